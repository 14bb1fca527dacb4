"""All kernels under the race checker, in full: python tests/races.py. A small part of it is tests/test_races.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from fastsn.ops import cuda as gpu
from fastsn.triton import settings
from fastsn.triton.settings import Settings
from interpreted import SMALL
from op_calls import alternating, call, larger, table
from race_checker import ORDERS, RaceChecker

OPS = {name: gpu.implementation(name) for name in gpu.KERNELS}
APART = replace(SMALL, last_tiles=0)  # sums of blocks are added up by a launch of their own


class Case(NamedTuple):
    """Weights, where their output channels are, and how kernels are launched; every other weight, from the first or
    the second on, iterates v first."""

    weights: Callable[[], tuple[list[Tensor], list[int]]]
    settings: Settings
    first: int = 0


CASES = {
    **{f"the table, {layout}": Case(lambda layout=layout: table(torch.float32, layout), SMALL)
       for layout in ("contiguous", "channels_last", "sliced", "offset")},
    "the table in bfloat16": Case(lambda: table(torch.bfloat16, "offset"), SMALL, 1),
    "the table, sums apart": Case(table, APART, 1),
    "larger weights, default settings": Case(larger, settings.DEFAULT),
    "larger weights, sums apart": Case(larger, replace(settings.DEFAULT, rows=4, last_tiles=0, columns=64, group=4), 1),
}  # fmt: skip


def results(checker: RaceChecker, order: str, case: Case, bits: int, scale: str, n: int) -> list[Tensor]:
    """Of all ops, their programs in this order: vectors, sigma, W̄ and gradients."""
    settings.use(case.settings, torch.device("cpu"))
    torch.manual_seed(1)
    weights, dims = case.weights()
    c = call(weights, dims, bits, scale, alternating(len(weights), case.first))
    with checker.watching(order):
        checker.know(c.weights, c.u, c.v, c.scales)
        iterate = OPS["power_iteration_" if n else "power_iteration"]
        sigma, vectors = iterate(*c.iteration(), n)
        outputs, mean = OPS["rescale"](c.weights, c.scales, sigma, vectors, *c.numbers())
        gradients, grad_sigma = [torch.randn_like(x) for x in outputs], torch.randn_like(mean)
        bases = c.weights if c.scales else outputs
        found = OPS["rescale_backward"](gradients, grad_sigma, bases, c.scales, mean, vectors, *c.numbers())
        return [sigma, vectors, *c.u, *c.v, *outputs, mean, *found[0], *found[1]]


def check(checker: RaceChecker, case: Case, bits: int, scale: str, n: int) -> None:
    """No race, nothing out of bounds, and the same bits in any order of the programs."""
    first, *others = [results(checker, order, case, bits, scale, n) for order in ORDERS]
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert x.equal(y), "results depend on the order of the programs"


if __name__ == "__main__":
    torch.set_num_threads(1)
    checker, begin = RaceChecker(), time.monotonic()
    for name, case in CASES.items():
        for bits, scale, n in ((3, "float", 2), (1, "tensor", 1), (2, "float", 1), (3, "float", 0)):
            check(checker, case, bits, scale, n)
            print(f"{name}, view masks {bits}, n = {n}: {time.monotonic() - begin:.0f} s", flush=True)
    print(", ".join(f"{count} {what}" for what, count in checker.counts.items()))
