"""OpenAI-compatible servers: one client, rate limits, a ledger; chat and embeddings."""
