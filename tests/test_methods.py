"""Rows of the papers' comparisons by name, on the command line and as configs."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import cifar10
import digits
import imagenet
from gan import cli, presets
from gan.checkpoint import of_step
from gan.config import Config
from norm_cases import NORMS
from tiny_runs import arguments, config_made, share_classifier

COMPARED = {  # norm, loss, weight of the gradient penalty, trainable factor
    "no-norm": ("none", "standard", 0, "none"),
    "weight-clipping": ("clip", "standard", 0, "none"),
    "gan-gp": ("none", "standard", 10, "none"),
    "wgan-gp": ("none", "wasserstein", 10, "none"),
    "batch-norm": ("bn", "standard", 0, "none"),
    "layer-norm": ("ln", "standard", 0, "none"),
    "weight-norm": ("wn", "standard", 0, "none"),
    "orthonormal": ("orthonormal", "standard", 0, "none"),
    "orthonormal-hinge": ("orthonormal", "hinge", 0, "none"),
    "sn": ("sn", "standard", 0, "none"),
    "sn-hinge": ("sn", "hinge", 0, "none"),
    "wgan-gp-weight-norm": ("wn", "wasserstein", 10, "none"),
    "wgan-gp-sn": ("sn", "wasserstein", 10, "different"),
    "ssn": ("ssn", "hinge", 0, "none"),
    "bsn": ("bsn", "hinge", 0, "none"),
    "bssn": ("bssn", "hinge", 0, "none"),
    "sn-conv": ("sn_conv", "hinge", 0, "none"),
    "sn-same-gamma": ("sn", "wasserstein", 10, "same"),
    "sn-different-gamma": ("sn", "wasserstein", 10, "different"),
}


def test_the_table_has_the_rows_of_the_papers():
    assert set(presets.METHODS) == set(COMPARED)
    assert {row["norm"] for row in presets.METHODS.values()} == set(NORMS)


@pytest.mark.parametrize("name", COMPARED)
def test_a_method_is_a_norm_a_loss_a_penalty_and_a_factor(monkeypatch, name):
    config = config_made(monkeypatch, "--method", name)
    assert (config.norm, config.loss, config.gradient_penalty, config.gamma) == COMPARED[name]
    assert (config.clip, config.scale) == (0.01, 1)


@pytest.mark.parametrize("method", COMPARED)
def test_every_method_goes_with_every_preset(method):
    for table in (presets.PRESETS, presets.IMAGENET):
        for preset in table.values():
            config = Config(**{"name": "x", **preset, **presets.METHODS[method]})
            assert config.norm == COMPARED[method][0]


@pytest.mark.parametrize("order", [1, -1])
def test_a_method_wins_over_a_preset_and_a_flag_over_both(monkeypatch, order):
    """In whatever order they stand."""
    parts = [["--method", "sn-hinge"], ["--preset=bsn-2-same"], ["--loss", "wasserstein"]][::order]
    config = config_made(monkeypatch, *(x for part in parts for x in part))
    assert (config.norm, config.gamma, config.gradient_penalty) == ("sn", "none", 0)  # the method's
    assert (config.lr_g, config.n_dis) == (2e-4, 1)  # the preset's
    assert config.loss == "wasserstein"


def test_methods_go_with_scales_and_with_imagenet(monkeypatch):
    config = config_made(monkeypatch, "--method=sn-conv", "--scale", "1.75")
    assert (config.norm, config.scale, config.loss) == ("sn_conv", 1.75, "hinge")
    given = ("--preset", "sngan-concat", "--method", "layer-norm")
    config = config_made(monkeypatch, *given, main=imagenet, table=presets.IMAGENET)
    assert (config.norm, config.conditional, config.loss) == ("ln", "concat", "standard")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "spectral"], "method must be one of no-norm, weight-clipping, .*, got 'spectral'"),
        (["--method"], "method must be one of .*, got ''"),
        (["--method", "sn", "--clip", "0.1"], r"clip must be 0.01 with norm 'sn' \(clip takes another\), got 0.1"),
        (
            ["--method", "weight-norm", "--gamma", "same"],
            r"gamma must be 'none' with norm 'wn' \(sn, ssn, bsn, bssn take",
        ),
        (["--norm", "spectral"], "--norm"),
    ],
)
def test_mistakes_are_one_line(given, said):
    with pytest.raises(SystemExit) as error:
        cli.start(cifar10.main, presets.PRESETS, ["--name", "x", "--data", "d", *given], methods=presets.METHODS)
    assert "\n" not in error.value.code
    with pytest.raises(ValueError, match=said):
        raise ValueError(error.value.code)


SCALED, WITH_GAMMA = ("ssn", "bssn", "sn_conv"), ("sn", "ssn", "bsn", "bssn")


@pytest.mark.parametrize("norm", NORMS)
def test_scales_and_factors_are_of_some_norms(norm):
    if norm in SCALED:
        assert Config(name="x", norm=norm, scale=1.4).scale == 1.4
    else:
        said = rf"scale must be 1.0 with norm '{norm}' \(ssn, bssn, sn_conv take another\), got 1.4"
        with pytest.raises(ValueError, match=said):
            Config(name="x", norm=norm, scale=1.4)
    if norm in WITH_GAMMA:
        assert Config(name="x", norm=norm, gamma="same").gamma == "same"
    else:
        said = rf"gamma must be 'none' with norm '{norm}' \(sn, ssn, bsn, bssn take another\), got 'same'"
        with pytest.raises(ValueError, match=said):
            Config(name="x", norm=norm, gamma="same")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "orthonormal", "clip": 0.1}, r"clip must be 0.01 with norm 'orthonormal' \(clip takes another\)"),
        ({"norm": "clip", "orthonormal_penalty": 0.1}, r"orthonormal_penalty must be 0.0001 with norm 'clip' \(ortho"),
        ({"norm": "clip", "clip": 0.0}, "clip must be finite and positive, got 0.0"),
        ({"norm": "clip", "clip": float("nan")}, "clip must be finite and positive, got nan"),
        ({"norm": "orthonormal", "orthonormal_penalty": -1.0}, "orthonormal_penalty must be finite and at least 0"),
        ({"last_width": 0.0}, "last_width must be finite and positive, got 0.0"),
        ({"architecture": "bsn-resnet", "last_width": 2.0}, r"last_width must be 1.0 with residual networks .*, got 2"),
    ],
)
def test_fields_that_do_not_go_with_a_norm(changes, said):
    with pytest.raises(ValueError, match=said):
        Config(name="x", **changes)


@pytest.mark.parametrize("recipe", ["digits", "cifar10", "stl10", "celeba", "images", "imagenet"])
def test_every_recipe_takes_methods(monkeypatch, recipe):
    script = Path(digits.__file__).with_name(f"{recipe}.py")
    monkeypatch.setattr(sys, "argv", [str(script), "--method", "nothing"])
    with pytest.raises(SystemExit, match=r"error: method must be one of no-norm, .*, got 'nothing'"):
        runpy.run_path(str(script), run_name="__main__")


def test_fields_that_do():
    assert Config(name="x", norm="clip", clip=0.1).clip == 0.1
    assert Config(name="x", norm="orthonormal", orthonormal_penalty=0.0).orthonormal_penalty == 0
    assert Config(name="x", last_width=8.0).last_width == 8


def command(tmp_path: Path, cache: Path, name: str, *flags: str, **changes: object) -> Path:
    """train/digits.py in this process."""
    runs = tmp_path / "runs"
    runs.mkdir(exist_ok=True)
    share_classifier(cache, runs)
    given = arguments(runs, name, eval_every=0, **changes)[1:]
    cli.start(digits.main, arguments=[*given, *flags], methods=presets.METHODS)
    return runs / name


def scalars(run: Path) -> dict[str, float]:
    return json.loads((run / "scalars.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("method", COMPARED)
def test_the_digits_train_by_every_method(tmp_path, classifier_cache, method):
    run = command(tmp_path, classifier_cache, "a", "--method", method, steps=2, log_every=1, checkpoint_every=2)
    about = json.loads((run / "config.json").read_text())["config"]
    assert (about["norm"], about["loss"], about["gradient_penalty"], about["gamma"]) == COMPARED[method]
    last = scalars(run)
    assert ("loss/orthonormal" in last) == method.startswith("orthonormal")
    assert ("loss/penalty" in last) == (COMPARED[method][2] > 0)
    assert ("sigma/convs.0" in last) == (COMPARED[method][0] in ("sn", "ssn", "bsn", "bssn", "sn_conv"))


@pytest.mark.parametrize("method", ["sn-conv", "batch-norm"])
def test_a_resumed_run_is_the_whole_run_to_the_bit(tmp_path, classifier_cache, method):
    flags = ["--method", method]
    whole = command(tmp_path, classifier_cache, "whole", *flags, steps=4, checkpoint_every=2)
    halves = command(tmp_path, classifier_cache, "halves", *flags, steps=4, checkpoint_every=2)
    of_step(halves / "checkpoint", 4).unlink()
    command(tmp_path, classifier_cache, "halves", *flags, "--resume", steps=4, checkpoint_every=2)
    a, b = (torch.load(of_step(run / "checkpoint", 4))["discriminator"] for run in (whole, halves))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ("convs.0._u" in a) == (method == "sn-conv")


def test_a_run_of_before_these_fields_may_be_continued(tmp_path, classifier_cache):
    flags = ["--norm", "sn"]
    run = command(tmp_path, classifier_cache, "old", *flags, steps=2, checkpoint_every=2)
    about = json.loads((run / "config.json").read_text())
    for field in ("clip", "orthonormal_penalty", "last_width"):
        del about["config"][field]
    (run / "config.json").write_text(json.dumps(about))
    command(tmp_path, classifier_cache, "old", *flags, "--resume", steps=2, checkpoint_every=2)
    with pytest.raises(SystemExit) as error:
        command(tmp_path, classifier_cache, "old", *flags, "--resume", steps=2, checkpoint_every=2, last_width=2.0)
    assert "last_width: 1.0 there, 2.0 here" in str(error.value.code)


def test_rows_of_metrics_are_written_by_the_operator_norm(tmp_path, classifier_cache):
    run = command(tmp_path, classifier_cache, "a", "--method", "sn-conv", "--eval-every", "2", steps=2)
    with open(run / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]
