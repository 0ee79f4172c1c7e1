"""Mask proofs: what a mask tensor's program says about query i and key j, in normal form."""

from nsa_compile.passes.masks.prove import Geometry, Prover

__all__ = ["Geometry", "Prover"]
