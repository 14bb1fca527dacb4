"""The state-dict keys of spectral norms, one row per implementation, and the search for them in a state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Found = Mapping[str, Tensor]  # part ("weight", "u", "v", "u_in", "v_in", "scale", "sigma") -> tensor


@dataclass(frozen=True)
class Layout:
    """The state-dict keys of one implementation.

    Attributes:
        name: the value of ``to`` in ``convert_state_dict``.
        tensors: part -> key after the module's prefix; {n} is the name of the normalized tensor (without it: "weight"),
            {i} its index among the parametrizations of that tensor.
        is_norm: whether the parts found (at least one besides the weight) and the tensor's name identify a spectral
            norm for certain.
        spare: pattern of further keys with redundant values, which are dropped.
        row: u is stored as 1 x h and belongs to the rows of ``weight.view(weight.size(0), -1)``; it is
            normalized at every use, so it may have any length.
        conjugates: supports complex weights.
        wide: u and v are float32 where the weight is in half precision.
    """

    name: str
    tensors: Mapping[str, str]
    is_norm: Callable[[Found, str], bool]
    spare: str | None = None
    row: bool = False
    conjugates: bool = False
    wide: bool = False

    def key(self, part: str, prefix: str, tensor: str, position: str = "0") -> str:
        """The key of a part."""
        return prefix + self.tensors[part].format(n=tensor, i=position)


def _always(_found: Found, _tensor: str) -> bool:
    return True


def _vectors(found: Found, _tensor: str) -> bool:
    """A scale alone does not identify a norm: any parametrization may have one."""
    return not found.keys().isdisjoint(("u", "v", "u_in", "v_in"))


def _hooked(found: Found, tensor: str) -> bool:
    """_orig (pruning), _u (attention) and _v (the old weight_norm) have other uses too, but not together."""
    return "weight" in found or (tensor == "weight" and "u" in found and found["u"].ndim == 1)


def _row_or_sigma(found: Found, _tensor: str) -> bool:
    """u0 is a common name, so its shape must be 1 x h; sv0 has no other use."""
    return "sigma" in found or (found["u"].ndim == 2 and found["u"].shape[0] == 1)


_PARAMETRIZATION = "parametrizations.{n}.{i}."
_CHILD = "spectral_norm."
_OURS = {"u": "_u", "v": "_v", "u_in": "_u_in", "v_in": "_v_in", "scale": "scale"}

LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout(
            "torch",
            {"weight": "parametrizations.{n}.original"} | {p: _PARAMETRIZATION + name for p, name in _OURS.items()},
            _vectors,
            conjugates=True,
        ),
        # Before torch 1.0 there was no v, and the normalized weight {n} was stored.
        Layout("torch_hook", {"weight": "{n}_orig", "u": "{n}_u", "v": "{n}_v"}, _hooked, spare="{n}"),
        Layout(
            "fastsn",
            {"weight": "weight"} | {part: _CHILD + name for part, name in _OURS.items()},
            _always,
            conjugates=True,
            wide=True,
        ),
        # u1, sv1, ...: further singular values, used for logging only.
        Layout(
            "biggan",
            {"weight": "weight", "u": "u0", "sigma": "sv0"},
            _row_or_sigma,
            spare=r"(u|sv)[1-9]\d*",
            row=True,
        ),
        Layout("mimicry", {"weight": "weight", "u": "sn_u", "sigma": "sn_sigma"}, _always, row=True),
    )
}


def get(name: object) -> Layout:
    """Look a layout up by its name; ValueError lists the valid names."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")
    return LAYOUTS[name]


@dataclass(frozen=True)
class Entry:
    """A spectral norm in a state dict.

    ``keys``: part -> key, in the order of the state; ``spare``: keys that are dropped; ``others``: keys of other
    parametrizations of the same tensor.
    """

    layout: Layout
    prefix: str
    tensor: str
    keys: Mapping[str, str]
    spare: tuple[str, ...]
    others: tuple[str, ...]


def _pattern(name: str) -> re.Pattern[str]:
    named = re.escape(name).replace(r"\{n\}", r"(?P<n>[^.]+)").replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(r"(?P<p>(?:.+\.)?)" + named)


# A weight alone does not identify a norm: it is looked up once another part is found.
_PATTERNS = [
    (row.name, part, _pattern(name))
    for row in LAYOUTS.values()
    for part, name in row.tensors.items()
    if part != "weight"
]

_Location = tuple[str, str, str, str]  # layout, prefix, tensor, position


def find(state: Mapping[str, Tensor], hooked: Iterable[tuple[str, str]] = ()) -> list[Entry]:
    """Every spectral norm of a state dict; ``hooked`` are the (prefix, tensor) that its metadata says torch's hook
    normalizes."""
    declared: set[_Location] = {("torch_hook", prefix, tensor, "0") for prefix, tensor in hooked}
    locations: dict[_Location, dict[str, str]] = {location: {} for location in declared}
    for key in state:
        for layout, part, pattern in _PATTERNS:
            if match := pattern.fullmatch(key):
                named = match.groupdict()
                location = (layout, named["p"], named.get("n", "weight"), named.get("i", "0"))
                locations.setdefault(location, {})[part] = key
    norms: dict[_Location, dict[str, str]] = {}
    for location, keys in locations.items():
        layout, prefix, tensor, _ = location
        weight = LAYOUTS[layout].key("weight", prefix, tensor)
        if weight in state:
            keys["weight"] = weight
        found = {part: state[key] for part, key in keys.items()}
        if found and (location in declared or LAYOUTS[layout].is_norm(found, tensor)):
            norms[location] = keys
    order = {key: i for i, key in enumerate(state)}
    return [_entry(location, norms, order) for location in norms]


def _entry(location: _Location, norms: Mapping[_Location, dict[str, str]], order: Mapping[str, int]) -> Entry:
    name, prefix, tensor, position = location
    layout, own = LAYOUTS[name], norms[location]
    spare = layout.spare and re.compile(re.escape(prefix) + layout.spare.format(n=re.escape(tensor)))
    chain = f"{prefix}parametrizations.{tensor}."
    rivals = [key for key in order if key.startswith(chain)]
    rivals += [key for other, keys in norms.items() if other[1:3] == (prefix, tensor) for key in keys.values()]
    # A parametrization that is not the first follows another, which may have no tensors.
    behind = [] if position == "0" else [f"{chain}0"]
    return Entry(
        layout,
        prefix,
        tensor,
        dict(sorted(own.items(), key=lambda item: order[item[1]])),
        tuple(key for key in order if spare and spare.fullmatch(key)),
        tuple(key for key in dict.fromkeys(rivals + behind) if key not in own.values()),
    )
