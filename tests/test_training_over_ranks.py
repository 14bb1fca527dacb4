"""Training over several processes is training in one."""

from __future__ import annotations

import pytest
import torch

import gan_rank_jobs as jobs
from gan.checkpoint import of_step
from gan.loop import REQUEUE

RESNET = {
    "architecture": "sngan-resnet",
    "image_size": 32,
    "width": 0.02,
    "order": "g_first",
    "z_of_g": "fresh",
    "u_schedule": "per_forward",
}
TRAININGS = {
    "CNN, BSSN": ({"norm": "bssn", "scale": 1.3, "n_dis": 2, "ema": 0.9}, 0),
    "CNN, Wasserstein with a penalty, a factor": (
        {"norm": "sn", "gamma": "same", "loss": "wasserstein", "gradient_penalty": 10.0, "n_dis": 2},
        0,
    ),
    "BSN ResNet": ({"architecture": "bsn-resnet", "image_size": 32, "width": 0.02, "batch_norm_in_d_steps": False}, 0),
    "projection, another batch for G, noise": (
        {**RESNET, "conditional": "projection", "n_dis": 2, "batch_size_g": 12, "dequantize": True},
        3,
    ),
    "concat, a penalty": ({**RESNET, "conditional": "concat", "u_schedule": "per_step", "gradient_penalty": 1.0}, 3),
    "batch norm over both ranks": ({"norm": "sn", "bn_groups": 1}, 0),
    "the discriminator's batch norm, with a penalty": ({"norm": "bn", "n_dis": 2, "gradient_penalty": 1.0}, 0),
    # 16 pixels: with 8, taps of the last convolution only ever meet padding, and their gradient at the start is
    # rounding alone, which Adam divides by itself.
    "orthonormal weights": (
        {"norm": "orthonormal", "orthonormal_penalty": 0.1, "loss": "standard", "image_size": 16},
        0,
    ),
    "the operator norm": ({"norm": "sn_conv", "scale": 1.5, "u_schedule": "per_forward"}, 0),
    "clipped weights": ({"norm": "clip", "n_dis": 2, "loss": "wasserstein"}, 0),
    "four groups": ({"norm": "sn", "bn_groups": 4}, 0),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_ranks_are_one_process(two, tmp_path, name):
    """Weights, u, v, statistics, optimizers and losses, after 20 steps in float64."""
    changes, classes = TRAININGS[name]
    (losses, first), (_, second) = two(jobs.stepped, changes, classes, tmp_path / "two", 20)
    assert first == second
    expected, _ = jobs.stepped(0, changes, classes, tmp_path / "one", 20)
    assert losses == pytest.approx(expected, rel=1e-9, abs=1e-9)
    found, alone = (torch.load(tmp_path / which) for which in ("two", "one"))
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)


def test_two_one_and_two_processes_are_one_run(two, tmp_path):
    """One rank is asked to stop; all stop at that step, with a checkpoint, and others continue."""
    changes = {"steps": 12, "eval_every": 0, "log_every": 3, "norm": "bssn", "lockstep_every": 2, "device": "cpu"}
    assert two(jobs.run_until, changes, tmp_path / "changing", 4) == [REQUEUE, REQUEUE]
    assert jobs.run_until(0, changes, tmp_path / "changing", 8) == REQUEUE
    assert two(jobs.run_until, changes, tmp_path / "changing", 0) == [None, None]
    assert jobs.run_until(0, changes, tmp_path / "one", 0) is None
    found, expected = (torch.load(of_step(tmp_path / run / "x/checkpoint", 12)) for run in ("changing", "one"))
    del found["seconds"], expected["seconds"]
    torch.testing.assert_close(jobs.flat(found), jobs.flat(expected), rtol=1e-9, atol=1e-9)
    scalars = [(tmp_path / run / "x/scalars.jsonl").read_text().splitlines() for run in ("changing", "one")]
    assert [len(lines) for lines in scalars] == [4, 4]


@pytest.mark.parametrize(
    "tensor",
    [
        "generator.dense.1.running_mean",
        "discriminator.convs.4.weight",
        "discriminator.convs.4.spectral_norm._u",
        "discriminator.linear.spectral_norm._v",
    ],
)
def test_a_rank_out_of_lockstep_is_said_with_the_first_tensor(two, tensor):
    said = f"ranks must stay in lockstep, got another {tensor} than rank 0's on rank 1"
    assert two(jobs.planted, tensor) == [said, said]


def test_errors_of_one_rank_are_errors_of_all(two):
    assert two(jobs.together, [], False) == ["", ""]
    assert two(jobs.together, [1], False) == ["rank 1: no disk 1"] * 2
    assert two(jobs.together, [0, 1], False) == ["rank 0: no disk 0"] * 2
    assert two(jobs.together, [0, 1], True) == ["no disk"] * 2
    assert two(jobs.of_first, False) == [{"rank": 0}] * 2
    assert two(jobs.of_first, True) == ["rank 0: bad"] * 2
    said = "the configuration must be the same on all ranks, got steps 10 on rank 0, 11 on rank 1"
    assert two(jobs.unlike) == [said, said]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 9, "bn_groups": 1}, "batch_size must be a multiple of the 2 processes, got 9"),
        (
            {"batch_size_g": 9, "bn_groups": 3, "batch_size": 6, "z_of_g": "fresh"},
            "batch_size_g must be a multiple of the 2 processes, got 9",
        ),
        ({"batch_size": 6, "bn_groups": 3}, "bn_groups must be a multiple or a divisor of the 2 processes, got 3"),
        ({"device": "cuda"}, "device must be 'auto' or 'cpu' on a machine without CUDA, got 'cuda'"),
    ],
)
def test_what_two_processes_cannot_divide(two, tmp_path, changes, said):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert two(jobs.run_until, {"eval_every": 0, **changes}, tmp_path, 0) == [said, said]
    assert not list(tmp_path.iterdir())


def test_a_batch_norm_group_may_span_ranks(two):
    """Loss of rank r is (r + 1) mean; the sum over ranks has the derivative (1 + 2) / 2."""
    assert two(jobs.group_means, 1) == [[0.5, 1.5], [0.5, 1.5]]


def test_two_ranks_log_what_one_process_does(two):
    changes = {"norm": "bssn", "scale": 1.3, "n_dis": 2}
    first, second = two(jobs.measured, changes, 3)
    assert first == second
    assert first == pytest.approx(jobs.measured(0, changes, 3), rel=1e-9)
