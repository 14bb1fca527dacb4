"""Launches and tables of ``rescale`` and ``rescale_backward`` for lists of weights."""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn.tensor_lists import DTYPES, FLOAT32, allocate
from fastsn.triton import memory
from fastsn.triton import rescale as kernels
from fastsn.triton.plan import TYPES, Kernel, Kinds, Launch, Weight, aligned, by_size, vector_places
from fastsn.triton.settings import Settings, vector_width

_SETTLED = 1024  # chunks whose sums are added at a time
_SCALED = 128  # weights whose derivatives by a scale are added at a time


class Numbers(NamedTuple):
    """What a call says of its weights beside the tensors."""

    view_masks: tuple[int, ...]
    scale_index: tuple[int, ...]
    scale_factor: tuple[float, ...]
    dtypes: tuple[int, ...]


def _bits(x: float) -> int:
    """Of a float32; of infinity where that has no room for the number."""
    largest = torch.finfo(torch.float32).max
    return int(struct.unpack("<i", struct.pack("<f", x if abs(x) <= largest else math.copysign(math.inf, x)))[0])


class _Plan:
    """What both directions have in common."""

    def __init__(
        self,
        weights: Sequence[Weight],
        numbers: Numbers,
        scales: int,
        device: torch.device,
        settings: Settings,
    ) -> None:
        self.weights, self.numbers, self.scales, self.device, self.settings = weights, numbers, scales, device, settings

    def read(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Scales as the kernels read them."""
        return [scale.to(self.device, torch.float32) for scale in scales]

    def row(self, i: int, tensor: int, scales: int, result: int, sigma: int) -> list[int | memory.Address]:
        """The columns up to the scale's number. Of the tensors of a call, ``tensor`` is the number of W or W̄,
        ``scales`` of the first scale and ``result`` of what is written."""
        a, at, views = self.weights[i].arrangement, self.numbers.scale_index[i], self.numbers.view_masks[i].bit_count()
        scale = memory.Address(scales + at) if at >= 0 else 0
        found: list[int | memory.Address] = []
        found += [memory.Address(tensor), a.stride, a.rows, a.b, a.k, memory.Address(result), sigma, views]
        return [*found, _bits(self.numbers.scale_factor[i]), scale, at]

    def elementwise_options(self, kinds: Kinds) -> dict[str, Any]:
        """Of a launch of elementwise kernels."""
        return {
            "KINDS": tuple(kinds.found),
            "CHUNK": self.settings.chunk,
            "STEP": self.settings.step,
            **self.settings.options(self.settings.rescale_warps),
        }

    def chunks(self, i: int) -> int:
        """Programs of the elementwise kernels."""
        return -(-self.weights[i].arrangement.numel // self.settings.chunk)


class _Forward(_Plan):
    """One launch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        work, kinds = Launch(), Kinds()
        for i in by_size(self.weights):
            w = self.weights[i]
            kind = kinds.number((w.strided(), w.flat_width(), TYPES[w.dtype], TYPES[DTYPES[self.numbers.dtypes[i]]]))
            for chunk in range(self.chunks(i)):
                work.add(i, chunk, kind)
        self.work, self.programs = work.sent(self.device), work.programs
        self.rescale = Kernel(kernels, "rescale", self.elementwise_options(kinds))
        self.tables = memory.Tables(self._numbers())

    def _numbers(self) -> list[int | memory.Address]:
        """The table, for the addresses of weights, scales and results."""
        numbers: list[int | memory.Address] = []
        count, sigma = len(self.weights), 0
        unused = [0] * (kernels.COLUMNS.value - kernels.FLAT.value)
        for i in range(count):
            numbers += [*self.row(i, i, count, count + self.scales + i, sigma), *unused]
            sigma += self.numbers.view_masks[i].bit_count()
        return numbers

    def run(
        self, places: Hashable, weights: Sequence[Tensor], scales: Sequence[Tensor], sigma: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """([W̄], mean sigma). ``places``: a key of where weights and scales lie. Rows of results come in the order of
        the weight's, without gaps, or ``weights`` were copies."""
        now = memory.now(self.device)
        results, place = allocate(weights, self.numbers.dtypes)
        table = self.tables.get((places, place), (weights, scales, results), now)
        return results, self._launch(table, now, sigma)

    def again(
        self,
        places: Hashable,
        places_of_results: Hashable,
        addresses: Sequence[int] | None,
        sigma: Tensor,
        _vectors: None,
        _grad_sigma: None,
    ) -> list[Tensor] | None:
        """[mean sigma], see ``Prepared``."""
        now = memory.now(self.device)
        table = self.tables.known((places, places_of_results), addresses, now)
        return None if table is None else [self._launch(table, now, sigma)]

    def _launch(self, table: Tensor, now: memory.Now, sigma: Tensor) -> Tensor:
        memory.keep(self, now)
        mean = torch.empty(len(self.weights), dtype=torch.float32, device=self.device)
        self.rescale.launch(self.programs, table, self.work.here(now), aligned(sigma), mean)
        return mean


class _Backward(_Plan):
    """Two launches."""

    def __init__(
        self,
        weights: Sequence[Weight],
        gradients: Sequence[Weight],
        numbers: Numbers,
        scales: int,
        device: torch.device,
        settings: Settings,
    ) -> None:
        super().__init__(weights, numbers, scales, device, settings)
        self.gradients, self.dtypes = gradients, (*numbers.dtypes, *[FLOAT32] * scales)
        self.first_chunks: list[int] = []
        self.total_chunks = 0
        for i in range(len(weights)):
            self.first_chunks.append(self.total_chunks)
            self.total_chunks += self.chunks(i)
        products, product_kinds, blocks, block_kinds = Launch(), Kinds(), Launch(), Kinds()
        order = by_size(weights)
        for i in order:
            w, g = weights[i], gradients[i]
            kind = (w.strided() or g.strided(), min(w.flat_width(), g.flat_width()), TYPES[w.dtype], TYPES[g.dtype])
            number = product_kinds.number(kind)
            for chunk in range(self.chunks(i)):
                products.add(i, chunk, number)
        for i in reversed(order):  # backwards: what was read last is still in the cache
            g, t = gradients[i], settings.tiles(weights[i].arrangement, settings.step)
            a, (p, q) = g.arrangement, self._views(i)
            itemsize = DTYPES[numbers.dtypes[i]].itemsize
            wide = min(g.vector_width(t), vector_width(a._replace(stride=a.n), itemsize, True, t))
            number = block_kinds.number((p, q, *t.kind(wide), TYPES[g.dtype], TYPES[DTYPES[numbers.dtypes[i]]]))
            for row in reversed(range(t.blocks)):
                blocks.add(i, row, number)
        self.products, self.many_products = products.sent(device), products.programs
        self.blocks, self.many_blocks = blocks.sent(device), blocks.programs
        elementwise = {**self.elementwise_options(product_kinds), "BC": _SETTLED}
        self.inner_products = Kernel(kernels, "inner_products", elementwise)
        options = settings.options(settings.rescale_warps)
        self.gradient = Kernel(kernels, "gradient", {"KINDS": tuple(block_kinds.found), "BL": _SCALED, **options})
        self.tables = memory.Tables(self._numbers())

    def _views(self, i: int) -> tuple[bool, bool]:
        """Whether the row matrix and the class matrix are in use."""
        out, into = bool(self.numbers.view_masks[i] & 1), bool(self.numbers.view_masks[i] & 2)
        return (into, out) if self.weights[i].arrangement.turned else (out, into)

    def _numbers(self) -> list[int | memory.Address]:
        """The table, for the addresses of gradients, bases, scales, results and derivatives by the scales."""
        numbers: list[int | memory.Address] = []
        count, flat = len(self.weights), 0
        results = 2 * count + self.scales
        for i, weight in enumerate(self.weights):
            places, size = vector_places(weight.arrangement, self.numbers.view_masks[i])
            numbers += self.row(i, count + i, 2 * count, results + i, i)
            numbers += [flat + place if place >= 0 else -1 for place in places]
            numbers += [memory.Address(i), self.gradients[i].arrangement.stride, self.chunks(i), self.first_chunks[i]]
            flat += size
        return numbers + [memory.Address(results + count + i) for i in range(self.scales)]

    def run(
        self,
        places: Hashable,
        gradients: Sequence[Tensor],
        grad_sigma: Tensor | None,
        bases: Sequence[Tensor],
        scales: Sequence[Tensor],
        sigma: Tensor,
        vectors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """([dW], [dscale]). ``places``: a key of where gradients, bases and scales lie."""
        now, count = memory.now(self.device), len(bases)
        results, place = allocate((*bases, *scales), self.dtypes)
        table = self.tables.get((places, place), (gradients, bases, scales, results), now)
        self._launch(table, now, grad_sigma, sigma, vectors)
        return results[:count], results[count:]

    def again(
        self,
        places: Hashable,
        places_of_results: Hashable,
        addresses: Sequence[int] | None,
        sigma: Tensor,
        vectors: Tensor,
        grad_sigma: Tensor | None,
    ) -> list[Tensor] | None:
        """Nothing beside the results, see ``Prepared``."""
        now = memory.now(self.device)
        table = self.tables.known((places, places_of_results), addresses, now)
        if table is None:
            return None
        self._launch(table, now, grad_sigma, sigma, vectors)
        return []

    def _launch(
        self, table: Tensor, now: memory.Now, grad_sigma: Tensor | None, sigma: Tensor, vectors: Tensor
    ) -> None:
        memory.keep(self, now)
        count = len(self.weights)
        # Both aligned, whatever the list.
        dots = torch.empty(self.total_chunks, dtype=torch.float32, device=self.device)
        coefficients = torch.empty(3 * count, dtype=torch.float32, device=self.device)
        sigma, vectors = aligned(sigma), aligned(vectors)
        given = sigma if grad_sigma is None else aligned(grad_sigma)
        self.inner_products.launch(
            self.many_products,
            *(table, self.products.here(now), sigma, given, int(grad_sigma is not None), dots, coefficients),
            memory.counters(count, now),
        )
        self.gradient.launch(self.many_blocks, table, self.blocks.here(now), coefficients, vectors, count, self.scales)


forward_plan = lru_cache(maxsize=256)(_Forward)
backward_plan = lru_cache(maxsize=256)(_Backward)
