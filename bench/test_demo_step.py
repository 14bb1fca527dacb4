"""One step of `make demo`: the digits GAN with the kernels against the same GAN on the reference."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import measure
import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import digits
import fastsn
from gan.data.batches import Batches
from gan.data.digits import digits as images
from gan.data.picks import with_replacement
from gan.training import Training

CONTESTANTS = [(norm, impl) for norm in ("sn", "bssn") for impl in ("reference", "auto")]


def stepping(norm: str, impl: str) -> Callable[[], dict[str, Tensor]]:
    """A training's next step."""
    config = digits.Digits(name="bench", norm=norm, scale=1.4 if norm == "bssn" else 1.0)
    store = images(config.image_size)
    made = Training(config, store.channels, 0, measure.DEVICE)
    for module in made.discriminator.modules():
        if isinstance(module, fastsn.SpectralNorm):
            module.impl = impl
    batches = Batches(store, lambda draw: with_replacement(0, draw, config.batch_size, store.count), measure.DEVICE)
    stream = iter(batches.next, None)
    return lambda: made.advance(stream)


@lru_cache
def medians() -> dict[tuple[str, str], float]:
    """The gate: after a step of the same training, both implementations have the same loss within rounding."""
    steps = {entry: stepping(*entry) for entry in CONTESTANTS}
    for norm in ("sn", "bssn"):
        losses = [float(steps[norm, impl]()["loss/d"]) for impl in ("reference", "auto")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    times = measure.interleaved({str(entry): step for entry, step in steps.items()}, budget=20)
    return {entry: statistics.median(times[str(entry)]) for entry in steps}


@pytest.mark.parametrize(("norm", "impl"), CONTESTANTS)
def test_demo_step(benchmark, norm, impl):
    found = medians()
    benchmark.extra_info |= {
        "variant": norm,
        "impl": impl,
        "step_ms": found[norm, impl] * 1e3,
        "times_reference": found[norm, impl] / found[norm, "reference"],
    }
    benchmark.pedantic(stepping(norm, impl), rounds=3, iterations=1, warmup_rounds=1)
