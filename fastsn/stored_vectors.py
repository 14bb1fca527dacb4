"""u and v of each view of a weight as buffers: initialization, dtype, and loading of checkpoints without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsn import checks, loading, reference, torch_private, views
from fastsn.reference import Vectors

WARM_UP_ITERATIONS = 15  # what torch spends at construction

_BUFFERS = {"out": ("_u", "_v"), "in": ("_u_in", "_v_in")}


class StoredVectors(nn.Module):
    """Buffers: ``_u`` (O), ``_v`` (I·K) of the view `out`; ``_u_in`` (O·K), ``_v_in`` (I) of the view `in` where the
    variant uses it and K > 1. Unit vectors in float32 (the weight's own dtype if that is wider), also after the module
    is cast to half precision. A zero or non-finite vector is never stored.
    """

    views: tuple[str, ...] = ()

    def store(self, oik: Tensor, names: tuple[str, ...], given: Mapping[str, Sequence[Tensor]]) -> Vectors:
        """Register the buffers for the views ``names`` of a weight (O, I, K): ``given`` ones without a copy, others
        drawn at random. Returns those that were drawn."""
        self.views, wide = names, reference.wide(oik.dtype)
        for view in names:
            sizes = views.vector_sizes(oik, view)
            pair = given[view] if view in given else [_drawn(oik.new_empty(n, dtype=wide)) for n in sizes]
            checks.lengths(pair, sizes, f"vectors[{view!r}]")
            for name, vector in zip(_BUFFERS[view], pair, strict=True):
                self.register_buffer(name, vector.to(wide))
        return {view: pair for view, pair in self.vectors().items() if view not in given}

    def vectors(self) -> Vectors:
        """The stored (u, v) of each view: the buffers themselves."""
        stored = self._buffers  # nn.Module.__getattr__ is slow, and this runs at every call of every layer
        return {view: (stored[_BUFFERS[view][0]], stored[_BUFFERS[view][1]]) for view in self.views}  # type: ignore[misc]

    def redraw_unusable(self, names: Sequence[str], device: torch.device) -> None:
        """Redraw the vectors of these views that are on meta, non-finite or far from length 1."""
        for name in (name for view in names for name in _BUFFERS[view]):
            vector = getattr(self, name)
            if vector.is_meta:
                setattr(self, name, _drawn(torch.empty_like(vector, device=device)))
            elif not 0.5 < float(torch.linalg.vector_norm(vector)) < 2:
                vector.copy_(_drawn(vector))

    def warm_up(self, weight: Tensor, iterations: int = WARM_UP_ITERATIONS, only: Sequence[str] | None = None) -> None:
        """Iterate and store u and v (of the views ``only``, default: all) for a new weight."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredVectors:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != reference.wide(new.dtype):
                self._buffers[name] = old.to(new.device, reference.wide(new.dtype))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        for name, buffer in self._buffers.items():  # assign=True takes a half-precision checkpoint's dtype
            if buffer is not None and buffer.dtype != reference.wide(buffer.dtype):
                self._buffers[name] = buffer.to(reference.wide(buffer.dtype))
        missing_views = [v for v in self.views if any(prefix + name not in state_dict for name in _BUFFERS[v])]
        self._missing_views = prefix, missing_views

    def warm_up_missing(self, weight: Callable[[], Tensor], missing: list[str]) -> None:
        """Warm up the vectors that the loaded checkpoint lacks. The owner calls this once its weight is loaded."""
        prefix, missing_views = self.__dict__.pop("_missing_views", ("", []))
        if not missing_views:
            return
        owner = prefix.rpartition(".")[0].rpartition(".")[0]
        layer, *chains = (
            f"{owner}.{name}".lstrip(".") for name in ("weight", "original", "parametrizations.weight.original")
        )
        # If the weight is missing too, the whole layer is not in the checkpoint: strict loading reports that.
        if not any(key == layer or key.startswith(tuple(chains)) for key in missing):
            loading.warn(missing, owner, ("u", "v") if "out" in missing_views else ("u_in", "v_in"), WARM_UP_ITERATIONS)
            value = weight()
            if not (value.is_meta or torch_private.is_sharded(value)):
                self.warm_up(value, only=missing_views)
            if missing_views == ["in"]:  # a complete checkpoint of a variant without this view: not an error
                own = {prefix + name for name in _BUFFERS["in"]}
                if own.issubset(missing):  # both vectors; a single missing one is a damaged checkpoint
                    missing[:] = [key for key in missing if key not in own]


def _drawn(vector: Tensor) -> Tensor:
    return F.normalize(vector.normal_(0, 1), dim=0)
