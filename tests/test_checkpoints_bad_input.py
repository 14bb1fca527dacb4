"""convert_state_dict names the key and the reason where it cannot do what was asked."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import fastsn
from fastsn.interop.state_dict_layouts import LAYOUTS
from foreign import build
from shapes import Case

LINEAR = Case("Linear", (7, 5), "small")


def raises(state, to, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastsn.convert_state_dict(state, to)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([("weight", torch.ones(2))], "got list"),
        (nn.Linear(2, 2), "got Linear"),
        ({0: torch.ones(2)}, "got the key 0"),
        ({"state_dict": {}, "epoch": 3}, "got dict for 'state_dict'"),
        ({"epoch": 3}, "got int for 'epoch'"),
    ],
)
def test_states_that_are_no_state_dict(state, message):
    with pytest.raises(TypeError, match=f"state must be a mapping of str to tensors, {message}"):
        fastsn.convert_state_dict(state, "torch")


@pytest.mark.parametrize("to", ["hook", "", None, 3, ["torch"]])
def test_unknown_layouts_list_the_known(to):
    raises(
        build("torch", LINEAR).state_dict(),
        to,
        f"to must be one of 'torch', 'torch_hook', 'fastsn', 'biggan', 'mimicry', got {to!r}",
    )


@pytest.mark.parametrize("state", [nn.Linear(2, 2).state_dict(), {}])
def test_no_norm_at_all_lists_layouts_and_keys(state):
    for name in LAYOUTS:
        raises(state, "torch", f"{name}: ")
    raises(state, "torch", f"got the keys {list(state)} ...")


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(
    ("layout", "weight", "first"),
    [
        ("torch", "parametrizations.weight.original", "parametrizations.weight.0._u"),
        ("torch_hook", "weight_orig", "weight_u"),
        ("fastsn", "weight", "spectral_norm._u"),
        ("biggan", "weight", "u0"),
        ("mimicry", "weight", "sn_u"),
    ],
)
def test_vectors_without_their_weight(layout, weight, first, to):
    state = {f"net.0.{key}": value for key, value in build(layout, LINEAR).state_dict().items() if key != weight}
    raises(state, to, f"'net.0.{first}' must have its weight 'net.0.{weight}' beside it")


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(
    ("layout", "key", "came", "expected"),
    [
        ("torch", "parametrizations.weight.0._u", [6], "[5] or [7]"),
        ("torch", "parametrizations.weight.0._v", [5], "[7]"),
        ("torch_hook", "weight_u", [5, 1], "[5] or [7]"),
        ("fastsn", "spectral_norm._v", [6], "[7]"),
        ("biggan", "u0", [1, 7], "[1, 5]"),
        ("biggan", "u0", [5], "[1, 5]"),
        ("mimicry", "sn_u", [5], "[1, 5]"),
    ],
)
def test_vectors_of_a_wrong_size(layout, key, came, expected, to):
    state = build(layout, LINEAR).state_dict() | {key: torch.ones(came)}
    raises(state, to, f"'{key}' must have shape {expected} for ")
    raises(state, to, f" of shape [5, 7], got {came}")


def test_vectors_of_the_other_view_of_a_wrong_size():
    state = fastsn.BSNConv2d(3, 8, 3).state_dict() | {"spectral_norm._v_in": torch.ones(4)}
    raises(state, "torch", "'spectral_norm._v_in' must have shape [3] for 'weight' of shape [8, 3, 3, 3], got [4]")


@pytest.mark.parametrize("to", ["torch_hook", "biggan", "mimicry"])
def test_layouts_without_a_second_view_or_a_scale(to):
    raises(fastsn.BSNConv2d(3, 8, 3).state_dict(), to, f"'spectral_norm._u_in' must be absent to become '{to}'")
    scaled = fastsn.spectral_norm(nn.Linear(3, 4), variant="ssn", scale=nn.Parameter(torch.tensor(2.0)))
    raises(scaled.state_dict(), to, f"'parametrizations.weight.0.scale' must be absent to become '{to}'")


@pytest.mark.parametrize("to", ["fastsn", "biggan", "mimicry"])
def test_layouts_for_weights_only(to):
    lstm = spectral_norm(nn.LSTM(3, 4), "weight_hh_l0").state_dict()
    raises(lstm, to, f"'weight_hh_l0_orig' must be of a tensor named 'weight' to become '{to}', got 'weight_hh_l0'")
    assert "parametrizations.weight_hh_l0.original" in fastsn.convert_state_dict(lstm, "torch")


@pytest.mark.parametrize("to", ["biggan", "mimicry"])
def test_layouts_for_output_channels_in_front_only(to):
    state = build("torch", Case("ConvTranspose2d", (3, 4, 2), "dim 1")).state_dict()
    key = "parametrizations.weight.original"
    raises(state, to, f"'{key}' must count output channels in dimension 0 to become '{to}', got 1")


@pytest.mark.parametrize("to", ["torch_hook", "biggan", "mimicry"])
def test_layouts_that_do_not_conjugate(to):
    state = fastsn.SNLinear(3, 4, dtype=torch.complex64).state_dict()
    raises(state, to, f"'weight' must be real for '{to}', which does not conjugate, got torch.complex64")
    raises(build("torch_hook", LINEAR, dtype=torch.complex64).state_dict(), "torch", "must be real for 'torch_hook'")


STACKS = {
    "twice": lambda: parametrizations.spectral_norm(parametrizations.spectral_norm(nn.Linear(3, 4))),
    "behind another": lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 4))),
    "behind one without tensors": lambda: parametrizations.spectral_norm(behind(nn.Linear(3, 4), Abs())),
    "in front of another": lambda: behind(parametrizations.spectral_norm(nn.Linear(3, 4)), Gain()),
    "of a normalized layer": lambda: fastsn.spectral_norm(fastsn.SNLinear(3, 4)),
}


class Abs(nn.Module):
    def forward(self, weight):
        return weight.abs()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.gain


def behind(layer, parametrization):
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


@pytest.mark.parametrize("stack", STACKS)
def test_several_parametrizations_of_one_tensor(stack):
    stacked = pytest.warns(UserWarning, match="has a spectral norm already")
    with stacked if stack == "of a normalized layer" else nullcontext():
        state = STACKS[stack]().state_dict()
    message = "must belong to the only parametrization of its tensor, got also 'parametrizations.weight."
    raises(state, "torch_hook", message)
    if stack != "of a normalized layer":
        converted = fastsn.convert_state_dict(state, "torch")
        assert list(converted) == list(state)
        assert all(converted[key] is state[key] for key in state)


def test_two_layouts_for_one_weight():
    state = build("biggan", LINEAR).state_dict() | {"sn_u": torch.randn(1, 5)}
    raises(state, "fastsn", "'weight' must belong to the only parametrization of its tensor, got also 'sn_u'")


def test_names_that_are_taken():
    state = build("mimicry", LINEAR).state_dict() | {"spectral_norm.dummy": torch.ones(1)}
    assert "spectral_norm.dummy" in fastsn.convert_state_dict(state, "fastsn")
    state |= {"weight_orig": torch.ones(2)}
    raises(state, "torch_hook", "'weight_orig' must be free to be written as 'torch_hook', but is in state already")


def test_weights_that_have_no_norm():
    state = {"weight": torch.ones(5), "sn_u": torch.ones(1, 5)}
    raises(state, "torch", "'weight' must have at least 2 dimensions to have u and v, got shape [5]")
    with pytest.raises(TypeError, match=r"weight must be floating point or complex, got torch.int64"):
        fastsn.convert_state_dict({"weight": torch.ones(5, 2, dtype=torch.int64), "sn_u": torch.ones(1, 5)}, "torch")
    meta = {key: value.to("meta") for key, value in build("torch", LINEAR).state_dict().items()}
    raises(meta, "fastsn", "'parametrizations.weight.original' must have values, got a meta tensor")
