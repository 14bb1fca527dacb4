"""Which ops of fastsn a block of code calls, and which a compiled graph holds."""

from __future__ import annotations

from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """The names of our ops, as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsn":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


class Graphs(CompileCounter):
    """Counts compilations and keeps what was compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[list[str]] = []

    def __call__(self, graph, inputs):
        super().__call__(graph, inputs)
        targets = [str(node.target) for node in graph.graph.nodes]
        self.ops.append(
            [name.removeprefix("fastsn.").removesuffix(".default") for name in targets if "fastsn." in name]
        )
        return aot_eager(graph, inputs)
