"""u and v of each view of a weight, as buffers: drawn, kept in float32, loaded, and brought to weights they lack."""

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
    variant uses it and K > 1. Unit vectors in float32 (the weight's own dtype if that is wider), which they keep when
    the module is cast to half precision. A vector that would become zero or non-finite is not stored.
    """

    views: tuple[str, ...] = ()

    def store(self, oik: Tensor, names: tuple[str, ...], given: Mapping[str, Sequence[Tensor]]) -> Vectors:
        """Register the buffers for the views ``names`` of a weight (O, I, K): ``given`` ones as they are, others drawn.
        Returns those that have been drawn."""
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
        stored = self._buffers  # not getattr: this is asked for at every use of every layer
        return {view: (stored[_BUFFERS[view][0]], stored[_BUFFERS[view][1]]) for view in self.views}  # type: ignore[misc]

    def redraw_unusable(self, names: Sequence[str], device: torch.device) -> None:
        """Draw the vectors of these views anew that are on meta, non-finite or far from length 1."""
        for name in (name for view in names for name in _BUFFERS[view]):
            vector = getattr(self, name)
            if vector.is_meta:
                setattr(self, name, _drawn(torch.empty_like(vector, device=device)))
            elif not 0.5 < float(torch.linalg.vector_norm(vector)) < 2:
                vector.copy_(_drawn(vector))

    def warm_up(self, weight: Tensor, iterations: int = WARM_UP_ITERATIONS, only: Sequence[str] | None = None) -> None:
        """Bring u and v (of ``only`` these views) to a weight that they do not belong to yet."""
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
        self._missing_views = (
            prefix,
            [v for v in self.views if any(prefix + x not in state_dict for x in _BUFFERS[v])],
        )

    def warm_up_missing(self, weight: Callable[[], Tensor], missing: list[str]) -> None:
        """Bring the vectors to a weight that was loaded without them. The owner calls it, when all of it is loaded."""
        prefix, lacking = self.__dict__.pop("_missing_views", ("", []))
        if not lacking:
            return
        owner = prefix.rpartition(".")[0].rpartition(".")[0]
        layer, *chains = (
            f"{owner}.{name}".lstrip(".") for name in ("weight", "original", "parametrizations.weight.original")
        )
        # A weight that is missing too belongs to a layer that is not in the checkpoint.
        if not any(key == layer or key.startswith(tuple(chains)) for key in missing):
            loading.warn(missing, owner, ("u", "v") if "out" in lacking else ("u_in", "v_in"), WARM_UP_ITERATIONS)
            value = weight()
            if not (value.is_meta or torch_private.is_sharded(value)):
                self.warm_up(value, only=lacking)
            if lacking == ["in"]:  # a checkpoint of a variant without this view, which has all that it can have
                own = {prefix + name for name in _BUFFERS["in"]}
                if own.issubset(missing):  # all of it, or somebody else has lost one
                    missing[:] = [key for key in missing if key not in own]


def _drawn(vector: Tensor) -> Tensor:
    return F.normalize(vector.normal_(0, 1), dim=0)
