"""Attention over chosen blocks whose scales have a gradient."""
