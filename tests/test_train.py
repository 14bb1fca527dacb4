"""The GAN engine: what a run computes, and what it leaves on disk."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import digits
import fastsn
from gan import config, data, evaluate, loop, losses, models, report
from tiny_runs import TINY, rows, tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory, classifier_cache) -> Path:
    """The folder of one tiny run."""
    return tiny(tmp_path_factory.mktemp("runs"), classifier_cache, "a", variant="bssn", scale=1.3)


def test_a_run_leaves_the_files_of_the_bsn_repo(finished):
    assert {p.name for p in finished.iterdir()} == {
        "checkpoint", "config.json", "metrics.csv", "sample", "tensorboard", "time.txt", "worker.log",
    }  # fmt: skip
    with open(finished / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "fid", "inception_score_mean", "inception_score_std", "seconds", "protocol"]
    assert [int(r["step"]) for r in table] == [3, 6, 9, 10]
    rounding = 1e-6  # the score is exp of a mean in float32, here of next to nothing: all images look alike yet
    assert all(float(r["fid"]) > 0 and 1 - rounding <= float(r["inception_score_mean"]) <= 10 for r in table)
    assert {r["protocol"] for r in table} == {"digits-cnn-1797r-100f"}
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["variant"] == "bssn"
    assert saved["config"]["scale"] == 1.3
    assert saved["environment"]["torch"] == torch.__version__
    assert [p.name for p in sorted((finished / "sample").iterdir())] == [f"step-{s:08d}.png" for s in (5, 10)]
    with Image.open(finished / "sample" / "step-00000010.png") as picture:
        assert picture.size == (10 * 9 - 1, 10 * 9 - 1)
    assert [p.name for p in sorted((finished / "checkpoint").iterdir())] == ["step-00000008.pt", "step-00000010.pt"]
    log = (finished / "worker.log").read_text()
    assert "step 10: FID" in log
    assert "iter 1 starts" in (finished / "time.txt").read_text()


def test_tensorboard_has_losses_scores_sigmas_and_slopes(finished):
    scalars = report.read_scalars(finished, "")
    layers = [f"convs.{i}" for i in range(0, 14, 2)] + ["linear"]
    assert set(scalars) == {
        *("loss/d", "loss/g", "D/real", "D/fake"),
        *(f"{kind}/{layer}" for kind in ("sigma", "sigma_out", "sigma_in") for layer in layers),
        *(f"slope/{where}_{how}" for where in ("real", "fake") for how in ("mean", "min", "max")),
    }
    assert all(steps == [4, 8, 10] for steps, _ in scalars.values())
    for where in ("real", "fake"):
        least, mean, most = (scalars[f"slope/{where}_{how}"][1] for how in ("min", "mean", "max"))
        assert all(0 < a <= b <= c for a, b, c in zip(least, mean, most, strict=True))


def test_same_config_same_metrics_and_other_seed_other_metrics(tmp_path, classifier_cache, finished):
    again = tiny(tmp_path, classifier_cache, "b", variant="bssn", scale=1.3)
    assert rows(again) == rows(finished)
    other = tiny(tmp_path, classifier_cache, "c", variant="bssn", scale=1.3, seed=1)
    assert rows(other) != rows(finished)


def test_logging_and_evaluating_change_nothing(tmp_path, classifier_cache, finished):
    often = tiny(tmp_path, classifier_cache, "b", variant="bssn", scale=1.3, log_every=1, eval_every=1, sample_every=1)
    assert [r for r in rows(often) if r[0] in ("3", "6", "9", "10")] == rows(finished)


@pytest.mark.parametrize("n_dis", [1, 2])
@pytest.mark.parametrize(("schedule", "stored"), [("per_forward", lambda n: 2 * n + 1), ("per_d_step", lambda n: n)])
def test_u_schedules_store_as_often_as_their_sources(schedule, stored, n_dis):
    """Every time that vectors are stored, autograd's version of the buffer goes up by one."""
    dataset = data.digits(8)
    training = loop.Training(digits.Digits("x", **{**TINY, "u_schedule": schedule, "n_dis": n_dis}), dataset, CPU)
    norms = [module for module in training.discriminator.modules() if isinstance(module, fastsn.SpectralNorm)]
    before = [norm._u._version for norm in norms]
    training.advance()
    assert len(norms) == 8
    assert [norm._u._version - old for norm, old in zip(norms, before, strict=True)] == [stored(n_dis)] * 8


def test_per_d_step_stores_one_iteration_of_the_updated_weights():
    training = loop.Training(digits.Digits("x", **{**TINY, "u_schedule": "per_d_step"}), data.digits(8), CPU)
    layer = training.discriminator.linear
    u, v = layer.spectral_norm.vectors()["out"]
    before = v.clone()
    training.advance()
    weight = layer.weight.detach()  # the generator's step leaves it alone
    expected = nn.functional.normalize(weight @ before, dim=0)
    torch.testing.assert_close(u, expected)
    torch.testing.assert_close(v, nn.functional.normalize(weight.T @ expected, dim=0))


def test_slopes_are_gradient_norms_and_leave_the_vectors_alone():
    training = loop.Training(digits.Digits("x", **TINY), data.digits(8), CPU)
    training.advance()
    before = [b.clone() for b in training.discriminator.buffers()]
    slopes = training.slopes()
    assert all(torch.equal(a, b) for a, b in zip(before, training.discriminator.buffers(), strict=True))
    x = training.last[0][:1].double()
    net, h = training.discriminator.double().eval(), 1e-5
    difference = torch.stack(
        [(net(x + h * e) - net(x - h * e)).squeeze() / (2 * h) for e in torch.eye(64).double().view(64, 1, 1, 8, 8)]
    )
    assert (
        float(slopes["slope/real_min"]) * 0.8
        <= float(difference.detach().norm())
        <= float(slopes["slope/real_max"]) * 1.25
    )


@pytest.mark.parametrize("variant", ["sn", "ssn", "bsn", "bssn"])
def test_every_variant_logs_three_sigmas_of_every_layer(variant):
    training = loop.Training(digits.Digits("x", **{**TINY, "variant": variant}), data.digits(8), CPU)
    found = training.sigmas()
    assert len(found) == 8 * 3
    assert all(0 < sigma < 10 for sigma in found.values())


CPU = torch.device("cpu")


def test_the_networks_are_the_papers():
    generator, discriminator = models.build("bssn", 1.0, 128, 3, 32, 1.0, seed=0)
    d = {n: p for n, p in discriminator.named_parameters() if p.ndim > 1}
    assert [tuple(p.shape) for p in d.values()] == [
        (64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4), (256, 128, 3, 3), (256, 256, 4, 4),
        (512, 256, 3, 3), (1, 512 * 16),
    ]  # fmt: skip
    g = [tuple(p.shape) for p in generator.parameters() if p.ndim > 1]
    assert g == [(512 * 16, 128), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 3, 3)]
    for name, weight in d.items():
        if "linear" not in name:
            assert float(weight.detach().abs().max()) <= 0.04  # truncated at two sigma
    assert float(d["convs.12.weight"].detach().std()) == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert float(generator.dense[0].weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    for module in (*generator.modules(), *discriminator.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            assert not module.bias.any()
    images = generator(torch.randn(4, 128))
    assert images.shape == (4, 3, 32, 32)
    assert discriminator(images).shape == (4, 1)


def test_networks_do_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    first, second = (models.build("sn", 1.0, 8, 1, 8, 0.05, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("variant", ["ssn", "bsn", "bssn"])
def test_every_variant_starts_from_the_same_weights(variant):
    sn, other = (models.build(v, 1.0, 8, 1, 8, 0.05, seed=3) for v in ("sn", variant))
    for a, b in zip(sn, other, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert float(losses.hinge_d(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert float(losses.hinge_g(fake)) == pytest.approx(1 / 3)


def test_the_digits_are_real_and_scaling_is_invertible():
    dataset = data.digits(16)
    assert dataset.images.shape == (1797, 1, 16, 16)
    assert dataset.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(dataset.images.max()) > 240
    floats = data.to_float(dataset.images)
    assert -1 <= float(floats.min()) < float(floats.max()) <= 1
    assert torch.equal(data.to_uint8(floats), dataset.images)


def test_batches_continue_from_their_state():
    batches = data.Batches(data.digits(8), 16, 0, CPU)
    batches.next()
    state = batches.generator.get_state()
    expected = batches.next()
    fresh = data.Batches(data.digits(8), 16, 5, CPU)
    fresh.generator.set_state(state)
    assert torch.equal(fresh.next(), expected)


class Pretender(nn.Module):
    """A "generator" that shows given images in order."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.at = images, 0

    def forward(self, z: Tensor) -> Tensor:
        self.at += len(z)
        return data.to_float(self.images[self.at - len(z) : self.at])


def test_metrics_tell_digits_from_worse_digits_from_noise(classifier_cache):
    dataset = data.digits(8)
    net = evaluate.digit_classifier(dataset, classifier_cache)
    evaluator = evaluate.Evaluator(dataset, net, net.FEATURES, 1500, 0, CPU)
    order = torch.randperm(1797)
    real = dataset.images[order]
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    blurred = nn.functional.avg_pool2d(real.float(), 3, 1, 1).to(torch.uint8)
    before = torch.get_rng_state()
    found = [evaluator(Pretender(images), 4) for images in (real, blurred, noise, real)]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0].fid < 1
    assert min(found[1].fid, found[2].fid) > 10
    assert found[0].inception_score_mean > 9
    assert max(found[1].inception_score_mean, found[2].inception_score_mean) < 5
    assert found[3] == found[0]


def test_the_classifier_is_over_97_percent_right_and_always_the_same():
    dataset = data.digits(8)
    before = torch.get_rng_state()
    (first, accuracy), (second, _) = (evaluate.train_digit_classifier(dataset) for _ in range(2))
    assert accuracy > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_grid_puts_images_row_by_row_a_pixel_apart():
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    pixels = np.asarray(report.grid(images, 3))
    assert pixels[0].tolist() == [1, 1, 0, 2, 2, 0, 3, 3]
    assert pixels[2].tolist() == [0] * 8
    assert pixels[4].tolist() == [4, 4, 0, 5, 5, 0, 0, 0]
    assert report.grid(images.expand(5, 3, 2, 2), 3).mode == "RGB"


def test_compare_makes_a_picture_and_a_table(finished, tmp_path):
    out = tmp_path / "new" / "compare.png"
    report.compare([finished, finished], out, "digit FID", "digit score")
    with Image.open(out) as image:
        picture = np.asarray(image.convert("L"))
    assert picture.size > 500_000
    assert np.unique(picture).size > 100
    text = report.table([finished], "digit FID", "digit score")
    last = rows(finished)[-1]
    assert "BSSN, scale 1.3, seed 0" in text
    assert f"{float(last[1]):.3f}" in text


def test_runs_that_have_nothing_to_compare_yet(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a run with a metrics.csv"):
        report.table([tmp_path], "a", "b")
    (tmp_path / "metrics.csv").write_text((finished / "metrics.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"must have been evaluated at least once, found no row"):
        report.table([tmp_path], "a", "b")
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="must hold samples, found no picture"):
        report.compare([tmp_path], tmp_path / "compare.png", "a", "b")
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 1), ("n_dis", -1), ("lr_g", 0.0), ("lr_d", float("nan")), ("scale", -1.0),
     ("width", 0.0), ("beta1", 1.0), ("image_size", 12), ("eval_fakes", 10), ("name", ""), ("name", "../x"),
     ("name", "/x"), ("name", "."), ("seed", -1), ("seed", 2**63)],
)  # fmt: skip
def test_configs_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        config.Config(**{"name": "x", field: value})


def test_a_batch_larger_than_the_data_set():
    with pytest.raises(ValueError, match="batch_size must be at most the 1797 images of digits, got 1798"):
        data.Batches(data.digits(8), 1798, 0, CPU)


def test_recipes_can_be_imported_without_what_only_their_command_line_needs():
    script = "import sys; sys.modules['tyro'] = None; import digits"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(digits.__file__).parent, check=False).returncode == 0
