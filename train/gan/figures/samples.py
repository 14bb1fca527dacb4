"""Sample sheets side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from PIL import Image

from gan.figures import axes
from gan.figures.groups import Group
from gan.figures.table import Columns, Row

_TITLE = 44  # characters that fit over a sheet
COLUMNS: Columns = {"group": str, "seed": int, "step": int, "picture": str}


def samples(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """The last sample sheet of every run. The CSV names the pictures, which a redraw needs."""
    rows = []
    for group in found:
        for run in sorted(group.runs, key=lambda run: run.config["seed"]):
            sheet = run.sheet
            rows.append((group.label, run.config["seed"], step_of(sheet), str(sheet)))
    return rows


def step_of(sheet: Path) -> int:
    """Of a picture step-00000100.png: 100."""
    return int(sheet.stem.split("-")[1])


def draw(rows: Sequence[Row]) -> Picture:
    """Four in a row, of many as many as there are rows."""
    picture, grid = axes.panels(len(rows), max(4, math.ceil(len(rows) ** 0.5)), 3.6, 3.9)
    for axis, row in zip(grid, rows, strict=True):
        show(axis, Path(row["picture"]), f"{row['group']}, seed {row['seed']}")
    return picture


def show(axis: Axes, sheet: Path, title: str) -> None:
    """A sheet with a title and its step."""
    with Image.open(sheet) as image:
        axis.imshow(image, cmap="gray", interpolation="nearest")
    lines = [*textwrap.wrap(title, _TITLE), f"samples at step {step_of(sheet):,}"]
    axis.set_title("\n".join(lines), fontsize=10)
    axis.set_axis_off()
