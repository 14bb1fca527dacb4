"""The examples in docstrings run, in the order in which they stand."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastsn

EXAMPLES = {
    name: examples
    for name in fastsn.__all__
    if (examples := doctest.DocTestParser().get_examples(getattr(fastsn, name).__doc__ or ""))
}


def discriminator() -> nn.Module:
    """With the names that the examples use."""
    norm = parametrizations.spectral_norm
    parts = {"body": norm(nn.Conv2d(3, 8, 3)), "flat": nn.Flatten(), "head": norm(nn.Linear(8 * 16, 2))}
    parts["embed"] = norm(nn.Linear(2, 1))
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


def biggan() -> nn.Module:
    """A layer of BigGAN-PyTorch: u0 and sv0 beside the weight."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net[0].register_buffer("u0", torch.randn(1, 4))
    net[0].register_buffer("sv0", torch.ones(1))
    return net


def test_there_are_examples():
    assert {"convert", "convert_state_dict", "spectral_norm"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(biggan().state_dict(), "G.pth")
    names = {"torch": torch, "nn": nn, "fastsn": fastsn, "D": discriminator()}
    names["model"] = nn.Sequential(fastsn.SNConv2d(3, 4, 3))
    for example in EXAMPLES[name]:
        exec(example.source, names)
    for model in (names["D"], names["model"]):
        assert all(torch.isfinite(p).all() for p in model.parameters())
