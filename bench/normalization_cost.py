"""What a training step costs by method: python bench/normalization_cost.py --out bench/results/<machine>/NAME.json

Fig. 10 of Miyato et al., ICLR 2018, for every row of ``--method``: seconds per 100 updates of the generator of the CNN
for CIFAR10, 5 updates of the discriminator before each, batches of 64, by the engine's whole step from images in
memory. All methods are in one process and take turns. First each is checked to hold what it promises of its weights or
outputs, with finite losses. The floor is the step without normalization and penalty (no-norm); "times_floor" is the
ratio of the medians to it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from machine import write
from measure import DEVICE, seconds

from gan.config import Config
from gan.data.batches import Batches
from gan.data.picks import with_replacement
from gan.data.store import memory_store
from gan.presets import METHODS, PRESETS
from gan.training import Training

FLOOR, IMAGES = "no-norm", 5000


class Contestant:
    """A training by one method on noise."""

    def __init__(self, method: str, **changes: Any) -> None:
        fields = {**PRESETS["sngan-a"], "u_schedule": "per_step", **METHODS[method], **changes}
        self.training = Training(Config(name="x", **fields), 3, 0, DEVICE)
        config, noise = self.training.config, np.random.default_rng(0)
        store = memory_store("noise", noise.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8))
        batches = Batches(store, lambda draw: with_replacement(0, draw, config.batch_size, store.count), DEVICE)
        self.stream = iter(batches.next, None)

    def step(self) -> dict[str, Tensor]:
        """One update of the generator and those of the discriminator before it."""
        return self.training.advance(self.stream)

    def check(self) -> None:
        """Raises AssertionError where a method does not hold what it promises, after three steps."""
        for _ in range(3):
            scalars = self.step()
        assert all(math.isfinite(x) for x in scalars.values())
        config = self.training.config
        assert ("loss/penalty" in scalars) == (config.gradient_penalty > 0)
        PROPERTIES[config.norm](self.training)


def _none(training: Training) -> None:
    parameters = dict(training.discriminator.named_parameters())
    assert all(torch.equal(x, parameters[f"{name}.weight"]) for name, x in training.norm.weights().items())


def _largest_is_the_scale(training: Training) -> None:
    """The norm of every weight as a matrix, or the mean of both of its norms, is near the constant."""
    averaged = training.config.norm in ("bsn", "bssn")
    for name, weight in training.norm.weights().items():
        layer = training.discriminator.get_submodule(name)
        views = [weight.flatten(1), *([weight.transpose(0, 1).flatten(1)] if averaged else [])]
        found = statistics.fmean(float(torch.linalg.matrix_norm(m.cpu(), 2)) for m in views)
        _near(found, float(torch.as_tensor(layer.spectral_norm.scale).detach()), name)


def _largest_of_operators_is_the_scale(training: Training) -> None:
    """Of the convolutions by 200 power iterations of <A v, A v>, by autograd, from a start of their own."""
    layers = dict(training.discriminator.named_modules())
    for name, weight in training.norm.weights().items():
        layer = layers[name]
        if not isinstance(layer, nn.Conv2d):
            continue
        v = torch.randn(layer._v.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
        for _ in range(200):
            v = (v / v.norm()).requires_grad_()
            length = nn.functional.conv2d(v, weight, None, layer.stride, layer.padding).square().sum()
            (v,) = torch.autograd.grad(length / 2, v)
        _near(float(length.detach().sqrt()), training.config.scale, name)


def _near(found: float, expected: float, name: str) -> None:
    assert 0.9 * expected < found < 1.25 * expected, (name, found, expected)  # one iteration a step runs after weights


def _rows(training: Training) -> None:
    for weight in training.norm.weights().values():
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(len(weight), device=DEVICE))


def _standardized(dims: tuple[int, ...]) -> Callable[[Training], None]:
    def check(training: Training) -> None:
        layer = training.discriminator.convs[0]
        with torch.no_grad():
            y = layer(training.last[0]) - layer.bias.view(-1, 1, 1)
        mean, var = y.mean(dims), y.var(dims, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        torch.testing.assert_close(var, torch.ones_like(var), atol=2e-2, rtol=0)  # less by epsilon

    return check


def _clipped(training: Training) -> None:
    limit = training.config.clip
    assert all(float(p.detach().abs().max()) <= limit * (1 + 1e-6) for p in training.discriminator.parameters())


def _orthonormal(training: Training) -> None:
    for weight in training.norm.weights().values():
        m = weight.flatten(1) if len(weight) <= weight[0].numel() else weight.flatten(1).T
        assert float((m @ m.T - torch.eye(len(m), device=DEVICE)).abs().max()) < 0.1


PROPERTIES: dict[str, Callable[[Training], None]] = {
    "none": _none,
    "sn": _largest_is_the_scale,
    "ssn": _largest_is_the_scale,
    "bsn": _largest_is_the_scale,
    "bssn": _largest_is_the_scale,
    "sn_conv": _largest_of_operators_is_the_scale,
    "wn": _rows,
    "ln": _standardized((1, 2, 3)),
    "bn": _standardized((0, 2, 3)),
    "clip": _clipped,
    "orthonormal": _orthonormal,
}


def compared(methods: list[str], rounds: int, **changes: Any) -> dict[str, dict[str, float]]:
    """{method: seconds per 100 updates of the generator (median, least, most), times the floor}."""
    made = {name: Contestant(name, **changes) for name in methods}
    for contestant in made.values():
        contestant.check()
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, contestant in made.items():
            times[name].append(100 * seconds(contestant.step))
    floor = statistics.median(times[FLOOR])
    return {
        name: {
            "seconds_per_100_updates": round(statistics.median(found), 3),
            "least": round(min(found), 3),
            "most": round(max(found), 3),
            "times_floor": round(statistics.median(found) / floor, 3),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-dis", type=int, default=5)
    parser.add_argument("--u-schedule", default="per_step", choices=["per_forward", "per_step", "per_d_step"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("width", "batch_size", "n_dis", "u_schedule")}
    methods = list(dict.fromkeys([FLOOR, *arguments.methods]))
    found = {"floor": FLOOR, **changes, "rounds": arguments.rounds}
    found["methods"] = compared(methods, arguments.rounds, **changes)
    write(arguments.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
