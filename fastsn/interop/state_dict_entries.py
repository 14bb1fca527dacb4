"""Converts one spectral norm of a state dict to another layout: copies its tensors and computes missing ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsn import checks, normalize, reference, views
from fastsn.interop.state_dict_layouts import Entry, Found, Layout
from fastsn.stored_vectors import WARM_UP_ITERATIONS

_PAIRS = {"out": ("u", "v"), "in": ("u_in", "v_in")}
_VECTORS = [part for pair in _PAIRS.values() for part in pair]


def convert_entry(entry: Entry, state: Mapping[str, Tensor], target: Layout) -> dict[str, dict[str, Tensor]]:
    """Every key of the entry -> the keys and tensors that replace it. Empty if nothing changes.

    Raises:
        ValueError, TypeError: as ``convert_state_dict``.
    """
    source, keys = entry.layout, entry.keys
    first, *_ = names = list(keys.values())
    if entry.others:  # the stored tensor is not the one that is normalized
        if source is target:
            return {}
        others = ", ".join(map(repr, entry.others))
        raise ValueError(f"{first!r} must belong to the only parametrization of its tensor, got also {others}")
    if "weight" not in keys:
        weight = source.key("weight", entry.prefix, entry.tensor)
        raise ValueError(f"{first!r} must have its weight {weight!r} beside it, which is not in state")
    found = {part: state[key] for part, key in keys.items()}
    dims = _dims(entry, found)
    if source is target and all(part in found for part in target.tensors if part in ("u", "v", "sigma")):
        return {}
    _refuse(entry, found, target)
    with normalize.no_autocast(found["weight"]):
        parts = _parts(entry, found, dims, target)
    replaced: dict[str, dict[str, Tensor]] = {key: {} for key in (*names, *entry.spare)}
    for part, tensor in parts.items():
        replaced[keys.get(part, names[-1])][target.key(part, entry.prefix, entry.tensor)] = tensor
    return replaced


def _dims(entry: Entry, found: Found) -> list[int]:
    """The dimensions that may be that of output channels by the sizes of u and v: at least one, else ValueError."""
    key, row = entry.keys["weight"], entry.layout.row
    weight = checks.weight(found["weight"], key)
    if weight.ndim < 2:
        raise ValueError(f"{key!r} must have at least 2 dimensions to have u and v, got shape {list(weight.shape)}")
    shape, sizes = torch.empty(weight.shape, device="meta"), {}
    for dim in range(1 if row else weight.ndim):
        pairs = [views.vector_sizes(views.as_oik(shape, dim), view) for view in _PAIRS]
        sizes[dim] = dict(zip(_VECTORS, [n for pair in pairs for n in pair], strict=True))
    for part in (part for part in _VECTORS if part in found):
        expected = {dim: [1, of[part]] if row else [of[part]] for dim, of in sizes.items()}
        came = list(found[part].shape)
        sizes = {dim: of for dim, of in sizes.items() if expected[dim] == came}
        if not sizes:
            shapes = " or ".join(dict.fromkeys(map(str, expected.values())))
            raise ValueError(
                f"{entry.keys[part]!r} must have shape {shapes} for {key!r} of shape {list(weight.shape)}, got {came}"
            )
    return list(sizes)


def _refuse(entry: Entry, found: Found, target: Layout) -> None:
    """Raise TypeError or ValueError if the target layout cannot store a tensor."""
    key, name = entry.keys["weight"], target.name
    if found["weight"].is_meta:
        raise ValueError(f"{key!r} must have values, got a meta tensor")
    if entry.tensor != "weight" and "{n}" not in target.tensors["weight"]:
        raise ValueError(f"{key!r} must be of a tensor named 'weight' to become {name!r}, got {entry.tensor!r}")
    for part in ("u_in", "v_in", "scale"):
        if part in found and part not in target.tensors:
            raise ValueError(f"{entry.keys[part]!r} must be absent to become {name!r}, which has no {part}")
    for layout in (entry.layout, target):
        if found["weight"].is_complex() and not layout.conjugates:
            raise ValueError(
                f"{key!r} must be real for {layout.name!r}, which does not conjugate, got {found['weight'].dtype}"
            )


def _parts(entry: Entry, found: Found, dims: list[int], target: Layout) -> dict[str, Tensor]:
    """The tensors of the target layout, in its order."""
    weight, parts = found["weight"], dict(found)
    width = reference.wide(weight.dtype) if target.wide else weight.dtype
    for part in (part for part in _VECTORS if part in found):
        vector = found[part][0] if entry.layout.row else found[part]
        parts[part] = vector.to(reference.wide(vector.dtype)) if target.wide else vector
    dim = _dim(weight, dims, parts)
    if target.row and dim != 0:
        key = entry.keys["weight"]
        raise ValueError(f"{key!r} must count output channels in dimension 0 to become {target.name!r}, got {dim}")
    oik = views.as_oik(weight, dim)
    if entry.layout.row and not target.row and "u" in parts:
        parts["u"] = _unit_length(parts["u"])
    for view, (u, v) in _PAIRS.items():
        if (view == "out" or u in parts or v in parts) and not (u in parts and v in parts):
            parts[u], parts[v] = _pair(oik, view, parts.get(u), parts.get(v), width)
    if "sigma" in target.tensors and "sigma" not in parts:
        sigma = reference.sigmas([oik], [{"out": (parts["u"], parts["v"])}])[0]["out"]
        parts["sigma"] = sigma.reshape(1).to(parts["u"].dtype)
    if target.row:
        parts["u"] = parts["u"].unsqueeze(0)
    return {part: parts[part] for part in target.tensors if part in parts}


def _dim(weight: Tensor, dims: list[int], parts: Found) -> int:
    """The dimension of output channels. If several have the right sizes (a ConvTranspose with as many channels in as
    out), it is the one whose matrix maps v to u."""
    if len(dims) == 1 or "u" not in parts or "v" not in parts:
        return dims[0]
    fits = [_fit(reference.matrix(views.as_oik(weight, dim), "out"), parts["u"], parts["v"]) for dim in dims]
    best = max(fits)
    return dims[fits.index(best)] if best > 0.9 else dims[0]  # vectors that were never iterated fit none


def _fit(m: Tensor, u: Tensor, v: Tensor) -> float:
    """1 if u is parallel to M v, or v to M^H u; near 0 for unrelated vectors."""
    u, v = u.to(m.dtype), v.to(m.dtype)
    mv, mhu = torch.mv(m, v), torch.mv(m.mH, u)
    fits = [torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y) for x, y in ((u, mv), (v, mhu))]
    return float(torch.vdot(u, mv).abs() / torch.stack(fits).amin())


def _unit_length(u: Tensor) -> Tensor:
    """u / |u|; u itself if its length is 1 up to rounding."""
    wide = u.to(reference.wide(u.dtype))
    if abs(float(torch.linalg.vector_norm(wide)) - 1) <= 4 * torch.finfo(u.dtype).eps:
        return u
    return reference.unit(wide, _start(wide, len(wide))[0]).to(u.dtype)


def _pair(oik: Tensor, view: str, u: Tensor | None, v: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u and v of a view, the missing one computed from the other."""
    m = reference.matrix(oik, view)
    start_u, start_v = _start(m, *m.shape)
    if u is not None:
        return u, reference.unit(torch.mv(m.mH, u.to(m.dtype)), start_v).to(u.dtype)
    if v is not None:
        return reference.unit(torch.mv(m, v.to(m.dtype)), start_u).to(v.dtype), v
    made = reference.power_iteration([oik], [{view: (start_u, start_v)}], WARM_UP_ITERATIONS)[0][view]
    return made[0].to(dtype), made[1].to(dtype)


def _start(like: Tensor, *sizes: int) -> list[Tensor]:
    """Fixed pseudo-random unit vectors of these sizes."""
    draw = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn(n, generator=draw, dtype=like.dtype, device="cpu").to(like.device) for n in sizes]
    return [F.normalize(x, dim=0) for x in drawn]
