"""What is said where a checkpoint lacks vectors of a norm."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fastsn.interop import state_dict_layouts as layouts

_CONVERT = "fastsn.convert_state_dict(state, to='fastsn') makes this checkpoint one for fastsn's layers"
_LENIENT = "load_state_dict(state, strict=False) brings u and v to the weights of a checkpoint without them"


class Advised(str):
    """A missing key that says what to do, in the error of strict loading alone: torch formats the keys into it, and
    gives no hook that would know whether it is going to raise."""

    advice = ""

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)}: {self.advice}"


def advice(state: Mapping[str, Any], prefix: str) -> str | None:
    """What to do with a checkpoint that has no vectors for the fastsn layer ``prefix``; None if it has no weight."""
    own = {key: value for key, value in state.items() if key.startswith(prefix)}
    found = {entry.layout.name for entry in layouts.find(own) if entry.prefix == prefix} - {"fastsn"}
    return _CONVERT if found else _LENIENT if f"{prefix}weight" in own else None


def advise(missing: list[str], prefix: str, text: str) -> None:
    """Once per checkpoint, at the first missing key of the layer."""
    if not any(isinstance(key, Advised) for key in missing):
        at = next((i for i, key in enumerate(missing) if key.startswith(prefix)), None)
        if at is not None:
            missing[at] = advised = Advised(missing[at])
            advised.advice = text


_warned: list[str] | None = None  # of the last call of load_state_dict that has warned, its list of missing keys


def warn(missing: list[str], owner: str, names: Sequence[str], iterations: int) -> None:
    """Once per checkpoint."""
    global _warned
    if _warned is not missing:
        _warned = missing
        warnings.warn(
            f"the checkpoint has no {' and '.join(names)} for {owner!r}, maybe not for others: they are brought to the "
            f"loaded weights by {iterations} power iterations (meta or sharded ones: call fastsn.warm_up later)",
            stacklevel=2,
        )
