"""Search, metrics, statistics: from embeddings to a comparison."""
