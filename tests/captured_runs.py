"""Trainings whose steps are captured in test_captured_steps and test_cuda_graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gan.config import Config
from gan.training import Training
from gan_rank_jobs import TINY

RATE = 2**-12  # in float32 what it is in float64, and so are its eighths
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "CNN, BSSN": ({"norm": "bssn", "scale": 1.3, "u_schedule": "per_step"}, 0),
    "two steps of D, a penalty": ({"norm": "sn", "n_dis": 2, "gradient_penalty": 10.0, "z_of_g": "fresh"}, 0),
    "projection ResNet": (
        {
            "architecture": "sngan-resnet",
            "conditional": "projection",
            "image_size": 32,
            "width": 0.02,
            "dequantize": True,
            "order": "g_first",
            "z_of_g": "fresh",
            "norm": "bssn",
        },
        3,
    ),
    "an average": ({"ema": 0.75, "batch_norm_in_d_steps": False}, 0),
    "learning rates that fall": ({"decay_from": 2}, 0),
    "forwards that iterate": ({"u_schedule": "per_forward", "gamma": "different", "n_dis": 2}, 0),
    "channels last": ({"channels_last": True, "norm": "bsn"}, 0),
    "a batch of G's own": ({"batch_size_g": 12, "z_of_g": "fresh", "loss": "standard"}, 0),
}
STEPS = 10


def configured(changes: dict[str, Any]) -> Config:
    return Config(name="x", **{**TINY, "lr_g": RATE, "lr_d": RATE, "steps": STEPS, **changes})


def stepped(training: Training, given: Any, steps: int) -> list[dict[str, Tensor]]:
    """Scalars of every step, as they are after the last one."""
    return [training.advance(given) for _ in range(steps)]
