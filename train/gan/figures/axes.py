"""What all pictures share: panels of one size, colours, legends below, names of quantities."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from gan.figures.table import Row

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f", "#bcbd22")
_DASHES = ("-", (0, (5, 2)), (0, (4, 2, 1, 2)), (0, (1, 1)))
_MARKERS = "osD^vP*X<>"
_STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
SAID = {
    "gradient": r"$\|\partial L_D / \partial W\|_F$",
    "slope": r"mean $\|\nabla_x D(x)\|$",
    "sigma": r"$\sigma$ of W",
    "variance": r"variance of $\bar{W}$",
    "spectrum": r"$\sigma_i^2 / \sigma_1^2$ of $\bar{W}$",
    "seconds": "seconds per 100 generator steps",
}  # of quantities; others are their own names
POWERS = ("gradient", "slope", "sigma", "variance", "spectrum")  # on logarithmic axes


def colour(number: int) -> str:
    """Of line or bar ``number``."""
    return COLOURS[number % len(COLOURS)]


def line(number: int, count: int) -> dict[str, object]:
    """How line ``number`` of ``count`` looks, another for each of twenty. Those that come later, and on top, have gaps
    and are thinner, so that lines of the same numbers are all seen."""
    above = number / max(1, count - 1)
    return {
        "color": colour(number),
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 2.4 - 1.3 * above,
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 6 - 3 * above,
    }


def panels(
    count: int, columns: int, width: float = 4.2, height: float = 3.1, below: int = 0
) -> tuple[Picture, list[Axes]]:
    """A picture of so many panels, in rows of at most ``columns``, with room for ``below`` rows of a legend."""
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = Picture(figsize=(width * columns, height * rows + 0.24 * below), layout="constrained")
    grid = list(picture.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return picture, grid[:count]


def legend_rows(labels: Sequence[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend of these labels below a picture of ``width`` inches."""
    columns = max(1, min(len(labels), int(width / (0.085 * max(map(len, labels)) + 0.6))))
    return columns, -(-len(labels) // columns)


def legend(picture: Picture, handles: Iterable[object], labels: Sequence[str]) -> None:
    """Below all panels."""
    columns, _ = legend_rows(labels, picture.get_figwidth())
    picture.legend(list(handles), labels, loc="outside lower center", ncols=columns, fontsize=9)


def with_seeds(rows: Sequence[Row]) -> dict[str, str]:
    """Groups in their order, with how many seeds they have."""
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(row["group"], []).append(row["seeds"])
    return {
        group: f"{group} (n = {min(n)})" if min(n) == max(n) else f"{group} (n = {min(n)} to {max(n)})"
        for group, n in seeds.items()
    }


def spread(values: Iterable[float]) -> float:
    """Largest by smallest of positive numbers; 1 where one is not positive or not finite."""
    found = list(values)
    known = [x for x in found if math.isfinite(x)]
    return max(known) / min(known) if known and min(known) > 0 else 1.0


def png(picture: Picture) -> bytes:
    """The same picture has the same bytes."""
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=110)
    return out.getvalue()


def styled() -> AbstractContextManager[None]:
    """Around everything that draws."""
    return rc_context(_STYLE)
