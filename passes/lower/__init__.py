"""Spell out calls that hide an attention: one node becomes projections and one plain attention."""

from nsa_compile.passes.lower.lowering import Lowering, lower

__all__ = ["Lowering", "lower"]
