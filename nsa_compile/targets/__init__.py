"""What nsa-convert can look at: Python code, Hugging Face configurations and exported programs."""

from __future__ import annotations

from nsa_compile.targets.kinds import EXPECTED, load, path_of
from nsa_compile.targets.target import Request, Target, TargetError

__all__ = ["EXPECTED", "Request", "Target", "TargetError", "load", "path_of"]
