"""In the place of a CUDA graph, on the CPU: the operators of a step, called again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dispatched import SYNCS
from gan.config import Config
from gan.training import Training
from gan_rank_jobs import flat

T = TypeVar("T")


def tensors(*values: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor))


def places(values: Iterable[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in values}


class Operators(TorchDispatchMode):
    """All that are called, but those of ``host``, a tensor that is on the CPU with a GPU too: they are carried out when
    they are called, and no graph has them."""

    def __init__(self, host: Tensor | None) -> None:
        super().__init__()
        self.host = [host] if host is not None else []
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if places(tensors(args)) & places(self.host):
            self.host += tensors(result)
            return result
        assert func.overloadpacket.__name__ not in SYNCS, "a step that waits for the device cannot be captured"
        self.calls.append((func, args, kwargs, result))
        return result


class Replayed:
    """A capture changes nothing, and no Python runs in a replay."""

    def __init__(self) -> None:
        self.training: Training | None = None
        self.captures = self.replays = 0

    def aside(self, work: Callable[[], T]) -> T:
        return work()

    def capture(self, work: Callable[[], T]) -> T:
        host = None if self.training.average is None else self.training.average.n_averaged
        state = [x for x in tensors(flat(self.training.state())) if not places([x]) & places(tensors(host))]
        before = [x.clone() for x in state]
        self.operators = Operators(host)
        with self.operators:
            result = work()
        with torch.no_grad():
            for _, args, kwargs, made in self.operators.calls:
                for x in self._new(made, args, kwargs):
                    if x.is_floating_point():  # memory that nobody has written to
                        x.fill_(float("nan"))
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
        self.captures += 1
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operators.calls:
            again = func(*args, **kwargs)
            for x, y in zip(tensors(made), tensors(again), strict=True):
                if any(x is new for new in self._new(made, args, kwargs)):
                    x.copy_(y)
        self.replays += 1

    def _new(self, made: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Of the results, those that are no views of what was given."""
        given = places(tensors(args, kwargs))
        return [x for x in tensors(made) if x.untyped_storage().data_ptr() not in given]


class NeverCaptured:
    """Every step by Python, as the first ones."""

    training: Training | None = None

    def aside(self, work: Callable[[], T]) -> T:
        return work()

    def capture(self, work: Callable[[], T]) -> T:
        self.work, self.result = work, {}
        return self.result

    def replay(self) -> None:
        self.result.update(self.work())


def training_with(graph: type, config: Config, classes: int) -> tuple[Training, list[Any]]:
    """And its graphs: one at the start, one more after each load."""
    made: list[Any] = []

    def graph_of(_: torch.device) -> Any:
        made.append(graph())
        if len(made) > 1:
            made[-1].training = made[0].training
        return made[-1]

    training = Training(config, 3, classes, torch.device("cpu"), graph_of)
    made[0].training = training
    return training, made
