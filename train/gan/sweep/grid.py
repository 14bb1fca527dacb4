"""Grids of runs as data: fields of recipes, multiplied out."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One run, or one that another entry has too: fields of the config of ``recipe``, a module of train/. ``data``:
    the folder of its data below --data; by default the recipe's name."""

    recipe: str
    fields: Fields
    data: str = ""


@dataclass(frozen=True)
class Grid:
    """What is trained for one table or figure.

    names: the fields that name a run, as in "norm-bssn,scale-1.2,seed-0"; "recipe" stands for the recipe's name.
    """

    about: str
    names: tuple[str, ...]
    entries: list[Entry] = field(default_factory=list)


def product(recipe: str, *choices: Iterable[Fields], data: str = "") -> list[Entry]:
    """An entry for each way to take one of each of the ``choices``; of a field that several of them set, the last one
    counts."""
    combinations = itertools.product(*choices)
    return [Entry(recipe, {k: v for part in parts for k, v in part.items()}, data) for parts in combinations]


def values(name: str, *found: Any) -> list[Fields]:
    """One field with each of these values."""
    return [{name: value} for value in found]


def seeds(count: int) -> list[Fields]:
    """0 to count - 1."""
    return values("seed", *range(count))


def scaled(free: str, *scales: float) -> list[Fields]:
    """A normalization with each scale: ``free`` is ssn or bssn, and sn or bsn stand for their scale 1."""
    fixed = {"ssn": "sn", "bssn": "bsn"}
    return [{"norm": fixed[free] if scale == 1 else free, "scale": scale} for scale in scales]


def known() -> dict[str, Grid]:
    """All grids of train/grids, by name. A file there with a dict GRIDS adds its own."""
    import grids

    found: dict[str, Grid] = {}
    for module in pkgutil.iter_modules(grids.__path__):
        for name, grid in importlib.import_module(f"grids.{module.name}").GRIDS.items():
            if name in found:
                raise ValueError(f"grid {name!r} must be in one file of train/grids, got another in {module.name}.py")
            found[name] = grid
    return found


def find(name: str) -> Grid:
    """The grid of this name."""
    grids = known()
    if name not in grids:
        raise ValueError(f"grid must be one of {', '.join(grids)}, got {name!r}")
    return grids[name]
