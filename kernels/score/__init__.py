"""How much each block of keys matters to a tile of queries."""
