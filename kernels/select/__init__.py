"""Which blocks a tile of queries reads."""
