"""Texts in, vectors out: one hand-written file per encoder family."""
