"""Attention over the selected blocks."""
