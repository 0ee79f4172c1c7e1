"""What a user can get wrong: exit status 2 and one line that says what to do, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_compile.cli import main
from tests.cli.running import MODELS, Runner, convert

__all__ = ["convert"]

# name: (content of target.py, callable, words of the message)
FILES = {
    "syntax error": ("def build(:\n", "", "cannot be imported: SyntaxError"),
    "missing import": ("import no_such_module\n", "", "No module named 'no_such_module'"),
    "raises when imported": ("x = 1\n1 / 0\n", "", "ZeroDivisionError: division by zero (line 2)"),
    "exits when imported": ("import sys\nsys.exit(3)\n", "", "cannot be imported: SystemExit: 3"),
    "no build": ("def make(): pass\n", "", "'build' does not exist"),
    "names what it has": ("def make(): pass\n", "", "the file has: make"),
    "missing callable": ("def build(): pass\n", ":other", "'other' does not exist"),
    "empty callable": ("def build(): pass\n", ":", "does not exist"),
    "not callable": ("build = 3\n", "", "'build' is not callable"),
    "raises": (
        "def build():\n    raise ValueError('no weights here')\n",
        "",
        "ValueError: no weights here (line 2)",
    ),
    "exits": ("def build():\n    raise SystemExit('bye')\n", "", "raised SystemExit: bye"),
    "missing file": (
        "def build():\n    open('no_such_file')\n",
        "",
        "FileNotFoundError: [Errno 2] No such file or directory: 'no_such_file'",
    ),
    "returns nothing": ("def build(): pass\n", "", "returned NoneType; expected a torch.nn.Module"),
    "returns a number": ("def build(): return 3\n", "", "returned int; expected"),
    "returns three": ("def build(): return 1, 2, 3\n", "", "returned 3 values"),
    "returns no inputs": (
        "from torch import nn\ndef build(): return nn.Identity(), None\n",
        "",
        "returned (model, None)",
    ),
    "returns odd inputs": (
        "from torch import nn\ndef build(): return nn.Identity(), 'text'\n",
        "",
        "inputs of type str; expected a tensor",
    ),
    "no inputs to guess": (
        "from torch import nn\ndef build(): return nn.Linear(3, 3)\n",
        "",
        "no nn.Embedding",
    ),
    "needs arguments": (
        "def build(name): pass\n",
        "",
        "needs arguments that nsa-convert does not have: name; give defaults",
    ),
    "needs a size": ("def build(seq_len): pass\n", "", "pass --seq-len"),
    "wrong shape": (
        "import torch\nfrom torch import nn\n"
        "def build(): return nn.Linear(3, 4), torch.ones(2, 10)\n",
        "",
        "the forward of Linear failed with these inputs ([2, 10]): RuntimeError: a and b must",
    ),
    "wrong number of arguments": (
        "import torch\nfrom torch import nn\n"
        "def build(): return nn.Linear(3, 4), (torch.ones(2, 3), 1)\n",
        "",
        "TypeError: ",
    ),
    "unknown keyword": (
        "import torch\nfrom torch import nn\n"
        "def build(): return nn.Linear(3, 4), {'x': torch.ones(2, 3)}\n",
        "",
        "TypeError: ",
    ),
    "asserts": (
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def forward(self, x):\n        assert len(x) < 5, f'too long: {len(x)}'\n"
        "def build(): return M(), torch.ones(9)\n",
        "",
        "AssertionError: too long: 9",
    ),
    "raises in forward": (
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def forward(self, x):\n        return {}['key']\n"
        "def build(): return M(), torch.ones(9)\n",
        "",
        "KeyError: 'key'",
    ),
    "exits in forward": (
        "import sys, torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def forward(self, x):\n        sys.exit(4)\n"
        "def build(): return M(), torch.ones(9)\n",
        "",
        "target.py ended the run: SystemExit: 4",
    ),
    "an error without words": (
        "class Mute(Exception):\n    def __str__(self): return 1 / 0\ndef build(): raise Mute\n",
        "",
        "raised Mute (line 3)",
    ),
    "scripted": (
        "import torch\nfrom torch import nn\n"
        "def build(): return torch.jit.script(nn.Linear(3, 4)), torch.ones(2, 3)\n",
        "",
        "torch.compile does not support compiling torch.jit.script",
    ),
}

ARGUMENTS = {
    "no target": ((), "TARGET is missing; expected file.py"),
    "missing target": (("no/such/file.py",), "no/such/file.py: no such file or directory"),
    "near a model type": (("lama",), "did you mean the model type 'llama'?"),
    "missing directory": (("no/such/dir",), "no such file or directory"),
    "not a model": (("pyproject.toml",), "not something that can be looked at"),
    "callable of a directory": (("tests:build",), "tests: 'build' does not exist"),
    "unknown flag": ((MODELS, "--fast"), "unrecognized arguments: --fast"),
    "abbreviated flag": ((MODELS, "--seq", "5"), "unrecognized arguments"),
    "zero length": ((MODELS, "--seq-len", "0"), "expected a positive integer, got '0'"),
    "length in words": ((MODELS, "--seq-len", "long"), "expected a positive integer, got 'long'"),
    "negative batch": ((MODELS, "--batch", "-1"), "expected a positive integer"),
    "sizes nobody takes": ((f"{MODELS}:by_keyword", "--seq-len", "5"), "--seq-len has no effect"),
    "both sizes nobody takes": (
        (f"{MODELS}:by_keyword", "--seq-len", "5", "--batch", "2"),
        "--seq-len and --batch has no effect",
    ),
    "longer than the mask": ((MODELS, "--seq-len", "65"), "failed with these inputs ([1, 65])"),
    "unknown option": (
        (MODELS, "--option", "num_select=3"),
        "unknown option 'num_select'; did you mean 'num_selected'?",
    ),
    "option without value": ((MODELS, "--option", "window"), "expects name=value, got 'window'"),
    "option without name": ((MODELS, "--option", "=3"), "expects name=value, got '=3'"),
    "option of another type": ((MODELS, "--option", "window=wide"), "window must be an integer"),
    "option out of range": ((MODELS, "--option", "dense_len=-1"), "dense_len must be at least 0"),
    "options that do not fit": ((MODELS, "--option", "num_selected=2"), "cannot hold the forced"),
    "scorer nobody knows": ((MODELS, "--option", "scorer=best"), "scorer must be one of channels"),
    "no such module": (("no.such_module:build",), "no.such_module cannot be imported: ModuleNotF"),
    "dotted name without module": ((":build",), ":build: no such file or directory; expected"),
    "missing in a module": (("json:no_such",), "json: 'no_such' does not exist; expected"),
    "a module that is no package": (("json.x:y",), "json.x cannot be imported: ModuleNotF"),
    "not a builder": (("json:loads",), "needs arguments that nsa-convert does not have: s"),
    "empty target": (("",), "TARGET is missing"),
    "nul in the target": (("a\0b",), "'a\\x00b' cannot be a path: "),
    "nul in a script": (("a\0b.py:c",), "cannot be a path: "),
    "endless target": (("x" * 5000,), "cannot be a path: "),
    "nul in an output": ((MODELS, "--json", "a\0b"), "--json 'a\\x00b' cannot be a path"),
    "two targets": ((MODELS, MODELS), "unrecognized arguments"),
    "attention of a script": (
        (MODELS, "--attn", "sdpa"),
        "--attn expects a Hugging Face model as TARGET, got a Python file: ",
    ),
    "configuration of a script": ((MODELS, "--hf-config", "a=1"), "--hf-config expects a Hugging"),
    "trust in a script": (
        (MODELS, "--trust"),
        "--trust expects an exported program or a pickled GraphModule as TARGET",
    ),
    "inputs in words": ((MODELS, "--inputs", "some ids"), "--inputs: expected name=dtype["),
    "inputs that do not fit": (
        (MODELS, "--inputs", "x=int64[1,8]"),
        "failed with these inputs (x=[1, 8])",
    ),
    "reason nobody knows": (
        (MODELS, "--fail-on", "drop"),
        "--fail-on expects reason codes, got 'drop'; did you mean 'dropout'?",
    ),
    "no reason": ((MODELS, "--fail-on", ""), "--fail-on expects reason codes, got ''; known: add"),
    "explain nothing": (
        (MODELS, "--explain", "layers.7"),
        "--explain: no attention layer 'layers.7'; did you mean 'layers.1'?",
    ),
    "explain far from all": ((MODELS, "--explain", "?"), "there is layers.0, layers.1"),
    "explain without attention": ((f"{MODELS}:convolution", "--explain", "x"), "there is none at"),
    "diff of one": (("--diff", "a.json"), "--diff: expected 2 arguments"),
    "diff of missing files": (("--diff", "a.json", "b.json"), "a.json: cannot be read: No such"),
    "diff of a directory": (("--diff", "tests", "b.json"), "tests: cannot be read: Is a directory"),
    "diff of no JSON": (("--diff", MODELS, MODELS), "models.py': expected a report as JSON: "),
    "diff of something else": (
        ("--diff", "tests/cli/list.json", "b.json"),
        "list.json: expected a report with schema_version 1, got None",
    ),
    "diff with a target": ((MODELS, "--diff", "a", "b"), "--diff expects two reports, no TARGET"),
    "diff with an option": (
        ("--diff", "a", "b", "--strict", "--seq-len", "5"),
        "--diff expects two reports and no other option, got --seq-len, --strict",
    ),
    "unknown shell": (("--completion", "csh"), "invalid choice: 'csh'"),
    "completion with a target": (
        (MODELS, "--completion", "bash"),
        "--completion expects a shell, no TARGET, got '",
    ),
    "completion with an option": (
        ("--completion", "bash", "--train"),
        "--completion expects a shell and no other option, got --train",
    ),
    "graphs to a file": ((MODELS, "--graph", "README.md"), "--graph README.md: is a file"),
    "graphs into nowhere": ((MODELS, "--graph", "no/such"), "the directory no does not exist"),
    "graphs below a file": ((MODELS, "--graph", "README.md/a"), "directory README.md does not exi"),
    "nul in the folder": ((MODELS, "--graph", "a\0b"), "--graph 'a\\x00b' cannot be a path"),
    "no lengths": ((MODELS, "--lengths", ""), "expected a positive integer, got ''"),
    "lengths in words": ((MODELS, "--lengths", "8192,long"), "positive integer, got 'long'"),
    "length zero among lengths": ((MODELS, "--lengths", "8192,0"), "positive integer, got '0'"),
    "huge length": ((MODELS, "--seq-len", "9" * 30), "expected a positive integer"),
    "more tokens than anyone has": (
        (f"{MODELS}:just_a_model", "--seq-len", 1 << 39, "--batch", 1 << 39),
        "expected at most 2**40 tokens in a batch, got 549755813888 x 549755813888",
    ),
    "json to a directory": ((MODELS, "--json", "tests"), "--json tests: is a directory"),
    "json over the target": ((MODELS, "--json", MODELS), "would be written over TARGET"),
    "markdown over the file of a callable": (
        (f"{MODELS}:by_keyword", "--markdown", MODELS), "would be written over TARGET",
    ),
    "two outputs in one file": (
        (MODELS, "--json", "a.x", "--html", "./a.x"), "--html a.x: would be written over --json",
    ),
    "json into nowhere": ((MODELS, "--json", "no/such/a.json"), "directory no/such does not exist"),
    "markdown into nowhere": ((MODELS, "--markdown", "no/a.md"), "directory no does not exist"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def check(status: int, err: str, words: str) -> None:
    assert status == 2
    assert err.startswith("nsa-convert: error: ")
    assert words in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("case", FILES)
def test_files(convert: Runner, tmp_path: Path, case: str) -> None:
    content, callable_name, words = FILES[case]
    path = tmp_path / "target.py"
    path.write_text(content)
    outcome = convert(f"{path}{callable_name}")
    check(outcome.status, outcome.err, words)
    assert outcome.out == ""


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, words = ARGUMENTS[case]
    status = main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    check(status, streams.err, words)
    assert streams.out == ""


def test_an_output_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    status = main([str(MODELS), "--json", str(tmp_path / "a.json")])
    check(status, capsys.readouterr().err, "cannot be written: Permission denied")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nsa-convert 0.")
    assert main(["--help"]) == 0
    assert "--seq-len" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_without_unicode_is_no_traceback(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "nsa_compile.cli", str(MODELS)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"2 of 2 attention layers converted" in done.stdout
    assert done.stderr == b""


def test_a_closed_pipe_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = f"{sys.executable} -m nsa_compile.cli {MODELS} | true"
    done = subprocess.run(command, env=environment, capture_output=True, shell=True, check=True)
    assert done.stderr == b""


def test_an_interrupt_is_not_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nsa_compile.cli.command.preview", interrupt)
    assert main([str(MODELS)]) == 130
    assert "interrupted" in capsys.readouterr().err
