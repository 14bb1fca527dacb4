"""What is logged of the discriminator at the flags --log-gradients and --log-variances."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import digits
import fastsn
from gan import probes
from gan.training import Training
from tiny_runs import TINY, rows, tiny

CPU = torch.device("cpu")
NORMS = ["none", "sn", "ssn", "bsn", "bssn"]


def trained(norm: str, **changes: object) -> tuple[Training, nn.Module]:
    """After two steps, and the discriminator from before its last one."""
    scale = 1.3 if norm in ("ssn", "bssn") else 1.0
    config = digits.Digits(name="x", norm=norm, scale=scale, **{**TINY, "n_dis": 1, **changes})
    training = Training(config, 1, 0, CPU)
    draw = torch.randint(0, 256, (2, 16, 1, 8, 8), dtype=torch.uint8)
    training.advance(iter([(draw[0], None)]))
    before = copy.deepcopy(training.discriminator)
    training.advance(iter([(draw[1], None)]))
    return training, before


def weights_of(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removesuffix(".weight"): p for name, p in net.named_parameters() if name.endswith(".weight")}


@pytest.mark.parametrize("order", ["d_first", "g_first"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_discriminators_loss(norm, order):
    z_of_g = "fresh" if order == "g_first" else "reused"
    training, net = trained(norm, u_schedule="per_d_step", order=order, z_of_g=z_of_g)
    found = probes.gradients(training)
    real, _, fake, _ = training.last
    if norm == "none":
        loss = (1 - net(real)).relu().mean() + (1 + net(fake)).relu().mean()
    else:
        with fastsn.step(net, advance=False):
            loss = (1 - net(real)).relu().mean() + (1 + net(fake)).relu().mean()
    net.zero_grad()
    loss.backward()
    expected = {f"gradient/{name}": p.grad.square().sum().sqrt() for name, p in weights_of(net).items()}
    assert len(expected) == 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # without a norm they are small at first


@pytest.mark.parametrize("norm", NORMS)
def test_variances_are_those_of_the_weights_that_the_next_forward_uses(norm):
    training, _ = trained(norm)
    before = [x.clone() for x in (*training.discriminator.buffers(), *training.discriminator.parameters())]
    found = probes.variances(training)
    after = [*training.discriminator.buffers(), *training.discriminator.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    net = copy.deepcopy(training.discriminator)
    if norm != "none":
        net = fastsn.fold(fastsn.advance(net))
    expected = {f"variance/{name}": (w - w.mean()).square().mean() for name, w in weights_of(net).items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_in_evaluation_weights_are_those_of_the_stored_vectors():
    training, _ = trained("bssn")
    training.discriminator.eval()
    expected = weights_of(fastsn.fold(copy.deepcopy(training.discriminator)))
    torch.testing.assert_close(training.norm.weights(), {name: p.detach() for name, p in expected.items()})
    assert not any(weight.requires_grad for weight in training.norm.weights().values())


def test_probes_are_logged_where_they_are_asked_for_and_change_nothing(tmp_path, classifier_cache):
    changes = {"steps": 5, "norm": "bssn", "scale": 1.3, "log_every": 2}
    plain = tiny(tmp_path, classifier_cache, "plain", **changes)
    probed = tiny(tmp_path, classifier_cache, "probed", log_gradients=True, log_variances=True, **changes)
    assert rows(plain) == rows(probed)
    here, there = (load_file(run / "weights/last.safetensors") for run in (plain, probed))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    lines = [[json.loads(x) for x in (run / "scalars.jsonl").read_text().splitlines()] for run in (plain, probed)]
    layers = [f"convs.{i}" for i in range(0, 14, 2)] + ["linear"]
    added = {f"{kind}/{layer}" for kind in ("gradient", "variance") for layer in layers}
    for without, with_probes in zip(*lines, strict=True):
        assert set(with_probes) - set(without) == added
        kept = [tag for tag in without if not tag.startswith(("time/", "images_per_s", "memory/"))]
        assert [without[tag] for tag in kept] == [with_probes[tag] for tag in kept]
        assert all(with_probes[tag] > 0 for tag in added)
