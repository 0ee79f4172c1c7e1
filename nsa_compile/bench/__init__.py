"""``python -m nsa_compile.bench``: dense SDPA against the converted path, on this machine.

The converted path is what the rewriter puts in the graph: channels or compress, select_blocks,
refine_blocks where the budget asks for it, selected_attention, through ``torch.ops.nsa``. Its time
is measured as a whole (on a GPU as a CUDA graph), and stage by stage beside it. Dense is
``scaled_dot_product_attention`` with its fastest backend (cuDNN first). Backward is the gradient of
q, k and v; choosing blocks has none.
"""

from nsa_compile.bench.rows import Row, run
from nsa_compile.bench.settings import Settings

__all__ = ["Row", "Settings", "run"]
