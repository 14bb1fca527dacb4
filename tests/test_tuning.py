"""Launch settings that are measured, kept and found again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

from fastsn.triton import launch, settings
from fastsn.triton.settings import DEFAULT, Settings

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if there were one, with a cache folder of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200 (a test)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(settings, "_known", {})
    return tmp_path / "fastsn" / "launch-nvidia-h200-a-test-.json"


def cost(tried: Settings) -> float:
    return abs(tried.rows - 16) + abs(tried.warps - 4)


def test_the_best_is_kept_and_in_force(gpu):
    best = launch.tune(measure=cost)
    assert best == replace(DEFAULT, rows=16, warps=4)
    assert settings.current(GPU) == best
    assert json.loads(gpu.read_text()) == asdict(best)
    settings._known.clear()  # as another process would
    assert settings.current(GPU) == best
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name]


def test_without_a_file_the_defaults_are_in_force(gpu):
    assert not gpu.exists()
    assert settings.current(GPU) == DEFAULT


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"rows": 4, "colour": 1}', '{"rows": "many"}', '{"rows": 3}'])
def test_a_file_that_cannot_be_used_is_said_to_be_and_left_out(gpu, text):
    gpu.parent.mkdir(parents=True)
    gpu.write_text(text)
    with pytest.warns(UserWarning, match="launch-nvidia-h200-a-test-.json is not used"):
        assert settings.current(GPU) == DEFAULT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0),
        ("elements", 100),
        ("warps", 2.0),
        ("last_tiles", -1),
        ("near", -1),
        ("registers", 256),
        ("rescale_warps", 3),
        ("chunk", 1024),
    ],
)
def test_settings_that_no_kernel_can_have(name, value):
    with pytest.raises(ValueError, match=name):
        replace(DEFAULT, **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_needs_a_gpu():
    with pytest.raises(RuntimeError, match="torch finds none"):
        launch.tune()
