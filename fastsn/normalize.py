"""Batches of weights that one call of the ops normalizes, and their dispatch to an implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsn import ops, reference, torch_private, views
from fastsn.backends import chosen, kernels_for
from fastsn.reference import Vectors


class WeightSpec(NamedTuple):
    """A weight and the settings and state that normalize it.

    ``dim``: the dimension of output channels; ``vectors``: (u, v) by view, updated in place; ``dtype``: of W̄;
    ``v_first``: update v before u.
    """

    weight: Tensor
    dim: int
    vectors: Vectors
    scale: float | Tensor
    dtype: torch.dtype
    impl: str = "auto"
    v_first: bool = False


class UsedVectors:
    """The vectors that a call used: copies, which the next forward does not overwrite.

    ``stored``: the vectors of each weight. With ``flat``, the values of all vectors concatenated, ``stored`` gives only
    their sizes. No reference to a weight, whose graph would otherwise live as long.
    """

    __slots__ = ("_flat", "_stored")

    def __init__(self, stored: Sequence[Vectors], flat: Tensor | None = None) -> None:
        self._stored, self._flat = stored, flat

    def of(self, position: int) -> Vectors:
        """The vectors of the weight with this index in the call."""
        if self._flat is None:
            return self._stored[position]
        own = self._stored[position]
        sizes = [x.numel() for each in self._stored[: position + 1] for pair in each.values() for x in pair]
        parts = torch.split(self._flat[: sum(sizes)], sizes)[-2 * len(own) :]
        return {view: (parts[2 * i], parts[2 * i + 1]) for i, view in enumerate(own)}


class Batch:
    """Weights that one call normalizes: the same implementation, device and accumulation dtype."""

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        self.specs = specs
        self.weights, self.given_scales = [spec.weight for spec in specs], [spec.scale for spec in specs]
        # Whether the version counter of the weight alone validates a cached W̄ (not that of a tensor scale too).
        traced = torch.compiler.is_compiling()
        self.fast_lookup = not (
            traced or any(isinstance(spec.scale, Tensor) or spec.weight.is_inference() for spec in specs)
        )

    def iterate(self, n: int) -> None:
        """``n`` power iterations, stored."""
        raise NotImplementedError

    def normalize(self, n: int, store: bool) -> tuple[list[Tensor], UsedVectors]:
        """The W̄ after ``n`` power iterations, whose vectors are stored if ``store``."""
        raise NotImplementedError

    def raise_on_second_backward(self, made: Sequence[Tensor]) -> None:
        """Make a second backward through these W̄, after the first has freed the graph, raise an error with the remedy.
        A no-op here: the backward of the kernels raises it itself."""


_fused = torch.ops.fastsn._normalize.default if kernels_for("cpp", 0).available else None  # csrc/normalize.cpp


class KernelBatch(Batch):
    """A batch for the C++ or Triton kernels: the arguments of the list ops."""

    _handle: Tensor | None = None  # handle of these arguments in C++, from the second call on

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        super().__init__(specs)
        self._used = False
        self.stored = [spec.vectors for spec in specs]
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        self.scales: list[Tensor] = []
        view_masks, scale_index, scale_factor = [], [], []
        for spec in specs:
            mask = 0
            for view, (u, v) in spec.vectors.items():
                self.u.append(u)
                self.v.append(v)
                mask += ops.VIEW_BITS[view]
            view_masks.append(mask)
            if isinstance(spec.scale, Tensor):
                index = next((i for i, scale in enumerate(self.scales) if scale is spec.scale), len(self.scales))
                self.scales += [spec.scale] * (index == len(self.scales))
                scale_index.append(index)
                scale_factor.append(1.0)
            else:
                scale_index.append(-1)
                scale_factor.append(spec.scale)
        dims, dtypes = [spec.dim for spec in specs], [ops.DTYPE_CODES[spec.dtype] for spec in specs]
        self._iteration = (dims, view_masks, [int(spec.v_first) for spec in specs])
        self._rescale = (dims, view_masks, scale_index, scale_factor, dtypes)

    def iterate(self, n: int) -> None:
        ops.power_iteration_(self.weights, self.u, self.v, *self._iteration, n)

    def normalize(self, n: int, store: bool) -> tuple[list[Tensor], UsedVectors]:
        store = store and n > 0
        if self._used and _fused is not None and not (torch.compiler.is_compiling() or torch_private.dispatch_modes()):
            if self._handle is None and self._can_have_handle():
                lists = (self.weights, self.u, self.v, self.scales)
                self._handle = torch.ops.fastsn._remember(*lists, *self._iteration, *self._rescale[2:])
            if self._handle is not None:
                outputs, vectors = _fused(self._handle, n, store)
                return outputs, UsedVectors(self.stored, vectors)
        self._used = True
        iterated = ops.power_iteration_ if store else ops.power_iteration
        sigma, vectors = iterated(self.weights, self.u, self.v, *self._iteration, n)
        scales = [saveable(scale) for scale in self.scales]
        outputs, _ = ops.rescale(self.weights, scales, sigma, vectors, *self._rescale)
        wanted = [requires_grad(spec.weight, spec.scale) for spec in self.specs]
        if not all(wanted):  # autograd gives every result of an op requires_grad if one needs it
            outputs = [w if own else w.detach() for w, own in zip(outputs, wanted, strict=True)]
        return outputs, UsedVectors(self.stored, vectors)

    def _can_have_handle(self) -> bool:
        """False for tensor subclasses, which must see the ops of the schema, and where ``module.to`` swaps tensors,
        which torch refuses for tensors that C++ refers to."""
        given = (*self.weights, *self.u, *self.v, *self.scales)
        plain = all(type(x) in (Tensor, nn.Parameter) for x in given)
        return plain and not torch.__future__.get_swap_module_params_on_conversion()


class ReferenceBatch(Batch):
    """A batch for the reference: differentiable to any order, and by torch.func transforms."""

    def iterate(self, n: int) -> None:
        _iterate(self.specs, n, True)

    def normalize(self, n: int, store: bool) -> tuple[list[Tensor], UsedVectors]:
        specs, vectors = self.specs, _iterate(self.specs, n, store)
        with no_autocast(specs[0].weight):
            # One cast: the terms of a half-precision gradient are summed before rounding.
            weights = [spec.weight.to(reference.wide(spec.weight.dtype)) for spec in specs]
            oiks = [views.as_oik(w, spec.dim) for w, spec in zip(weights, specs, strict=True)]
            scales = [saveable(spec.scale) if isinstance(spec.scale, Tensor) else spec.scale for spec in specs]
            sigmas = reference.sigmas(oiks, vectors)
            return reference.rescale(weights, sigmas, scales, [spec.dtype for spec in specs]), UsedVectors(vectors)

    def raise_on_second_backward(self, made: Sequence[Tensor]) -> None:
        """By a prehook on each node, which costs some microseconds."""
        for weight in made:
            if weight.grad_fn is not None:
                weight.grad_fn.register_prehook(_FreedGraph())


class _FreedGraph:
    """Prehook of an autograd node: raises if an earlier backward has freed the graph."""

    def __init__(self) -> None:
        self._freed = False

    def __call__(self, _: Any) -> None:
        if self._freed:
            raise RuntimeError(ops.autograd.FREED)
        if not torch.compiler.is_compiling():  # compiled autograd cannot trace the call
            self._freed = not torch_private.retains_graph()


@torch.no_grad()
def _iterate(specs: Sequence[WeightSpec], n: int, store: bool) -> Sequence[Vectors]:
    """The vectors after ``n`` iterations of the reference: copies, as the next forward overwrites the buffers."""
    if n == 0:
        return [_copied(spec.vectors) for spec in specs]
    transformed = torch_private.transforms_active() if not torch.compiler.is_compiling() else False
    with torch_private.forward_mode(False) if transformed else nullcontext(), no_autocast(specs[0].weight):
        oiks = [views.as_oik(spec.weight, spec.dim) for spec in specs]
        orders = [spec.v_first for spec in specs]
        new = reference.power_iteration(oiks, [spec.vectors for spec in specs], n, v_first=orders)
    for buffer, vector in _pairs(specs, new) if store else ():
        if transformed and torch_private.is_batched(buffer):
            buffer.copy_(vector)
        else:  # out= also works on buffers captured by torch.func transforms
            torch.mul(vector, 1, out=buffer)
    return [_copied(vectors) for vectors in new] if torch.compiler.is_compiling() else new


def _pairs(specs: Sequence[WeightSpec], new: Sequence[Vectors]) -> list[tuple[Tensor, Tensor]]:
    """Pairs (stored vector, new vector)."""
    return [
        pair
        for spec, vectors in zip(specs, new, strict=True)
        for view, found in vectors.items()
        for pair in zip(spec.vectors[view], found, strict=True)
    ]


def _copied(vectors: Vectors) -> Vectors:
    """Copies that a compiled graph is certain to save for backward. The partitioner may recompute pointwise copies in
    backward, from buffers that the next forward has overwritten by then, but never a concatenation."""
    tensors = [x for pair in vectors.values() for x in pair]
    parts = torch.cat(tensors).split_with_sizes([x.numel() for x in tensors])
    return {view: (parts[2 * i], parts[2 * i + 1]) for i, view in enumerate(vectors)}


_BATCH: dict[str, type[Batch]] = {"reference": ReferenceBatch, "cpp": KernelBatch, "triton": KernelBatch}


def batches(specs: Sequence[WeightSpec]) -> list[tuple[Batch, list[int]]]:
    """``specs`` in as few batches as possible, each with the indices of its weights in ``specs``.

    Weights that share a norm are in different ones: a GPU would read and write its vectors at once.
    """
    kinds: dict[Any, Any] = {}
    groups: dict[Any, list[int]] = {}
    uses: Counter[tuple[int, ...]] = Counter()
    for i, spec in enumerate(specs):
        kind = (spec.impl, spec.weight.device, spec.weight.dtype)
        if kind not in kinds:
            kinds[kind] = (chosen(spec.impl, spec.weight), spec.weight.device, reference.wide(spec.weight.dtype))
        vectors = tuple([id(u) for u, _ in spec.vectors.values()])
        groups.setdefault((*kinds[kind], uses[vectors]), []).append(i)
        uses[vectors] += 1
    return [(_BATCH[impl]([specs[i] for i in positions]), positions) for (impl, *_), positions in groups.items()]


def batch(spec: WeightSpec) -> Batch:
    """The batch of a single weight."""
    return _BATCH[chosen(spec.impl, spec.weight)]([spec])


def normalize(spec: WeightSpec, n: int, store: bool) -> tuple[Tensor, Vectors]:
    """W̄ of a single weight after ``n`` power iterations, and the vectors used."""
    (weight,), used = batch(spec).normalize(n, store)
    return weight, used.of(0)


def requires_grad(weight: Tensor, scale: float | Tensor) -> bool:
    """Whether W̄ requires grad."""
    return weight.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)


def saveable(scale: Tensor) -> Tensor:
    """A scale that autograd can save: a copy if it is a buffer. DDP in torch 2.10 and 2.11 overwrites buffers before
    each forward, which would invalidate tensors saved by an earlier forward."""
    return scale if scale.requires_grad or not torch.is_grad_enabled() else scale.clone()


def autocast_is_on(device: str) -> bool:
    """Whether autocast is enabled for a device type; False where autocast does not exist."""
    # torch.compile in torch 2.10 and 2.11 cannot trace is_autocast_available: called only for other device types.
    exists = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return exists and torch.is_autocast_enabled(device)


def no_autocast(weight: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast: power iterations never run in lower precision."""
    device = weight.device.type
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()
