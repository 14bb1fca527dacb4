"""``power_iteration`` for tensors of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsn.kernels import launch, memory
from fastsn.kernels import power_iteration as kernels
from fastsn.kernels.plan import SETTINGS, TYPES, Kinds, Launch, Weight, by_size, described, on, vector_places


def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    views: Sequence[int],
    n: int,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """(sigma, vectors) as the op gives them; with ``store``, u and v are written in place."""
    placed = [described(w, dim) for w, dim in zip(weights, dims, strict=True)]
    plan = _plan(tuple(weight for _, weight in placed), tuple(views), weights[0].device, n == 0, SETTINGS)
    own_u, own_v = [x.contiguous() for x in u], [x.contiguous() for x in v]
    results = plan.run([w for w, _ in placed], own_u, own_v, n, store)
    if store and n:
        for given, own in zip((*u, *v), (*own_u, *own_v), strict=True):
            if own is given:
                torch.autograd.graph.increment_version(given)
            else:
                given.copy_(own)
    return results


class Plan:
    """Launches and tables for a list of weights."""

    def __init__(
        self,
        weights: Sequence[Weight],
        views: Sequence[int],
        device: torch.device,
        measure: bool,
        settings: launch.Settings,
    ) -> None:
        self.device, self.weights, self.views, self.settings = device, weights, views, settings
        self.tables = memory.Tables()
        self.tiles = [launch.tiles(w.arrangement, settings) for w in weights]
        self.vectors = self.scratch = self.sigmas = 0
        self.places = [self._place(i) for i in range(len(weights))]
        modes = (kernels.FUSED.value, kernels.ACCUMULATE.value, kernels.LOCAL.value, kernels.MEASURE.value)
        fused, accumulate, local, measured = modes
        turned = [w.arrangement.turned for w in weights]
        if measure:
            passes = [[measured] * len(weights)]
        else:
            passes = [[accumulate if t else fused for t in turned]]
            passes += [[local if t else None for t in turned]] if any(turned) else []
        self.launches: list[tuple[Any, Tensor, int, tuple[Any, ...] | None]] = []
        for modes_of_pass in passes:
            self._plan(modes_of_pass)

    def _place(self, i: int) -> list[int]:
        """Offsets of the vectors (p, x, q, z), of both sigmas and of the scratch; -1 where there is no such view."""
        a, blocks = self.weights[i].arrangement, self.tiles[i].blocks
        places, size = vector_places(a, self.views[i])
        vectors = [self.vectors + place if place >= 0 else -1 for place in places]
        in_row, in_class = places[0] >= 0, places[2] >= 0
        after = self.sigmas + (in_row and in_class)  # sigma of `out` comes first: of the class matrix where turned
        row, cls = (after, self.sigmas) if a.turned else (self.sigmas, after)
        scratch = self.scratch
        self.vectors += size
        self.sigmas += in_row + in_class
        self.scratch += -(-(a.rows * (1 + a.k) + blocks * (2 + a.n + a.b)) // 4) * 4
        return [*vectors, row if in_row else -1, cls if in_class else -1, scratch]

    def _plan(self, modes: Sequence[int | None]) -> None:
        main, apart, kinds = Launch(), Launch(), Kinds()
        for i in by_size(self.weights):
            mode, w, t = modes[i], self.weights[i], self.tiles[i]
            if mode is None:
                continue
            a, place = w.arrangement, self.places[i]
            exact = a.k == t.kp
            kind = (mode, place[4] >= 0, place[5] >= 0, t.bo, t.bi, t.kp, exact, a.kb, w.vector_width(), TYPES[w.dtype])
            accumulates = mode in (kernels.FUSED.value, kernels.ACCUMULATE.value)
            later = accumulates and launch.finished_apart(a, t.blocks, self.settings)
            number = kinds.number(kind)
            for block in range(t.blocks):
                main.add(i, block, number, mode, int(later))
            if later:
                tiles = -(-a.n // self.settings.columns)
                for tile in range(tiles):
                    apart.add(i, tile, tiles, mode, 0)
        self.launches.append((kernels.iterate, main.sent(self.device), main.programs, tuple(kinds.found)))
        if apart.programs:
            self.launches.append((kernels.reduce, apart.sent(self.device), apart.programs, None))

    def rows(self, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> list[int]:
        """The table."""
        numbers: list[int] = []
        pair = 0
        for i, tensor in enumerate(weights):
            a, place, views = self.weights[i].arrangement, self.places[i], {}
            for bit in (bit for bit in (1, 2) if self.views[i] & bit):
                views[bit] = (u[pair].data_ptr(), v[pair].data_ptr())
                pair += 1
            rows, classes = (views.get(bit, (0, 0)) for bit in ((2, 1) if a.turned else (1, 2)))
            order = (1, 0) if a.turned else (0, 1)
            numbers += [tensor.data_ptr(), a.stride, a.rows, a.b, a.k, self.tiles[i].blocks, place[6]]
            numbers += [*(rows[j] for j in order), *(classes[j] for j in order), *place[:6]]
        return numbers

    def run(
        self, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], n: int, store: bool
    ) -> tuple[Tensor, Tensor]:
        """Launch."""
        device = self.device
        memory.keep(self, device)
        addresses = tuple([x.data_ptr() for x in (*weights, *u, *v)])
        table = self.tables.get(addresses, lambda: self.rows(weights, u, v), device)
        sigma = torch.empty(self.sigmas, dtype=torch.float32, device=device)
        vectors = torch.empty(self.vectors, dtype=torch.float32, device=device)
        scratch = torch.empty(self.scratch, dtype=torch.float32, device=device)
        counters = memory.counters(len(weights), device)
        with on(device):
            for round_ in range(max(n, 1)):
                for kernel, work, programs, kinds in self.launches:
                    # Within a round, too, what the launch before has made is read from the flat result: x of a turned
                    # weight. p, which is only stored, is what it was.
                    arguments = (table, work, vectors, sigma, scratch, counters, int(round_ == 0), int(store and n > 0))
                    extra = {} if kinds is None else {"KINDS": kinds}
                    kernel[(programs,)](*arguments, **extra, FINISH=self.settings.finish, num_warps=self.settings.warps)
        return sigma, vectors


_plan = lru_cache(maxsize=256)(Plan)
