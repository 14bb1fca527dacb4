"""Lines in panels: scores over steps, and what is known of each layer of D. A panel per score or layer, a line per
group, a band of one standard error over seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from gan import weights
from gan.figures import axes, runs
from gan.figures.groups import Group, Series, over_seeds
from gan.figures.runs import Run
from gan.figures.table import Columns, Row

COLUMNS: Columns = {
    **{"quantity": str, "of": str, "group": str, "step": int, "mean": float, "standard_error": float, "seeds": int}
}
BOUNDED: Columns = {**COLUMNS, "bound": float}
SPECTRA: Columns = {"index" if name == "step" else name: kind for name, kind in COLUMNS.items()}
_log = logging.getLogger("gan")


def curves(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """FID and score over generator steps, as Lin et al., NeurIPS 2021, Fig. 6."""
    runs.protocol([run for group in found for run in group.runs])
    return over_seeds(found, _scores)


def gradients(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """Norm of dL/dW of each layer of D, and slopes |dD/dx| at real and fake images, beside FID and score, as in Fig. 4
    of the blog of Lin et al. Needs --log-gradients."""
    _need(found, "gradient", "gradients", "--log-gradients")
    runs.protocol([run for group in found for run in group.runs])

    def series(run: Run) -> Series:
        slopes = {("slope", f"{which} images"): run.scalars(f"slope/{which}_mean")[""] for which in ("real", "fake")}
        return {**_scores(run), **slopes, **_layers(run, "gradient")}

    return over_seeds(found, series)


def variances(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """Variance of the entries of each layer's normalized weight beside 1/max(m, n) of its m x n reshape (output
    channels by all the rest), as Lin et al., NeurIPS 2021, Fig. 5. Needs --log-variances."""
    _need(found, "variance", "variances", "--log-variances")
    bounds = {}
    for group in found:
        for layer, shape in weights.shapes_of_discriminator(group.runs[0].weights).items():
            bounds[layer, group.label] = 1 / max(shape[0], math.prod(shape[1:]))
    rows = over_seeds(found, lambda run: _layers(run, "variance"))
    return [(*row, bounds[row[1], row[2]]) for row in rows]


def sigmas(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """What each layer's weight is divided by, over training: its growth, which the normalization takes out (Miyato et
    al., ICLR 2018, Fig. 9, show the norm of what remains)."""
    without = [str(run.folder) for group in found for run in group.runs if not run.scalars("sigma/")]
    if len(without) == sum(len(group.runs) for group in found):
        raise ValueError(f"sigmas needs runs with a norm that divides by sigma, got {', '.join(without)}")
    if without:
        _log.info("left out, as nothing is divided by a sigma: %s", ", ".join(without))
    return over_seeds(found, lambda run: _layers(run, "sigma"))


def spectra(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """Squared singular values of the normalized weight of each layer of the trained D, as an m x n matrix (output
    channels by all the rest), relative to the largest, in order, as Miyato et al., ICLR 2018, Fig. 3."""

    def series(run: Run) -> Series:
        values = {}
        for layer, weight in weights.normalized_of_discriminator(run.weights).items():
            squares = torch.linalg.svdvals(weight.flatten(1).double()).square().numpy()
            values["spectrum", layer] = dict(enumerate((squares / squares[0]).tolist(), 1))
        return values

    return over_seeds(found, series)


def draw(rows: Sequence[Row]) -> Picture:
    """Of any of these."""
    keys = list(dict.fromkeys((row["quantity"], row["of"]) for row in rows))
    named = axes.with_seeds(rows)
    columns = 2 if len(keys) < 4 else 4
    bounded, x_axis = "bound" in rows[0], "index" if "index" in rows[0] else "step"
    labels = [*named.values(), *(["1 / max(m, n)"] if bounded else [])]
    wide = 4.2 * min(columns, len(keys))
    picture, grid = axes.panels(len(keys), columns, below=axes.legend_rows(labels, wide)[1])
    handles = {}
    for axis, (quantity, of) in zip(grid, keys, strict=True):
        here = [row for row in rows if (row["quantity"], row["of"]) == (quantity, of)]
        for number, group in enumerate(named):
            own = [row for row in here if row["group"] == group]
            steps, means, errors = (np.array([r[x] for r in own]) for x in (x_axis, "mean", "standard_error"))
            style = axes.line(number, len(named)) | ({} if len(own) <= 25 else {"marker": ""})
            (handles[number],) = axis.plot(steps, means, **style)
            low, high = means - errors, means + errors
            axis.fill_between(steps, low, high, color=style["color"], alpha=min(0.2, 0.9 / len(named)), linewidth=0)
        for bound in {row["bound"] for row in here if bounded}:
            handles[len(named)] = axis.axhline(bound, color="black", linestyle=(0, (5, 3)), linewidth=1)
        title = of if quantity in axes.SAID else f"protocol {of}"
        axis.set(title=title, ylabel=axes.SAID.get(quantity, quantity), xlabel="generator steps")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if x_axis == "index":
            axis.set(xlabel="singular value, in order")
        powers = quantity in axes.POWERS or ("FID" in quantity and axes.spread(r["mean"] for r in here) > 8)
        if powers:
            _logarithmic(axis, here)
    axes.legend(picture, [handles[i] for i in sorted(handles)], labels)
    return picture


def _logarithmic(axis: Axes, rows: Sequence[Row]) -> None:
    """Powers of ten; within less than one of them plain numbers. What is 0, or a band that comes to it, leaves the
    panel below."""
    means = [row["mean"] for row in rows if 0 < row["mean"] < math.inf]
    if not means:
        return
    axis.set_yscale("log", nonpositive="clip")
    lower = [row["mean"] - row["standard_error"] for row in rows]
    if min([*(row["mean"] for row in rows), *lower]) < min(means) / 3:
        axis.set_ylim(bottom=min(means) / 1.5)
    if max(means) / min(means) < 8:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(ScalarFormatter())


def _scores(run: Run) -> Series:
    label = run.metrics[0]["protocol"]
    return {(name, label): run.scores(column) for column, name in runs.score_names(label).items()}


def _layers(run: Run, quantity: str) -> Series:
    return {(quantity, layer): values for layer, values in run.scalars(f"{quantity}/").items()}


def _need(found: Sequence[Group], quantity: str, figure: str, what: str) -> None:
    lacking = [str(run.folder) for group in found for run in group.runs if not run.scalars(f"{quantity}/")]
    if lacking:
        raise ValueError(f"{figure} needs runs trained with {what}, got {', '.join(lacking)} without")
