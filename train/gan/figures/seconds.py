"""How long training takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from gan.figures import axes
from gan.figures.groups import Group, mean_and_error
from gan.figures.runs import Run
from gan.figures.table import Columns, Row

COLUMNS: Columns = {
    **{"quantity": str, "of": str, "group": str, "mean": float, "standard_error": float, "seeds": int, "updates": int}
}


def seconds(found: Sequence[Group]) -> list[tuple[Any, ...]]:
    """Seconds per 100 generator steps, each with its n_dis discriminator steps, as Miyato et al., ICLR 2018, Fig. 10.

    Of every run the median over the intervals between points of its scalars, without the first one, in which memory is
    allocated and networks are compiled. Counted: data, both networks, reduction over ranks, the optimizers. Not
    counted: scalars and probes, sample sheets, evaluation, checkpoints, the lockstep check.

    Raises:
        ValueError: runs on different devices, or with other numbers of processes or threads; a run with one point.
    """
    first = found[0].runs[0]
    rows = []
    for group in found:
        for run in group.runs:
            if _where(run) != _where(first):
                raise ValueError(
                    f"seconds needs runs on one device, got {_where(first)} of {first.folder} and {_where(run)} of "
                    f"{run.folder}"
                )
        numbers = mean_and_error([_of_a_run(run) for run in group.runs])
        rows.append(("seconds", _where(first), group.label, *numbers, group.config["n_dis"]))
    return rows


def _of_a_run(run: Run) -> float:
    rates = list(run.scalars("images_per_s_per_process").get("", {}).values())[1:]
    if not rates:
        raise ValueError(f"seconds needs two points of the scalars or more (--log-every), got {run.folder} with fewer")
    return statistics.median(100 * run.config["n_dis"] * run.config["batch_size"] / rate for rate in rates)


def _where(run: Run) -> str:
    about = run.environment
    counts = ", ".join(f"{name} {about.get(name, 'unknown')}" for name in ("processes", "threads"))
    return f"{about.get('device', 'unknown device')}, {counts}"


def draw(rows: Sequence[Row]) -> Picture:
    """A bar for each group, the shortest name of what was counted below."""
    named = axes.with_seeds(rows)
    longest = max(map(len, named.values()))
    picture, (axis,) = axes.panels(1, 1, 5 + 0.08 * longest, 1.3 + 0.32 * len(rows))
    places, means = np.arange(len(rows)), np.array([row["mean"] for row in rows])
    errors = np.nan_to_num([row["standard_error"] for row in rows])
    axis.barh(places, np.nan_to_num(means), 0.7, xerr=errors, color=axes.colour(0), capsize=3)
    for place, mean, error in zip(places, means, errors, strict=True):
        axis.annotate(f"{mean:.3g}", (mean + error, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    labels = [f"{named[row['group']]}, n_dis {row['updates']}" for row in rows]
    axis.set_yticks(places, labels)
    axis.set(xlabel=axes.SAID["seconds"] + "\nlogging, samples, evaluation not counted", title=rows[0]["of"])
    axis.title.set_fontsize(9)
    axis.set_xlim(0, 1.15 * float(np.max(means + errors)))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return picture
