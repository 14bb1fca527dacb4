"""What a training step takes beside its networks: python bench/training_share.py --out OUT.json

The CNN of CIFAR10 at width 1, batch 64, one step of either network, three ways in turns: plain networks (forwards,
backwards and Adam on tensors that are there, no normalization), the same with BSSN, and the engine's whole step from
images in memory, with random numbers, labels, schedule of u and v and losses. First the last two are checked to give
the same weights. On a GPU also the engine's step as one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from machine import write
from measure import in_a_line

from gan import streams
from gan.captured import EAGER_STEPS, CudaGraph
from gan.config import Config
from gan.data.batches import Batches
from gan.data.images import to_float
from gan.data.picks import with_replacement
from gan.data.store import memory_store
from gan.training import Training

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STORE = memory_store("noise", np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8))


def config(norm: str) -> Config:
    return Config(name="x", norm=norm, scale=1.4 if norm == "bssn" else 1.0)


def batches(own: Config) -> Batches:
    return Batches(STORE, lambda draw: with_replacement(own.seed, draw, own.batch_size, STORE.count), DEVICE)


def networks(norm: str) -> tuple[Callable[[], None], Training]:
    """The steps of both networks on tensors that are there: the first batch and z, again and again."""
    training = Training(config(norm), 3, 0, DEVICE)
    d, g, own = training.discriminator, training.generator, training.config
    real = to_float(next(iter(batches(own).next, None))[0])
    z = streams.normal(own.seed, "z of d", (own.batch_size, own.latent), 0, 0).to(DEVICE)

    def step() -> None:
        with torch.no_grad():
            fake = g(z)
        with training.norm.during_a_step():
            loss = training.loss.d(d(real), d(fake))
            training.optimizer_d.zero_grad()
            loss.backward()
        training.optimizer_d.step()
        training.norm.after_a_d_step()
        d.requires_grad_(False)
        with training.norm.during_a_step():
            loss = training.loss.g(d(g(z)))
            training.optimizer_g.zero_grad()
            loss.backward()
        training.optimizer_g.step()
        d.requires_grad_(True)

    return step, training


def whole(graph: type[CudaGraph] | None = None) -> tuple[Callable[[], None], Training]:
    """The engine's."""
    training = Training(config("bssn"), 3, 0, DEVICE, graph)
    stream = iter(batches(training.config).next, None)
    return lambda: training.advance(stream), training


def captured_as_well(steps: dict[str, Callable[[], None]]) -> dict[str, str]:
    """Add the engine's step as one CUDA graph, or say why there is none."""
    try:
        step, _ = whole(CudaGraph)
        for _ in range(EAGER_STEPS + 1):
            step()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"whole step, CUDA graph": f"failed: {in_a_line(error)}"}
    steps["whole step, CUDA graph"] = step
    return {}


def timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    made = {"plain networks": networks("none"), "networks with BSSN": networks("bssn"), "whole step": whole()}
    steps = {name: step for name, (step, _) in made.items()}
    torch.backends.cudnn.deterministic = True  # for the check alone
    for step in steps.values():
        step()
    torch.backends.cudnn.deterministic = False
    ours, engines = made["networks with BSSN"][1], made["whole step"][1]
    for a, b in zip(ours.discriminator.parameters(), engines.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for step in steps.values():  # cuDNN's choice of kernels
        step()
    failed = captured_as_well(steps) if DEVICE.type == "cuda" else {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    medians = {name: statistics.median(found) for name, found in times.items()}
    shares = {
        "normalization_percent": 100 * (medians["networks with BSSN"] / medians["plain networks"] - 1),
        "engine_percent": 100 * (medians["whole step"] / medians["networks with BSSN"] - 1),
    }
    rows = [{"contestant": name, "interleaved_median_ms": round(1e3 * x, 2)} for name, x in medians.items()]
    found = {"training_share": rows, **{name: round(x, 2) for name, x in shares.items()}, "rounds": arguments.rounds}
    found |= failed
    write(arguments.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
