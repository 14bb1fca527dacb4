"""From a grid to its runs: each once, checked, with a folder and a command line."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan import cli, run
from gan.config import Config
from gan.data.digits import digits
from gan.data.store import Store, open_store
from gan.sweep.grid import Entry, Fields, Grid

TRAIN = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """One run of a grid. ``data``: its data folder, None for a recipe that has its data with it."""

    name: str
    recipe: str
    fields: Fields
    config: Config
    data: Path | None

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.folder

    def arguments(self) -> list[str]:
        """The command that starts or continues it; --device is for whoever calls it."""
        given = {**self.fields, "name": self.config.name, "runs": self.config.runs}
        if self.data is not None:
            given["data"] = self.data
        return [sys.executable, str(TRAIN / f"{self.recipe}.py"), *cli.flags(given), "--resume"]


def runs(name: str, grid: Grid, parent: Path, data: Path, only: Sequence[str] = ()) -> list[Run]:
    """Each run of the grid once, in the grid's order, in folders <parent>/<name>/; with ``only`` those whose name
    matches one of these patterns (as of a shell).

    Raises:
        ValueError: a recipe, or a value of a field, that does not exist; two different runs of one name; a pattern that
            matches nothing.
    """
    found: dict[str, Run] = {}
    identities: dict[str, Any] = {}
    for entry in grid.entries:
        made = _run(name, grid, entry, parent, data)
        own = (made.recipe, made.data, made.config.identity(), made.config.protocol)
        if made.name not in found:
            found[made.name], identities[made.name] = made, own
        elif identities[made.name] != own:
            raise ValueError(
                f"grid {name!r} must name its runs apart, got two that are called {made.name!r}: "
                f"{_differences(identities[made.name], own)}"
            )
    for pattern in only:
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"only must match runs of {name!r}, such as {next(iter(found))!r}, got {pattern!r}")
    return [r for r in found.values() if not only or any(fnmatch.fnmatchcase(r.name, p) for p in only)]


def _run(grid_name: str, grid: Grid, entry: Entry, parent: Path, data: Path) -> Run:
    kind = _config_class(entry.recipe)
    unknown = [x for x in entry.fields if x not in kind.__dataclass_fields__]
    if unknown:
        raise ValueError(f"fields of a run of {entry.recipe}.py must be of its config, got {', '.join(unknown)}")
    folder = None
    if "data" in kind.__dataclass_fields__:
        folder = data if (data / "meta.json").is_file() else data / (entry.data or entry.recipe)
    given = {**entry.fields, "runs": parent} | ({} if folder is None else {"data": folder})
    unnamed = kind(name="x", **given)
    called = ",".join(x for x in (_part(field, entry, unnamed) for field in grid.names) if x)
    return Run(called, entry.recipe, entry.fields, kind(name=f"{grid_name}/{called}", **given), folder)


def _part(field: str, entry: Entry, config: Config) -> str:
    if field == "recipe":
        return entry.recipe
    value = getattr(config, field)
    return f"{field}-{value:g}" if isinstance(value, float) else f"{field}-{value}"


@functools.cache
def _config_class(recipe: str) -> type[Config]:
    """What ``main`` of the recipe takes."""
    if not (TRAIN / f"{recipe}.py").is_file():
        raise ValueError(f"recipe must be a file of {TRAIN.name}/, got {recipe!r}")
    kind: type[Config] = typing.get_type_hints(importlib.import_module(recipe).main)["config"]
    return kind


def _differences(a: tuple[Any, ...], b: tuple[Any, ...]) -> str:
    fields = {k: (v, b[2][k]) for k, v in a[2].items() if v != b[2][k]}
    fields |= {k: (x, y) for k, x, y in zip(("recipe", "data"), a, b, strict=False) if x != y}
    if a[3] != b[3]:
        fields["protocol"] = a[3], b[3]
    return ", ".join(f"{k} {x!r} and {y!r}" for k, (x, y) in fields.items())


def check(planned: Iterable[Run]) -> None:
    """That all of them can start: data that is there and fits, folders that are free or hold the run.

    Raises ValueError that names every data folder that is missing, or the first run whose folder is another's.
    """
    planned = list(planned)
    missing = {r.data for r in planned if r.data is not None and not (r.data / "meta.json").is_file()}
    if missing:
        count = sum(r.data in missing for r in planned)
        raise ValueError(
            f"data must hold, for {count} of {len(planned)} runs, what prepare.py writes: not found "
            f"{', '.join(str(x) for x in sorted(missing))}"
        )
    from gan.loop import check_data

    for r in planned:
        store = _store(r.data, r.config.image_size)
        try:
            check_data(r.config, store)
        except ValueError as error:
            raise ValueError(f"{r.config.name}: {error}") from error
        run.check_folder(r.folder, run.identity(r.config, store))


@functools.cache
def _store(data: Path | None, image_size: int) -> Store:
    return digits(image_size) if data is None else open_store(data)
