"""Scores against a number of the configuration, and over settings of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import NullLocator

from gan.figures import axes, groups, runs
from gan.figures.groups import Group
from gan.figures.runs import Run
from gan.figures.table import Columns, Row
from gan.presets import PRESETS

_SCORES: Columns = {"quantity": str, "of": str, "which": str}
_MEANS: Columns = {"group": str, "mean": float, "standard_error": float, "seeds": int}
AGAINST: Columns = {**_SCORES, "field": str, "value": str, **_MEANS}
SETTINGS: Columns = {**_SCORES, "setting": str, **_MEANS}
_FIELDS = ("lr_g", "lr_d", "beta1", "beta2", "n_dis")
_LETTERS = {tuple(PRESETS[f"sngan-{letter}"][field] for field in _FIELDS): letter.upper() + "; " for letter in "abcdef"}


def against(all_runs: Sequence[Run], field: str = "scale") -> list[tuple[Any, ...]]:
    """Last and best FID and score against a field of the configuration, as scale (Lin et al., NeurIPS 2021), n_dis
    (Miyato et al., ICLR 2018, Fig. 11) or the width of the last layer (Fig. 4): a line for all that differ in nothing
    but this field.

    Raises:
        ValueError: no config has the field; it has one value in all of them.
    """
    if field == "scale":  # 1 of ssn is sn, of bssn bsn: points of one line
        free = {"sn": "ssn", "bsn": "bssn"}
        configs = [{**run.config, "norm": free.get(run.config["norm"], run.config["norm"])} for run in all_runs]
        all_runs = [replace(run, config=config) for run, config in zip(all_runs, configs, strict=True)]
    known = sorted({name for run in all_runs for name in run.config} - {"seed"})
    if field not in known:
        raise ValueError(f"field must be one of {', '.join(known)}, got {field!r}")
    values = {groups.number(run.config[field]) for run in all_runs}
    if len(values) == 1:
        raise ValueError(f"field must differ among the runs, got {field} {values.pop()} in all of them")
    runs.protocol(all_runs)
    rates = ("lr_g", "lr_d")
    together = field in rates and all(run.config["lr_g"] == run.config["lr_d"] for run in all_runs)
    found = groups.groups(all_runs, unnamed=rates if together else (field,))
    found.sort(key=lambda group: groups.order(field, group.config.get(field)))
    lines = dict.fromkeys(group.label for group in groups.groups(all_runs, unnamed=rates if together else (field,)))
    rows = []
    for label in lines:
        for group in (x for x in found if x.label == label):
            value = groups.number(group.config.get(field))
            rows += [(*score, field, value, label or "all", *numbers) for score, numbers in _last_and_best(group)]
    return _by_panel(rows)


def settings(all_runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    """Last and best FID and score of each method under each setting of learning rates, beta1, beta2 and n_dis, as
    Miyato et al., ICLR 2018, Figs. 1 and 2; those of its Table 1 have their letters."""
    rows = []
    runs.protocol(all_runs)
    found = groups.groups(all_runs, unnamed=_FIELDS)
    for group in sorted(found, key=lambda group: tuple(group.config[field] for field in _FIELDS)):
        rates = [groups.number(x) for x in dict.fromkeys(group.config[field] for field in ("lr_g", "lr_d"))]
        betas = [groups.number(group.config[field]) for field in ("beta1", "beta2")]
        letter = _LETTERS.get(tuple(group.config[field] for field in _FIELDS), "")
        setting = f"{letter}lr {' / '.join(rates)}; β {', '.join(betas)}; n_dis {group.config['n_dis']}"
        rows += [(*score, setting, group.label, *numbers) for score, numbers in _last_and_best(group)]
    return _by_panel(rows)


def _last_and_best(group: Group) -> Iterator[tuple[tuple[str, str, str], tuple[float, float, int]]]:
    """Of each seed by itself: (name, protocol, which), then mean, standard error, seeds."""
    label = group.runs[0].metrics[0]["protocol"]
    for column, name in runs.score_names(label).items():
        values = [run.scores(column) for run in group.runs]
        yield (name, label, "last"), groups.mean_and_error([x[max(x)] for x in values])
        best = min if column == "fid" else max
        known = [[score for score in x.values() if not math.isnan(score)] or [math.nan] for x in values]
        yield (name, label, "best"), groups.mean_and_error([best(x) for x in known])


def _by_panel(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """FID last, FID best, score last, score best."""
    panels = list(dict.fromkeys(row[:3] for row in rows))
    return sorted(rows, key=lambda row: panels.index(row[:3]))


def draw_against(rows: Sequence[Row]) -> Picture:
    """A line of markers with error bars for each group; a field that is no number has places at equal distances."""
    named, values = axes.with_seeds(rows), list(dict.fromkeys(row["value"] for row in rows))
    numeric = all(_number(x) is not None for x in values)
    values.sort(key=lambda x: _number(x) or 0.0)
    places = {x: _number(x) if numeric else i for i, x in enumerate(values)}
    logarithmic = numeric and min(places.values()) > 0 and max(places.values()) / min(places.values()) > 5
    picture, grid = _four(rows, list(named.values()))
    handles = {}
    for axis, here in grid:
        for number, group in enumerate(named):
            own = sorted((places[r["value"]], r["mean"], r["standard_error"]) for r in here if r["group"] == group)
            x, means, errors = np.array(own).reshape(-1, 3).T
            look = axes.line(number, len(named))
            handles[group] = axis.errorbar(x, means, np.nan_to_num(errors), **look, capsize=3)[0]
        axis.set(xlabel=rows[0]["field"].replace("_", " "))
        if "FID" in here[0]["quantity"] and axes.spread(row["mean"] for row in here) > 8:
            axis.set_yscale("log")
        if logarithmic:
            axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(list(places.values()), list(places), rotation=45 if len(places) > 6 else 0)
    axes.legend(picture, list(handles.values()), list(named.values()))
    return picture


def draw_settings(rows: Sequence[Row]) -> Picture:
    """Bars side by side at each setting, with error bars."""
    named, places = axes.with_seeds(rows), list(dict.fromkeys(row["setting"] for row in rows))
    width = max(4.8, len(places) * (0.75 + 0.1 * len(named)))
    picture, grid = _four(rows, list(named.values()), width)
    handles = {}
    for axis, here in grid:
        for number, group in enumerate(named):
            own = [(places.index(r["setting"]), r["mean"], r["standard_error"]) for r in here if r["group"] == group]
            x, means, errors = np.array(own).reshape(-1, 3).T
            x += (number + 0.5) * 0.84 / len(named) - 0.42
            hatch = ("", "//", "..", "xx")[number // len(axes.COLOURS) % 4]
            look = {"color": axes.colour(number), "hatch": hatch, "error_kw": {"linewidth": 1}, "capsize": 2}
            bars = axis.bar(x, np.nan_to_num(means), 0.84 / len(named), yerr=np.nan_to_num(errors), **look)
            handles[group] = bars
            mark_unknown(axis, x, means)
        axis.set_xlim(-0.6, len(places) - 0.4)
        axis.set_xticks(range(len(places)), [place.replace("; ", "\n") for place in places], fontsize=9)
        axis.grid(axis="x", visible=False)
    axes.legend(picture, list(handles.values()), list(named.values()))
    return picture


def mark_unknown(axis: Axes, x: Sequence[float], means: Sequence[float]) -> None:
    """A word where a bar would be: a diverged run has no score."""
    for place, mean in zip(x, means, strict=True):
        if not math.isfinite(mean):
            axis.text(place, 0, " not finite", rotation=90, ha="center", va="bottom", fontsize=8)


def _four(rows: Sequence[Row], labels: list[str], width: float = 4.8) -> tuple[Picture, list[tuple[Axes, list[Row]]]]:
    """A panel for last and best of FID and score, with its rows."""
    keys = list(dict.fromkeys((row["quantity"], row["of"], row["which"]) for row in rows))
    columns = 2 if width < 8 else 1
    picture, grid = axes.panels(len(keys), columns, width, 3.3, below=axes.legend_rows(labels, columns * width)[1])
    panels = []
    for axis, key in zip(grid, keys, strict=True):
        here = [row for row in rows if (row["quantity"], row["of"], row["which"]) == key]
        axis.set(title=f"{key[2]}, protocol {key[1]}", ylabel=key[0])
        panels.append((axis, here))
    return picture, panels


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
