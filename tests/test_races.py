"""The Triton kernels have no races and stay inside their tensors; the checker that says so catches what is planted."""

import importlib.util
from pathlib import Path

import pytest
import torch

from conftest import ON

pytest.importorskip("triton")
from triton.runtime.errors import InterpreterError

from fastsn.triton import memory, power_iteration, rescale, settings
from race_checker import KERNELS, RaceChecker
from races import APART, SMALL, Case, check, results

pytestmark = pytest.mark.skipif(ON != "", reason="the checker watches the interpreter, on its own")


def few():
    """Several blocks of rows each; channels_last; output channels second; one view by K = 1."""
    shapes = [(9, 5, 3, 3), (12, 6, 2), (10, 17), (7, 3, 2, 2)]
    weights = [torch.randn(shape) for shape in shapes]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    return weights, [0, 1, 0, 0]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    settings.use(settings.DEFAULT, torch.device("cpu"))
    memory._counters.clear()  # a planted bug may leave counts in them


@pytest.mark.filterwarnings("ignore")  # numpy's, of lanes that are not used
@pytest.mark.parametrize(
    "case",
    [Case(few, SMALL), Case(few, APART, first=1)],
    ids=["sums by the last program", "sums by a second launch"],
)
def test_no_races_nothing_out_of_bounds_and_the_same_bits_in_any_order(case):
    checker = RaceChecker()
    check(checker, case, 3, "tensor", 2)
    assert checker.counts["shared addresses"] > 100  # programs do share what the last one adds up


BUGS = {
    "an arriver one early": (
        power_iteration,
        "last_to_arrive(counters, layer, tl.load(row + BLOCKS).to(tl.int32))",
        "last_to_arrive(counters, layer, tl.load(row + BLOCKS).to(tl.int32) - 1)",
        "race in iterate",
    ),
    "a store past the end": (
        rescale,
        "tl.store(out + e, (w * power * inverse * scale).to(out.dtype.element_ty), mask=e < end)",
        "tl.store(out + e, (w * power * inverse * scale).to(out.dtype.element_ty), mask=e <= end)",
        "store out of bounds|race in rescale",
    ),
    "an overflow inside scratch": (
        power_iteration,
        "tl.store(p_raw + o, p, mask=in_rows)",
        "tl.store(p_raw + o, p, mask=o <= rows)",
        "store out of bounds|race in iterate",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    module, right, wrong, message = BUGS[bug]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    file = tmp_path / "planted.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", file)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for name in KERNELS[module]:
        monkeypatch.setattr(module, name, getattr(planted, name))
    with pytest.raises((AssertionError, InterpreterError), match=message):
        results(RaceChecker(), "plain", Case(few, SMALL), 3, "float", 1)
