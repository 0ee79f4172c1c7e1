"""Registers every operator of the namespace ``nsa`` with torch.library by importing it."""

from __future__ import annotations

import nsa_compile.kernels.attend.op
import nsa_compile.kernels.combine.op
import nsa_compile.kernels.compress.op
import nsa_compile.kernels.compressed.op
import nsa_compile.kernels.gated.op
import nsa_compile.kernels.importance.op
import nsa_compile.kernels.marker.op
import nsa_compile.kernels.refine.op
import nsa_compile.kernels.scaled.op
import nsa_compile.kernels.score.op
import nsa_compile.kernels.select.op
import nsa_compile.kernels.topk.op
import nsa_compile.kernels.window.op  # noqa: F401
