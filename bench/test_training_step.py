"""What normalization adds to a whole training step: bench/training_step.py as part of a suite, for bench/report.py."""

from __future__ import annotations

from functools import lru_cache

import pytest
import training_step
from discriminator import PLAIN, Setting, prepared
from measure import DEVICE

SECONDS = 10.0 if DEVICE.type == "cuda" else 40.0
GROUPS = {group.mode: group for group in training_step.FIRST if group.mode in ("eager", "compiled")}

pytestmark = pytest.mark.timeout(1200)


_prepared = lru_cache(None)(prepared)


@lru_cache
def _figures(mode: str) -> dict[str, training_step.Figures]:
    rows = training_step.steps_of(GROUPS[mode], Setting(), SECONDS, _prepared)
    return {row["contestant"]: row for row in rows}


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode, x in GROUPS.items() for name in x.contestants])
def test_training_step(benchmark, mode, name):
    suffix = "" if mode == "eager" else f", {mode}"
    figures = _figures(mode)[name]
    assert "error" not in figures, figures["error"]
    benchmark.extra_info |= {
        "contestant": name + suffix,
        "plain": PLAIN + suffix,
        "batch": figures["batch"],
        "step_ms": figures["wall_ms"],
        "normalization_ms": figures["normalization_ms"],
        "rounds": figures["rounds"],
    }
    benchmark.pedantic(_prepared(name, mode, Setting()), rounds=3, warmup_rounds=1)
