"""Attention sites of a graph: what is computed, on which heads, under which proven mask."""

from nsa_compile.passes.match.sites import find_sites

__all__ = ["find_sites"]
