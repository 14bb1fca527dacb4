"""Predicts device times on an H100 from bytes and launches, and lists what the compiler makes of the kernels.

python tests/compiled.py sm90 > COMPILED.json      # once for each version of Triton
python bench/predictions.py COMPILED.json ... > bench/results/predictions.md

Nothing is measured. The first measurement on a GPU is to be held against it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from workloads import WORKLOADS, Workload

from fastsn.kernels.arrangement import arrangement
from fastsn.kernels.settings import DEFAULT

BANDWIDTH = 0.85 * 3.35e12  # bytes per second: what a copy gets of an H100's HBM3, by assumption
LAUNCH = 2.0  # µs of each kernel in a CUDA graph, start and drain, by assumption
TRIP = 0.3  # µs of a dependent load from L2, by assumption
MULTIPROCESSORS, L2 = 132, 50
NAMES = ("CIFAR10 CNN", "ImageNet ResNet", "4 Linear 4096")


def predicted(workload: Workload) -> str:
    """A row of the table: bytes, the launches, the trips of the slowest weight, and times."""
    weights = sums = own = trips = near = 0
    apart = False
    with torch.device("meta"):
        shapes = [tuple(layer().weight.shape) for layer in workload.layers]
    for shape in shapes:
        a = arrangement(shape, torch.empty(shape, device="meta").stride(), 0)
        assert a is not None
        t = DEFAULT.tiles(a, DEFAULT.tile)
        views = 2 if a.k > 1 else 1
        columns = a.n + a.b * (views - 1)
        weights += 4 * a.numel
        sums += 2 * 4 * t.blocks * columns
        own += 4 * t.blocks * t.own(a.n) * (views - 1)
        near = max(near, 4 * min(t.blocks, MULTIPROCESSORS * 16 // DEFAULT.warps) * t.bo * a.n)
        groups = -(-t.blocks // DEFAULT.group)
        later = DEFAULT.finished_apart(a, t.blocks)
        apart |= later
        # Groups of one tile of columns, or of all of them; then every vector is multiplied and divided.
        tiles = -(-a.n // DEFAULT.columns) + -(-a.b // DEFAULT.columns) * (views - 1)
        lengths = [a.rows, a.n, a.rows * a.k, a.b][: 2 * views]
        vectors = 2 * sum(-(-n // DEFAULT.vector) for n in lengths)
        trips = max(trips, (views * groups if later else groups * tiles) + vectors)
    times = {
        "iteration": (weights + sums + own) / BANDWIDTH * 1e6 + (1 + apart) * LAUNCH + trips * TRIP,
        "rescale": 2 * weights / BANDWIDTH * 1e6 + LAUNCH,
        "backward": 4 * weights / BANDWIDTH * 1e6 + 2 * LAUNCH,
    }
    numbers = [f"{x / 1e6:.1f}" for x in (weights, sums, near, own)]
    cells = [*numbers, str(4 + apart), str(trips), *(f"{x:.0f}" for x in times.values())]
    return f"| {workload.name} | {' | '.join(cells)} |"


def compiled(file: Path) -> list[str]:
    """Rows of the other table."""
    found = json.loads(file.read_text())
    rows = []
    for name, needs in found["kernels"].items():
        if needs["loops"] and "network" not in name:
            counts = ("instructions", "shuffles", "barriers", "loads of 16 bytes")
            loops = ", ".join(" / ".join(str(loop[count]) for count in counts) for loop in needs["loops"])
            rows.append(f"| {name.removesuffix(' wide')} | {found['triton']} | {needs['registers']} | {loops} |")
    return rows


if __name__ == "__main__":
    print(f"""# Predicted device times, float32, on an H100

Predictions, by `bench/predictions.py`; nothing here was measured. Caches cold, one iteration, inside a CUDA graph.

Assumed: {BANDWIDTH / 1e12:.2f} TB/s (85 % of 3.35), {LAUNCH} µs per launch, {TRIP} µs per dependent trip to L2.
Bytes: the iteration reads W once, and writes and reads the sums of its blocks, all counted at the speed of memory;
rescaling reads W and writes W̄; backward reads G and W̄, then G again, and writes dW. Time is bytes over bandwidth,
launches, and for the iteration the trips of the weight with the most of them. "near" is what the programs that run at
once hold of the largest weight: below {L2} MB, the second half of an iteration finds it in L2. "own" is what blocks
write so that positions come together where K is no power of two; it is read while it is in L2, and written back later.
The ImageNet weights of 9216 columns have blocks of 8 rows, whose sums add a quarter: of 16 rows, not all would stay in
L2.

| workload | W, MB | sums, MB | near, MB | own, MB | launches | trips | iteration, µs | rescale, µs | backward, µs |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    print("\n".join(predicted(workload) for workload in WORKLOADS if workload.name in NAMES))
    print("""
# What the compiler makes of the loops over tiles, sm_90

Read from machine code, not run: registers per thread, and of each loop, per thread and 16 elements of the weight, the
instructions / shuffles between lanes / barriers / loads of 16 bytes. An iteration has two loops, its halves.

| kernel | Triton | registers | loops |
| --- | --- | --- | --- |""")
    print("\n".join(sorted(row for file in sys.argv[1:] for row in compiled(Path(file)))))
