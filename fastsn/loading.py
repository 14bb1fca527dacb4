"""Messages for checkpoints without u and v of a norm."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fastsn.interop import state_dict_layouts as layouts

_CONVERT = "fastsn.convert_state_dict(state, to='fastsn') makes this checkpoint one for fastsn's layers"
_LENIENT = "load_state_dict(state, strict=False) brings u and v to the weights of a checkpoint without them"


class Advised(str):
    """A missing key whose formatted text adds advice. Only the error of strict loading formats the keys; torch has no
    hook that runs only if that error is raised."""

    advice = ""

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)}: {self.advice}"


def advice(state: Mapping[str, Any], prefix: str) -> str | None:
    """Advice for a checkpoint without u and v of the fastsn layer ``prefix``; None if it lacks the weight too."""
    own = {key: value for key, value in state.items() if key.startswith(prefix)}
    found = {entry.layout.name for entry in layouts.find(own) if entry.prefix == prefix} - {"fastsn"}
    return _CONVERT if found else _LENIENT if f"{prefix}weight" in own else None


def advise(missing: list[str], prefix: str, text: str) -> None:
    """Add the advice to the first missing key of the layer, once per checkpoint."""
    if not any(isinstance(key, Advised) for key in missing):
        at = next((i for i, key in enumerate(missing) if key.startswith(prefix)), None)
        if at is not None:
            missing[at] = advised = Advised(missing[at])
            advised.advice = text


_warned: list[str] | None = None  # the missing keys of the last load_state_dict that warned: the list identifies it


def warn(missing: list[str], owner: str, names: Sequence[str], iterations: int) -> None:
    """Warn that u and v are missing and are warmed up, once per checkpoint."""
    global _warned
    if _warned is not missing:
        _warned = missing
        warnings.warn(
            f"the checkpoint has no {' and '.join(names)} for {owner!r}, maybe not for others: they are brought to the "
            f"loaded weights by {iterations} power iterations (meta or sharded ones: call fastsn.warm_up later)",
            stacklevel=2,
        )
