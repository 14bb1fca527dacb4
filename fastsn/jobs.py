"""Weights to normalize, in lists: who computes them, and one call of the ops for all that one call can take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsn import ops, reference, views
from fastsn.backends import chosen, transformed
from fastsn.reference import Vectors


class Job(NamedTuple):
    """One weight to normalize, and how."""

    weight: Tensor
    dim: int
    vectors: Vectors
    scale: float | Tensor
    dtype: torch.dtype
    impl: str = "auto"


class Fixed(NamedTuple):
    """The vectors that a weight was normalized with: private copies, which the next forward does not overwrite."""

    made_with: Vectors | _Batch
    position: int = 0

    def vectors(self) -> Vectors:
        """By view. Kernels give those of a whole call end to end, and they are rarely asked for."""
        if not isinstance(self.made_with, _Batch):
            return self.made_with
        stored, flat = self.made_with
        sizes = [x.numel() for each in stored[: self.position + 1] for pair in each.values() for x in pair]
        own = stored[self.position]
        parts = torch.split(flat[: sum(sizes)], sizes)[-2 * len(own) :]
        return {view: (parts[2 * i], parts[2 * i + 1]) for i, view in enumerate(own)}


class _Batch(NamedTuple):
    """The stored vectors of all jobs of a call, for their sizes, and what they were in the call, end to end. Of the
    jobs themselves nothing: vectors outlive the graphs that weights may have."""

    stored: list[Vectors]
    flat: Tensor


class Normalized(NamedTuple):
    """W̄, and what it was made with."""

    weight: Tensor
    fixed: Fixed


def requires_grad(weight: Tensor, scale: float | Tensor) -> bool:
    """Whether W̄ should: an op gives all of its results a graph as soon as one needs it."""
    return weight.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)


def saveable(scale: Tensor) -> Tensor:
    """A scale that a graph can save: of a buffer a copy. DDP of torch 2.10 and 2.11 writes over buffers before each
    forward, and the first of two would find what it has saved overwritten."""
    return scale if scale.requires_grad or not torch.is_grad_enabled() else scale.clone()


def normalize(jobs: Sequence[Job], n: int, store: bool) -> list[Normalized]:
    """Iterate ``n`` times, ``store`` the vectors, rescale: one call of each op for all jobs of a device and width."""
    if len(jobs) == 1:
        return _RUN[chosen(jobs[0].impl, jobs[0].weight)](jobs, n, store)
    results: dict[int, Normalized] = {}
    for impl, places in _calls(jobs):
        results |= zip(places, _RUN[impl]([jobs[i] for i in places], n, store), strict=True)
    return [results[i] for i in range(len(jobs))]


def iterate(jobs: Sequence[Job], n: int) -> None:
    """``n`` rounds, stored: one call for all jobs of a device and width."""
    for impl, places in _calls(jobs):
        own = [jobs[i] for i in places]
        if impl == "reference":
            _iterate_reference(own, n, True)
        else:
            ops.power_iteration_(*_lists(own), n)


def _calls(jobs: Sequence[Job]) -> list[tuple[str, list[int]]]:
    """Who computes, and which jobs in one call."""
    kinds: dict[Any, Any] = {}
    groups: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
        kind = (job.impl, job.weight.device, job.weight.dtype)
        if kind not in kinds:
            kinds[kind] = (chosen(job.impl, job.weight), job.weight.device, reference.wide(job.weight.dtype))
        groups.setdefault(kinds[kind], []).append(i)
    return [(impl, places) for (impl, _, _), places in groups.items()]


def _lists(jobs: Sequence[Job]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], list[int], list[int]]:
    """What power_iteration takes of the jobs."""
    u, v, bits = [], [], []
    for job in jobs:
        bits.append(0)
        for view, pair in job.vectors.items():
            u.append(pair[0])
            v.append(pair[1])
            bits[-1] += ops.VIEW_BITS[view]
    return [job.weight for job in jobs], u, v, [job.dim for job in jobs], bits, [0] * len(jobs)


def _run_kernels(jobs: Sequence[Job], n: int, store: bool) -> list[Normalized]:
    lists = _lists(jobs)
    sigma, vectors = (ops.power_iteration_ if store and n else ops.power_iteration)(*lists, n)
    tensors: list[Tensor] = []
    scale_index, scale_factor = [], []
    for job in jobs:
        if isinstance(job.scale, Tensor):
            known = next((i for i, scale in enumerate(tensors) if scale is job.scale), None)
            scale_index.append(len(tensors) if known is None else known)
            scale_factor.append(1.0)
            tensors += [job.scale] * (known is None)
        else:
            scale_index.append(-1)
            scale_factor.append(job.scale)
    scales = [saveable(scale) for scale in tensors]
    dtypes = [ops.DTYPE_CODES[job.dtype] for job in jobs]
    outputs, _ = ops.rescale(lists[0], scales, sigma, vectors, *lists[3:5], scale_index, scale_factor, dtypes)
    batch = _Batch([job.vectors for job in jobs], vectors)
    own = [w if requires_grad(job.weight, job.scale) else w.detach() for w, job in zip(outputs, jobs, strict=True)]
    return [Normalized(w, Fixed(batch, i)) for i, w in enumerate(own)]


def _run_reference(jobs: Sequence[Job], n: int, store: bool) -> list[Normalized]:
    vectors = _iterate_reference(jobs, n, store)
    with no_autocast(jobs[0].weight):
        # Widened once: the parts of a half-precision gradient are added up before it is rounded.
        weights = [job.weight.to(reference.wide(job.weight.dtype)) for job in jobs]
        sigmas = reference.sigmas([views.as_oik(w, job.dim) for w, job in zip(weights, jobs, strict=True)], vectors)
        scales = [saveable(job.scale) if isinstance(job.scale, Tensor) else job.scale for job in jobs]
        outputs = reference.rescale(weights, sigmas, scales, [job.dtype for job in jobs])
    return [Normalized(w, Fixed(made_with)) for w, made_with in zip(outputs, vectors, strict=True)]


@torch.no_grad()
def _iterate_reference(jobs: Sequence[Job], n: int, store: bool) -> list[Vectors]:
    """The vectors after ``n`` rounds: always private copies, for the next forward overwrites the buffers in place."""
    if n == 0:
        return [_copies(job.vectors) for job in jobs]
    under_transforms = transformed()
    # no_grad leaves forward mode on, but an iteration is constant to every derivative.
    constant = forward_ad._set_fwd_grad_enabled(False) if under_transforms else nullcontext()
    with constant, no_autocast(jobs[0].weight):
        oiks = [views.as_oik(job.weight, job.dim) for job in jobs]
        new = reference.power_iteration(oiks, [job.vectors for job in jobs], n)
    if store:
        for job, vectors in zip(jobs, new, strict=True):
            for view, pair in vectors.items():
                for buffer, vector in zip(job.vectors[view], pair, strict=True):
                    if under_transforms and torch._C._functorch.is_batchedtensor(buffer):  # vmap has no rule for out=
                        buffer.copy_(vector)
                    else:  # out= also works on captured buffers inside torch.func transforms, as torch's does
                        torch.mul(vector, 1, out=buffer)
    return [_copies(vectors) for vectors in new] if torch.compiler.is_compiling() else new


def _copies(vectors: Vectors) -> Vectors:
    """Copies that a compiled graph saves for its backward. What is made element by element it may instead make again
    there, from the buffers, which the next forward has overwritten by then; a concatenation it never makes twice."""
    tensors = [x for pair in vectors.values() for x in pair]
    parts = torch.cat(tensors).split_with_sizes([x.numel() for x in tensors])
    return {view: (parts[2 * i], parts[2 * i + 1]) for i, view in enumerate(vectors)}


_RUN = {"reference": _run_reference, "cpp": _run_kernels, "triton": _run_kernels}


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; False where there is no such thing."""
    # The compiler of torch 2.10 and 2.11 cannot trace the question whether there is: asked only where there may not be.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def no_autocast(weight: Tensor) -> AbstractContextManager[object]:
    """A context without autocast: iterations never run in a lower precision."""
    device = weight.device.type
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()
