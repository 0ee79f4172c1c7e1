"""Why a layer was kept dense: every code, what it says and what the user can do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Reason codes: (code, text, hint). ``{detail}`` in a text is filled by a Refusal."""

    MASK_NOT_UNDERSTOOD = (
        "mask_not_understood",
        "the mask could not be proven: {detail}",
        "build the mask from positions (arange, compare), tril/triu or a padding mask inside the "
        "compiled region, or pass is_causal=True",
    )
    MASK_FROM_OUTSIDE = (
        "mask_from_outside",
        "the mask comes into the graph ready-made, so what it hides is unknown: {detail}",
        "pass a padding mask [B, T] instead of a 4-d one, or build the mask inside the compiled "
        "region (a graph break between mask and attention also hides how it was built)",
    )
    DROPOUT = (
        "dropout",
        "attention dropout is active: {detail}",
        "set the attention dropout to 0 (sparse attention is trained without it) or call eval()",
    )
    EXCLUDED = (
        "excluded",
        "the layer filters leave it out: {detail}",
        "change include/exclude if this layer should be converted",
    )
    NOT_PREPARED = (
        "not_prepared",
        "it should have learned gates, and there are none in its graph: {detail}",
        "call nsa_compile.prepare(model, config) before torch.compile, and train; or use "
        "merge='softmax', which needs no new weights",
    )
    UNSUPPORTED_SHAPE = (
        "unsupported_shape",
        "the operators do not take these shapes: {detail}",
        "expected q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] with Hq a multiple of "
        "Hkv and D, Dv at most 256",
    )
    UNSUPPORTED_DTYPE = (
        "unsupported_dtype",
        "the operators do not take this dtype: {detail}",
        "use float32, float16 or bfloat16",
    )
    UNSUPPORTED_SCALE = (
        "unsupported_scale",
        "the scale is not a positive number: {detail}",
        "pass a positive Python float as scale",
    )
    DECODE_STEP = (
        "decode_step",
        "one query against a cache reads every key once already: {detail}",
        "nothing to do: prefill is converted, decoding stays dense",
    )
    WEIGHTS_ESCAPE = (
        "weights_escape",
        "something other than the product with the values reads the attention weights: {detail}",
        "do not ask for the weights (output_attentions=False, need_weights=False)",
    )
    ALREADY_LOCAL = (
        "already_local",
        "its own mask lets a query see no more keys than the sparse budget reads: {detail}",
        "nothing to do: the layer is sparse as it is; a smaller num_selected would convert it",
    )
    MODIFIER_NOT_SUPPORTED = (
        "modifier_not_supported",
        "the operators do not compute this kind of score: {detail}",
        "keep this layer dense, or write its scores without it",
    )
    ADDITIVE_BIAS = (
        "additive_bias",
        "a dense bias is added to the scores: {detail}",
        "keep this layer dense: blocks cannot be chosen under an arbitrary bias",
    )
    DATA_DEPENDENT_MASK = (
        "data_dependent_mask",
        "its mask, or a bias that it adds to the scores, is computed from activations: {detail}",
        "keep this layer dense: it chooses its keys itself, or its bias depends on the queries",
    )
    UNRECOGNISED_ATTENTION = (
        "unrecognised_attention",
        "a softmax between two matrix products that is spelled in an unknown way: {detail}",
        "use scaled_dot_product_attention, or report the graph (TORCH_LOGS=graph_code)",
    )
    INSIDE_OPERATOR = (
        "inside_operator",
        "it runs inside an operator whose body is not rewritten: {detail}",
        "move the attention out of torch.cond, scan, vmap, autograd.Function and the like",
    )
    SIZES_DO_NOT_FIT = (
        "sizes_do_not_fit",
        "the configured sizes do not fit this site: {detail}",
        "raise num_selected or lower window for this layer (per_layer)",
    )
    INTERNAL_ERROR = (
        "internal_error",
        "nsa_compile failed on this graph and left it untouched: {detail}",
        "please report it with the graph (TORCH_LOGS=graph_code)",
    )

    @property
    def code(self) -> str:
        return self.value[0]

    @property
    def text(self) -> str:
        return self.value[1]

    @property
    def hint(self) -> str:
        return self.value[2]


@dataclass(frozen=True)
class Refusal:
    """One reason with the node or value that earned it. A value, never an exception."""

    reason: Reason
    detail: str = ""

    @property
    def code(self) -> str:
        return self.reason.code

    @property
    def text(self) -> str:
        return self.reason.text.format(detail=self.detail)

    @property
    def hint(self) -> str:
        return self.reason.hint
