"""convert_state_dict: a checkpoint of any spectral normalization gives the same weights in any other."""

from __future__ import annotations

import copy
import io
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import fastsn
from conftest import ON
from fastsn.interop.state_dict_layouts import LAYOUTS
from foreign import ROWS, WITH_V, build, trained, use
from shapes import TABLE, Case

LINEAR = Case("Linear", (7, 5), "small")
CONV = Case("Conv2d", (3, 8, 3), "two views")
OUTPUT_FIRST = [case for case in TABLE if not case.layer.startswith("ConvTranspose")]
PAIRS = [(*pair, case) for pair in itertools.permutations(WITH_V, 2) for case in TABLE]
PAIRS += [(*p, c) for p in itertools.permutations(LAYOUTS, 2) if {*p} & {*ROWS} for c in OUTPUT_FIRST]


def matrix(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return weight.detach().movedim(dim, 0).flatten(1)


def without(state, *endings):
    """A copy, with its metadata, less some keys."""
    kept = copy.copy(state)
    for key in [key for key in state if key.endswith(endings)]:
        del kept[key]
    return kept


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(("source", "to", "case"), PAIRS, ids=str)
def test_every_layout_loads_into_every_other(source, to, case):
    layer, other = trained(source, case), build(to, case).eval()
    state = layer.state_dict()
    converted = fastsn.convert_state_dict(state, to)
    other.load_state_dict(converted, strict=True)
    if source in WITH_V and to in WITH_V:
        assert torch.equal(use(layer, case), use(other, case))
        back = fastsn.convert_state_dict(converted, source)
        assert_equal_states(dict(sorted(back.items())), dict(sorted(state.items())))
    elif source in ROWS and to in WITH_V:
        u, m = state[ROWS[source][0]][0], matrix(layer.weight)
        sigma = u @ m @ F.normalize(u @ m, dim=0)
        torch.testing.assert_close(use(other, case), layer.weight.detach() / sigma, rtol=1e-5, atol=1e-7)
    elif source in WITH_V:
        there, here = other.state_dict(), fastsn.convert_state_dict(state, "fastsn")
        assert torch.equal(there[ROWS[to][0]][0], here["spectral_norm._u"])
        sigma = here["spectral_norm._u"] @ matrix(here["weight"]) @ here["spectral_norm._v"]
        torch.testing.assert_close(there[ROWS[to][1]], sigma.reshape(1))
    else:
        assert torch.equal(use(layer, case), use(other, case))
        assert torch.equal(state[ROWS[source][1]], other.state_dict()[ROWS[to][1]])


@pytest.mark.parametrize("case", OUTPUT_FIRST, ids=str)
@pytest.mark.parametrize("source", ROWS)
def test_rows_that_have_converged_give_the_weights_of_their_owners(source, case):
    layer, ours = trained(source, case, uses=400), build("fastsn", case).eval()
    ours.load_state_dict(fastsn.convert_state_dict(layer.state_dict(), "fastsn"))
    torch.testing.assert_close(use(ours, case), use(layer, case), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ROWS)
def test_rows_go_on_in_training_as_with_their_owners(source):
    """Evaluation is half an iteration behind until the next training step, which makes the same u."""
    layer, ours = trained(source, CONV, uses=1).train(), build("fastsn", CONV)
    ours.load_state_dict(fastsn.convert_state_dict(layer.state_dict(), "fastsn"))
    for _ in range(3):
        use(layer, CONV), use(ours, CONV)
        torch.testing.assert_close(ours.spectral_norm._u, getattr(layer, ROWS[source][0])[0])


@pytest.mark.parametrize("length", [0.0, 1e-30, 0.97, 20.0])
def test_rows_of_any_length_are_brought_to_1(length):
    """As drawn, or averaged: their owners do so at every use."""
    layer = trained("biggan", CONV)
    expected = fastsn.convert_state_dict(layer.state_dict(), "fastsn")
    layer.u0 = layer.u0 * length  # not in place: the converted state shares it
    state = fastsn.convert_state_dict(layer.state_dict(), "fastsn")
    assert float(state["spectral_norm._u"].norm()) == pytest.approx(1)
    if length:
        torch.testing.assert_close(state["spectral_norm._u"], expected["spectral_norm._u"])
        torch.testing.assert_close(state["spectral_norm._v"], expected["spectral_norm._v"])
    assert torch.equal(fastsn.convert_state_dict(layer.state_dict(), "mimicry")["sn_u"], layer.u0)


def test_further_singular_values_of_biggan_are_left_behind():
    state = trained("biggan", CONV).state_dict()
    expected = fastsn.convert_state_dict(state, "torch")
    state |= {"u1": torch.randn(1, 8), "sv1": torch.ones(1), "u10": torch.randn(1, 8)}
    assert_equal_states(fastsn.convert_state_dict(state, "torch"), expected)
    assert_equal_states(fastsn.convert_state_dict(state, "biggan"), state)


@pytest.mark.parametrize("learnt", [False, True])
def test_two_views_and_a_scale_go_between_layers_and_parametrizations(learnt):
    layer = fastsn.BSSNConv2d(3, 8, 3, scale=nn.Parameter(torch.tensor(1.3)) if learnt else 1.3)
    scale = nn.Parameter(torch.ones(())) if learnt else 1.3
    wrapped = fastsn.spectral_norm(nn.Conv2d(3, 8, 3), variant="bssn", scale=scale)
    x = torch.randn(2, 3, 5, 5)
    layer(x)
    wrapped.load_state_dict(fastsn.convert_state_dict(layer.state_dict(), "torch"), strict=True)
    assert torch.equal(layer.eval()(x), wrapped.eval()(x))
    layer.load_state_dict(fastsn.convert_state_dict(wrapped.state_dict(), "fastsn"), strict=True)
    partial = fastsn.convert_state_dict(without(layer.state_dict(), "_v_in"), "torch")
    n = layer.weight.detach().flatten(2).transpose(1, 2).flatten(0, 1)
    u, v = (partial[f"parametrizations.weight.0.{name}"] for name in ("_u_in", "_v_in"))
    torch.testing.assert_close(v, F.normalize(n.T @ u, dim=0))


def test_a_whole_mixed_model():
    """DDP's prefix, layouts mixed, other keys in their places, values shared, the state untouched."""
    plain = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {
            "a": trained("biggan", CONV),
            "bn": plain,
            "b": trained("torch_hook", LINEAR),
            "c": trained("torch", LINEAR),
            "d": trained("fastsn", CONV),
        }
    )
    state = nn.ModuleDict({"module": model, "_orig_mod": nn.Linear(2, 2)}).state_dict()
    state["module.a._extra_state"] = {"any": "thing"}
    before, versions = copy.deepcopy(state), {k: getattr(v, "_version", 0) for k, v in state.items()}
    converted = fastsn.convert_state_dict(state, "torch_hook")
    a, b, c, d = (f"module.{name}." for name in "abcd")
    assert list(converted) == [
        *(a + n for n in ("weight_orig", "bias", "weight_u", "weight_v")),
        *(f"module.bn.{n}" for n in plain.state_dict()),
        *(b + n for n in ("bias", "weight_orig", "weight_u", "weight_v")),
        *(c + n for n in ("bias", "weight_orig", "weight_u", "weight_v")),
        *(d + n for n in ("weight_orig", "bias", "weight_u", "weight_v")),
        *("_orig_mod.weight", "_orig_mod.bias", "module.a._extra_state"),
    ]
    for new, old in ((a + "weight_orig", a + "weight"), (c + "weight_u", c + "parametrizations.weight.0._u")):
        assert converted[new] is state[old]
    assert converted[a + "weight_u"].data_ptr() == state[a + "u0"].data_ptr()
    assert converted[a + "_extra_state"] is state[a + "_extra_state"]
    assert state.keys() == before.keys()
    assert state._metadata == before._metadata
    assert versions == {k: getattr(v, "_version", 0) for k, v in state.items()}
    for name in "abcd":
        assert converted._metadata[f"module.{name}"] == {"version": 1, "spectral_norm": {"weight.version": 1}}
    assert converted._metadata["module.bn"] == {"version": 2}
    assert not [path for path in converted._metadata if "parametrizations" in path or "spectral_norm" in path]
    again = fastsn.convert_state_dict(converted, "torch_hook")
    assert all(again[key] is converted[key] for key in converted)
    assert again._metadata == converted._metadata
    elsewhere = fastsn.convert_state_dict(converted, "fastsn")
    assert not any("spectral_norm" in facts for facts in elsewhere._metadata.values())


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_state_in_the_layout_asked_for_is_returned_as_it_is(to):
    state = trained(to, CONV).state_dict()
    for _ in range(2):
        converted = fastsn.convert_state_dict(state, to)
        assert list(converted) == list(state)
        assert all(converted[key] is state[key] for key in state)
        assert converted._metadata == state._metadata
        state = converted
    plain = fastsn.convert_state_dict(dict(state), to)
    assert hasattr(plain, "_metadata") == (to == "torch_hook")


@pytest.mark.parametrize("to", WITH_V)
def test_checkpoints_of_the_hook_before_it_had_v(to):
    layer = trained("torch_hook", CONV)
    state = without(layer.state_dict(), "_v")
    state["weight"] = use(layer, CONV)
    del state._metadata[""]["spectral_norm"]
    u, m = state["weight_u"], matrix(layer.weight_orig)
    expected = layer.weight_orig.detach() / (u @ m @ F.normalize(u @ m, dim=0))
    other = build(to, CONV).eval()
    other.load_state_dict(fastsn.convert_state_dict(state, to), strict=True)
    torch.testing.assert_close(use(other, CONV), expected)


def test_metadata_of_a_norm_that_is_no_more_say_nothing():
    state = without(trained("torch_hook", LINEAR).state_dict(), "weight_orig", "weight_u", "weight_v")
    state |= {f"1.{key}": value for key, value in trained("torch", LINEAR).state_dict().items()}
    assert fastsn.convert_state_dict(state, "torch_hook")._metadata == {
        "": {"version": 1},
        "1": {"spectral_norm": {"weight.version": 1}},
    }


def test_metadata_survive_a_file():
    file = io.BytesIO()
    torch.save(fastsn.convert_state_dict(trained("mimicry", LINEAR).state_dict(), "torch_hook"), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)._metadata[""]["spectral_norm"] == {"weight.version": 1}


@pytest.mark.parametrize("kind", ["torch_hook", "fastsn", "mimicry"])
def test_u_and_v_that_were_stripped_are_made_the_same_every_time(kind):
    case = Case("Linear", (20, 10), "stripped")
    layer = fastsn.SSNLinear(*case.args, scale=torch.tensor(1.5)) if kind == "fastsn" else trained(kind, case)
    state = without(layer.state_dict(), "_u", "_v")
    key = next(key for key in state if key.startswith("weight"))
    left, _, right = torch.linalg.svd(state[key], full_matrices=False)
    state[key] = left * 0.8 ** torch.arange(10) @ right  # 15 iterations find the largest, 1 does not
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(fastsn.convert_state_dict(state, "torch"))
    assert_equal_states(*states)
    u, v = (states[0][f"parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    m = matrix(states[0]["parametrizations.weight.original"])
    assert float(u @ m @ v) == pytest.approx(1, abs=5e-3)


def test_an_original_alone_is_left_alone():
    state = without(trained("torch", LINEAR).state_dict(), "_u", "_v")
    state |= {f"1.{key}": value for key, value in trained("torch", LINEAR).state_dict().items()}
    converted = fastsn.convert_state_dict(state, "fastsn")
    assert converted["parametrizations.weight.original"] is state["parametrizations.weight.original"]
    assert "1.spectral_norm._u" in converted


@pytest.mark.parametrize("missing", ["_u", "_v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_any_shape_and_dim(missing, dtype):
    draw = random.Random(0)
    for _ in range(40):
        shape = draw.sample(range(2, 7), draw.randint(2, 4))  # all different: sizes tell the dimension
        dim = draw.randrange(len(shape))
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        if shape[dim] in {torch.Size(shape).numel() // n for n in shape}:
            continue  # u could be v
        state = parametrizations.spectral_norm(module, dim=dim).state_dict()
        converted = fastsn.convert_state_dict(without(state, missing), "fastsn")
        m = matrix(converted["weight"], dim)
        u, v = converted["spectral_norm._u"], converted["spectral_norm._v"]
        made, product = (v, m.mH @ u) if missing == "_v" else (u, m @ v)
        torch.testing.assert_close(made, F.normalize(product, dim=0))
        if dim == 0 and not dtype.is_complex:
            u0 = fastsn.convert_state_dict(state, "biggan")["u0"]
            assert torch.equal(u0[0], state["parametrizations.weight.0._u"])


def test_equal_channels_leave_it_to_u_and_v_which_dimension_it_is():
    for seed in range(10):
        torch.manual_seed(seed)
        for layer in (nn.Linear(16, 16), nn.Conv2d(16, 16, 3)):  # never iterated, so u and v are strangers
            assert fastsn.convert_state_dict(spectral_norm(layer).state_dict(), "biggan")["u0"].shape == (1, 16)
        for wrap in (parametrizations.spectral_norm, spectral_norm):
            layer = wrap(nn.ConvTranspose2d(4, 4, 3))
            layer(torch.randn(1, 4, 3, 3))
            with pytest.raises(ValueError, match="must count output channels in dimension 0 to become 'biggan', got 1"):
                fastsn.convert_state_dict(layer.state_dict(), "biggan")
    state = without(trained("torch", Case("ConvTranspose2d", (4, 4, 3), "square")).state_dict(), "_v")
    converted = fastsn.convert_state_dict(state, "fastsn")
    expected = F.normalize(matrix(converted["weight"]).T @ converted["spectral_norm._u"], dim=0)
    torch.testing.assert_close(converted["spectral_norm._v"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    state = {key: value.to(dtype) for key, value in trained("torch", CONV).state_dict().items()}
    assert {v.dtype for v in fastsn.convert_state_dict(without(state, "_v"), "torch_hook").values()} == {dtype}
    assert fastsn.convert_state_dict(state, "biggan")["sv0"].dtype == dtype
    converted = fastsn.convert_state_dict(without(state, "_v"), "fastsn")
    assert [converted[f"spectral_norm.{name}"].dtype for name in ("_u", "_v")] == [torch.float32] * 2
    assert converted["weight"].dtype == dtype
    v = F.normalize(matrix(converted["weight"]).float().T @ converted["spectral_norm._u"], dim=0)
    torch.testing.assert_close(converted["spectral_norm._v"], v)


def test_zero_weights_get_vectors_of_length_1():
    state = without(trained("torch", LINEAR).state_dict(), "_v")
    state["parametrizations.weight.original"] = torch.zeros(5, 7)
    assert float(fastsn.convert_state_dict(state, "fastsn")["spectral_norm._v"].norm()) == pytest.approx(1)


def test_nothing_that_is_made_has_a_graph():
    state = trained("biggan", CONV).state_dict(keep_vars=True)
    converted = fastsn.convert_state_dict(state, "fastsn")
    assert converted["weight"] is state["weight"]
    assert not converted["spectral_norm._v"].requires_grad


@pytest.mark.skipif(ON != "cuda", reason="autocast on a CPU leaves matrix times vector alone")
def test_autocast_does_not_reach_what_is_made():
    state = trained("biggan", CONV).state_dict()
    expected = fastsn.convert_state_dict(state, "fastsn")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_equal_states(fastsn.convert_state_dict(state, "fastsn"), expected)


def test_keys_that_only_look_like_a_norm_pass_through():
    others = nn.ModuleDict(
        {
            "pruned": nn.Linear(3, 4),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "normed": parametrizations.weight_norm(nn.Linear(3, 4)),
        }
    )
    prune.l1_unstructured(others["pruned"], "weight", 2)
    state = others.state_dict()
    state |= {"old.weight_g": torch.ones(4, 1), "old.weight_v": torch.randn(4, 3)}
    state |= {"attention.pos_bias_u": torch.randn(2, 3), "attention.pos_bias_v": torch.randn(2, 3)}
    state |= {"solver.u0": torch.randn(5), "solver.weight": torch.randn(5, 2), "factors.weight_u": torch.randn(3, 2)}
    mixed = fastsn.convert_state_dict(state | trained("torch", LINEAR).state_dict(), "fastsn")
    assert all(mixed[key] is state[key] for key in state)
    with pytest.raises(ValueError, match="state must have a spectral norm in it"):
        fastsn.convert_state_dict(state, "fastsn")
