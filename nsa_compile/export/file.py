"""Write a converted program to a .pt2 file that says what is needed to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

NOTE = "nsa_compile.txt"  # stands under extra/ in the archive


def save(program: ExportedProgram, path: Path | str) -> None:
    """``torch.export.save``, with a note in the archive (``unzip -p out.pt2 '*/nsa_compile.txt'``).

    Without ``import nsa_compile`` the file does not load: torch names the operator
    ``torch.ops.nsa.*`` that it does not know and says that a custom operator has to be imported.
    """
    torch.export.save(program, path, extra_files={NOTE: note(program)})


def imports(program: ExportedProgram) -> list[str]:
    """Modules whose classes stand among the inputs or outputs: loading needs them imported."""
    found: dict[str, None] = {}
    pending: list[Any] = [program.call_spec.in_spec, program.call_spec.out_spec]
    while pending:
        spec = pending.pop()
        if spec is None or spec.is_leaf():
            continue
        module = spec.type.__module__
        if module.partition(".")[0] not in ("builtins", "collections", "torch"):
            found[module] = None
        pending += children(spec)
    return sorted(found)


def children(spec: Any) -> list[Any]:
    """The parts of a tree's structure, whatever this version of torch calls them."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def note(program: ExportedProgram) -> str:
    """What a reader of the file has to know."""
    needed = ", ".join(["torch", "nsa_compile", *imports(program)])
    import nsa_compile

    return (
        f"This exported program calls operators of nsa-compile {nsa_compile.__version__} "
        f"(torch.ops.nsa.*); it was written with torch {torch.__version__}.\n"
        "To load it: pip install nsa-compile, then in Python\n\n"
        f"    import {needed}  # nsa_compile registers the operators\n"
        "    program = torch.export.load(path)\n"
    )
