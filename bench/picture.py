"""The picture of a result file: every contestant against the floor, and how the cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

# Grey is torch's SN, brown BSSN by hand, darker where it is compiled; blue and green are fastsn.
COLOURS = {
    "torch SN eager": "#8c8c8c",
    "torch SN compiled": "#595959",
    "torch SN compiled, reduce-overhead": "#262626",
    "composed BSSN eager": "#d9b38c",
    "composed BSSN compiled": "#b3753a",
    "composed BSSN compiled, reduce-overhead": "#7a4a1c",
    "fastsn BSSN reference": "#bcd4ea",
    "fastsn SN per layer": "#5aa9a0",
    "fastsn BSSN per layer": "#4b86c2",
    "fastsn BSSN whole model": "#123f7a",
}
UNITS = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB"))


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        _figure(result).savefig(out, dpi=130)


def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1))
    _bars(figure.add_subplot(grid[0, :]), result)
    growth = result["results"]["growth"]
    _growth(figure.add_subplot(grid[1, 0]), [x for x in growth if x["axis"] == "layers"], "layers, Conv2d(64, 64, 3)")
    sizes = figure.add_subplot(grid[1, 1])
    _growth(sizes, [x for x in growth if x["axis"] == "bytes"], "one square weight")
    ticks = sorted({x["value"] for x in growth if x["axis"] == "bytes"})
    sizes.set_xticks(ticks, [_bytes(x) for x in ticks])
    figure.suptitle(f"Normalizing all weights, forward + backward ({report.provenance(result)})", fontsize=10)
    return figure


def _bars(axes: Axes, result: dict[str, Any]) -> None:
    workloads = report.by_workload(result)
    present = report.names(workloads)
    contestants = [name for name in COLOURS if name in present]
    width = 0.84 / len(contestants)
    for i, name in enumerate(contestants):
        places = [(x, found[name]) for x, found in enumerate(workloads.values()) if name in found]
        left = [x + (i - (len(contestants) - 1) / 2) * width for x, _ in places]
        heights = [figures["times_floor"] for _, figures in places]
        bars = axes.bar(left, heights, width * 0.92, color=COLOURS[name], label=name)
        axes.bar_label(bars, [f"{h:.0f}" if h >= 10 else f"{h:.1f}" for h in heights], fontsize=6, padding=1)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set(yscale="log", ylabel="times the floor", ylim=(0.7, None))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    labels = [
        f"{workload}\n{x['layers']} layers, {x['weights_MB']:.3g} MB\nfloor {x['floor_ms']:.2g} ms"
        for workload, x in ((w, next(iter(found.values()))) for w, found in workloads.items())
    ]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.legend(ncols=4, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _growth(axes: Axes, points: list[dict[str, Any]], label: str) -> None:
    for name in dict.fromkeys(x["contestant"] for x in points):
        mine = [x for x in points if x["contestant"] == name]
        values, times = [x["value"] for x in mine], [x["interleaved_median_ms"] for x in mine]
        axes.plot(values, times, "o-", markersize=4, linewidth=1.6, color=COLOURS[name], label=name)
    floor = {x["value"]: x["floor_ms"] for x in points}
    axes.plot(floor.keys(), floor.values(), "--", color="black", linewidth=1, label="floor: bytes / copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    axes.set_xticks(list(floor), [str(x) for x in floor])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(True, axis="y", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)


def _bytes(n: int) -> str:
    size, unit = next((size, unit) for size, unit in UNITS if n >= size)
    return f"{n // size} {unit}"
