"""The benchmark command: what it measures, writes, reads back and advises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsa_compile.bench import rows
from nsa_compile.bench.__main__ import main
from nsa_compile.bench.advice import break_evens, crossing
from nsa_compile.bench.document import document, load
from nsa_compile.bench.rows import Cost, Row
from nsa_compile.bench.settings import Settings
from nsa_compile.bench.timing import Timing

SMALL = (
    "--device cpu --lengths 128,256 --heads 2/1 --dim 16 --score-channels 8 --query-tile 16 "
    "--num-selected 8 --window 64 --dense-len 128 --budget-ms 1"
).split()


def test_measures_writes_and_shows_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results, picture = tmp_path / "results.json", tmp_path / "results.svg"
    assert main([*SMALL, "--json", str(results), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    data = json.loads(results.read_text())
    assert [(row["length"], row["path"]) for row in data["rows"]] == [
        (128, "channels"), (128, "mean"), (256, "channels"), (256, "mean"),
    ]  # fmt: skip
    assert data["rows"][0]["is_dense"]
    assert set(data["rows"][2]["stages"]) == {"summary", "select", "refine", "attend"}
    assert picture.read_text().lstrip().startswith("<?xml")
    assert main(["--load", str(results)]) == 0
    # An empty line stands where the progress display was.
    assert capsys.readouterr().out.strip() == shown.strip()


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results, measured = tmp_path / "results.json", rows._measure_shape

    def until_256(settings: Settings, heads: tuple[int, int], length: int, step: Any) -> list[Row]:
        if length == 256:
            raise KeyboardInterrupt
        return measured(settings, heads, length, step)

    monkeypatch.setattr(rows, "_measure_shape", until_256)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--json", str(results)])
    assert [row.length for row in load(results)[2]] == [128, 128]


def test_the_gated_path_in_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "results.json"
    assert main([*SMALL, "--paths", "gate", "--json", str(results)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(results.read_text())["rows"]
    assert [(row["length"], row["is_dense"]) for row in found] == [(128, False), (256, False)]
    stages = ["compress", "compressed", "select", "selected", "window and sum"]
    assert list(found[0]["stages"]) == stages
    assert found[0]["backward_ratio"] is not None
    assert "dense_len=" not in shown
    assert [row.path for row in load(results)[2]] == ["gate", "gate"]


def test_reads_back_what_it_wrote(tmp_path: Path):
    settings = Settings("cpu", "float32", 64, ((8, 8),), (1024, 2048))
    rows = [_row(1024, 2.0), _row(2048, 0.5)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document(settings, rows)))
    again = load(path)
    assert (again[0], again[2]) == (settings, rows)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([(1024, 2.0), (4096, 0.5)], (2048, True)),
        ([(1024, 2.0), (4096, 1.1)], (None, False)),
        ([(1024, 0.9), (4096, 0.5)], (1024, False)),
        # Faster, slower, faster: dense is right up to the last crossing.
        ([(512, 0.9), (1024, 2.0), (4096, 0.5)], (2048, True)),
        ([(1024, 1.0), (4096, 0.5)], (1024, True)),
    ],
)
def test_crossing(ratios: list[tuple[int, float]], expected: tuple[int | None, bool]):
    assert crossing(ratios) == expected


def test_advice_names_the_dense_len():
    (found,) = break_evens([_row(1024, 2.0), _row(4096, 0.5)])
    assert str(found) == (
        "8/8 heads, channels, forward: sparse is faster from 2,048 tokens on; dense_len=2048"
    )


def test_ratio_of_memory_and_backward():
    row = _row(1024, 0.5)
    assert row.backward_ratio is None
    assert row.memory_ratio is None
    slow = Timing(8.0, 8.0, 8.0)
    row = replace(
        row, dense=Cost(slow, slow, 100), converted=Cost(slow, Timing(2.0, 2.0, 2.0), 120)
    )
    assert row.backward_ratio == 0.25
    assert row.memory_ratio == 1.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "8"], "--heads takes pairs"),
        (["--heads", "8/3"], "must be a multiple of kv heads, got 8/3"),
        (["--lengths", "many"], "--lengths numbers"),
        (["--lengths", "0"], "--lengths must be positive, got 0"),
        (["--paths", "channel"], "--paths takes some of channels,mean"),
        (["--window", "9999999"], "window"),
        (["--json", "/nowhere/at/all.json"], "the directory /nowhere/at does not exist"),
        (["--load", "a", "--json", "b"], "with --load nothing is measured"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("{", "a file that --json wrote"), ('{"schema_version": 1}', "got 1")],
)
def test_bad_file_to_load(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert main(["--load", str(path)]) == 2
    assert message in capsys.readouterr().err


def _row(length: int, ratio: float) -> Row:
    dense, sparse = (Cost(Timing(x, x, x)) for x in (4.0, 4.0 * ratio))
    return Row(8, 8, length, "channels", "cpu", dense, sparse, sparse, False)
