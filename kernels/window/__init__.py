"""Attention over the nearest keys, nsa::sliding_window_attention."""
