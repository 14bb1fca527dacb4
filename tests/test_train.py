"""Runs: what they leave on disk, and that only their numbers and their data decide the result."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cifar10
import digits
import evaluate
import export
import images
import sample
from gan import cli, pictures, presets, probes, recipe
from gan.config import Config, Numbers
from gan.data.digits import digits as real_digits
from gan.data.images import to_float, to_uint8
from gan.data.store import memory_store
from gan.figures import comparison
from gan.figures import runs as folders
from gan.training import Training
from gan.weights import load_generator
from readme import GENERATOR
from tiny_runs import TINY, config_made, rows, tiny

CPU = torch.device("cpu")
BSSN = {"norm": "bssn", "scale": 1.3, "ema": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, classifier_cache) -> Path:
    """The folder of one tiny run."""
    return tiny(tmp_path_factory.mktemp("runs"), classifier_cache, "a", **BSSN)


def test_a_run_leaves_its_files(finished):
    assert {p.name for p in finished.iterdir()} == {
        *("checkpoint", "config.json", "metrics.csv", "reals.png", "sample", "scalars.jsonl", "tensorboard"),
        *("time.txt", "weights", "worker.log"),
    }
    with open(finished / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(r["step"]) for r in table] == [3, 6, 9, 10]
    rounding = 1e-6  # the score is exp of a mean, here of next to nothing: all images look alike yet
    assert all(float(r["fid"]) > 0 and 1 - rounding <= float(r["inception_score_mean"]) <= 10 for r in table)
    assert {(r["protocol"], r["weights"], r["reals"], r["fakes"]) for r in table} == {
        ("digits-1797r-2000f", "average", "1797", "2000")
    }
    assert {r["kid_mean"] + r["missing"] for r in table} == {""}
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["norm"] == "bssn"
    assert saved["config"]["scale"] == 1.3
    assert saved["config"]["data_key"] == real_digits(8).key
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["runtime"]["eval_every"] == 3
    assert [p.name for p in sorted((finished / "sample").iterdir())] == [f"step-{s:08d}.png" for s in (5, 10)]
    for name in ("sample/step-00000010.png", "reals.png"):
        with Image.open(finished / name) as picture:
            assert picture.size == (10 * 9 - 1, 10 * 9 - 1)
    assert [p.name for p in sorted((finished / "checkpoint").iterdir())] == ["step-00000008.pt", "step-00000010.pt"]
    log = (finished / "worker.log").read_text()
    assert "step 10: FID" in log
    assert "iter 1 starts" in (finished / "time.txt").read_text()


def test_scalars_have_losses_sigmas_slopes_and_times(finished):
    scalars = folders.read(finished).scalars("")
    layers = [f"convs.{i}" for i in range(0, 14, 2)] + ["linear"]
    times = {tag for tag in scalars if tag.startswith("time/")}
    assert {f"time/{phase}_percent" for phase in ("step", "data", "discriminator", "generator", "log")} <= times
    assert set(scalars) - times == {
        *("loss/d", "loss/g", "D/real", "D/fake", "images_per_s_per_process", "memory/peak_gb"),
        *(f"{kind}/{layer}" for kind in ("sigma", "sigma_out", "sigma_in") for layer in layers),
        *(f"slope/{where}_{how}" for where in ("real", "fake") for how in ("mean", "min", "max")),
    }
    assert all(list(scalars[tag]) == [4, 8, 10] for tag in set(scalars) - times)
    for where in ("real", "fake"):
        least, mean, most = (scalars[f"slope/{where}_{how}"].values() for how in ("min", "mean", "max"))
        assert all(0 < a <= b <= c for a, b, c in zip(least, mean, most, strict=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(scalars)
    assert [e.value for e in events.Scalars("loss/d")] == pytest.approx(list(scalars["loss/d"].values()))


def test_same_config_same_metrics_and_other_seed_other_metrics(tmp_path, classifier_cache, finished):
    again = tiny(tmp_path, classifier_cache, "b", **BSSN)
    assert rows(again) == rows(finished)
    other = tiny(tmp_path, classifier_cache, "c", seed=1, **BSSN)
    assert rows(other) != rows(finished)


def test_logging_and_evaluating_change_nothing(tmp_path, classifier_cache, finished):
    often = tiny(tmp_path, classifier_cache, "b", log_every=1, eval_every=1, sample_every=1, **BSSN)
    assert [r for r in rows(often) if r[0] in ("3", "6", "9", "10")] == rows(finished)


def test_a_generator_is_loaded_from_a_run_a_checkpoint_or_weights(finished):
    z = torch.randn(3, 8)
    found = [
        load_generator(finished / path) for path in ("", "checkpoint/step-00000010.pt", "weights/last.safetensors")
    ]
    made = [generator(z) for generator, _ in found]
    assert all(torch.equal(made[0], x) for x in made[1:])
    assert all(config.norm == "bssn" and config.latent == 8 for _, config in found)
    earlier, _ = load_generator(finished / "checkpoint/step-00000008.pt")
    assert not torch.equal(earlier(z), made[0])


def test_a_generator_is_loaded_as_the_readme_says(finished):
    names = {"torch": torch}
    exec(GENERATOR.replace("runs/cifar10/bssn", str(finished)), names)
    assert names["images"].shape == (64, 1, 8, 8)


def test_evaluating_a_run_gives_its_last_row_again(finished, capsys):
    scores = evaluate.main(finished, "digits", device="cpu", cache=finished.parent)
    assert [f"{scores.fid:.12f}", f"{scores.inception_score_mean:.12f}"] == rows(finished)[-1][1:3]
    assert f"digit FID: {scores.fid:.4f}" in capsys.readouterr().out


def test_samples_as_a_grid_as_files_and_as_an_array(finished, tmp_path):
    for name in ("a.png", "a.npz", "files"):
        sample.main(finished, tmp_path / name, count=7, seed=3)
    with np.load(tmp_path / "a.npz") as file:
        array = file["images"]
    assert (array.shape, array.dtype) == ((7, 8, 8, 1), np.uint8)
    files = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(7)]
    for image, path in zip(array, files, strict=True):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), image[..., 0])
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture)[:8, 9:17], array[1, ..., 0])
    sample.main(finished, tmp_path / "b.npz", count=3, seed=3)
    with np.load(tmp_path / "b.npz") as file:
        assert np.array_equal(file["images"], array[:3])
    for out, count, message in (
        (tmp_path / "files", 7, "out must be an empty folder"),
        (tmp_path / "a.gif", 7, "out must be a .png file, a .npz file or a folder"),
        (tmp_path / "c.npz", 0, "count must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main(finished, out, count=count)


def test_an_exported_generator_makes_the_same_images(finished, tmp_path):
    from onnx.reference import ReferenceEvaluator

    generator, config = load_generator(finished)
    z = torch.randn(3, config.latent)
    export.main(finished, tmp_path / "g.onnx")
    (made,) = ReferenceEvaluator(str(tmp_path / "g.onnx")).run(None, {"z": z.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), generator(z), rtol=1e-4, atol=1e-5)
    export.main(finished, tmp_path / "g.safetensors")
    again, _ = load_generator(tmp_path / "g.safetensors")
    assert torch.equal(again(z), generator(z))
    with pytest.raises(ValueError, match=r"out must be a .safetensors or .onnx file, got .*g.pt"):
        export.main(finished, tmp_path / "g.pt")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: folder, "path must be the folder of a run that has saved weights"),
        (lambda folder: folder / "nothing.safetensors", "path must be a run, a checkpoint or a .safetensors file"),
        (lambda folder: folder / "cut.safetensors", "path must be weights that a run has saved"),
        (lambda folder: folder / "step-00000001.pt", "path must be a checkpoint in the folder of its run"),
    ],
)
def test_what_is_no_generator(tmp_path, finished, made, message):
    (tmp_path / "cut.safetensors").write_bytes((finished / "weights/last.safetensors").read_bytes()[:1000])
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load_generator(made(tmp_path))


def test_slopes_are_gradient_norms_and_leave_the_vectors_alone():
    training = Training(digits.Digits(name="x", **TINY), 1, 0, CPU)
    draw = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    training.advance(iter([(draw, None)] * 2))
    before = [b.clone() for b in training.discriminator.buffers()]
    slopes = probes.slopes(training)
    assert all(torch.equal(a, b) for a, b in zip(before, training.discriminator.buffers(), strict=True))
    x = training.last[0][:1].double()
    net, h = training.discriminator.double(), 1e-5
    with training.norm.at_rest(), torch.no_grad():
        difference = torch.stack(
            [(net(x + h * e) - net(x - h * e)).squeeze() / (2 * h) for e in torch.eye(64).double().view(64, 1, 1, 8, 8)]
        )
    least, most = float(slopes["slope/real_min"]), float(slopes["slope/real_max"])
    assert 0.999 * least <= float(difference.norm()) <= 1.001 * most


def test_scaling_is_invertible():
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert (float(floats.min()), float(floats.max())) == (-1, 1)
    assert torch.equal(to_uint8(floats), every)


def test_the_digits_are_real():
    store = real_digits(16)
    assert (store.count, store.image_size, store.channels, store.classes) == (1797, 16, 1, 10)
    assert np.bincount(store.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(store.read(np.arange(100)).max()) > 240


def test_a_grid_puts_images_row_by_row_a_pixel_apart():
    five = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    pixels = np.asarray(pictures.grid(five, 3))
    assert pixels[0].tolist() == [1, 1, 0, 2, 2, 0, 3, 3]
    assert pixels[2].tolist() == [0] * 8
    assert pixels[4].tolist() == [4, 4, 0, 5, 5, 0, 0, 0]
    assert pictures.grid(five.expand(5, 3, 2, 2), 3).mode == "RGB"


def test_compare_makes_a_picture_and_a_table(finished, tmp_path):
    out = tmp_path / "new" / "compare.png"
    runs = [folders.read(finished)]
    comparison.compare(runs * 2, out)
    with Image.open(out) as image:
        picture = np.asarray(image.convert("L"))
    assert picture.size > 500_000
    assert np.unique(picture).size > 100
    text = comparison.table(runs)
    with open(finished / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert "BSSN, scale 1.3, seed 0" in text
    assert {"digit FID", "digit score"} <= set(re.split(r"  +", text.splitlines()[0]))
    assert f"{float(last['fid']):.3f}" in text


def test_runs_that_differ_in_their_seed_become_a_mean_and_a_standard_error(tmp_path):
    for name, seed, scale, fid in (("a", 0, 1.0, 3), ("b", 1, 1.0, 5), ("c", 2, 1.0, 7), ("d", 0, 2.0, 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"config": {"norm": "ssn", "scale": scale, "seed": seed}})
        )
        (tmp_path / name / "metrics.csv").write_text(
            f"protocol,network,reals,missing,fid,inception_score_mean\nbsn,x,5000,,100,1\nbsn,x,5000,,{fid},2\n"
        )
    lines = comparison.over_seeds([folders.read(tmp_path / name) for name in "abcd"]).splitlines()
    assert lines.pop(0).split() == ["runs", "seeds", "FID", "Inception", "Score"]
    assert lines[0].split() == ["SSN,", "scale", "1", "3", "5.000", "±", "1.155", "2.000", "±", "0.000"]
    assert lines[1].split() == ["SSN,", "scale", "2", "1", "9.000", "2.000"]


def test_runs_that_have_nothing_to_compare_yet(finished, tmp_path):
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a run with a metrics.csv"):
        comparison.table([folders.read(tmp_path)])
    table = (finished / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(table.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"must have been evaluated at least once, found no row"):
        comparison.table([folders.read(tmp_path)])
    (tmp_path / "metrics.csv").write_text(table)
    with pytest.raises(FileNotFoundError, match="must hold samples, found no picture"):
        comparison.compare([folders.read(tmp_path)], tmp_path / "compare.png")
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 1), ("batch_size_g", 1), ("n_dis", -1), ("lr_g", 0.0), ("lr_d", float("nan")),
     ("scale", -1.0), ("scale", 2.0), ("width", 0.0), ("beta1", 1.0), ("ema", 1.0), ("image_size", 12),
     ("image_size", 264), ("decay_from", 100_000), ("name", ""), ("name", "../x"), ("name", "/x"), ("name", "."),
     ("seed", -1), ("seed", 2**63), ("norm", "spectral"), ("loss", "l2"), ("gradient_penalty", -1.0),
     ("architecture", "cnn"), ("conditional", "yes"), ("bn_groups", 0), ("lockstep_every", 0)],
)  # fmt: skip
def test_configs_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        Config(**{"name": "x", field: value})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("z_of_g", {"order": "g_first"}),
        ("z_of_g", {"batch_size_g": 128}),
        ("conditional", {"conditional": "projection"}),
        ("image_size", {"architecture": "sngan-resnet", "image_size": 40}),
        ("batch_size", {"bn_groups": 5}),
        ("batch_size", {"bn_groups": 64}),
        ("batch_size_g", {"batch_size_g": 6, "bn_groups": 4, "z_of_g": "fresh"}),
        ("gamma", {"norm": "none", "gamma": "same"}),
    ],
)
def test_fields_that_do_not_go_together(field, changes):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        Config(name="x", **changes)


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table in (presets.PRESETS, presets.IMAGENET) for name in table]
)
def test_every_preset_is_a_config(table, name):
    config = Config(name="x", **table[name])
    assert config.identity()["lr_g"] == config.lr_g


def test_with_a_penalty_the_discriminator_stays_eager():
    assert Config(name="x", compile=True).compiled == ("generator", "discriminator")
    assert Config(name="x", compile=True, gradient_penalty=10.0).compiled == ("generator",)
    assert Config(name="x").compiled == ()


def test_presets_are_rows_of_the_papers_tables():
    b, three = (Config(name="x", **presets.PRESETS[name]) for name in ("sngan-b", "bsn-3-same"))
    assert (b.lr_d, b.beta1, b.beta2, b.n_dis, b.order, b.loss) == (1e-4, 0.5, 0.999, 1, "g_first", "standard")
    assert (three.beta2, three.n_dis, three.gamma, three.loss, three.gradient_penalty) == (
        *(0.9, 5, "same", "wasserstein", 10.0),
    )
    best, bsn = (Config(name="x", **row) for row in (presets.PRESETS["sngan-resnet"], presets.IMAGENET["bsn"]))
    for config in (best, bsn):
        assert (config.lr_g, config.lr_d, config.beta1, config.beta2, config.n_dis) == (2e-4, 2e-4, 0, 0.9, 5)
        assert (config.loss, config.conditional, config.z_of_g) == ("hinge", "none", "fresh")
    assert (best.batch_size, best.batch_size_g, best.steps, best.decay_from, best.dequantize) == (64, 128, 1e5, 0, True)
    assert (bsn.batch_size, bsn.batch_size_g, bsn.steps, bsn.decay_from, bsn.picks) == (
        *(16, 32, 5e5, -1, "with_replacement"),
    )
    projection = Config(name="x", **presets.IMAGENET["sngan-projection"])
    assert (projection.bn_groups, projection.steps, projection.decay_from) == (4, 450_000, 400_000)


def ended(arguments: list[str], main: object = images.main) -> str:
    with pytest.raises(SystemExit) as error:
        cli.start(main, presets.PRESETS, arguments)
    assert "\n" not in str(error.value.code)
    return str(error.value.code)


def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--name", "x", "--data", "nowhere"]
    assert ended([*data, "--preset", "sngan-z"]).startswith("error: preset must be one of bsn-1, bsn-2, ")
    assert "--learning-rate" in ended([*data, "--learning-rate", "1"])
    assert "l2" in ended([*data, "--loss", "l2"])
    assert "nowhere" in ended(data)
    assert "n_dis must be at least 1, got 0" in ended([*data, "--n-dis", "0"])
    assert list(tmp_path.iterdir()) == []


def test_flags_beside_a_preset_win(monkeypatch):
    config = config_made(monkeypatch, "--preset", "sngan-a", "--n-dis", "3", main=images)
    assert (config.lr_g, config.n_dis, config.ema) == (1e-4, 3, 0.999)


def test_a_preset_turns_flags_off_and_a_flag_beside_it_on(monkeypatch):
    for table, given, flags in (
        (presets.IMAGENET, ["--preset", "bsn"], (False, False)),
        (presets.IMAGENET, ["--batch-norm-in-d-steps", "--preset", "bsn"], (True, False)),
        (presets.PRESETS, ["--preset", "sngan-a", "--no-dequantize"], (True, False)),
    ):
        config = config_made(monkeypatch, *given, main=images, table=table)
        assert (config.batch_norm_in_d_steps, config.dequantize) == flags


def test_a_dry_run_says_everything_and_leaves_nothing(tmp_path, capsys):
    store = memory_store("mine", np.zeros((100, 32, 32, 3), np.uint8))
    config = cifar10.Cifar10(name="x", runs=tmp_path, data=tmp_path, norm="bssn", scale=1.4)
    recipe.train(config, store, dry_run=True)
    said = capsys.readouterr().out
    for part in ("discriminator: 2,935,873 parameters", '"scale": 1.4', f"folder: {tmp_path}/x", "checkpoint: about"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_data_that_a_run_cannot_take(tmp_path):
    config = Config(name="x", runs=tmp_path, image_size=32)
    for shape, message in (
        ((100, 16, 16, 3), "expected images of 32 x 32 pixels, got mine of 16 x 16"),
        ((63, 32, 32, 3), "batch_size must be at most the 63 images of mine, got 64"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.train(config, memory_store("mine", np.zeros(shape, np.uint8)))
    assert list(tmp_path.iterdir()) == []


def test_another_data_set_is_another_run(finished, classifier_cache, tmp_path):
    run = tiny(tmp_path, classifier_cache, "a", **BSSN)
    store = real_digits(8)
    other = memory_store("digits", 255 - store.read(np.arange(store.count)), store.labels)
    config = digits.Digits(name="a", runs=tmp_path, **{**TINY, **BSSN})
    with pytest.raises(ValueError, match=r"name must be free or hold this config, got .* \(data_key: '\w+' there"):
        recipe.train(config, other, resume=True)
    assert rows(run) == rows(finished)


def test_how_a_run_is_carried_out_is_no_part_of_what_it_is():
    fields = set(Numbers.__dataclass_fields__)
    assert not fields & {"name", "runs", "data", "device", "eval_every", "workers", "protocol"}
    assert set(Config(name="x").identity()) == fields


def test_recipes_can_be_imported_without_what_only_their_command_line_needs():
    script = "import sys; sys.modules['tyro'] = None; import digits, cifar10, stl10, celeba, images"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(digits.__file__).parent, check=False).returncode == 0
