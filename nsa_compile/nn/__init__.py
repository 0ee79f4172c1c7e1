"""The learned parts of Native Sparse Attention as modules."""

from nsa_compile.nn.attention import NativeSparseAttention
from nsa_compile.nn.parameters import NSAParameters

__all__ = ["NSAParameters", "NativeSparseAttention"]
