"""Figures of the papers from the folders of runs: rows of numbers, and pictures drawn from these alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Picture

from gan.checkpoint import atomic_write
from gan.figures import axes, fields, groups, lines, runs, samples, seconds, table
from gan.figures.groups import Group
from gan.figures.runs import Run
from gan.figures.table import Columns, Row

Rows = Sequence[Sequence[Any]]
_log = logging.getLogger("gan")


class Figure(NamedTuple):
    """``rows`` of runs, with these ``columns``, and the picture that is drawn of them."""

    columns: Columns
    rows: Callable[..., Rows]
    draw: Callable[[Sequence[Row]], Picture]


def _grouped(rows: Callable[[list[Group]], Rows]) -> Callable[[list[Run]], Rows]:
    return lambda found: rows(groups.groups(found))


FIGURES = {
    "curves": Figure(lines.COLUMNS, _grouped(lines.curves), lines.draw),
    "against": Figure(fields.AGAINST, fields.against, fields.draw_against),
    "settings": Figure(fields.SETTINGS, fields.settings, fields.draw_settings),
    "gradients": Figure(lines.COLUMNS, _grouped(lines.gradients), lines.draw),
    "variances": Figure(lines.BOUNDED, _grouped(lines.variances), lines.draw),
    "sigmas": Figure(lines.COLUMNS, _grouped(lines.sigmas), lines.draw),
    "spectra": Figure(lines.SPECTRA, _grouped(lines.spectra), lines.draw),
    "seconds": Figure(seconds.COLUMNS, _grouped(seconds.seconds), seconds.draw),
    "samples": Figure(samples.COLUMNS, _grouped(samples.samples), samples.draw),
}


def make(name: str, paths: Sequence[Path], out: Path, unfinished: bool = False, **options: Any) -> None:
    """Write figure ``name`` of the runs in these folders to ``out``, a .png, and its numbers beside it as .csv. One
    .csv that was written so gives its picture again, to the byte.

    Raises:
        ValueError: an unknown name; a path that is no run, a run that is not finished (with ``unfinished`` it is taken
            as it is), runs that cannot be compared, a probe that was off; a CSV of another figure. Nothing is written.
        OSError: something cannot be read or written.
    """
    if name not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {name!r}")
    if out.suffix != ".png":
        raise ValueError(f"out must be a .png file, got {out}")
    figure, given = FIGURES[name], [path for path in paths if path.suffix == ".csv"]
    if given and len(paths) > 1:
        raise ValueError(f"runs must be folders, or one .csv of a figure, got {given[0]} among {len(paths)}")
    if given:
        written = given[0].read_text()
    else:
        written = table.text(figure.columns, figure.rows(runs.find(paths, unfinished), **options))
    rows = table.parse(figure.columns, written, given[0] if given else out.with_suffix(".csv"))
    with axes.styled():
        picture = axes.png(figure.draw(rows))
    if not given:
        atomic_write(out.with_suffix(".csv"), written.encode())
        _log.info("numbers: %s", out.with_suffix(".csv"))
    atomic_write(out, picture)
    _log.info("picture: %s", out)
