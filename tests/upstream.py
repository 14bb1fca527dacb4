"""``make upstream TESTS=...``: PyTorch's own tests of its spectral norms, run on fastsn.

    python tests/upstream.py PYTORCH/test/nn/test_parametrization.py PYTORCH/test/test_nn.py

The files come from a checkout of PyTorch, best of the version that is installed; nothing of them is kept here. Of each,
only the tests with ``spectral_norm`` in their name are compiled, and the imports that these use: the rest may need what
is not installed. Meanwhile ``torch.nn.utils.parametrizations.spectral_norm`` is ``fastsn.spectral_norm``. The old
``torch.nn.utils.spectral_norm`` is followed by ``fastsn.convert``; the layer then answers to the hook's names for its
state as well (``layer.weight_u``) and gives a state dict by ``fastsn.convert_state_dict(..., to="torch_hook")``. An
assertion that does not hold is noted and the test goes on. Fails unless exactly those of DIFFERENT do not hold.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as hook

import fastsn

_PLACE = "a converted layer has the state where torch's parametrization has it"
# By test: the assertions that do not hold, or the error that ends it, and why that is right.
DIFFERENT = {
    "test_spectral_norm": {
        "self.assertTrue('weight_orig' in m._parameters)": _PLACE,
        "self.assertTrue('weight_u' in m._buffers)": _PLACE,
        "self.assertTrue('weight_v' in m._buffers)": _PLACE,
        "self.assertEqual(m.weight_orig.storage(), m.weight.storage())": (
            "before the first forward the hook shows W as layer.weight, a parametrization always the normalized weight"
        ),
        "with self.assertRaisesRegex(RuntimeError, 'register two spectral_norm hooks'):": (
            "the second is torch's own hook over a parametrization: a KeyError, as over torch's parametrization"
        ),
    },
    "test_spectral_norm_load_state_dict": dict.fromkeys(
        (
            "self.assertEqual(out0_eval, snm(inp))",
            "self.assertEqual(out1_train, snm(inp))",
            "self.assertEqual(out2_train, snm(inp))",
            "self.assertEqual(out3_eval, snm(inp))",
        ),
        "for an old checkpoint the test reads layer.weight: under a parametrization, torch's too, this is a use and "
        "iterates, so that u and the normalized weight in that checkpoint do not belong to each other",
    ),
    "test_spectral_norm_pickle": {
        "RuntimeError: Serialization of parametrized modules is only supported through state_dict(). See:": (
            "torch's rule for everything that is parametrized"
        ),
    },
}


class _Only(ast.NodeTransformer):
    """Keeps the tests of spectral norms, whose assertions are then noted, and their classes."""

    def visit_Module(self, module: ast.Module) -> ast.Module:
        classes = [node for node in map(self._kept, module.body) if node is not None]
        names = {node.name for node in classes}
        calls = [node for node in module.body if _called(node) == "instantiate_parametrized_tests"]
        calls = [node for node in calls if names & _used([node])]
        used = _used([*classes, *calls])
        imports = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            node.names = [each for each in node.names if (each.asname or each.name.split(".")[0]) in used]
        module.body = [*(node for node in imports if node.names), *classes, *calls]
        return ast.fix_missing_locations(module)

    def _kept(self, node: ast.stmt) -> ast.ClassDef | None:
        if not isinstance(node, ast.ClassDef):
            return None
        tests = [x for x in node.body if isinstance(x, ast.FunctionDef) and "spectral_norm" in x.name]
        node.body = []
        for test in (test for test in tests if test.name.startswith("test")):
            self._seen: Counter[str] = Counter()
            node.body.append(self.visit(test))
        return node if node.body else None

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return self._noted(node) if _called(node).startswith("assert") else node

    def visit_With(self, node: ast.With) -> ast.stmt:
        self.generic_visit(node)
        return self._noted(node) if _called(node).startswith("assert") else node

    def _noted(self, node: ast.stmt) -> ast.stmt:
        """An assertion under its own name: its first line, and which of several with the same one it is."""
        name = ast.unparse(node).partition("\n")[0]
        self._seen[name] += 1
        name += f" ({self._seen[name]})" if self._seen[name] > 1 else ""
        noted: Any = ast.parse(f"with __noted__({name!r}): pass").body[0]
        noted.body = [node]
        return noted


def _called(node: ast.AST) -> str:
    """The name of what a statement calls."""
    call = node.items[0].context_expr if isinstance(node, ast.With) else getattr(node, "value", None)
    function = call.func if isinstance(call, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def _used(nodes: list[Any]) -> set[str]:
    return {x.id for node in nodes for x in ast.walk(node) if isinstance(x, ast.Name)}


@contextmanager
def instead(impl: str) -> Iterator[None]:
    """fastsn in the place of torch's spectral norms."""
    hooked, utils = partial(_hooked, impl), "torch.nn.utils"
    with (
        mock.patch(f"{utils}.parametrizations.spectral_norm", partial(fastsn.spectral_norm, impl=impl)),
        mock.patch(f"{utils}.spectral_norm", hooked),
        mock.patch(f"{utils}.remove_spectral_norm", _removed),
    ):
        yield


def _hooked(impl: str, layer: nn.Module, name: str = "weight", *rest: Any, **more: Any) -> nn.Module:
    fastsn.convert(hook(layer, name, *rest, **more))
    chain: Any = layer.parametrizations[name]
    chain[0].impl = impl
    for suffix, get in (
        ("_orig", lambda self: self.parametrizations[name].original),
        ("_u", lambda self: self.parametrizations[name][0]._u),
        ("_v", lambda self: self.parametrizations[name][0]._v),
    ):
        setattr(type(layer), name + suffix, property(get))
    layer._register_state_dict_hook(_with_old_names)
    return layer


def _with_old_names(_: nn.Module, state: dict[str, Any], *__: object) -> dict[str, Any]:
    return fastsn.convert_state_dict(state, to="torch_hook")


def _removed(layer: nn.Module, name: str = "weight") -> nn.Module:
    mode = layer.training
    parametrize.remove_parametrizations(layer.eval(), name)  # torch's does not iterate
    return layer.train(mode)


def run(path: Path, impl: str, report: Callable[[str], None] = print) -> bool:
    """Whether every test of the file ended as it has to."""
    noted: list[tuple[str, str]] = []

    @contextmanager
    def note(assertion: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            noted.append((assertion, f"{type(error).__name__}: {error}"))

    module: dict[str, Any] = {"__name__": path.stem, "__noted__": note}
    exec(compile(_Only().visit(ast.parse(path.read_text())), str(path), "exec"), module)
    suite = unittest.TestSuite()
    for case in module.values():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and case.__module__ == path.stem:
            suite.addTests(map(case, unittest.TestLoader().getTestCaseNames(case)))
    right = suite.countTestCases() > 0
    if not right:
        report(f"no test of spectral norms in {path}")
    for test in suite:
        noted.clear()
        result = unittest.TestResult()
        with instead(impl):
            test.run(result)
        noted += [(_error(trace), trace) for _, trace in (*result.errors, *result.failures)]
        name = test.id().rpartition(".")[2]
        different = DIFFERENT.get(re.sub("_swap_(True|False)$", "", name), {})
        problems = [f"now holds: {x}" for x in different if x not in dict(noted)]
        problems += [f"{x}: {why.strip()}" for x, why in noted if x not in different]
        on_purpose = f" ({len(different)} different on purpose)" if different else ""
        lines = [f"{'FAILED' if problems else 'passed'}  {impl:9}  {name}{on_purpose}", *problems]
        report("\n    ".join(lines))
        right &= not problems
    return right


def _error(trace: str) -> str:
    """The line that names the error, of a traceback."""
    return next(line for line in trace.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line))


def main() -> int:
    parser = argparse.ArgumentParser(description="PyTorch's tests of its spectral norms, on fastsn.")
    parser.add_argument("files", nargs="*", type=Path, help="test/nn/test_parametrization.py, test/test_nn.py")
    files = parser.parse_args().files
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        wanted = "PyTorch's test/nn/test_parametrization.py, test/test_nn.py or both"
        print(f"skipped: TESTS must be {wanted}, got {', '.join(missing) + ': no such file' if missing else 'nothing'}")
        return 0
    try:
        import expecttest  # noqa: F401
    except ImportError:
        print("skipped: torch.testing._internal needs expecttest, which is not installed")
        return 0
    results = [run(path, impl) for path in files for impl in ("auto", "reference")]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
