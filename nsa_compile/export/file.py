"""Write a converted program to a .pt2 file that says what is needed to load it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

NOTE = "nsa_compile.txt"  # stands under extra/ in the archive


def save(program: ExportedProgram, path: Path | str) -> None:
    """``torch.export.save``, with a note in the archive (``unzip -p out.pt2 '*/nsa_compile.txt'``).

    Without ``import nsa_compile`` the file does not load: torch names the operator
    ``torch.ops.nsa.*`` that it does not know and says that a custom operator has to be imported.
    """
    torch.export.save(program, path, extra_files={NOTE: note()})


def note() -> str:
    """What a reader of the file has to know."""
    import nsa_compile

    return (
        f"This exported program calls operators of nsa-compile {nsa_compile.__version__} "
        f"(torch.ops.nsa.*); it was written with torch {torch.__version__}.\n"
        "To load it: pip install nsa-compile, then in Python\n\n"
        "    import torch, nsa_compile  # registers the operators\n"
        "    program = torch.export.load(path)\n"
    )
