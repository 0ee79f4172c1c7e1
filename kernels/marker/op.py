"""nsa::site: does nothing; says in a graph which hidden states and parameters an attention has.

``nsa_compile.prepare`` calls it ahead of each attention module. The rewriter reads it and takes it
out again; any other compiler drops it, since it has no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

_lib = torch.library.Library("nsa", "FRAGMENT")
# ``parameters``: the tensors that the template called ``template`` names, in its order.
_lib.define("site(Tensor hidden, Tensor[] parameters, str template, bool training) -> ()")


def _nothing(hidden: Tensor, parameters: list[Tensor], template: str, training: bool) -> None:
    return None


_lib.impl("site", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake("nsa::site", _nothing, lib=_lib)
