"""What the device does in a training step, as one CUDA graph: Python asks for it once and not kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gan.config import Runtime
from gan.draws import Drawn

EAGER_STEPS = 3  # before the capture: whatever is made once is there then
Scalars = dict[str, Tensor]
T = TypeVar("T")


class Graph(Protocol):
    """Work on a device that is captured once and replayed."""

    def aside(self, work: Callable[[], T]) -> T:
        """Carry it out, in the way that a capture must have before it."""

    def capture(self, work: Callable[[], T]) -> T:
        """Remember it without carrying it out. The tensors that it gives hold something after each replay."""

    def replay(self) -> None:
        """Carry out what was captured, on the same memory."""


class CudaGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph, self._stream = device, torch.cuda.CUDAGraph(), _stream_of_captures(device)

    def aside(self, work: Callable[[], T]) -> T:
        """On a stream of its own, as torch wants it: on the default stream, autograd would make a capture wait for
        that."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = work()
        here.wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], T]) -> T:
        """Remember the kernels. On the stream where the steps before it ran: what libraries keep for a stream, such as
        cuBLAS its workspace, is there."""
        here = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                return work()
        finally:  # a capture that fails stays on its stream
            torch.cuda.set_stream(here)

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


@cache
def _stream_of_captures(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs. torch hands out 32 by turns: the one that a capture is on must not be anybody else's."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CapturedStep:
    """``work`` on the inputs of a step: the first steps as they are, the others as replays of a graph of the same.

    Inputs are copied to where the graph reads them; tensors that it changes, weights and states of optimizers, must
    stay where they are. The scalars of a step are the caller's.
    """

    def __init__(self, work: Callable[[Sequence[Drawn]], Scalars], graph: Graph) -> None:
        self._work, self._graph, self._eager_steps = work, graph, EAGER_STEPS
        self._inputs: list[Drawn] = []
        self._scalars: Scalars = {}

    def __call__(self, inputs: Sequence[Drawn]) -> Scalars:
        """One step."""
        if self._eager_steps:
            self._eager_steps -= 1
            return self._graph.aside(lambda: self._work(inputs))
        if not self._inputs:
            own = [each._make(None if x is None else x.clone() for x in each) for each in inputs]
            self._scalars = self._graph.capture(lambda: self._work(own))
            self._inputs = own
        for held, given in zip(self._inputs, inputs, strict=True):
            for place, x in zip(held, given, strict=True):
                if place is not None:
                    place.copy_(x)
        self._graph.replay()
        return {name: x.clone() for name, x in self._scalars.items()}


def graph_for(runtime: Runtime, device: torch.device, processes: int) -> type[CudaGraph] | None:
    """What captures the steps of a run; None: nothing. Raises ValueError for ``cuda_graph`` where none can be."""
    if not runtime.cuda_graph:
        return None
    if device.type != "cuda":
        raise ValueError(f"cuda_graph must be False without a CUDA device, got True with device {device.type!r}")
    if processes > 1:
        raise ValueError(f"cuda_graph must be False with several processes, got True with {processes}")
    return CudaGraph
