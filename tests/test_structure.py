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
# Data flows one way: a module imports only from those further down, and leaves only from torch.
ORDER = """
    memory distributed interop.state_dict interop.state_dict_entries interop.convert interop.torch_hook
    interop.adapters model.tools model.scopes plan parametrize tensor_property initialization model.sites layers
    norm stored_vectors loading exporting weight_cache recomputation normalize ops ops.cuda ops.autograd
    ops.fallback ops.checks ops.schema backends origin checks interop.state_dict_layouts torch_private views
    variants reference
    triton.launch triton.rescale_calls triton.rescale_plans triton.iteration_calls triton.plan triton.memory
    triton.settings triton.rescale triton.power_iteration triton.rows triton.finish triton.shared triton.arrangement
    tensor_lists
    interop model triton
""".split()  # noqa: SIM905 (a name per line would fill the screen)
LEAVES = {"interop.state_dict_layouts", "torch_private", "origin", "tensor_lists", "views", "variants", "reference"}
LEAVES |= {"interop", "model", "triton"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imported(path: Path) -> set[str]:
    """The modules of fastsn that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastsn":
            module = node.module.removeprefix("fastsn").removeprefix(".")
            inner = {".".join(filter(None, (module, alias.name))) for alias in node.names}
            names |= {name if name in ORDER else module for name in inner}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    if not name:  # the package itself
        assert imported(path) <= set(ORDER)
    elif name in LEAVES:
        assert not imported(path)
    else:
        assert imported(path) <= set(ORDER[ORDER.index(name) + 1 :])
        # What needs Triton is imported when the first tensor of a GPU comes.
        assert name.startswith("triton") or not any(x.startswith("triton") for x in imported(path))


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
