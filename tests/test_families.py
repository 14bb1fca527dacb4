"""Models of users and the README's lines for them: what it says to add runs, and does what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsn
from dispatched import Counted, Graphs
from families import MultiScaleDiscriminator
from family_tasks import (
    FAMILIES,
    adam,
    evaluated,
    gan_loss,
    images,
    moons,
    tensors,
    train,
    trained,
    upscaler_loss,
    vocoder_loss,
    waves,
)
from networks import moved, state
from readme import CLASSIFIER, INLINE, UPSCALER, VOCODER

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
ONCE = ["power_iteration_", "rescale"]
(TO_BSSN,) = (call for call in INLINE if call.startswith("fastsn.convert(net_d"))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within float32 rounding, measured by each tensor's largest value."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's lines find their files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The README's lines


def upscaler_names(folder: Path) -> tuple[nn.Module, dict[str, object]]:
    theirs = trained(FAMILIES["upscaler"])
    torch.save({"params": theirs.state_dict()}, folder / "net_d.pth")
    names = {"torch": torch, "fastsn": fastsn, "gan_loss": gan_loss, "net_d": FAMILIES["upscaler"].build()}
    return theirs, names | {"real": images(0.5), "fake": images().requires_grad_()}


def test_the_lines_for_the_upscaler_in_evaluation_give_torchs_losses(folder):
    theirs, names = upscaler_names(folder)
    names["net_d"].eval()
    exec(UPSCALER, names)
    theirs.eval()
    fakes = theirs(names["fake"])
    loss_d = gan_loss(theirs(names["real"]), True) + gan_loss(fakes, False)
    assert_same([names["loss_d"], names["loss_g"]], [loss_d, gan_loss(fakes, True)])


def test_the_lines_for_the_upscaler_in_training(folder):
    _, names = upscaler_names(folder)
    model = names["net_d"]
    optimizer, parameters = adam(model), list(model.parameters())
    with Counted() as counted:
        exec(UPSCALER, names)
    # The discriminator's step, its backward, the generator's step, which stores nothing.
    assert counted.names == [*ONCE, "rescale_backward", "power_iteration", "rescale"]
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert all(p.grad is not None for p in parameters)
    names["loss_g"].backward()
    assert names["fake"].grad.abs().sum() > 0
    train(model, upscaler_loss, optimizer, 2)


def test_the_lines_for_the_upscaler_with_bssn_train():
    names = {"fastsn": fastsn, "net_d": trained(FAMILIES["upscaler"])}
    exec(TO_BSSN, names)
    model = fastsn.fuse(names["net_d"])
    measured = fastsn.sigmas(model)
    assert len(measured) == 8
    assert all(s.sigma == pytest.approx((s.sigma_out + s.sigma_in) / 2, rel=1e-5) for s in measured.values())
    losses = train(model, upscaler_loss, torch.optim.Adam(model.parameters(), lr=3e-4), 50)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("weight_norm", [parametrizations.weight_norm, old_weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_lines_for_the_vocoder(weight_norm, folder):
    build = partial(MultiScaleDiscriminator, 16, weight_norm)
    theirs, msd = build(), build()
    theirs_optimizer, optimizer = adam(theirs), adam(msd)
    train(theirs, vocoder_loss, theirs_optimizer, 3)
    torch.save({"msd": theirs.state_dict(), "optim_d": theirs_optimizer.state_dict()}, folder / "do_00500000")
    y, generated = waves(0.05), waves(0.2).requires_grad_()
    names = {"torch": torch, "fastsn": fastsn, "msd": msd, "optim_d": optimizer, "y": y, "y_g_hat": generated}
    others = [(name, id(m)) for d in msd.discriminators[1:] for name, m in d.named_modules()]
    keys = [key for key in msd.state_dict() if not key.startswith("discriminators.0.")]
    with Counted() as counted:
        exec(VOCODER, names)
    assert counted.names == ONCE  # though the first discriminator is used for real and for generated
    assert [(name, id(m)) for d in msd.discriminators[1:] for name, m in d.named_modules()] == others
    assert [key for key in msd.state_dict() if not key.startswith("discriminators.0.")] == keys
    assert set(fastsn.sigmas(msd)) == {f"discriminators.0.{n}" for n in (*(f"convs.{i}" for i in range(7)), "last")}
    msd.load_state_dict(torch.load("do_00500000")["msd"], strict=True)  # now too
    assert_same(evaluated(msd, (y, generated)), evaluated(theirs, (y, generated)))
    for p, q in zip(*(each.param_groups[0]["params"] for each in (theirs_optimizer, optimizer)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(theirs_optimizer.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
    assert {id(p) for p in optimizer.state} == {id(p) for p in msd.parameters()}
    losses = train(msd, vocoder_loss, optimizer, 15)
    assert sum(losses[-3:]) < sum(losses[:3])


def step_of(model: nn.Module, losses: list[float]) -> Callable[[nn.Module, Tensor, Tensor], None]:
    """A training step for one model, which notes its losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train_step(model: nn.Module, x: Tensor, label: Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return train_step


def test_the_lines_for_the_classifier(capsys):
    theirs = FAMILIES["classifier"].build()
    model, batches = copy.deepcopy(theirs), [moons(128) for _ in range(20)]
    x_test = torch.cat([moons()[0], torch.tensor([[30.0, -40.0]])])
    expected, found = [], []
    train_step = step_of(theirs, expected)
    torch.manual_seed(2)  # the dropout
    for x, label in batches:
        train_step(theirs, x, label)
    names = {"fastsn": fastsn, "model": model, "loader": batches, "x_test": x_test}
    names["train_step"] = step_of(model, found)
    torch.manual_seed(2)
    exec(CLASSIFIER, names)
    assert found == pytest.approx(expected, rel=1e-3)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert "hidden.3" in capsys.readouterr().out
    logits, variance = theirs.eval()(x_test)
    torch.testing.assert_close(names["logits"], logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(names["variance"], variance, rtol=1e-3, atol=1e-4)
    assert variance[-1].mean() > 1.2 * variance[:-1].mean()  # it knows that it has seen nothing there
    assert all(type(layer) is nn.Linear for layer in model.hidden)


# What holds for each of them


@every
def test_evaluation_is_torchs_before_and_after_and_folding_keeps_it(family):
    model, inputs = trained(family), family.inputs()
    expected = evaluated(model, inputs)
    fastsn.fuse(fastsn.convert(model))
    before = state(model)
    found = evaluated(model, inputs)
    assert_same(found, expected)
    assert moved(before, model) == set()
    folded = evaluated(fastsn.fold(model), inputs)
    assert all(torch.equal(a, b) for a, b in zip(folded, found, strict=True))
    normed = {m for d in getattr(model, "discriminators", [])[1:] for m in d.modules()}  # by weight_norm
    for module in {*model.modules()} - normed:
        assert not type(module).__module__.startswith("fastsn")
        assert not parametrize.is_parametrized(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@every
@pytest.mark.parametrize("order", ["convert, load", "load, convert"])
def test_old_checkpoints_load_strictly(family, order, tmp_path):
    theirs, model, inputs = trained(family), family.build(), family.inputs()
    torch.save(theirs.state_dict(), tmp_path / "old.pt")
    for word in order.split(", "):
        if word == "convert":
            fastsn.fuse(fastsn.convert(model))
        else:
            model.load_state_dict(torch.load(tmp_path / "old.pt"), strict=True)
    expected = evaluated(theirs, inputs)
    assert_same(evaluated(model, inputs), expected)
    # And back, into the code without fastsn.
    to = "torch" if family is FAMILIES["classifier"] else "torch_hook"
    again = family.build()
    again.load_state_dict(fastsn.convert_state_dict(model.state_dict(), to=to), strict=True)
    assert_same(evaluated(again, inputs), expected)


@every
def test_a_training_forward_calls_each_op_once_however_many_layers(family):
    model = fastsn.fuse(fastsn.convert(trained(family)))
    assert len(fastsn.sigmas(model)) == family.norms
    for _ in range(2):
        with Counted() as counted:
            first, *_ = tensors(model(*family.inputs()))
            first.mean().backward()
        assert counted.names == [*ONCE, "rescale_backward"]


@every
def test_autocast(family):
    theirs, inputs = trained(family), family.inputs()
    model = family.build()
    model.load_state_dict(theirs.state_dict())
    fastsn.fuse(fastsn.convert(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = evaluated(theirs, inputs), evaluated(model, inputs)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 * float(b.abs().max()))
    before = state(model)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return family.loss(model)

    losses = train(model, loss, adam(model), 15)
    assert sum(losses[-3:]) < sum(losses[:3])
    vectors = {name: x for name, x in model.named_buffers() if name.endswith(("._u", "._v"))}
    assert len(vectors) == 2 * family.norms
    assert {name for name in vectors if name.endswith("._v")} <= moved(before, model)
    for x in vectors.values():
        assert x.dtype == torch.float32
        assert x.norm().item() == pytest.approx(1, abs=1e-5)


@every
def test_averaged_copies(family):
    model = fastsn.warm_up(fastsn.fuse(fastsn.convert(trained(family))), 300)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed in range(8):
        train(model, family.loss, optimizer, 1, seed)
        ema.update_parameters(model)
        fastsn.copy_vectors(model, ema)
    vectors = {name: x for name, x in model.named_buffers() if name.endswith(("._u", "._v"))}
    assert len(vectors) == 2 * family.norms
    assert all(torch.equal(ema.module.get_buffer(name), x) for name, x in vectors.items())
    found, exact = fastsn.sigmas(ema), fastsn.sigmas(fastsn.warm_up(copy.deepcopy(ema), 300))
    for name, measured in found.items():
        assert measured.sigma == pytest.approx(exact[name].sigma, rel=0.01)
    with Counted() as counted:
        ema(*family.inputs())
    assert counted.names == ONCE  # the copy is fused too


# torch hides this warning of its own from all filters but "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@every
def test_compiled(family):
    """For a class of the user's, torch compiles the hooks apart from the forward: two graphs, and none later."""
    model = fastsn.fuse(fastsn.convert(trained(family)))
    twin, graphs = copy.deepcopy(model), Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    losses = [train(m, family.loss, torch.optim.SGD(m.parameters(), lr=1e-3), 3) for m in (compiled, twin)]
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert sorted(graphs.ops) == [[], ONCE]


@every
def test_exported(family):
    model, inputs = fastsn.fuse(fastsn.convert(trained(family))), family.inputs()
    folded = fastsn.fold(model).eval()
    program = torch.export.export(folded, inputs)
    assert not any("fastsn" in str(node.target) for node in program.graph.nodes)
    assert_same([*tensors(program.module()(*inputs))], [*tensors(folded(*inputs))])
