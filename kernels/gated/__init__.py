"""The gated sum of the three branches with one backward, nsa::gated_attention."""
