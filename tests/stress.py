"""Races that show only now and then: one step of the kernels, launched again and again, has the same bits every time.

python tests/stress.py --launches 10000      # on a GPU; without one a few, in Triton's interpreter

Nothing waits for the device between launches, so that they follow one another as closely as they can: whether two
results differ is added up on the device and read at the end. With small tiles, weights have many more blocks, and sums
that a launch of their own adds up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before Triton is imported

from fastsn import ops
from fastsn.triton import settings
from interpreted import SMALL, kernels
from op_calls import alternating, call, larger, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def two() -> tuple[list[Tensor], list[int]]:
    """A convolution, output channels second, and a matrix."""
    return [torch.randn(6, 4, 3), torch.randn(5, 7)], [1, 0]


SETTINGS = {
    "default": settings.DEFAULT,
    "small": SMALL,
    "small, sums apart": replace(SMALL, last_tiles=0),
}
WEIGHTS = {"two weights": two, "the table": table, "larger weights": larger}


def differing(step: Callable[[], list[Tensor]], launches: int) -> int:
    """How many times a step does not give, bit for bit, what it gave first: launched by Python, and on a GPU as many
    times again by a CUDA graph, without Python's gaps in between."""
    first = bits(step())
    count = torch.zeros((), dtype=torch.int64, device=first.device)

    def compare() -> None:
        count.add_((bits(step()) != first).any())

    for _ in range(launches):
        compare()
    if first.is_cuda and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # which leaves no memory for graphs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compare()
        for _ in range(launches):
            graph.replay()
    return int(count)


def bits(results: list[Tensor]) -> Tensor:
    """Of float32 results, as integers: NaN is then equal to itself, and 0 is not -0."""
    return torch.cat([x.flatten() for x in results]).view(torch.int32)


def step(weights: list[Tensor], dims: list[int]) -> Callable[[], list[Tensor]]:
    """Two iterations, weights and gradients, always of the same numbers."""
    c = call(weights, dims, v_first=alternating(len(weights)))
    with torch.no_grad():
        outputs, mean = c.rescale(*c.iterate())
    gradients, grad_sigma = [torch.randn_like(x) for x in outputs], torch.randn_like(mean)

    @torch.no_grad()
    def run() -> list[Tensor]:
        sigma, vectors = c.iterate(2)
        outputs, mean = c.rescale(sigma, vectors)
        found, _ = ops.rescale_backward(gradients, grad_sigma, outputs, [], mean, vectors, *c.numbers())
        return [sigma, vectors, *outputs, mean, *found]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=10000, help="of a step, for each list of weights and settings")
    parser.add_argument("--weights", choices=WEIGHTS, action="append", help="default: all")
    launches, chosen = vars(parser.parse_args()).values()
    torch.set_default_device(DEVICE)
    failed = False
    for kind, own in SETTINGS.items():
        for name in chosen or WEIGHTS:
            torch.manual_seed(0)
            begin = time.monotonic()
            with kernels(own) if DEVICE.type == "cpu" else nullcontext():
                settings.use(own, torch.zeros(()).device)
                found = differing(step(*WEIGHTS[name]()), launches)
            failed |= found > 0
            said = f"{found} results DIFFER" if found else "all the same bits"
            print(f"{kind}, {name}: {launches} launches, {said}, {time.monotonic() - begin:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
