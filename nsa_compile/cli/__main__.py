"""``python -m nsa_compile.cli`` is ``nsa-convert``."""

from __future__ import annotations

import sys

from nsa_compile.cli.command import main

sys.exit(main())
