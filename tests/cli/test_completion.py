"""The completion scripts: each shell takes its own, and completes options, choices and files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_compile.cli import main
from nsa_compile.cli.arguments import parser
from nsa_compile.cli.completion import SHELLS
from nsa_compile.passes.reasons import Reason

# What is typed, and what is offered among others.
TYPED = {
    "an option": (["--se"], {"--seq-len"}),
    "every option": (["--"], {text for a in parser()._actions for text in a.option_strings[-1:]}),
    "a choice": (["model.py", "--attn", ""], {"sdpa", "eager"}),
    "a reason": (["--fail-on", "dr"], {Reason.DROPOUT.code}),
    "a target": (["mod"], {"model.py"}),
    "a file after an option": (["model.py", "--json", "mod"], {"model.py"}),
}


def script(shell: str, capsys: pytest.CaptureFixture[str], folder: Path) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["--completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def run(shell: str, commands: str, folder: Path) -> list[str]:
    command = [shell, "--norc", "-c"] if shell == "bash" else [shell, "--no-config", "-c"]
    done = subprocess.run(
        [*command, commands], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_its_script(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = script(shell, capsys, tmp_path)
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", TYPED)
def test_bash_completes(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words, offered = TYPED[case]
    path = script("bash", capsys, tmp_path)
    (tmp_path / "model.py").touch()
    typed = " ".join(f"'{word}'" for word in ["nsa-convert", *words])
    found = run(
        "bash",
        f"source {path}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_nsa_convert; "
        'printf "%s\\n" "${COMPREPLY[@]}"',
        tmp_path,
    )
    assert offered <= set(found)


@pytest.mark.parametrize("case", TYPED)
def test_fish_completes(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words, offered = TYPED[case]
    path = script("fish", capsys, tmp_path)
    (tmp_path / "model.py").touch()
    found = run("fish", f"source {path}; complete -C 'nsa-convert {' '.join(words)}'", tmp_path)
    assert offered <= {line.split("\t")[0] for line in found}


def test_zsh_knows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef nsa-convert")
    known = {option for action in parser()._actions for option in action.option_strings}
    assert known <= set(re.findall(r"--?[a-z][a-z-]*", text))


def test_without_shtab_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 2
    assert "pip install 'nsa-compile[completion]'" in capsys.readouterr().err
