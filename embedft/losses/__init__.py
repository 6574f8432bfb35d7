"""Losses: pure functions of (Q, D, Targets)."""
