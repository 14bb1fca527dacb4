"""The Triton kernels compiled for GPUs that are not here: all compile, loops hardly spill, loads are wide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ON

pytest.importorskip("triton")

from fastsn.triton.settings import REGISTERS

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
pytestmark = pytest.mark.skipif(ON != "", reason="compiled already by the tests on the CPU")


@pytest.fixture(scope="session")
def needs() -> dict[str, dict[str, dict[str, int]]]:
    """Of every target, two at a time."""
    script = Path(__file__).parent / "compiled.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {}
    for pair in (TARGETS[:2], TARGETS[2:]):
        running = {
            target: subprocess.Popen(
                [sys.executable, str(script), target], env=environment, stdout=subprocess.PIPE, text=True
            )
            for target in pair
        }
        for target, process in running.items():
            out, _ = process.communicate()
            assert process.returncode == 0, target
            found[target] = json.loads(out)["kernels"]
    return found


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm")])
def test_registers_stay_within_their_bounds_and_loops_over_tiles_hardly_spill(needs, target):
    for name, found in needs[target].items():
        bound = REGISTERS["strided" if name.endswith("strided") else name.split()[0]]
        assert found["registers"] <= bound, name
        # One value of one loop, stored and loaded: sm_100, with Triton 3.6.
        assert all(loop["spills"] <= 2 for loop in found["loops"]), name


def test_kernels_compile_for_amd(needs):
    assert needs["gfx942"].keys() == needs["sm80"].keys()


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm")])
def test_loads_are_of_16_bytes_where_the_weight_is_aligned_and_only_there(needs, target):
    for name, found in needs[target].items():
        if name.endswith("wide"):
            assert found["wide"] >= 1, name
        if name.endswith("narrow"):
            assert found["wide"] == 0, name


# Of a thread, per loop over tiles of 32 floats for each, with Triton 3.6, rounded up: instructions, shuffles, barriers.
# The two halves of an iteration, and the gradient.
LOOPS = {
    "iterate 3x3 wide": ((180, 0, 0), (180, 0, 2)),
    "iterate 3x3 of many rows wide": ((180, 0, 4), (210, 8, 10)),
    "iterate 4x4 wide": ((200, 0, 4), (180, 2, 4)),
    "iterate 3x3 channels_last wide": ((180, 0, 4), (210, 10, 8)),
    "iterate Linear wide": ((120, 0, 2), (110, 0, 2)),
    "gradient 3x3 wide": ((370, 0, 6),),
    "gradient 4x4 wide": ((300, 0, 4),),
    "gradient 3x3 channels_last wide": ((370, 0, 6),),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_over_tiles_stay_short_and_read_four_floats_at_a_time(needs, name):
    loops = needs["sm90"][name]["loops"]
    assert len(loops) == len(LOOPS[name])
    for found, bounds in zip(loops, LOOPS[name], strict=True):
        assert found["loads of 16 bytes"] == 32 // 4  # all of the weight's elements
        measured = found["instructions"], found["shuffles"], found["barriers"]
        assert all(number <= bound for number, bound in zip(measured, bounds, strict=True)), (measured, bounds)


@pytest.fixture(scope="session")
def launched() -> dict[str, list[dict[str, list[list[Any]]]]]:
    """What lists launch, see specialized.py."""
    script = Path(__file__).parent / "specialized.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_whole_lists_compile_as_the_jit_specializes_them(launched):
    every = [launch for found in launched.values() for each in found for launch in each["first"]]
    names = {"iterate", "reduce", "rescale", "inner_products", "gradient"}
    assert {name for name, *_ in every} == names
    alike = {(name, binary) for each in launched["alike"] for name, binary, *_ in each["first"]}
    assert len(alike) == len({name for name, _ in alike})  # each kernel of these lists was compiled once


def test_a_launch_that_goes_past_the_jit_is_the_same(launched):
    for found in launched.values():
        for each in found:
            assert len(each["first"]) >= 4
            assert each["again"] == each["first"]


def test_a_launch_that_goes_past_the_jit_gets_flat_vectors_at_multiples_of_16_bytes(launched):
    for found in launched.values():
        for each in found:
            assert each["not aligned"] == each["first"]
