"""Spell out calls that hide an attention: one node becomes projections and one plain attention."""

from nsa_compile.passes.lower.blocks import Blocks
from nsa_compile.passes.lower.lowering import Lowering, hides, lower

__all__ = ["Blocks", "Lowering", "hides", "lower"]
