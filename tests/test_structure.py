"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastsn

PACKAGE = Path(fastsn.__file__).parent
ROOT = PACKAGE.parent
# Data flows one way: a module imports only from those further down (reference: only torch).
ORDER = ["__init__", "memory", "replicas", "checkpoints", "transcribe", "convert", "hooks", "places", "model"]
ORDER += ["scopes", "parametrize", "initialising", "sites", "layers", "norm", "loading", "exporting", "holds"]
ORDER += ["serving", "jobs", "gpu", "ops", "backends", "origin", "checks", "layouts", "views", "variants", "reference"]
# Imported when the first tensor of a GPU comes.
KERNELS = ["launch", "rescale_calls", "iteration_calls", "plan", "memory", "settings", "rescale", "power_iteration"]
KERNELS += ["rows", "finish", "shared", "arrangement", "__init__"]
LEAVES = {"layouts", "origin", "views", "variants", "reference"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastsn":
            parts = node.module.split(".")[1:]
            names |= set(parts[:1]) or {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    assert path.stem in ORDER
    allowed = set() if path.stem in LEAVES else set(ORDER[ORDER.index(path.stem) + 1 :])
    assert imported(path) <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_imports_of_the_kernels_go_one_way(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsn"):
            assert node.module.startswith("fastsn.kernels")
            names |= set(node.module.split(".")[2:3]) or {alias.name for alias in node.names}
    assert names <= set(KERNELS[KERNELS.index(path.stem) + 1 :])


def test_train_uses_only_the_public_api():
    for path in (ROOT / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("fastsn"), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastsn":
                assert node.attr in [*fastsn.__all__, "__version__"], (path, node.attr)


def test_every_public_name_exists_and_is_documented():
    for name in fastsn.__all__:
        assert getattr(fastsn, name).__doc__, name


def test_importing_is_quiet_and_needs_only_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import fastsn; new = set(sys.modules) - before; "
        "print(sorted({m.split('.')[0] for m in new} - {'torch', 'fastsn'} - sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
