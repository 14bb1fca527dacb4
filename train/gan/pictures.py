"""Pictures: sample grids, and the comparison of runs."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 (N, C, S, S) with C of 1 or 3 as one picture, row by row, a pixel apart."""
    count, channels, size, _ = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(channels, rows * (size + 1) - 1, columns * (size + 1) - 1, dtype=torch.uint8)
    for index, image in enumerate(images.cpu()):
        top, left = (index // columns) * (size + 1), (index % columns) * (size + 1)
        sheet[:, top : top + size, left : left + size] = image
    pixels = sheet[0] if channels == 1 else sheet.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv. Raises FileNotFoundError or ValueError for a folder without any."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{run} must be the folder of a run with a metrics.csv, found none")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{run} must have been evaluated at least once, found no row in metrics.csv")
    return rows


def read_scalars(run: Path, prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """Of scalars.jsonl, those whose tag starts with ``prefix``: {tag: (steps, values)}."""
    path = run / "scalars.jsonl"
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        values = json.loads(line)
        step = values.pop("step")
        for tag, value in values.items():
            if tag.startswith(prefix):
                steps, numbers = found.setdefault(tag, ([], []))
                steps.append(step)
                numbers.append(value)
    return found


def title(run: Path) -> str:
    """Normalisation, scale and seed of a run."""
    config: dict[str, Any] = json.loads((run / "config.json").read_text())["config"]
    scale = f", scale {config['scale']:g}" if config["scale"] != 1 else ""
    return f"{config['norm'].upper()}{scale}, seed {config['seed']}"


def compare(runs: list[Path], out: Path, fid_name: str, score_name: str) -> None:
    """One picture: last sample grids side by side, FID and score over steps, sigma of every layer over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(4.6 * max(2, len(runs)), 13), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.25, 0.8, 1))
    for axis, run in zip(top.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        last = max((run / "sample").glob("step-*.png"), default=None)
        if last is None:
            raise FileNotFoundError(f"{run} must hold samples, found no picture in its folder sample")
        with Image.open(last) as picture:
            axis.imshow(picture, cmap="gray", interpolation="nearest")
        axis.set_title(f"{title(run)}\nsamples at step {int(last.stem.split('-')[1]):,}")
        axis.set_axis_off()
    for axis, column, name in zip(
        middle.subplots(1, 2), ("fid", "inception_score_mean"), (fid_name, score_name), strict=True
    ):
        for run in runs:
            rows = read_metrics(run)
            axis.plot([int(r["step"]) for r in rows], [float(r[column]) for r in rows], marker=".", label=title(run))
        axis.set(xlabel="generator steps", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes = bottom.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, run in zip(axes, runs, strict=True):
        for tag, (steps, values) in read_scalars(run, "sigma/").items():
            axis.plot(steps, values, label=tag.removeprefix("sigma/"))
        axis.set(title=f"sigma of each layer, {title(run)}", xlabel="generator steps", ylabel="sigma", yscale="log")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=8, fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def table(runs: list[Path], fid_name: str, score_name: str) -> str:
    """The last row of each run, and its best FID, as text."""
    lines = [f"{'run':<24}{'steps':>8}{fid_name:>12}{'best':>10}{score_name:>16}{'seconds':>10}"]
    for run in runs:
        rows = read_metrics(run)
        last, best = rows[-1], min(float(r["fid"]) for r in rows if r["fid"])
        score = f"{float(last['inception_score_mean']):.3f} ± {float(last['inception_score_std']):.3f}"
        lines.append(
            f"{title(run):<24}{last['step']:>8}{float(last['fid']):>12.3f}{best:>10.3f}{score:>16}"
            f"{float(last['seconds']):>10.0f}"
        )
    return "\n".join(lines)


def over_seeds(runs: list[Path], fid_name: str, score_name: str) -> str:
    """Mean and standard error of the last rows of runs that differ in nothing but the seed, as text."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())["config"]
        del config["seed"]
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
    lines = [f"{'runs':<24}{'seeds':>8}{fid_name:>20}{score_name:>20}"]
    for found in groups.values():
        last = [read_metrics(run)[-1] for run in found]
        cells = [_mean([float(row[column]) for row in last]) for column in ("fid", "inception_score_mean")]
        name = title(found[0]).rpartition(", seed")[0]
        lines.append(f"{name:<24}{len(found):>8}{cells[0]:>20}{cells[1]:>20}")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    """Mean ± standard error, where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"
