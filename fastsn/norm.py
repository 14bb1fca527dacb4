"""SpectralNorm: normalizes one weight, stores its u and v, and decides when they are iterated.

A child module of fastsn layers, a parametrization under ``fastsn.spectral_norm``; both call ``norm(weight)``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsn import checks, normalize, recomputation, reference, torch_private, variants, views, weight_cache
from fastsn.backends import available, chosen
from fastsn.exporting import refuse_onnx
from fastsn.normalize import Batch, WeightSpec
from fastsn.reference import Sigmas, Vectors
from fastsn.stored_vectors import WARM_UP_ITERATIONS, StoredVectors
from fastsn.weight_cache import CacheEntry

_settings = itemgetter("dim", "impl", "v_first")


class _Changes:
    """``count`` changes whenever an attribute of any norm is set, in any thread: while it is unchanged, a plan need not
    compare settings."""

    count = 0
    following = itertools.count(1).__next__  # atomic, as += is not


changes = _Changes()


class SpectralNorm(StoredVectors):
    r"""Normalizes one weight: ``norm(weight)`` returns :math:`\bar W = c\,W / \mathrm{mean}_{views}(\sigma)`.

    In training mode every call first runs ``n_power_iterations`` rounds of :math:`u \leftarrow M v / \|M v\|`,
    :math:`v \leftarrow M^H u / \|M^H u\|` on each view and stores u and v in place; in evaluation mode they are not
    updated. The gradient treats u and v as constants. Frozen weights, and calls under ``no_grad``, iterate too, as in
    torch.

    Args:
        weight: the current weight, any shape with at least one dimension. A 1-D weight is divided by its 2-norm and
            has no u and v.
        n_power_iterations: power iterations per call in training mode, at least 1.
        dim: the dimension of output channels.
        eps: floor of the norm of a 1-D weight, as in torch. A weight with more dimensions needs none: its vectors are
            normalized exactly at any size, and a zero vector is not stored.
        variant: "sn", "ssn", "bsn" or "bssn", see ``fastsn.variants``.
        scale: the constant c of "ssn" and "bssn": a float, a tensor of one element, or a Parameter (learnable, may be
            shared between norms).
        impl: the implementation: "auto" (the kernels of the weight's device, else the reference), "reference", "cpp" or
            "triton"; see ``fastsn.backends``.
        follows_autocast: return the weight in the autocast dtype while autocast is on. For weights of operations
            that autocast would cast anyway; the iteration itself never runs in a lower precision.
        vectors: initial (u, v) by view, registered without a copy unless the dtype has to be widened. Views that are
            not in it are drawn at random and iterated. For replacing another norm.
        v_first: a power iteration updates v before u, as in torch's old hook ``torch.nn.utils.spectral_norm``.

    Buffers: u and v, see ``StoredVectors``.

    Raises:
        ValueError, TypeError, IndexError: a bad argument; the message names it.
        RuntimeError: an ``impl`` that is not available, with the reason.
    """

    scale: float | Tensor
    cached: list[CacheEntry]  # of the active steps and fused forwards, newest last

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        variant: str = "sn",
        scale: float | Tensor = 1.0,
        impl: str = "auto",
        follows_autocast: bool = False,
        vectors: Vectors | None = None,
        v_first: bool = False,
    ) -> None:
        super().__init__()
        row = variants.get(variant)
        checks.weight(weight, "weight")
        n_power_iterations = checks.count(n_power_iterations, "n_power_iterations")
        self.ndim = weight.ndim
        self.dim = checks.dim(dim, weight.ndim)
        self.eps = checks.eps(eps)
        self.variant = variant
        self.impl = available(impl)
        scale = checks.scale(scale, row)
        checks.scale_has_values(weight, scale)
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale
        self.follows_autocast = follows_autocast
        self.v_first = checks.flag(v_first, "v_first")
        given: Any = checks.vectors_by_view({} if vectors is None else vectors)
        self.cached = []
        self._cached_batch: tuple[list[object], Batch] | None = None
        if weight.ndim > 1:
            self.n_power_iterations = n_power_iterations
            oik = views.as_oik(weight.detach(), self.dim)
            fresh = self.store(oik, views.distinct(row.views, oik), given)
            if fresh and not weight.is_meta:
                normalize.batch(self.spec(weight)._replace(vectors=fresh)).iterate(WARM_UP_ITERATIONS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale" and not isinstance(value, Tensor):  # not tensors: FSDP and replicas assign them all the time
            value = checks.scale(value, variants.get(self.variant))
        super().__setattr__(name, value)
        changes.count = changes.following()

    def fast_call(self, weight: Tensor, eager: bool = False) -> Tensor:
        """``self(weight)``, by a shorter path if a step has cached W̄. ``eager``: known not to be compiling."""
        own = self.__dict__  # attributes of an nn.Module take twice as long
        cached: list[CacheEntry] = own["cached"]
        if cached and (eager or not torch.compiler.is_compiling()) and not torch_private.has_hooks(own):
            # A slice, as another thread may just have ended its step.
            for weights, _, known, scale, version, value in cached[-1:]:
                if (
                    known is weight
                    and scale is own.get("scale")
                    and weight._version == version
                    and weight.dtype is value.dtype
                    and (weight.requires_grad is value.requires_grad or not torch.is_grad_enabled())
                    and weights.thread == threading.get_ident()
                    and not (
                        recomputation.state.active or torch_private.any_autocast() or torch_private.backward_id() != -1
                    )
                ):
                    return value
        return self(weight)  # type: ignore[no-any-return]

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight: same shape and strides, same dtype (or autocast's). Iterates in training mode."""
        if getattr(weight, "ndim", None) != self.ndim:
            weight = checks.weight(weight, "weight")
            raise ValueError(f"weight must have {self.ndim} dimensions as at construction, got {weight.ndim}")
        if self.ndim == 1:
            unit = F.normalize(weight.to(reference.wide(weight.dtype)), dim=0, eps=self.eps)
            return self.scaled(unit).to(weight.dtype)
        compiling = torch.compiler.is_compiling()
        region = None if compiling else recomputation.current_region()
        if region is not None and region.replaying is not None:
            return weight_cache.normalize_fixed(
                self.spec(checks.weight(weight, "weight"))._replace(vectors=recomputation.replay(self))
            )
        cached = weight_cache.active_entry(self.cached, compiling)
        if cached is not None:
            weights, position, *_ = cached
            if region is not None:
                recomputation.record(self, weights.vectors, position)
            return weights.get(position, weight, self.scale, self._out_dtype(weight), compiling)
        rounds = 0 if not compiling and recomputation.in_backward() else self.rounds()
        batch = self._batch(weight, compiling)
        with recomputation.hide_from_checkpoint():
            (normalized,), vectors = batch.normalize(rounds, rounds > 0)
        if region is not None:
            recomputation.record(self, vectors, 0)
        return normalized

    def _batch(self, weight: Tensor, compiling: bool) -> Batch:
        """The batch of this weight: the cached one if neither the weight nor a setting has changed."""
        if compiling or torch_private.tracing_state() is not None:
            return normalize.batch(self.spec(checks.weight(weight, "weight")))
        state: list[object] = [weight, weight.dtype, weight.is_cpu, weight.get_device(), self._out_dtype(weight)]
        state += _settings(self.__dict__)
        state += (self.__dict__.get("scale"), torch_private.transforms_active())
        state += self._buffers.values()
        state += self._parameters.values()
        previous = self._cached_batch
        if previous is not None and len(previous[0]) == len(state) and all(map(is_, previous[0], state)):
            return previous[1]
        batch = normalize.batch(self.spec(checks.weight(weight, "weight")))
        if isinstance(weight, nn.Parameter):  # anything else is a new tensor at each call, and may hold a graph
            self.__dict__["_cached_batch"] = (state, batch)
        return batch

    def scaled(self, tensor: Tensor) -> Tensor:
        """scale * tensor, in the tensor's dtype."""
        return tensor * (normalize.saveable(self.scale).reshape(()) if isinstance(self.scale, Tensor) else self.scale)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Assigning to a parametrized tensor stores the value unchanged, as in torch."""
        return value

    def rounds(self) -> int:
        """Power iterations per call in the current mode."""
        return self.n_power_iterations if self.training else 0

    def spec(self, weight: Tensor) -> WeightSpec:
        """The WeightSpec of a call, with the output dtype under the current autocast."""
        if torch_private.tracing_state() is not None or torch.compiler.is_compiling():
            refuse_onnx(weight, self.impl, self.training)
        scale = self.scale
        if isinstance(scale, Tensor):
            checks.scale_has_values(weight, scale)
        return WeightSpec(weight, self.dim, self.vectors(), scale, self._out_dtype(weight), self.impl, self.v_first)

    def measure(self, weight: Tensor) -> Sigmas:
        """sigma of each view for the stored vectors, differentiable in the weight."""
        with normalize.no_autocast(weight):
            return reference.sigmas([views.as_oik(weight, self.dim)], [self.vectors()])[0]

    def evaluate(self, weight: Tensor) -> Tensor:
        """W̄ as in evaluation mode, outside of steps and autocast, in any mode. u and v are not updated."""
        with normalize.no_autocast(weight):
            return self(weight) if weight.ndim == 1 else normalize.normalize(self.spec(weight), 0, False)[0]

    def evaluate_cached(self, weight: Tensor) -> Tensor:
        """``evaluate``, but with the vectors of an active step, if there is one."""
        compiling = torch.compiler.is_compiling()
        cached = weight_cache.active_entry(self.cached, compiling)
        if cached is None:
            return self.evaluate(weight)
        weights, position, *_ = cached
        return weights.get(position, weight, self.scale, self._out_dtype(weight), compiling)

    @torch.no_grad()
    def warm_up(self, weight: Tensor, iterations: int = WARM_UP_ITERATIONS, only: Sequence[str] | None = None) -> None:
        """Iterate and store u and v (of the views ``only``, default: all) for a new weight, in any mode. Unusable
        vectors (on meta, non-finite, far from length 1, as after ``to_empty``) are redrawn first. The scale is not
        used, so it may be on meta."""
        wanted = self.views if only is None else only
        self.redraw_unusable(wanted, weight.device)
        if wanted:
            vectors = {view: pair for view, pair in self.vectors().items() if view in wanted}
            spec = WeightSpec(weight, self.dim, vectors, 1.0, weight.dtype, self.impl, self.v_first)
            normalize.batch(spec).iterate(iterations)

    def _out_dtype(self, weight: Tensor) -> torch.dtype:
        dtype = weight.dtype
        if not self.follows_autocast or not (torch.compiler.is_compiling() or torch_private.any_autocast()):
            return dtype
        device = weight.device.type
        castable = dtype in (torch.float32, torch.float16, torch.bfloat16)
        if not castable or not normalize.autocast_is_on(device) or torch_private.parametrizations_are_cached():
            return dtype
        return torch.get_autocast_dtype(device)

    def __getstate__(self) -> dict[str, Any]:
        # Cached tensors carry autograd graphs and belong to an active step, not to copies of the module.
        return {**self.__dict__, "cached": [], "_cached_batch": None}

    def _replicate_for_data_parallel(self) -> SpectralNorm:
        replica: SpectralNorm = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.cached = [weights.for_any_thread(position) for weights, position, *_ in self.cached]
        return replica

    def extra_repr(self) -> str:
        """Variant, scale and implementation, and the number and order of iterations where they are not the default."""
        parts = [f"variant={self.variant!r}", f"scale={self._scale_repr()}"]
        if getattr(self, "n_power_iterations", 1) != 1:
            parts.append(f"n_power_iterations={self.n_power_iterations}")
        if self.v_first:
            parts.append("v_first=True")
        if self.views:
            parts.append(f"impl={self._impl_in_use()!r}")
        return ", ".join(parts)

    def _impl_in_use(self) -> str:
        """The implementation that "auto" resolves to on the device of u and v."""
        u = self.vectors()[self.views[0]][0]
        return chosen("auto", u) if self.impl == "auto" and not u.is_meta else self.impl

    def _scale_repr(self) -> str:
        if not isinstance(self.scale, Tensor):
            return f"{self.scale:.6g}"
        if self.scale.is_meta:
            value = "meta"
        elif torch_private.is_sharded(self.scale):  # FSDP's: reading it is a collective, and one rank may print alone
            value = "sharded"
        else:
            value = f"{float(self.scale.detach()):.6g}"
        return value + (" (learnable)" if isinstance(self.scale, nn.Parameter) else " (tensor)")
