"""What a block of code asks torch's dispatcher for, and what a compiled graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastsn

# Each of them makes the host wait for the device, which also ends the capture of a CUDA graph.
SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


def needs_kernels() -> None:
    """Skips a test of what only fastsn's ops can do, or that counts them: the reference is made of torch's."""
    if not fastsn.backends()["cpp"].available:
        pytest.skip("needs the C++ kernels")


class Counted(TorchDispatchMode):
    """The names of a namespace's ops, as they are dispatched: fastsn's or torch's ("aten"). What an op calls inside is
    not among them: the C++ kernels may read numbers, for theirs are on the host."""

    def __init__(self, namespace: str = "fastsn") -> None:
        super().__init__()
        if namespace == "fastsn":
            needs_kernels()
        self.namespace = namespace
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of all ops in a block, with those that they call inside, once it has ended."""
    names: list[str] = []
    with profile(use_cpu=True) as found:
        yield names
    names += [event.name.removeprefix("aten::") for event in found.function_events]


class Graphs(CompileCounter):
    """Counts compilations and keeps what was compiled."""

    def __init__(self) -> None:
        super().__init__()
        needs_kernels()
        self.ops: list[list[str]] = []

    def __call__(self, graph, inputs):
        super().__call__(graph, inputs)
        targets = [str(node.target) for node in graph.graph.nodes]
        self.ops.append(
            [name.removeprefix("fastsn.").removesuffix(".default") for name in targets if "fastsn." in name]
        )
        return aot_eager(graph, inputs)
