"""One step of `make demo`: the digits GAN with the kernels against the same GAN on the reference."""

from __future__ import annotations

import statistics
from functools import lru_cache

import measure
import pytest

import digits
import fastsn
from gan import data, loop

CONTESTANTS = [(variant, impl) for variant in ("sn", "bssn") for impl in ("reference", "auto")]


def training(variant: str, impl: str) -> loop.Training:
    config = digits.Digits(name="bench", variant=variant, scale=1.4 if variant == "bssn" else 1.0)
    made = loop.Training(config, data.digits(config.image_size), measure.DEVICE)
    for module in made.discriminator.modules():
        if isinstance(module, fastsn.SpectralNorm):
            module.impl = impl
    return made


@lru_cache
def medians() -> dict[tuple[str, str], float]:
    """The gate: after some steps of the same training, both implementations have the same loss within rounding."""
    runs = {entry: training(*entry) for entry in CONTESTANTS}
    for variant in ("sn", "bssn"):
        losses = [float(runs[variant, impl].advance()["loss/d"]) for impl in ("reference", "auto")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    times = measure.interleaved({str(entry): run.advance for entry, run in runs.items()}, budget=20)
    return {entry: statistics.median(times[str(entry)]) for entry in runs}


@pytest.mark.parametrize(("variant", "impl"), CONTESTANTS)
def test_demo_step(benchmark, variant, impl):
    found = medians()
    benchmark.extra_info |= {
        "variant": variant,
        "impl": impl,
        "step_ms": found[variant, impl] * 1e3,
        "times_reference": found[variant, impl] / found[variant, "reference"],
    }
    benchmark.pedantic(training(variant, impl).advance, rounds=3, iterations=1, warmup_rounds=1)
