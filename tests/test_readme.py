"""The README's code runs and is true."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastsn
from dispatched import Counted
from readme import CONVERT, EQUIVALENT, EXAMPLE, INLINE, README, ROOT


def script(path: str) -> ModuleType:
    """A file that is no module of a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, matrix = script("bench/report.py"), script(".ci/matrix.py")
digits = script("train/results/digits/report.py")


@pytest.mark.parametrize("spectral_norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_the_two_lines_keep_the_numbers(spectral_norm):
    theirs = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), spectral_norm(nn.Conv2d(4, 4, 3)))
    model, x = copy.deepcopy(theirs), torch.randn(2, 3, 8, 8)
    exec(CONVERT, {"fastsn": fastsn, "model": model})
    for _ in range(3):
        with Counted() as counted:
            found = model(x)
        assert counted.names == ["power_iteration_", "rescale"]
        torch.testing.assert_close(found, theirs(x))


def test_the_example_runs():
    names: dict[str, object] = {}
    exec(EXAMPLE, names)
    assert all(p.grad is not None for p in names["D"].parameters())


def test_the_equivalent_is_equivalent():
    layer = fastsn.BSSNConv2d(3, 8, 4, stride=2, padding=1, scale=1.4)
    norm = layer.spectral_norm
    x = torch.randn(2, 3, 8, 8)
    names = {"torch": torch, "F": F, "x": x, "scale": 1.4, "stride": 2, "padding": 1}
    names |= {"W": layer.weight, "bias": layer.bias, "v": norm._v.clone(), "v_in": norm._v_in.clone()}
    for _ in range(2):
        exec(EQUIVALENT, names)
        torch.testing.assert_close(layer(x), names["y"])
        torch.testing.assert_close(norm._u_in, names["u_in"])


def test_the_calls_in_the_text_run():
    """sync needs processes and tune a GPU: they have tests of their own."""
    model, net_d, layer = (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))),
        nn.Conv2d(3, 4, 3),
        nn.Linear(3, 3),
    )
    names = {"fastsn": fastsn, "model": model, "net_d": net_d, "layer": layer, "state": model.state_dict()}
    names["ema"] = fastsn.convert(copy.deepcopy(model))
    calls = [call for call in INLINE if "sync(" not in call and "tune(" not in call]
    assert len(calls) >= 10
    exec(CONVERT, names)
    for call in calls:
        exec(call, names)
    assert type(model[0]) is nn.Linear
    assert [x.parametrizations.weight[0].variant for x in (net_d, layer)] == ["bssn", "bssn"]


@pytest.mark.parametrize(("part", "make"), [("", report.table), (" host cost", report.host_costs)])
def test_the_tables_of_figures_are_those_of_the_result_files(part, make):
    section = README[README.index(f"bench/report.py{part} begin") :]
    path = ROOT / re.search(r"\(`(bench/results/.*?\.json)`\)", section)[1]
    text = make(json.loads(path.read_text()), path.relative_to(ROOT).as_posix())
    assert report.with_table(README, text, part) == README


def test_the_table_of_versions_is_the_result_file():
    results = json.loads((ROOT / "bench/results/matrix.json").read_text())
    assert set(results) <= {f"{version}-{torch}" for version, torch, _ in matrix.STACKS}
    assert all(x["failed"] == len(x["failures"]) and x["passed"] > 1000 for x in results.values())
    assert matrix.with_table(README, matrix.table(results)) == README


def test_a_test_that_fails_twice_counts_once_in_the_table_of_versions(tmp_path):
    """pytest writes a test whose teardown fails too as two cases."""
    cases = ["<testcase classname='a' name='good'/>", "<testcase classname='a' name='none'><skipped/></testcase>"]
    cases += [f"<testcase classname='a' name='bad'><{how}/></testcase>" for how in ("failure", "error")]
    (tmp_path / "report.xml").write_text(f"<testsuites>{''.join(cases)}</testsuites>")
    expected = {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a::bad"]}
    assert matrix.counted(tmp_path / "report.xml") == expected


def headings(file: Path) -> set[str]:
    """As links name them."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", ["README.md", "train/README.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!http)(.*?)\)", (ROOT / name).read_text())
    assert len(links) >= 5
    for link in links:
        path, _, heading = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), link
        assert not heading or heading in headings(file), link


def test_the_tables_of_the_digits_are_those_of_the_committed_rows():
    assert f"{digits.BEGIN}\n{digits.section()}\n{digits.END}" in README


def test_the_figure_of_the_digits_has_the_means_of_the_committed_rows():
    with open(ROOT / "train/results/digits/scales.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "1000"]
    scores: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        line = {"sn": "SSN", "bsn": "BSSN"}.get(row["norm"], row["norm"].upper())
        scores.setdefault((line, float(row["scale"])), []).append(float(row["fid"]))
    with open(ROOT / "train/results/digits/scales-figure.csv", newline="") as file:
        figure = [row for row in csv.DictReader(file) if (row["quantity"], row["which"]) == ("digit FID", "last")]
    found = {(row["group"], float(row["value"])): (float(row["mean"]), float(row["standard_error"])) for row in figure}
    assert set(found) == set(scores)
    for key, values in scores.items():
        assert len(values) == 5
        assert found[key] == pytest.approx((statistics.mean(values), statistics.stdev(values) / 5**0.5))
