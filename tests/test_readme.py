"""The README's code runs and is true."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastsn

ROOT = Path(fastsn.__file__).parent.parent
README = (ROOT / "README.md").read_text()
spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
EXAMPLE, EQUIVALENT, MODEL = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_the_calls_on_a_model_run():
    model = nn.Sequential(fastsn.SNLinear(3, 3))
    layers = [nn.Conv2d(3, 4, 3) for _ in range(2)]
    for line in MODEL.splitlines():
        layer = copy.deepcopy(layers.pop()) if "spectral_norm(" in line else None
        exec(line, {"fastsn": fastsn, "model": model, "layer": layer})
    assert type(model[0]) is nn.Linear


def test_the_table_of_figures_is_the_result_files():
    path = ROOT / re.search(r"\(`(bench/results/.*?\.json)`\)", README)[1]
    text = report.table(json.loads(path.read_text()), path.relative_to(ROOT).as_posix())
    assert report.with_table(README, text) == README


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)(.*?)\)", README)
    assert len(links) >= 5
    assert all((ROOT / link).is_file() for link in links)
