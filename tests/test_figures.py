"""Figures from runs: the numbers behind them, and pictures drawn from these alone."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import figures as command
from gan import figures
from gan.config import Numbers
from gan.figures import groups, runs
from tiny_runs import tiny

LAYERS = [f"convs.{i}" for i in range(0, 14, 2)] + ["linear"]
PROTOCOL = "digits-1797r-2000f"
HEAD = "step,fid,inception_score_mean,protocol,network,reals,missing"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, classifier_cache) -> Path:
    """A folder of SN with two seeds and BSSN with one, all probes on."""
    folder, changes = tmp_path_factory.mktemp("runs"), {"steps": 8, "log_gradients": True, "log_variances": True}
    for name, own in {"sn/0": {}, "sn/1": {"seed": 1}, "bssn": {"norm": "bssn", "scale": 1.3}}.items():
        tiny(folder, classifier_cache, name, **changes, **own)
    return folder


def written(
    folder: Path,
    scores: dict[int, tuple[float, float]],
    protocol: str = "bsn",
    rates: tuple[float, ...] = (),
    **config: Any,
) -> Path:
    """A run by hand: {step: (FID, score)}; images a second."""
    about = {"config": {**Numbers(steps=20).identity(), "data": "mine", "data_key": "k", **config}, "runtime": {}}
    about["environment"] = {"device": "a CPU", "processes": 1, "threads": 2}
    (folder / "sample").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    lines = [f"{step},{fid},{score},{protocol},n,5000," for step, (fid, score) in scores.items()]
    (folder / "metrics.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    points = [{"step": i + 1, "images_per_s_per_process": rate} for i, rate in enumerate(rates)]
    (folder / "scalars.jsonl").write_text("".join(json.dumps(x) + "\n" for x in points))
    return folder


def made(name: str, *paths: Path, out: Path, **options: Any) -> list[dict[str, str]]:
    figures.make(name, paths, out / "x.png", **options)
    return read(out)


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "x.csv").read_text())))


def table(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text())))


def scalars(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]


def numbers(row: dict[str, str]) -> list[float]:
    return [float(row["mean"]), float(row["standard_error"] or "nan"), float(row["seeds"])]


def expected(values: list[float]) -> Any:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return pytest.approx([np.mean(values), error, len(values)], rel=1e-12, nan_ok=True)


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory) -> dict[str, Path]:
    """The folder of each figure of the trained runs."""
    found = {name: tmp_path_factory.mktemp(name) for name in figures.FIGURES}
    for name, folder in found.items():
        figures.make(name, [trained], folder / "x.png")
    return found


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_picture_is_not_blank_and_comes_again_from_its_numbers(name, drawn, tmp_path):
    with Image.open(drawn[name] / "x.png") as picture:
        pixels = np.asarray(picture.convert("L"), float)
    assert min(pixels.shape) > 150
    assert pixels.std() > 10
    figures.make(name, [drawn[name] / "x.csv"], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (drawn[name] / "x.png").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.png"]


@pytest.mark.parametrize("name", ["curves", "against", "settings", "seconds"])
def test_a_picture_is_of_the_rows_of_its_csv(name, drawn, tmp_path):
    lines = (drawn[name] / "x.csv").read_text().splitlines()
    (tmp_path / "fewer.csv").write_text("\n".join(lines[:-1]) + "\n")
    figures.make(name, [tmp_path / "fewer.csv"], tmp_path / "fewer.png")
    assert (tmp_path / "fewer.png").read_bytes() != (drawn[name] / "x.png").read_bytes()


def test_curves_are_means_and_standard_errors_over_seeds(trained, drawn):
    rows = read(drawn["curves"])
    tables = {"SN": [table(trained / "sn/0"), table(trained / "sn/1")], "BSSN, scale 1.3": [table(trained / "bssn")]}
    found = {(r["quantity"], r["group"], int(r["step"])): numbers(r) for r in rows}
    assert set(found) == {(q, g, s) for q in ("digit FID", "digit score") for g in tables for s in (3, 6, 8)}
    for (quantity, group, step), values in found.items():
        column = {"digit FID": "fid", "digit score": "inception_score_mean"}[quantity]
        assert values == expected([float(x[column]) for t in tables[group] for x in t if int(x["step"]) == step])
    assert {r["of"] for r in rows} == {PROTOCOL}


@pytest.mark.parametrize(
    ("name", "quantity"), [("gradients", "gradient"), ("variances", "variance"), ("sigmas", "sigma")]
)
def test_what_is_known_of_layers_is_what_was_logged(name, quantity, trained, drawn):
    rows = [r for r in read(drawn[name]) if r["quantity"] == quantity]
    logged = {
        "SN": [scalars(trained / "sn/0"), scalars(trained / "sn/1")],
        "BSSN, scale 1.3": [scalars(trained / "bssn")],
    }
    assert [(r["of"], r["group"], int(r["step"])) for r in rows] == [
        (x, g, s) for x in LAYERS for g in logged for s in (4, 8)
    ]
    for row in rows:
        lines = [line for x in logged[row["group"]] for line in x if line["step"] == int(row["step"])]
        assert numbers(row) == expected([line[f"{quantity}/{row['of']}"] for line in lines])


def test_gradients_stand_beside_scores_and_slopes(trained, drawn):
    rows = read(drawn["gradients"])
    panels = dict.fromkeys((r["quantity"], r["of"]) for r in rows)
    slopes = [("slope", "real images"), ("slope", "fake images")]
    scores = [("digit FID", PROTOCOL), ("digit score", PROTOCOL)]
    assert list(panels) == [*scores, *slopes, *(("gradient", layer) for layer in LAYERS)]
    for which in ("real", "fake"):
        (row,) = [r for r in rows if r["of"] == f"{which} images" and r["group"] == "SN" and r["step"] == "8"]
        assert numbers(row) == expected([scalars(trained / f"sn/{i}")[-1][f"slope/{which}_mean"] for i in (0, 1)])


def test_variances_have_the_bound_of_their_layers(trained, drawn):
    rows = read(drawn["variances"])
    saved = load_file(trained / "bssn/weights/last.safetensors")
    for row in rows:
        weight = saved[f"discriminator.{row['of']}.weight"]
        assert float(row["bound"]) == 1 / max(len(weight), weight.size // len(weight))


def test_spectra_are_squared_singular_values_by_the_largest(trained, drawn):
    """A norm that divides the whole weight by a number leaves them as they are in the weight itself."""
    rows = read(drawn["spectra"])
    saved = [load_file(trained / f"sn/{i}/weights/last.safetensors") for i in (0, 1)]
    for layer in LAYERS:
        weights = [x[f"discriminator.{layer}.weight"].astype(float) for x in saved]
        values = [np.linalg.svd(w.reshape(len(w), -1), compute_uv=False) ** 2 for w in weights]
        own = [r for r in rows if r["of"] == layer and r["group"] == "SN"]
        assert [int(r["index"]) for r in own] == list(range(1, len(values[0]) + 1))
        means = np.mean([v / v[0] for v in values], 0)
        assert [float(r["mean"]) for r in own] == pytest.approx(means, rel=1e-4, abs=1e-6)
        assert float(own[0]["mean"]) == 1


def test_samples_are_the_last_sheets(trained, drawn):
    rows = read(drawn["samples"])
    assert [(r["group"], r["seed"], r["step"], Path(r["picture"])) for r in rows] == [
        ("SN", "0", "8", trained / "sn/0/sample/step-00000008.png"),
        ("SN", "1", "8", trained / "sn/1/sample/step-00000008.png"),
        ("BSSN, scale 1.3", "0", "8", trained / "bssn/sample/step-00000008.png"),
    ]


def test_against_a_field_there_are_last_and_best_of_each_seed(tmp_path):
    written(tmp_path / "runs/a", {10: (5, 2), 20: (7, 3)}, norm="ssn", scale=2.0)
    written(tmp_path / "runs/b", {10: (9, 5), 20: (8, 4)}, norm="ssn", scale=2.0, seed=1)
    written(tmp_path / "runs/c", {10: (4, 1), 20: (3, 2)}, norm="ssn", scale=0.5)
    written(tmp_path / "runs/d", {10: (2, 1), 20: (6, 2)})
    rows = made("against", tmp_path / "runs", out=tmp_path)
    found = {(r["quantity"], r["which"], r["group"], r["value"]): numbers(r) for r in rows}
    assert len(found) == len(rows) == 4 * 3
    assert found["FID", "last", "SSN", "2"] == expected([7, 8])
    assert found["FID", "best", "SSN", "2"] == expected([5, 8])
    assert found["Inception Score", "last", "SSN", "2"] == expected([3, 4])
    assert found["Inception Score", "best", "SSN", "2"] == expected([3, 5])
    assert found["FID", "last", "SSN", "0.5"] == expected([3])
    assert found["FID", "best", "SSN", "1"] == expected([2])  # what SN is
    assert {r["field"] for r in rows} == {"scale"}


def test_against_a_learning_rate_that_both_networks_share_there_is_one_line(tmp_path):
    for i, rate in enumerate((1e-4, 2e-4, 1e-3)):
        written(tmp_path / f"runs/{i}", {20: (i, 1)}, lr_g=rate, lr_d=rate)
    rows = made("against", tmp_path / "runs", out=tmp_path, field="lr_g")
    points = [(r["group"], r["value"], r["mean"]) for r in rows if r["which"] == "last" and r["quantity"] == "FID"]
    assert points == [("SN", "1e-4", "0.0"), ("SN", "2e-4", "1.0"), ("SN", "1e-3", "2.0")]


def test_settings_have_the_letters_of_the_paper(tmp_path):
    c, other = {"lr_g": 2e-4, "lr_d": 2e-4}, {"lr_g": 1e-4, "lr_d": 4e-4, "n_dis": 2}
    for i, seed in enumerate((0, 1)):
        written(tmp_path / f"runs/c{seed}", {10: (9, 1), 20: (10 + 4 * i, 2)}, seed=seed, **c)
        written(tmp_path / f"runs/o{seed}", {20: (30, 3)}, norm="bsn", seed=seed, **other)
    written(tmp_path / "runs/bsn", {20: (40, 3)}, norm="bsn", **c)
    rows = made("settings", tmp_path / "runs", out=tmp_path)
    found = {(r["quantity"], r["which"], r["setting"], r["group"]): numbers(r) for r in rows}
    letter, own = "C; lr 2e-4; β 0.5, 0.999; n_dis 1", "lr 1e-4 / 4e-4; β 0.5, 0.999; n_dis 2"
    assert len(found) == len(rows) == 4 * 3
    assert found["FID", "last", letter, "SN"] == expected([10, 14])
    assert found["FID", "best", letter, "SN"] == expected([9, 9])
    assert found["FID", "last", own, "BSN"] == expected([30, 30])
    assert found["FID", "last", letter, "BSN"] == expected([40])


def test_seconds_are_medians_without_the_first_interval(tmp_path):
    """100 steps of n_dis 5 and batches of 64 are 32,000 images."""
    done = {20: (1.0, 1.0)}
    written(tmp_path / "runs/a", done, rates=(1.0, 3200.0, 1600.0, 3200.0), n_dis=5)
    written(tmp_path / "runs/b", done, rates=(1.0, 1600.0), n_dis=5, seed=1)
    written(tmp_path / "runs/c", done, rates=(1.0, 800.0, 3200.0), norm="bsn", n_dis=5)
    rows = made("seconds", tmp_path / "runs", out=tmp_path)
    assert [(r["group"], r["updates"], r["of"]) for r in rows] == [
        ("SN", "5", "a CPU, processes 1, threads 2"),
        ("BSN", "5", "a CPU, processes 1, threads 2"),
    ]
    assert [numbers(r) for r in rows] == [expected([10, 20]), expected([25])]


def test_a_score_that_is_not_finite_is_no_number_and_not_left_out(tmp_path):
    written(tmp_path / "runs/a", {10: (5, 2), 20: ("", "")})
    written(tmp_path / "runs/b", {10: (7, 2), 20: (6, 2)}, seed=1)
    rows = made("curves", tmp_path / "runs", out=tmp_path)
    assert [(r["step"], r["mean"], r["seeds"]) for r in rows if r["quantity"] == "FID"] == [
        ("10", "6.0", "2"),
        ("20", "", "2"),
    ]


BASE = Numbers().identity()


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"norm": "sn"}], ["SN"]),
        ([{"norm": "ssn", "scale": 1.4}], ["SSN, scale 1.4"]),
        ([{"norm": "sn"}, {"norm": "bssn", "scale": 1.4}], ["SN", "BSSN, scale 1.4"]),
        ([{"norm": "sn"}, {"norm": "ssn"}, {"norm": "ssn", "scale": 2.0}], ["SN", "SSN, scale 1", "SSN, scale 2"]),
        ([{"norm": "none"}, {"norm": "clip"}], ["no normalization", "weight clipping"]),
        ([{"norm": "wn"}, {"norm": "sn_conv", "scale": 1.75}], ["WN", "SN conv, scale 1.75"]),
        ([{}, {"lr_g": 2e-4, "lr_d": 2e-4}], ["SN, lr 1e-4", "SN, lr 2e-4"]),
        ([{}, {"lr_g": 2e-4}], ["SN, lr of G 1e-4", "SN, lr of G 2e-4"]),
        (
            [{"loss": "wasserstein", "gradient_penalty": 10.0}, {}],
            ["SN, loss wasserstein, penalty 10", "SN, loss hinge, penalty 0"],
        ),
        ([{"gamma": "same"}, {"n_dis": 5}], ["SN, gamma same, n dis 1", "SN, gamma none, n dis 5"]),
        ([{"dequantize": True}, {}], ["SN, dequantize", "SN, no dequantize"]),
        (
            [{"data": "a", "data_key": "1", "classes": 0}, {"data": "b", "data_key": "2", "classes": 10}],
            ["SN, data a", "SN, data b"],
        ),
        ([{"data": "a", "data_key": "1"}, {"data": "a", "data_key": "2"}], ["SN, data key 1", "SN, data key 2"]),
        ([{"seed": 0, "last_width": 0.5}, {"last_width": 8.0}], ["SN, last width 0.5", "SN, last width 8"]),
    ],
)  # fmt: skip
def test_runs_are_called_by_what_differs_among_them(changes, labels):
    assert groups.names([{k: v for k, v in (BASE | own).items() if k != "seed"} for own in changes]) == labels


def test_groups_stand_in_the_order_of_norms_and_numbers(tmp_path):
    for i, (norm, scale) in enumerate((("bssn", 1.0), ("ssn", 10.0), ("ssn", 2.0), ("sn", 1.0), ("none", 1.0))):
        written(tmp_path / str(i), {20: (1, 1)}, norm=norm, scale=scale)
    found = groups.groups(runs.find([tmp_path]))
    assert [g.label for g in found] == ["no normalization", "SN", "SSN, scale 2", "SSN, scale 10", "BSSN"]


def test_runs_are_found_at_any_depth_and_once(trained):
    found = runs.find([trained / "sn", trained, trained / "sn/0", trained / "bssn"])
    assert [run.folder.relative_to(trained) for run in found] == [Path(x) for x in ("sn/0", "sn/1", "bssn")]


def test_a_run_that_is_not_finished_is_named(tmp_path, caplog):
    half, none = written(tmp_path / "runs/a", {10: (5, 2)}), written(tmp_path / "runs/b", {}, seed=1)
    written(tmp_path / "runs/c", {10: (6, 2), 20: (6, 2)}, seed=2)
    named = f"{half} at step 10 of 20, {none} at step 0 of 20"
    with pytest.raises(ValueError, match=f"runs must be at their last step .*--unfinished.*, got {named}"):
        made("curves", tmp_path / "runs", out=tmp_path)
    with caplog.at_level(logging.INFO):
        rows = made("curves", tmp_path / "runs", out=tmp_path, unfinished=True)
    assert f"not finished: {named}" in caplog.messages
    assert f"left out, as nothing is written yet: {none}" in caplog.messages
    assert [(r["step"], r["mean"], r["seeds"]) for r in rows[:2]] == [("10", "5.5", "2"), ("20", "6.0", "1")]
    with pytest.raises(ValueError, match="runs must have written something, got 1 without a row"):
        made("curves", none, out=tmp_path, unfinished=True)


def test_a_norm_without_sigma_is_named_and_left_out(trained, tmp_path, caplog):
    none = written(tmp_path / "none", {20: (1, 1)}, norm="none", data="digits")
    with caplog.at_level(logging.INFO):
        rows = made("sigmas", trained, none, out=tmp_path)
    assert {r["group"].split(",")[0] for r in rows} == {"SN", "BSSN"}
    assert f"left out, as nothing is divided by a sigma: {none}" in caplog.messages
    with pytest.raises(ValueError, match=f"sigmas needs runs with a norm that divides by sigma, got {none}"):
        made("sigmas", none, out=tmp_path)


@pytest.mark.parametrize(("name", "flag"), [("gradients", "--log-gradients"), ("variances", "--log-variances")])
def test_a_probe_that_was_off_is_said(name, flag, trained, tmp_path):
    off = written(tmp_path / "off", {20: (1, 1)})
    with pytest.raises(ValueError, match=f"{name} needs runs trained with {flag}, got {off} without"):
        made(name, trained, off, out=tmp_path)
    assert not (tmp_path / "x.png").exists()
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": "sngan"}, "got protocol bsn in .*/a and sngan in .*/b"),
        ({"data": "other"}, "got data mine k in .*/a and other k in .*/b"),
    ],
)
@pytest.mark.parametrize("name", ["curves", "against", "settings"])
def test_scores_that_do_not_compare(name, change, said, tmp_path):
    written(tmp_path / "a", {20: (1, 1)}, norm="ssn")
    written(tmp_path / "b", {20: (1, 1)}, norm="ssn", scale=2.0, **change)
    with pytest.raises(ValueError, match=f"runs must be scored by one protocol, network and data set, {said}"):
        made(name, tmp_path, out=tmp_path)


def test_scores_that_could_not_be_computed(tmp_path):
    run = written(tmp_path / "a", {20: ("", "")})
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().rstrip() + "no Inception\n")
    with pytest.raises(ValueError, match=r"must have scores, got none at step 20: no Inception"):
        made("curves", run, out=tmp_path)


def test_one_seed_twice_is_no_second_seed(tmp_path):
    a, b = (written(tmp_path / name, {20: (1, 1)}) for name in "ab")
    with pytest.raises(ValueError, match=f"runs of one config must differ in their seed, got seed 0 in {a} and {b}"):
        made("curves", tmp_path, out=tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "options", "said"),
    [
        ("curve", "runs", {}, "figure must be one of curves, against, .*, got 'curve'"),
        ("curves", "empty", {}, "run must be the folder of a run, or a folder .*, got .*empty without any"),
        ("curves", "nowhere", {}, "run must be the folder of a run, or .*, got .*nowhere without any"),
        ("curves", "broken", {}, "run must be the folder of a run, got .*broken, whose config.json is no run's"),
        ("against", "runs", {"field": "sclae"}, "field must be one of architecture, .*, got 'sclae'"),
        ("against", "runs", {"field": "n_dis"}, "field must differ among the runs, got n_dis 1 in all of them"),
        ("seconds", "runs", {}, "seconds needs two points of the scalars or more .*--log-every.*, got .* with fewer"),
        ("curves", "settings.csv", {}, "settings.csv must have the columns quantity, of, group, .*, got quantity"),
        ("curves", "word.csv", {}, "word.csv must be CSV of a figure, got line 2: .*'many'"),
        ("curves", "short.csv", {}, "short.csv must be CSV of a figure, got line 2: 2 cells in place of 7"),
        ("curves", "head.csv", {}, "head.csv must have rows, got none"),
    ],
)  # fmt: skip
def test_what_makes_no_figure(name, path, options, said, tmp_path):
    written(tmp_path / "runs/a", {20: (1, 1)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("[]")
    (tmp_path / "settings.csv").write_text("quantity\n1\n")
    head = ",".join(figures.FIGURES["curves"].columns)
    (tmp_path / "head.csv").write_text(f"{head}\n")
    (tmp_path / "short.csv").write_text(f"{head}\nFID,bsn\n")
    (tmp_path / "word.csv").write_text(f"{head}\nFID,bsn,SN,many,1,1,1\n")
    with pytest.raises(ValueError, match=said):
        figures.make(name, [tmp_path / path], tmp_path / "x.png", **options)
    assert not (tmp_path / "x.png").exists()


def test_what_else_makes_no_figure(tmp_path):
    a = written(tmp_path / "a", {20: (1, 1)}, rates=(1.0, 2.0))
    b = written(tmp_path / "b", {20: (1, 1)}, rates=(1.0, 2.0), seed=1)
    about = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(about | {"environment": {"device": "a GPU"}}))
    with pytest.raises(ValueError, match=r"seconds needs runs on one device, got a CPU, .*/a and a GPU, .*/b"):
        made("seconds", tmp_path, out=tmp_path)
    with pytest.raises(ValueError, match=r"out must be a .png file, got x.pdf"):
        figures.make("curves", [a], Path("x.pdf"))
    with pytest.raises(ValueError, match=r"runs must be folders, or one .csv of a figure, got x.csv among 2"):
        figures.make("curves", [a, Path("x.csv")], Path("x.png"))
    with pytest.raises(FileNotFoundError, match="must hold samples, found no picture"):
        made("samples", a, out=tmp_path)
    with pytest.raises(FileNotFoundError, match="has saved weights, found none"):
        made("spectra", a, out=tmp_path)


def test_the_command_line(trained, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        command.main(["against", str(trained), "--field", "norm", "--out", str(tmp_path / "x.png")])
    assert f"picture: {tmp_path / 'x.png'}" in caplog.messages
    assert (tmp_path / "x.csv").read_text().startswith("quantity,of,which,field,value,group,")
    with pytest.raises(SystemExit, match=r"^error: field must be one of .*, got 'x'$"):
        command.main(["against", str(trained), "--field", "x", "--out", str(tmp_path / "y.png")])
    with pytest.raises(SystemExit, match="curve"):
        command.main(["curve", str(trained), "--out", str(tmp_path / "y.png")])
    assert set(figures.FIGURES) == {f.__name__ for f in command.COMMANDS}
