"""What users of spectral norms suffer from, row by row: bad weights, half precision, vectors that are not there yet."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

import fastsn
from dispatched import SYNCS, Counted

TORCH = parametrizations.spectral_norm


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def top(weight: Tensor) -> float:
    """The largest singular value."""
    w = weight.detach()
    return float(torch.linalg.matrix_norm(w.to(torch.complex128 if w.is_complex() else torch.float64).flatten(1), 2))


# torch spoils u and v for good, and NaN in the weight stays NaN in both until it is gone.
BAD = {"zero": 0.0, "1e-20": 1e-20, "denormal": 1e-41, "NaN": float("nan"), "infinite": float("inf")}


@pytest.mark.parametrize("variant", ["sn", "bsn"])
@pytest.mark.parametrize("bad", BAD)
def test_row_13_one_bad_weight_does_no_lasting_harm(bad, variant):
    good = torch.randn(5, 4, 3)
    ours = fastsn.spectral_norm(nn.Conv1d(4, 5, 3), variant=variant, n_power_iterations=3)
    theirs = TORCH(nn.Conv1d(4, 5, 3), n_power_iterations=3)
    for layer in (ours, theirs):
        original(layer).data = BAD[bad] * good
        spoilt = layer.weight
        if layer is ours and bad in ("zero", "1e-20", "denormal"):
            assert spoilt.isfinite().all()
        original(layer).data = good.clone()
        for _ in range(100):
            restored = layer.weight.detach()
        if layer is theirs:
            assert not restored.isfinite().all()
        else:
            divisor = top(good) if variant == "sn" else (top(good) + top(good.transpose(0, 1))) / 2
            torch.testing.assert_close(restored, (good / divisor), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_row_13_a_float16_weight_of_zeros_stays_zero_and_learns(variant):
    """torch divides by eps, and 1e-12 is nothing in float16."""
    layers = [wrap(nn.Conv1d(4, 5, 3).half()) for wrap in (TORCH, lambda m: fastsn.spectral_norm(m, variant=variant))]
    theirs, ours = layers
    for layer in layers:
        original(layer).data.zero_()
    assert theirs.weight.isnan().all()
    assert not ours.weight.any()
    ours.weight.sum().backward()
    assert torch.equal(original(ours).grad, torch.ones_like(original(ours)))
    assert all(float(vector.norm()) == pytest.approx(1, abs=1e-5) for vector in ours.buffers())


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_row_13_nobody_asks_whether_a_weight_is_bad(bad, impl):
    """No number comes to the host, in the kernels' path and in plain torch's."""
    layer = fastsn.spectral_norm(nn.Linear(6, 5), variant="bssn", scale=1.2, impl=impl)
    original(layer).data *= BAD[bad]
    with Counted("aten") as counted:
        layer.weight.sum().backward()
    assert "sum" in counted.names
    assert not SYNCS.intersection(counted.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_row_14_autocast_reaches_the_result_and_not_the_iteration(impl, dtype):
    inside = nn.Sequential(
        fastsn.BSSNConv2d(3, 8, 3, scale=1.4, impl=impl), fastsn.spectral_norm(nn.Conv2d(8, 4, 3), impl=impl)
    )
    outside, x = copy.deepcopy(inside), torch.randn(2, 3, 7, 7)
    for _ in range(3):
        outside(x)
        with torch.autocast("cpu", dtype=dtype):
            y = inside(x)
    assert y.dtype == dtype
    assert fastsn.sigmas(inside) == fastsn.sigmas(outside)
    assert all(torch.equal(a, b) for a, b in zip(inside.buffers(), outside.buffers(), strict=True))
    assert {b.dtype for b in inside.buffers()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        halves = [inside[0].eval().normalized()[0], inside[1].eval().weight]
    for half, full in zip(halves, [outside[0].eval().normalized()[0], outside[1].eval().weight], strict=True):
        assert torch.equal(half, full.to(dtype))  # rounded once
    fastsn.warm_up(inside, 300)
    assert fastsn.sigmas(inside)["1"].sigma == pytest.approx(top(original(inside[1])), rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (1, 50), (24, 8, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_15_sigma_of_a_half_precision_module_is_that_of_its_weights(shape, dtype):
    """Against SVD in float64 of the weights as they are stored; torch's u and v are in half precision themselves."""
    errors = {}
    for name, wrap in (("torch", TORCH), ("fastsn", fastsn.spectral_norm)):
        torch.manual_seed(0)
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(shape))
        wrap(layer, n_power_iterations=500)
        layer.to(dtype)
        assert layer.weight.dtype == dtype
        u, v = layer.parametrizations.weight[0]._u.double(), layer.parametrizations.weight[0]._v.double()
        w = original(layer).detach().double().flatten(1)
        errors[name] = abs(float(u @ w @ v) / top(w) - 1)
    assert errors["fastsn"] < 1e-5
    assert errors["torch"] > 2e-5


def test_row_15_a_half_precision_module_keeps_float32_vectors_through_save_and_load():
    source, target = (fastsn.BSNConv2d(4, 6, 3).bfloat16() for _ in range(2))
    state = source.state_dict()
    assert {state[f"spectral_norm.{name}"].dtype for name in ("_u", "_v", "_u_in", "_v_in")} == {torch.float32}
    target.load_state_dict({key: value.bfloat16() for key, value in state.items()}, assign=True)
    assert {b.dtype for b in target.spectral_norm.buffers()} == {torch.float32}


def test_row_16_the_first_evaluation_is_near_and_warm_up_makes_it_exact():
    """torch's hook has not iterated yet when a new model is evaluated."""
    tops = {}
    for name, wrap in (("hook", hook), ("torch", TORCH), ("fastsn", fastsn.spectral_norm)):
        torch.manual_seed(0)
        layer = nn.Linear(288, 64)
        nn.init.normal_(layer.weight)
        layer = wrap(layer).eval()
        layer(torch.randn(1, 288))
        tops[name], drawn = top(layer.weight), torch.rand(1)
        if name != "hook":
            assert tops.setdefault("next draw", drawn) == drawn  # the same random numbers are used up
    assert tops["hook"] > 2
    assert tops["fastsn"] == pytest.approx(tops["torch"], rel=1e-6)
    assert 1 <= tops["fastsn"] < 1.2
    fastsn.warm_up(layer, 1000)
    assert top(layer.weight) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("build", [lambda: fastsn.SNLinear(60, 40), lambda: fastsn.spectral_norm(nn.Linear(60, 40))])
def test_row_17_foreign_weights_bring_a_warning_and_vectors_of_their_own(build):
    """torch evaluates with the vectors of the weights that were there before."""
    weight = torch.randn(40, 60)
    theirs = TORCH(nn.Linear(60, 40)).eval()
    theirs.load_state_dict({"parametrizations.weight.original": weight}, strict=False)
    assert not 0.8 < top(theirs.weight) < 1.25
    ours = build().eval()
    key = "weight" if isinstance(ours, fastsn.SNLinear) else "parametrizations.weight.original"
    with pytest.warns(UserWarning, match="no u and v"):
        ours.load_state_dict({key: weight}, strict=False)
    assert 1 <= top(ours.normalized()[0] if key == "weight" else ours.weight) < 1.1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_row_18_complex_weights(dtype, variant):
    """Against SVD; torch's hook has no complex conjugate."""
    layer = fastsn.spectral_norm(nn.Conv1d(4, 5, 3, dtype=dtype), n_power_iterations=300, variant=variant)
    w = original(layer).detach()
    divisor = top(w) if variant == "sn" else (top(w) + top(w.transpose(0, 1))) / 2
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-9
    torch.testing.assert_close(layer.weight.detach(), w / divisor, rtol=tolerance, atol=tolerance)
    old = hook(nn.Conv1d(4, 5, 3, dtype=dtype), n_power_iterations=300)
    old(torch.randn(1, 4, 5, dtype=dtype))
    assert abs(top(old.weight) - 1) > 0.01


@pytest.mark.parametrize(("dtype", "size"), [(torch.complex64, 1e-41), (torch.complex128, 1e-315)])
def test_row_18_a_complex_weight_of_subnormal_entries_does_not_spoil_the_vectors(dtype, size):
    weight = (torch.randn(5, 4, dtype=torch.complex128) * size).to(dtype)
    norm = fastsn.SpectralNorm(weight).train()
    norm(weight)
    for vector in norm.vectors()["out"]:
        torch.testing.assert_close(torch.linalg.vector_norm(vector), torch.ones((), dtype=vector.real.dtype))
