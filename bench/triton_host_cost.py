"""What a step of the Triton kernels costs before the GPU has anything to do: the time of Python and C++ with every
launch replaced by nothing, for tensors of the CPU, which go the way of tensors of a GPU.

    PYTHONPATH=.:tests python bench/triton_host_cost.py --out bench/results/<machine>/triton_host_cost.json

It leaves out Triton's own launch of a kernel, and what CUDA's allocator and streams take. Medians, in microseconds,
once with memory that comes back to the same places in every step, as from torch's allocator for GPUs, and once with
memory at new places, for which a table of addresses is made. "backward" is that of rescale through autograd: a step
that has it less one that has not. First, with small weights, the results are compared with the reference.

"step" is all of it as users write it: ``fastsn.step`` of BSSN layers, each of which asks for its weight, and a backward
from these weights to the gradients of the parameters. "floor" is what torch alone takes for one op in the place of
fastsn, ``torch._foreach_mul`` of weights with one element. Both less a step without any op.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
from machine import commit, machine, write
from measure import Step, interleaved
from torch import Tensor, nn
from workloads import WORKLOADS, build

import fastsn
from fastsn import ops
from fastsn.triton import memory
from interpreted import kernels, launches_replaced
from op_calls import call

TARGETS = {"CIFAR10 CNN": 200, "64 small convs": 900}  # of a whole step, in microseconds
SECONDS = 8.0  # for each workload


class Feed(torch.autograd.Function):
    """Gives its inputs the gradients that it was handed: what a network does, without the network."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def steps(weights: list[Tensor]) -> dict[str, Step]:
    """What is timed: an iteration, rescaling, all three with the backward, and the backward of what feeds gradients."""
    c = call(weights, [0] * len(weights), [3 if w.ndim > 2 else 1 for w in weights])
    gradients = [torch.randn_like(w) for w in weights]
    state = c.iterate(in_place=True)

    def whole() -> tuple[Tensor, ...]:
        outputs, _ = c.rescale(*c.iterate(in_place=True))
        return torch.autograd.grad(Feed.apply(gradients, *outputs), weights)

    return {
        "power_iteration_": lambda: c.iterate(in_place=True),
        "rescale": lambda: c.rescale(*state),
        "whole": whole,
        "feed": lambda: torch.autograd.grad(Feed.apply(gradients, *weights), weights),
    }


def normalized(plain: nn.Module) -> Any:
    """The BSSN layer of the same shape."""
    if isinstance(plain, nn.Linear):
        return fastsn.BSSNLinear(plain.in_features, plain.out_features)
    assert isinstance(plain, nn.Conv2d)
    return fastsn.BSSNConv2d(plain.in_channels, plain.out_channels, plain.kernel_size)


def steps_of_users(plain: nn.ModuleList) -> dict[str, Step]:
    """A step of a network that asks for the weights of its layers, and what torch takes for such a step."""
    net = nn.ModuleList([normalized(layer) for layer in plain])
    layers, gradients = list(net), [torch.randn_like(layer.weight) for layer in plain]
    parameters, ones = [layer.weight for layer in layers], [torch.ones(1, requires_grad=True) for _ in plain]

    def step() -> None:
        with fastsn.step(net):
            weights = [layer.normalized()[0] for layer in layers]
        torch.autograd.grad(Feed.apply(gradients, *weights), parameters)

    return {
        "step": step,
        "floor": lambda: torch.autograd.grad(Feed.apply(ones, *torch._foreach_mul(ones, 1.5)), ones),
    }


def microseconds(weights: list[Tensor], plain: nn.ModuleList) -> dict[str, float]:
    """Medians of the ops, and of a step of a user."""
    timed = {**steps(weights), **steps_of_users(plain)}
    found = {name: 1e6 * statistics.median(times) for name, times in interleaved(timed, SECONDS).items()}
    feed = found.pop("feed")
    total, step, floor = (found.pop(name) - feed for name in ("whole", "step", "floor"))
    return {**found, "backward": total - sum(found.values()), "all": total, "step": step, "floor": floor}


@contextmanager
def places(new: bool) -> Iterator[None]:
    """Every call finds the first table that there is, or, with ``new``, none."""

    def patched(name: str) -> Any:
        look_up = getattr(memory.Tables, name)

        def found(tables: memory.Tables, where: object, *rest: Any) -> Tensor | None:
            return look_up(tables, object() if new else next(iter(tables._known), where), *rest)

        return mock.patch.object(memory.Tables, name, found)

    with patched("get"), patched("known"):
        yield


def check(weights: list[Tensor]) -> None:
    """Raises AssertionError unless results are those of the reference: of weights with a sixteenth of the channels."""
    small = [w.detach()[: -(-w.shape[0] // 16), : -(-w.shape[1] // 16)].clone().requires_grad_() for w in weights]
    c = call(small, [0] * len(small), [3 if w.ndim > 2 else 1 for w in small])
    e = c.exact()
    exact = ops.fallback.power_iteration(*e.iteration(), 1)
    for w in e.weights:
        w.requires_grad_()
    outputs, _ = c.rescale(*c.iterate(in_place=True))
    expected, _ = e.rescale(*exact)
    gradients = [torch.randn_like(w) for w in small]
    ours = torch.autograd.grad(Feed.apply(gradients, *outputs), small)
    theirs = torch.autograd.grad(Feed.apply([g.double() for g in gradients], *expected), e.weights)
    for x, y in zip((*outputs, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out, rows = parser.parse_args().out, []
    found = machine()
    print(
        f"torch {torch.__version__}, Triton {triton.__version__}, {found['cpu']}, {found['fastsn']}, commit {commit()}"
    )
    columns = ("power_iteration_", "rescale", "backward", "all", "step", "floor", "target of step")
    print(f"{'us':16}{'places':>8}" + "".join(f"{name:>18}" for name in columns))
    for workload in (workload for workload in WORKLOADS if workload.name in TARGETS):
        plain = build(workload, torch.device("cpu"))
        weights = [layer.weight for layer in plain]
        with kernels():
            check(weights)
        for new in (False, True):
            with launches_replaced(), places(new):
                times = microseconds(weights, plain)
            row, kept = {**times, "target of step": TARGETS[workload.name]}, "new" if new else "same"
            print(f"{workload.name:16}{kept:>8}" + "".join(f"{us:18.0f}" for us in row.values()))
            rows.append({"workload": workload.name, "places": kept} | {f"{k}_us": round(x) for k, x in row.items()})
    write(out, {"triton_host_cost": rows, "threads": torch.get_num_threads(), "triton": triton.__version__})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
