"""A compilation cache of its own for each test run.

Inductor finds compiled graphs by their operators' names and shapes. It cannot know that an operator
changed, so code compiled for an earlier version of ours would be run with the present one.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_cache = tempfile.mkdtemp(prefix="nsa-compile-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache  # before torch is imported; subprocesses inherit it
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
