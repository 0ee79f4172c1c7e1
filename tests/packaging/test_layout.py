"""Guards of the package layout: each of these broke something when it was tried otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_of_the_tree() -> set[str]:
    """Dotted names of the folders that hold modules, as they are imported."""
    names = set()
    for top, prefix in (
        ("nsa_compile", ()),
        ("passes", ("nsa_compile",)),
        ("kernels", ("nsa_compile",)),
    ):
        for file in (ROOT / top).rglob("*.py"):
            names.add(".".join((*prefix, *file.parent.relative_to(ROOT).parts)))
    return names


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_no_init_in_the_top_level_folders(folder: str) -> None:
    """With one, ``import kernels`` in the checkout shadows the package transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_of_the_tree_is_listed(project: dict[str, Any]) -> None:
    assert set(project["tool"]["setuptools"]["packages"]) == packages_of_the_tree()


def test_subfolders_are_packages() -> None:
    for name in packages_of_the_tree() - {"nsa_compile.passes", "nsa_compile.kernels"}:
        assert importlib.util.find_spec(name).origin, f"{name} has no __init__.py"


def test_entry_points_name_things_that_exist(project: dict[str, Any]) -> None:
    declared = {
        **project["project"]["scripts"],
        **project["project"]["entry-points"]["torch_dynamo_backends"],
    }
    assert set(declared) == {"nsa-convert", "nsa"}
    for reference in declared.values():
        module, _, name = reference.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_version_is_written_once_in_each_place(project: dict[str, Any]) -> None:
    import nsa_compile

    assert nsa_compile.__version__ == project["project"]["version"]


def test_every_dependency_is_constrained(project: dict[str, Any]) -> None:
    """constraints.txt pins all that is asked for directly, the extras too."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["project"]["dependencies"], *(text for extra in extras for text in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(Requirement(line).name)
        for line in lines
        if line.strip() and not line.startswith("#")
    }
    assert {canonicalize_name(Requirement(text).name) for text in asked} <= pinned


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_the_checkout_does_not_shadow_top_level_names(folder: str) -> None:
    """From the checkout's root the folder is at most a namespace, which a real package beats."""
    code = (
        f"import importlib.util as u; s = u.find_spec({folder!r}); print(s.origin if s else None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


def test_a_walk_over_submodules_ends() -> None:
    """``TORCH_LOGS=nsa_compile`` makes one; the package must not stand inside itself."""
    import nsa_compile

    names = [module.name for module in pkgutil.iter_modules(nsa_compile.__path__)]
    assert "cli" in names
    assert "nsa_compile" not in names


def test_importing_the_face_loads_no_triton_kernel() -> None:
    code = (
        "import sys, nsa_compile, nsa_compile.functional, nsa_compile.cli;"
        "print([name for name in sys.modules if name.endswith('triton_kernel')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_installed_the_backend_is_known_without_importing_us() -> None:
    from importlib.metadata import entry_points

    if not entry_points(group="torch_dynamo_backends", name="nsa"):
        pytest.skip("nsa-compile is not installed here; .ci/run installs it")
    code = (
        "import sys, torch; assert 'nsa' in torch._dynamo.list_backends();"
        "assert 'nsa_compile' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
