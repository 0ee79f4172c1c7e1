"""docs/verify.md and docs/export.md: their Python runs, and prints what stands below it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import golden

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["verify.md", "export.md"])
def test_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    page = ROOT / "docs" / name
    for number, (code, shown) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
        if "_inductor" in code:  # tests/export/test_aoti.py does this
            continue
        file = tmp_path / f"block_{number}.py"
        file.write_text(code)
        exec(compile(code, str(file), "exec"), module.__dict__)
        printed = capsys.readouterr().out
        if without_digits(printed) != without_digits(shown):
            golden.check_part(page, shown, printed)


def without_digits(text: str) -> list[str]:
    """The words of a text; numbers and column widths vary a little between machines."""
    return re.sub(r"\d[\d.e%+-]*", "0", text).replace("─", "").split()
