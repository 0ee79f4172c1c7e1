"""The blocks with the largest exact share of attention, nsa::topk_blocks."""
