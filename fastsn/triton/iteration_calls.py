"""``power_iteration`` for tensors of a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsn.tensor_lists import addresses
from fastsn.triton import memory
from fastsn.triton import power_iteration as kernels
from fastsn.triton.arrangement import arranged
from fastsn.triton.finish import ACCUMULATE, FUSED, LOCAL, MEASURE
from fastsn.triton.plan import TYPES, Kernel, Kinds, Launch, Prepared, Weight, by_size, described, vector_places
from fastsn.triton.settings import Settings, current

_FUSED, _ACCUMULATE, _LOCAL, _MEASURE = (mode.value for mode in (FUSED, ACCUMULATE, LOCAL, MEASURE))


def prepared(
    store: bool,
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    view_masks: Sequence[int],
    v_first: Sequence[int],
    n: int,
) -> Prepared:
    """What gives (sigma, vectors), as the op does, for lists of tensors like these; with ``store``, u and v are written
    in place."""
    placed = [described(w, dim) for w, dim in zip(weights, dims, strict=True)]
    device = weights[0].device
    described_all = tuple(weight for _, weight in placed)
    plan = _plan(described_all, tuple(view_masks), tuple(v_first), device, n == 0, current(device))
    where_they_are = all(place is w for w, (place, _) in zip(weights, placed, strict=True))
    where_they_are = where_they_are and all(x.is_contiguous() for x in (*u, *v))
    store = store and n > 0
    made_in_inference_mode = [i for i, pair in enumerate(zip(u, v, strict=True)) if any(x.is_inference() for x in pair)]

    def run(
        places: Hashable, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *_: Any
    ) -> tuple[Tensor, Tensor]:
        if store:
            if made_in_inference_mode and not torch.is_inference_mode_enabled():
                name = f"u[{made_in_inference_mode[0]}] or v[{made_in_inference_mode[0]}]"
                raise RuntimeError(f"{name} was made in inference mode and cannot be updated outside of it")
            torch.autograd.graph.increment_version([x for x in (*u, *v) if not x.is_inference()])
        now = memory.now(device)
        if where_they_are:
            return plan.launch(plan.tables.get(places, (weights, u, v), now), now, n, store)
        weights = [arranged(w, dim)[0] for w, dim in zip(weights, dims, strict=True)]
        own_u, own_v = [x.contiguous() for x in u], [x.contiguous() for x in v]
        table = plan.tables.get(addresses(weights, own_u, own_v), (weights, own_u, own_v), now)
        results = plan.launch(table, now, n, store)
        if store:
            for given, own in zip((*u, *v), (*own_u, *own_v), strict=True):
                if own is not given:
                    given.copy_(own)
        return results

    def again(
        places: Hashable, _places_of_results: Hashable, addresses: Sequence[int] | None, *_: Any
    ) -> tuple[Tensor, Tensor] | None:
        now = memory.now(device)
        table = plan.tables.known(places, addresses, now)
        return None if table is None else plan.launch(table, now, n, store)

    return Prepared(device, run, again if where_they_are and not (store and made_in_inference_mode) else None)


class Plan:
    """Launches and tables for a list of weights."""

    def __init__(
        self,
        weights: Sequence[Weight],
        view_masks: Sequence[int],
        v_first: Sequence[int],
        device: torch.device,
        measure: bool,
        settings: Settings,
    ) -> None:
        self.device, self.weights, self.view_masks, self.settings = device, weights, view_masks, settings
        self.tiles = [settings.tiles(w.arrangement, settings.tile) for w in weights]
        self.vectors = self.scratch = self.sigmas = 0
        self.places = [self._place(i) for i in range(len(weights))]
        self._kinds = Kinds()
        # Where the vector with entries for columns comes first, each half of a round takes a launch of its own.
        apart = [w.arrangement.turned != bool(order) for w, order in zip(weights, v_first, strict=True)]
        passes: list[list[int | None]] = [[_MEASURE] * len(weights)]
        if not measure:
            passes = [[_ACCUMULATE if two else _FUSED for two in apart]]
            passes += [[_LOCAL if two else None for two in apart]] if any(apart) else []
        self.phases = [phase for modes in passes for phase in self._phases(modes)]
        self.sent = [phase.sent(device) for phase in self.phases]
        self.tables = memory.Tables(self._numbers())
        # An option that only compilers for NVIDIA's GPUs have.
        at_most = {"maxnreg": settings.registers} if device.type == "cuda" and not torch.version.hip else {}
        options = {"FINISH": settings.finish, **settings.options(settings.warps)}
        self.iterate = Kernel(kernels, "iterate", {"KINDS": tuple(self._kinds.found), **at_most, **options})
        self.reduce = Kernel(kernels, "reduce", options)

    def _place(self, i: int) -> list[int]:
        """Offsets of the vectors (p, x, q, z), of both sigmas and of the scratch; -1 where there is no such view."""
        a, tiles = self.weights[i].arrangement, self.tiles[i]
        places, size = vector_places(a, self.view_masks[i])
        vectors = [self.vectors + place if place >= 0 else -1 for place in places]
        in_row, in_class = places[0] >= 0, places[2] >= 0
        after = self.sigmas + (in_row and in_class)  # sigma of `out` comes first: of the class matrix where turned
        row, cls = (after, self.sigmas) if a.turned else (self.sigmas, after)
        scratch = self.scratch + tiles.blocks * tiles.own(a.n)  # what blocks have to themselves comes before
        self.vectors += size
        self.sigmas += in_row + in_class
        self.scratch = scratch + -(-(a.rows * (1 + a.k) + tiles.blocks * (2 + a.n + a.b)) // 4) * 4
        return [*vectors, row if in_row else -1, cls if in_class else -1, scratch]

    def _phases(self, modes: Sequence[int | None]) -> list[Launch]:
        """The blocks of rows, and what adds them up where they are many."""
        blocks, columns, settings = Launch(), Launch(), self.settings
        for i in by_size(self.weights):
            mode, w, t, place = modes[i], self.weights[i], self.tiles[i], self.places[i]
            if mode is None:
                continue
            a = w.arrangement
            kind = self._kinds.number((mode, place[4] >= 0, place[5] >= 0, *t.kind(w.vector_width(t)), TYPES[w.dtype]))
            later = mode in (_FUSED, _ACCUMULATE) and settings.finished_apart(a, t.blocks)
            for block in range(t.blocks):
                blocks.add(i, block, kind, mode, int(later))
            tiles = -(-a.n // settings.columns) if later else 0
            for tile in range(tiles):
                columns.add(i, tile, -1, mode, tiles)
        return [blocks, columns] if columns.programs else [blocks]

    def _numbers(self) -> list[int | memory.Address]:
        """The table, for the addresses of weights, u and v."""
        numbers: list[int | memory.Address] = []
        pair, pairs = len(self.weights), sum(bits.bit_count() for bits in self.view_masks)
        for i, weight in enumerate(self.weights):
            a, place = weight.arrangement, self.places[i]
            views: dict[int, tuple[int | memory.Address, ...]] = {}
            for bit in (bit for bit in (1, 2) if self.view_masks[i] & bit):
                views[bit] = (memory.Address(pair), memory.Address(pair + pairs))
                pair += 1
            rows, classes = (views.get(bit, (0, 0)) for bit in ((2, 1) if a.turned else (1, 2)))
            order = (1, 0) if a.turned else (0, 1)
            numbers += [memory.Address(i), a.stride, a.rows, a.b, a.k, self.tiles[i].blocks, place[6]]
            numbers += [*(rows[j] for j in order), *(classes[j] for j in order), *place[:6]]
        return numbers

    def launch(self, table: Tensor, now: memory.Now, n: int, store: bool) -> tuple[Tensor, Tensor]:
        """(sigma, vectors) of the weights in the table."""
        memory.keep(self, now)
        device = self.device
        sigma = torch.empty(self.sigmas, dtype=torch.float32, device=device)
        vectors = torch.empty(self.vectors, dtype=torch.float32, device=device)
        scratch = torch.empty(self.scratch, dtype=torch.float32, device=device)
        shared = (vectors, sigma, scratch, memory.counters(len(self.weights), now))
        for round_ in range(max(n, 1)):
            for phase, work in zip(self.phases, self.sent, strict=True):
                arguments = (table, work.here(now), *shared, int(round_ == 0), int(store))
                kernel = self.iterate if phase.work[2] >= 0 else self.reduce
                kernel.launch(phase.programs, *arguments)
        return sigma, vectors


_plan = lru_cache(maxsize=256)(Plan)
