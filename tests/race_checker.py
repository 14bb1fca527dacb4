"""What Triton's interpreter cannot see by itself: accesses outside of tensors, and races between programs.

``RaceChecker`` watches every load, store and atomic of the launches inside it. The programs of a launch run in the
order asked for ("plain", "reverse" or "random"). It raises AssertionError for

- an element outside of all tensors that a launch was given; of the scratch and of the flat vectors every part counts
  as a tensor of its own;
- a store that writes an address twice;
- an address that two programs of a launch access, one of them writing, with nothing between that orders them: an atomic
  of the one after its access, and later an atomic of the other on the same counter before its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from fastsn.ops import cuda as gpu
from fastsn.triton import iteration_calls, memory, power_iteration, rescale, rescale_plans

BUILDER = interpreter.interpreter_builder
KERNELS = {
    power_iteration: ("iterate", "reduce"),
    rescale: ("rescale", "inner_products", "gradient"),
}
ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "plain": lambda programs: programs,
    "reverse": lambda programs: programs[::-1],
    "random": lambda programs: random.Random(0).sample(programs, len(programs)),
}


class Access(NamedTuple):
    """Elements that a program has loaded or stored; ``phase``: how many atomics it had done by then."""

    addresses: np.ndarray
    program: int
    phase: int
    write: bool


class Atomic(NamedTuple):
    """On a counter; ``phase``: how many atomics the program had done before."""

    address: int
    program: int
    phase: int


class RaceChecker:
    """Inside ``with checker.watching(order):``. ``counts`` says what has been seen."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("launches", "programs", "accesses", "elements", "shared addresses"), 0)
        self._extents: dict[int, int] = {}  # first address -> one behind the last
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._held: list[Tensor] = []  # so that no address is given to another tensor
        self._log: list[Access] = []
        self._atomics: list[Atomic] = []
        self._order: list[int] = []
        self._program = self._phase = 0
        self._plan: iteration_calls.Plan

    @contextmanager
    def watching(self, order: str) -> Iterator[None]:
        """Tensors that launches are given from here on are known until the end."""
        gpu._prepared.clear()
        for plan in (iteration_calls._plan, rescale_plans.forward_plan, rescale_plans.backward_plan):
            plan.cache_clear()  # plans know tables by addresses, whose tensors are gone
        memory._counters.clear()
        patches = [(type(BUILDER), f"create_masked_{name}", getattr(self, f"_{name}")) for name in ("load", "store")]
        patches += [(type(BUILDER), "create_atomic_rmw", self._atomic), (iteration_calls.Plan, "launch", self._launch)]
        patches += [(type(BUILDER), "set_grid_dim", self._grid(ORDERS[order]))]
        patches += [(type(BUILDER), "set_grid_idx", self._next_program)]
        patches += [(memory.Tables, "get", self._table)]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(gpu, "_served", return_value=True))
            for owner, name, around in patches:
                stack.enter_context(_patched(owner, name, around))
            for module, names in KERNELS.items():
                for name in names:
                    kernel = _Watched(self, name, getattr(module, name))
                    stack.enter_context(mock.patch.object(module, name, kernel))
            yield
        self._extents.clear()
        self._held.clear()

    # Extents.

    def know(self, *tensors: Any) -> None:
        """Elements of these may be accessed."""
        for x in tensors:
            if isinstance(x, list | tuple):
                self.know(*x)
            elif isinstance(x, Tensor) and x.numel():
                span = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
                self._know(x.data_ptr(), span * x.element_size())
                self._held.append(x)

    def know_arguments(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        """Those of a launch."""
        if kernel in KERNELS[power_iteration]:
            self.know(*arguments[:2], arguments[3], *arguments[5:])
            self._know_parts(self._plan, arguments[2], arguments[4])
        else:
            self.know(*arguments)

    def _know_parts(self, plan: iteration_calls.Plan, flat: Tensor, scratch: Tensor) -> None:
        self._held += [flat, scratch]
        for weight, place, tiles in zip(plan.weights, plan.places, plan.tiles, strict=True):
            a, blocks, p, q = weight.arrangement, tiles.blocks, place[4] >= 0, place[5] >= 0
            for at, size in zip(place[:4], (a.rows, a.n, a.rows * a.k, a.b), strict=True):
                if at >= 0:
                    self._know(flat.data_ptr() + 4 * at, 4 * size)
            at = scratch.data_ptr() + 4 * place[6]
            for block in range(blocks):
                self._know(at - 4 * tiles.own(a.n) * (blocks - block), 4 * tiles.own(a.n) * q)
            parts = [(p, a.rows), (q, a.rows * a.k), (p, blocks), (q, blocks)]
            for used, size in parts + [(p, a.n)] * blocks + [(q, a.b)] * blocks:
                self._know(at, 4 * size * used)
                at += 4 * size

    def _know(self, begin: int, size: int) -> None:
        if size:
            self._extents[begin] = max(begin + size, self._extents.get(begin, 0))
            self._sorted = None

    def _table(self, original: Callable[..., Any], tables: memory.Tables, places: Any, *rest: Any) -> Any:
        self.know(*rest)
        return original(tables, places, *rest)

    def _launch(self, original: Callable[..., Any], plan: iteration_calls.Plan, *arguments: Any) -> Any:
        self._plan = plan
        return original(plan, *arguments)

    def _inside(self, pointers: Any, mask: Any, what: str) -> np.ndarray:
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)].ravel()
        self.counts["accesses"] += 1
        self.counts["elements"] += addresses.size
        if self._sorted is None:
            begins = np.array(sorted(self._extents), np.int64)
            self._sorted = begins, np.array([self._extents[begin] for begin in begins.tolist()], np.int64)
        begins, ends = self._sorted
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.searchsorted(begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > ends[at])
        assert not outside.any(), f"{what} out of bounds, program {self._program}"
        return addresses

    # Accesses.

    def _load(self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        self._log.append(Access(self._inside(pointers, mask, "load"), self._program, self._phase, False))
        return original(builder, pointers, mask, *rest)

    def _store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        addresses = self._inside(pointers, mask, "store")
        assert np.unique(addresses).size == addresses.size, f"store to one address twice, program {self._program}"
        self._log.append(Access(addresses, self._program, self._phase, True))
        return original(builder, pointers, value, mask, *rest)

    def _atomic(
        self, original: Callable[..., Any], builder: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        (address,) = self._inside(pointer, mask, "atomic")
        self._atomics.append(Atomic(int(address), self._program, self._phase))
        self._phase += 1
        return original(builder, op, pointer, value, mask, *rest)

    # Programs.

    def _grid(self, order: Callable[[list[int]], list[int]]) -> Callable[..., Any]:
        def set_grid_dim(original: Callable[..., Any], builder: Any, x: int, y: int, z: int) -> Any:
            self._order = order(list(range(x)))
            self.counts["launches"] += 1
            self.counts["programs"] += x
            return original(builder, x, y, z)

        return set_grid_dim

    def _next_program(self, original: Callable[..., Any], builder: Any, x: int, y: int, z: int) -> Any:
        self._program, self._phase = self._order[x], 0
        return original(builder, self._program, y, z)

    def launched(self, kernel: str) -> None:
        """Raises for what programs of the launch that has just run did without order."""
        accesses = [a for a in self._log if a.addresses.size]
        writes = [a.addresses for a in accesses if a.write]
        written = np.unique(np.concatenate(writes)) if writes else np.zeros(0, np.int64)
        before = self._order_of_atomics()
        self._log, self._atomics = [], []
        columns = []
        for access in accesses:
            addresses = np.unique(access.addresses[np.isin(access.addresses, written)])
            columns.append(np.stack([addresses, *(np.full_like(addresses, int(x)) for x in access[1:])]))
        table = np.concatenate(columns, 1)
        table = table[:, np.argsort(table[0], kind="stable")]
        known: set[frozenset[tuple[int, ...]]] = set()
        for group in np.split(table, np.flatnonzero(np.diff(table[0])) + 1, axis=1):
            who = frozenset(map(tuple, group[1:].T.tolist()))
            if len({program for program, *_ in who}) < 2:
                continue
            self.counts["shared addresses"] += 1
            if who in known:
                continue
            known.add(who)
            for p, p_phase, p_write in who:
                for q, q_phase, q_write in who:
                    ordered = before(p, p_phase, q, q_phase) or before(q, q_phase, p, p_phase)
                    race = p < q and (p_write or q_write) and not ordered
                    assert not race, f"race in {kernel} between programs {p} and {q}"

    def _order_of_atomics(self) -> Callable[[int, int, int, int], bool]:
        """Whether what a program did in a phase comes before what another did in one."""
        of: dict[int, list[tuple[int, int, int]]] = {}
        for time, atomic in enumerate(self._atomics):
            of.setdefault(atomic.program, []).append((atomic.phase, atomic.address, time))

        def before(p: int, p_phase: int, q: int, q_phase: int) -> bool:
            return any(
                i >= p_phase and j < q_phase and counter == other and when < later
                for i, counter, when in of.get(p, ())
                for j, other, later in of.get(q, ())
            )

        return before


class _Watched:
    """A kernel whose launches are checked."""

    def __init__(self, checker: RaceChecker, name: str, kernel: Any) -> None:
        self._checker, self._name, self._kernel = checker, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> None:
            self._checker.know_arguments(self._name, arguments)
            self._kernel[grid](*arguments, **options)
            self._checker.launched(self._name)

        return run


def _patched(owner: type, name: str, around: Callable[..., Any]) -> Any:
    """``around(original, *arguments)`` in the place of a method."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *arguments: around(original, *arguments))
