"""The gated sum of the three branches, nsa::combine."""
