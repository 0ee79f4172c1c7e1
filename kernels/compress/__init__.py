"""Pooling keys into compressed blocks."""
