"""A few finished runs in one picture and as text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Picture

from gan.checkpoint import atomic_write
from gan.figures.groups import groups, mean_and_error, names
from gan.figures.runs import SCORES, Run, protocol, score_names
from gan.figures.samples import show


def title(run: Run) -> str:
    """Normalization, scale and seed."""
    return f"{names([run.config])[0]}, seed {run.config['seed']}"


def compare(runs: Sequence[Run], out: Path) -> None:
    """One picture: last sample grids side by side, FID and score over steps, sigma of every layer over steps."""
    called = score_names(protocol(runs))
    picture = Picture(figsize=(4.6 * max(2, len(runs)), 13), layout="constrained")
    top, middle, bottom = picture.subfigures(3, 1, height_ratios=(1.25, 0.8, 1))
    for axis, run in zip(top.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        show(axis, run.sheet, title(run))
    for axis, (column, name) in zip(middle.subplots(1, 2), called.items(), strict=True):
        for run in runs:
            values = run.scores(column)
            axis.plot(list(values), list(values.values()), marker=".", label=title(run))
        axis.set(xlabel="generator steps", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes = bottom.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, run in zip(axes, runs, strict=True):
        for layer, values in run.scalars("sigma/").items():
            axis.plot(list(values), list(values.values()), label=layer)
        axis.set(title=f"sigma of each layer, {title(run)}", xlabel="generator steps", ylabel="sigma", yscale="log")
        axis.grid(alpha=0.3)
    bottom.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small")
    written = io.BytesIO()
    picture.savefig(written, dpi=110)
    atomic_write(out, written.getbuffer())


def table(runs: Sequence[Run]) -> str:
    """The last row of each run, and its best FID, as text."""
    fid, score = score_names(protocol(runs)).values()
    lines = [f"{'run':<24}{'steps':>8}{fid:>12}{'best':>10}{score:>16}{'seconds':>10}"]
    for run in runs:
        last, best = run.metrics[-1], min(float(row["fid"]) for row in run.metrics if row["fid"])
        found = f"{float(last['inception_score_mean']):.3f} ± {float(last['inception_score_std']):.3f}"
        lines.append(
            f"{title(run):<24}{last['step']:>8}{float(last['fid']):>12.3f}{best:>10.3f}{found:>16}"
            f"{float(last['seconds']):>10.0f}"
        )
    return "\n".join(lines)


def over_seeds(runs: Sequence[Run]) -> str:
    """Mean and standard error of the last rows of runs that differ in nothing but the seed, as text."""
    fid, score = score_names(protocol(runs)).values()
    lines = [f"{'runs':<24}{'seeds':>8}{fid:>20}{score:>20}"]
    for group in groups(runs):
        cells = [_mean([float(run.metrics[-1][column]) for run in group.runs]) for column in SCORES]
        lines.append(f"{group.label:<24}{len(group.runs):>8}{cells[0]:>20}{cells[1]:>20}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    """Mean ± standard error, where there are several."""
    mean, error, count = mean_and_error(values)
    return f"{mean:.3f}" if count == 1 else f"{mean:.3f} ± {error:.3f}"
