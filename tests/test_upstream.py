"""tests/upstream.py, on a file as PyTorch's are: what it runs, and that it tells when something changes."""

import upstream

FILE = """
import unittest
import not_installed
from torch import nn
import torch

class TestNorms(unittest.TestCase):
    def test_spectral_norm(self):
        layer = torch.nn.utils.spectral_norm(nn.Linear(4, 3))
        self.assertEqual(type(layer.weight_u), torch.Tensor)
        self.assertIn("weight_u", layer.state_dict())
        self.assertIn("weight_u", layer._buffers)
        layer = torch.nn.utils.remove_spectral_norm(layer)
        self.assertFalse(hasattr(layer, "weight_u"))

    def test_new_spectral_norm(self):
        layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.assertEqual(type(layer.parametrizations.weight[0]).__module__, "fastsn.norm")

    def test_other(self):
        not_installed.fail()
"""
HOLDS_NOT = "self.assertIn('weight_u', layer._buffers)"


def ended(tmp_path, monkeypatch, different):
    monkeypatch.setattr(upstream, "DIFFERENT", {"test_spectral_norm": dict.fromkeys(different, "a reason")})
    path, lines = tmp_path / "test_norms.py", []
    path.write_text(FILE)
    return upstream.run(path, "reference", lines.append), lines


def test_the_tests_of_spectral_norms_run_on_fastsn(tmp_path, monkeypatch):
    right, lines = ended(tmp_path, monkeypatch, [HOLDS_NOT])
    assert right
    assert [line.split()[:3] for line in lines] == [
        ["passed", "reference", "test_new_spectral_norm"],
        ["passed", "reference", "test_spectral_norm"],
    ]


def test_an_assertion_that_does_not_hold_any_more_or_again_is_told(tmp_path, monkeypatch):
    right, (_, line) = ended(tmp_path, monkeypatch, [])
    assert not right
    assert HOLDS_NOT in line
    right, (_, line) = ended(tmp_path, monkeypatch, [HOLDS_NOT, "self.assertIn('weight_u', layer.state_dict())"])
    assert not right
    assert "now holds: self.assertIn('weight_u', layer.state_dict())" in line
