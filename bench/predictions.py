"""Predicts device times on an H100 from bytes and launches: python bench/predictions.py > bench/results/predictions.md

Nothing is measured. The first measurement on a GPU is to be held against it.
"""

from __future__ import annotations

import torch
from workloads import WORKLOADS, Workload

from fastsn.kernels.arrangement import arrangement
from fastsn.kernels.settings import DEFAULT

BANDWIDTH = 0.85 * 3.35e12  # bytes per second: what a copy gets of an H100's HBM3, by assumption
LAUNCH = 2.0  # µs of each kernel in a CUDA graph, start and drain, by assumption
TRIP = 0.3  # µs of a dependent load from L2, by assumption
NAMES = ("CIFAR10 CNN", "ImageNet ResNet", "4 Linear 4096")


def predicted(workload: Workload) -> str:
    """A row of the table: MB of the weights, of the blocks' sums (written and read), the launches, µs."""
    weights = sums = own = trips = 0
    apart = False
    with torch.device("meta"):
        shapes = [tuple(layer().weight.shape) for layer in workload.layers]
    for shape in shapes:
        a = arrangement(shape, torch.empty(shape, device="meta").stride(), 0)
        assert a is not None
        t = DEFAULT.tiles(a)
        views = 2 if a.k > 1 else 1
        columns = a.n + a.b * (views - 1)
        weights += 4 * a.numel
        sums += 2 * 4 * t.blocks * columns
        own += 2 * 4 * t.blocks * t.own * (views - 1)
        tiles, groups = -(-columns // DEFAULT.columns), -(-t.blocks // DEFAULT.group)
        later = DEFAULT.finished_apart(a, t.blocks)
        apart |= later
        # The slowest weight: groups of one tile of columns, or of all of them; then both vectors, twice.
        vectors = -(-(a.rows * a.k + a.n) // DEFAULT.vector) * 2 * views
        trips = max(trips, (groups if later else groups * tiles) + vectors)
    launches = 2 + apart
    bytes_ = {"iteration": weights, "rescale": 2 * weights, "backward": 4 * weights}
    times = {
        "iteration": (weights + sums) / BANDWIDTH * 1e6 + (1 + apart) * LAUNCH + trips * TRIP,
        "rescale": bytes_["rescale"] / BANDWIDTH * 1e6 + LAUNCH,
        "backward": bytes_["backward"] / BANDWIDTH * 1e6 + 2 * LAUNCH,
    }
    numbers = [weights / 1e6, sums / 1e6, own / 1e6]
    cells = [f"{x:.1f}" for x in numbers] + [str(launches + 2), str(trips)] + [f"{x:.0f}" for x in times.values()]
    return f"| {workload.name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(f"""# Predicted device times, float32, on an H100

Predictions, by `bench/predictions.py`; nothing here was measured. Caches cold, one iteration, inside a CUDA graph.

Assumed: {BANDWIDTH / 1e12:.2f} TB/s (85 % of 3.35), {LAUNCH} µs per launch, {TRIP} µs per dependent trip to L2.
Bytes: the iteration reads W once, and writes and reads the sums of its blocks, all counted at the speed of memory;
rescaling reads W and writes W̄; backward reads G and W̄, then G again, and writes dW. Time is bytes over bandwidth,
launches, and for the
iteration the trips of the weight with the most of them: a whole column of groups where a second launch adds sums up,
all tiles where the last program does. "own" is what positions take to come together where K is no power of two, written
and read in L2, and in no time below.

| workload | W, MB | sums, MB | own, MB | launches | trips | iteration, µs | rescale, µs | backward, µs |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    print("\n".join(predicted(workload) for workload in WORKLOADS if workload.name in NAMES))
