"""The mark that a prepared attention module leaves in a graph, nsa::site."""
