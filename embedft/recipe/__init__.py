"""Puts training and retrieval together."""
