"""Spell out calls that hide an attention: one node becomes projections and one plain attention."""

from nsa_compile.passes.lower.lowering import Lowering, lower, not_spelled_out

__all__ = ["Lowering", "lower", "not_spelled_out"]
