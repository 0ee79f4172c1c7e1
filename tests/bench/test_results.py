"""docs/results.md shows what its files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_compile.bench.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["h100-64k", "h100-128k", "h100-32-channels"])
def test_the_page_holds_the_table_of_the_file(name: str, tmp_path: Path):
    page, table = DOCS / "results.md", tmp_path / "table.md"
    assert main(["--load", str(DOCS / "results" / f"{name}.json"), "--markdown", str(table)]) == 0
    assert table.read_text() in page.read_text()
    assert f"docs/results/{name}.json" in page.read_text()
