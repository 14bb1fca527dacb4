"""``rescale`` and ``rescale_backward`` for tensors of a GPU."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn.triton import memory
from fastsn.triton import rescale as kernels
from fastsn.triton.arrangement import arranged, arrangement
from fastsn.triton.plan import DTYPES, TYPES, Kinds, Launch, Run, Weight, by_size, described, vector_places
from fastsn.triton.settings import Settings, current, vector_width

_SETTLED = 1024  # chunks whose sums are added at a time
_SCALED = 128  # weights whose derivatives by a scale are added at a time


class Numbers(NamedTuple):
    """What a call says of its weights beside the tensors."""

    view_masks: tuple[int, ...]
    scale_index: tuple[int, ...]
    scale_factor: tuple[float, ...]
    dtypes: tuple[int, ...]


def prepared_rescale(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> Run:
    """What gives ([W̄], mean sigma), as the op does, for lists of tensors like these."""
    placed = [described(w, dim, dense=True) for w, dim in zip(weights, dims, strict=True)]
    numbers = Numbers(tuple(view_masks), tuple(scale_index), tuple(scale_factor), tuple(dtypes))
    plan = _forward_plan(tuple(w for _, w in placed), numbers, weights[0].device, current(weights[0].device))
    where_they_are = all(place is w for w, (place, _) in zip(weights, placed, strict=True))

    def run(weights: Sequence[Tensor], scales: Sequence[Tensor], sigma: Tensor, *_: Any) -> tuple[list[Tensor], Tensor]:
        if where_they_are:
            return plan.run(weights, scales, sigma)
        places = [arranged(w, dim, dense=True)[0] for w, dim in zip(weights, dims, strict=True)]
        results, mean = plan.run(places, scales, sigma)
        return _as_given(results, places, weights, dims), mean

    return run


def prepared_rescale_backward(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> Run:
    """What gives ([dW], [dscale]), as the op does, for lists of tensors like these."""
    placed = [described(base, dim, dense=True) for base, dim in zip(bases, dims, strict=True)]
    beside = [_beside(*each) for each in zip(gradients, bases, placed, dims, strict=True)]
    numbers = Numbers(tuple(view_masks), tuple(scale_index), tuple(scale_factor), tuple(dtypes))
    described_all = tuple(w for _, w in placed), tuple(g for _, g in beside)
    device = bases[0].device
    plan = _backward_plan(*described_all, numbers, len(scales), device, current(device))
    found = zip((*bases, *gradients), (*placed, *beside), strict=True)
    where_they_are = all(place is x for x, (place, _) in found)

    def run(
        gradients: Sequence[Tensor],
        grad_sigma: Tensor | None,
        bases: Sequence[Tensor],
        scales: Sequence[Tensor],
        sigma: Tensor,
        vectors: Tensor,
        *_: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        places, given = bases, gradients
        if not where_they_are:
            placed = [described(base, dim, dense=True) for base, dim in zip(bases, dims, strict=True)]
            places = [place for place, _ in placed]
            given = [_beside(*each)[0] for each in zip(gradients, bases, placed, dims, strict=True)]
        results, d_scales = plan.run(places, given, grad_sigma, scales, sigma, vectors)
        own = [d.to(scale.device, scale.dtype) for d, scale in zip(d_scales, scales, strict=True)]
        return results if where_they_are else _as_given(results, places, bases, dims), own

    return run


def _as_given(
    results: list[Tensor], places: Sequence[Tensor], given: Sequence[Tensor], dims: Sequence[int]
) -> list[Tensor]:
    """Results of weights that had to be copied go back to the order of their dimensions."""
    return [
        x if place is w else torch.empty_like(w, dtype=x.dtype).copy_(x.movedim(0, dim))
        for x, place, w, dim in zip(results, places, given, dims, strict=True)
    ]


def _beside(g: Tensor, base: Tensor, placed: tuple[Tensor, Weight], dim: int) -> tuple[Tensor, Weight]:
    """The gradient, or a copy of it, whose rows lie in the order of the base's."""
    place, weight = placed
    if place is not base:
        return described(g.movedim(dim, 0).contiguous(), 0)
    found = arrangement(g.shape, g.stride(), dim)
    if found is None or found.order() != weight.arrangement.order():
        g = torch.empty_like(base, dtype=g.dtype).copy_(g)
    return described(g, dim)


def _bits(x: float) -> int:
    """Of a float32; of infinity where that has no room for the number."""
    largest = torch.finfo(torch.float32).max
    return int(struct.unpack("<i", struct.pack("<f", x if abs(x) <= largest else math.copysign(math.inf, x)))[0])


class _Plan:
    """What the tables of both directions have in common."""

    def __init__(
        self,
        weights: Sequence[Weight],
        numbers: Numbers,
        device: torch.device,
        settings: Settings,
    ) -> None:
        self.weights, self.numbers, self.device, self.settings = weights, numbers, device, settings
        self.tables = memory.Tables()

    def results(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Memory for W̄ or dW. Its rows come in the order of the weight's, without gaps, or ``like`` were a copy."""
        codes = self.numbers.dtypes
        return [torch.empty_like(x, dtype=DTYPES[code]) for x, code in zip(like, codes, strict=True)]

    def row(self, i: int, tensor: Tensor, result: Tensor, sigma: int, scales: Sequence[Tensor]) -> list[int]:
        """The columns up to the scale's number."""
        a, at, views = self.weights[i].arrangement, self.numbers.scale_index[i], self.numbers.view_masks[i].bit_count()
        scale = scales[at].data_ptr() if at >= 0 else 0
        numbers = [tensor.data_ptr(), a.stride, a.rows, a.b, a.k, result.data_ptr(), sigma, views]
        return [*numbers, _bits(self.numbers.scale_factor[i]), scale, at]

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
        self.work, self.programs, self.kinds = work.sent(self.device), work.programs, tuple(kinds.found)

    def rows(self, weights: Sequence[Tensor], results: Sequence[Tensor], scales: Sequence[Tensor]) -> list[int]:
        """The table."""
        numbers: list[int] = []
        sigma = 0
        unused = [0] * (kernels.COLUMNS.value - kernels.FLAT.value)
        for i, tensor in enumerate(weights):
            numbers += [*self.row(i, tensor, results[i], sigma, scales), *unused]
            sigma += self.numbers.view_masks[i].bit_count()
        return numbers

    def run(self, weights: Sequence[Tensor], scales: Sequence[Tensor], sigma: Tensor) -> tuple[list[Tensor], Tensor]:
        """Launch."""
        device, settings = self.device, self.settings
        memory.keep(self, device)
        scales = [scale.to(device, torch.float32) for scale in scales]
        results = self.results(weights)
        addresses = tuple([x.data_ptr() for x in (*weights, *results, *scales)])
        table = self.tables.get(addresses, lambda: self.rows(weights, results, scales), device)
        mean = torch.empty(len(weights), dtype=torch.float32, device=device)
        kernels.rescale[(self.programs,)](
            table, self.work.here(), sigma.contiguous(), mean,
            KINDS=self.kinds, CHUNK=settings.chunk, STEP=settings.step, **settings.options(settings.rescale_warps),
        )  # fmt: skip
        return results, mean


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
        super().__init__(weights, numbers, device, settings)
        self.gradients, self.scales = gradients, scales
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
        self.launches = [
            (launched.sent(device), launched.programs, tuple(kinds.found))
            for launched, kinds in ((products, product_kinds), (blocks, block_kinds))
        ]

    def _views(self, i: int) -> tuple[bool, bool]:
        """Whether the row matrix and the class matrix are in use."""
        out, into = bool(self.numbers.view_masks[i] & 1), bool(self.numbers.view_masks[i] & 2)
        return (into, out) if self.weights[i].arrangement.turned else (out, into)

    def rows(
        self,
        bases: Sequence[Tensor],
        gradients: Sequence[Tensor],
        results: Sequence[Tensor],
        scales: Sequence[Tensor],
        d_scales: Sequence[Tensor],
    ) -> list[int]:
        """The table."""
        numbers: list[int] = []
        flat = 0
        for i, (base, g) in enumerate(zip(bases, gradients, strict=True)):
            places, size = vector_places(self.weights[i].arrangement, self.numbers.view_masks[i])
            own = [flat + place if place >= 0 else -1 for place in places]
            flat += size
            numbers += [
                *self.row(i, base, results[i], i, scales),
                *own,
                g.data_ptr(),
                self.gradients[i].arrangement.stride,
            ]
            numbers += [self.chunks(i), self.first_chunks[i]]
        return numbers + [d.data_ptr() for d in d_scales]

    def run(
        self,
        bases: Sequence[Tensor],
        gradients: Sequence[Tensor],
        grad_sigma: Tensor | None,
        scales: Sequence[Tensor],
        sigma: Tensor,
        vectors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Launch."""
        device, settings = self.device, self.settings
        options = settings.options(settings.rescale_warps)
        memory.keep(self, device)
        scales = [scale.to(device, torch.float32) for scale in scales]
        results, d_scales = self.results(bases), [torch.empty_like(scale) for scale in scales]
        tensors = (bases, gradients, results, scales, d_scales)
        addresses = tuple([x.data_ptr() for each in tensors for x in each])
        table = self.tables.get(addresses, lambda: self.rows(*tensors), device)
        (products, many_products, product_kinds), (blocks, many_blocks, block_kinds) = self.launches
        # Both aligned, whatever the list: the JIT compiles anew for an argument that is not.
        dots = torch.empty(self.total_chunks, dtype=torch.float32, device=device)
        coefficients = torch.empty(3 * len(bases), dtype=torch.float32, device=device)
        sigma, vectors = sigma.contiguous(), vectors.contiguous()
        given = sigma if grad_sigma is None else grad_sigma.contiguous()
        kernels.inner_products[(many_products,)](
            table, products.here(), sigma, given, int(grad_sigma is not None), dots, coefficients,
            memory.counters(len(bases), device),
            KINDS=product_kinds, CHUNK=settings.chunk, STEP=settings.step, BC=_SETTLED, **options,
        )  # fmt: skip
        kernels.gradient[(many_blocks,)](
            table, blocks.here(), coefficients, vectors, len(bases), self.scales,
            KINDS=block_kinds, BL=_SCALED, **options,
        )  # fmt: skip
        return results, d_scales


_forward_plan = lru_cache(maxsize=256)(_Forward)
_backward_plan = lru_cache(maxsize=256)(_Backward)
