"""No weight, however bad, spoils u and v; half precision never touches them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import fastsn
from conftest import ON

VARIANTS = [("sn", 1.0), ("bssn", 1.5)]


def vectors(norm: fastsn.SpectralNorm) -> list[Tensor]:
    return [vector for pair in norm.vectors().values() for vector in pair]


def assert_sound(norm: fastsn.SpectralNorm) -> None:
    for vector in vectors(norm):
        assert float(torch.linalg.vector_norm(vector.double())) == pytest.approx(1, abs=1e-6)


def assert_recovers(norm: fastsn.SpectralNorm, weight: Tensor, scale: float) -> None:
    """One use with a sound weight is one power iteration from a sound start: finite, and exact after some more."""
    assert norm(weight).isfinite().all()
    for _ in range(500):
        norm(weight)
    w = weight.double().flatten(2)
    out = torch.linalg.matrix_norm(w.reshape(w.shape[0], -1), 2)
    both = (out + torch.linalg.matrix_norm(w.transpose(0, 1).reshape(w.shape[1], -1), 2)) / 2
    expected = scale * weight.double() / (out if norm.variant == "sn" else both)
    rounding = torch.finfo(weight.dtype).eps
    torch.testing.assert_close(norm(weight).double(), expected, rtol=max(1e-4, rounding), atol=0)


@pytest.mark.parametrize(("variant", "scale"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [0.0, 1e-20, 1e-40, float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("at", ["construction", "training"])
def test_one_bad_weight_leaves_sound_vectors_and_the_layer_recovers(variant, scale, dtype, bad, at):
    good = torch.randn(6, 4, 3, 3).to(dtype)
    spoilt = (torch.randn(6, 4, 3, 3) * bad).to(dtype)
    norm = fastsn.SpectralNorm(spoilt if at == "construction" else good, variant=variant, scale=scale)
    for _ in range(3):
        norm(spoilt)
    assert_sound(norm)
    assert_recovers(norm, good, scale)


@pytest.mark.parametrize(("dtype", "size"), [(torch.complex64, 1e-41), (torch.complex128, 1e-315)])
def test_a_complex_weight_of_subnormal_entries_leaves_sound_vectors(dtype, size):
    weight = (torch.randn(5, 4, dtype=torch.complex128) * size).to(dtype)
    norm = fastsn.SpectralNorm(weight)
    norm(weight)
    for vector in vectors(norm):
        assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("where", ["one entry", "one row"])
def test_a_partly_bad_weight_is_as_harmless(where):
    good = torch.randn(6, 4, 3, 3)
    spoilt = good.clone()
    spoilt[(0, 0, 0, 0) if where == "one entry" else 2] = torch.nan
    norm = fastsn.SpectralNorm(good, variant="bsn")
    assert norm(spoilt).isnan().any()  # a broken weight is not hidden
    assert_sound(norm)
    assert_recovers(norm, good, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 60000.0])
def test_one_dimensional_weights_in_half_precision(dtype, value):
    layer = nn.Linear(3, 40).to(dtype)
    layer.bias.data.fill_(value)
    fastsn.spectral_norm(layer, "bias")
    torch.testing.assert_close(
        layer.bias.float(), torch.full((40,), 0.0 if value == 0 else 40**-0.5), rtol=4e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", ["half the module", "made in half", "layer"])
def test_vectors_stay_float32_in_half_precision(dtype, cast):
    if cast == "layer":
        module = fastsn.BSSNConv2d(4, 6, 3, scale=1.5).to(dtype)
        norm, weight = module.spectral_norm, module.weight
    else:
        module = nn.Conv2d(4, 6, 3).to(dtype) if cast == "made in half" else nn.Conv2d(4, 6, 3)
        fastsn.spectral_norm(module, variant="bssn", scale=1.5).to(dtype)
        norm, weight = module.parametrizations.weight[0], module.parametrizations.weight.original
    assert {v.dtype for v in vectors(norm)} == {torch.float32}
    assert_sound(norm)
    norm.warm_up(weight, 500)
    output = norm(weight)
    assert output.dtype == dtype
    exact = norm.eval()(weight.float())
    assert torch.equal(output, exact.to(dtype))  # float32 sums, one rounding
    module(torch.randn(1, 4, 5, 5, dtype=dtype)).sum().backward()


def test_float64_weights_keep_float64_vectors_and_casting_there_and_back_loses_little():
    layer = fastsn.BSNConv2d(4, 6, 3, dtype=torch.float64)
    assert {v.dtype for v in vectors(layer.spectral_norm)} == {torch.float64}
    before = [v.clone() for v in vectors(layer.spectral_norm)]
    for old, new in zip(before, vectors(layer.half().double().spectral_norm), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-6, atol=1e-7)


def test_a_fixed_tensor_scale_is_not_rounded_to_half():
    layer = fastsn.BSSNConv2d(4, 6, 3, scale=torch.tensor(1.4)).half()
    assert float(layer.spectral_norm.scale) == pytest.approx(1.4, rel=1e-7)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_iteration_is_untouched_and_the_weight_comes_out_in_half(dtype, impl):
    results = []
    for enabled in (False, True):
        torch.manual_seed(5)
        layer = fastsn.BSSNConv2d(4, 6, 3, scale=1.5, impl=impl)
        dropin = fastsn.spectral_norm(nn.Linear(4, 6), impl=impl)
        embedding = fastsn.SNEmbedding(5, 4, impl=impl)
        with torch.autocast(torch.get_default_device().type, dtype=dtype, enabled=enabled):
            made = [layer.normalized()[0], dropin.weight, embedding.normalized()[0]]
        assert [w.dtype for w in made] == ([dtype, dtype, torch.float32] if enabled else [torch.float32] * 3)
        results.append([*vectors(layer.spectral_norm), *dropin.buffers(), *(w.to(dtype) for w in made)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registering_under_autocast_works():
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        layer = fastsn.spectral_norm(nn.Linear(4, 6))
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("fused", [True, False])
def test_200_uses_hold_no_memory(fused):
    layer = fastsn.BSSNConv2d(4, 6, 3)
    if fused:
        fastsn.fuse(layer)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    x = torch.randn(1, 4, 5, 5)

    def train(steps: int) -> None:
        for _ in range(steps):
            layer(x).sum().backward()

    train(20)  # the vectors of the last 16 are kept
    before = tensors()
    train(200)
    # On a GPU a plan keeps the tables of the last places in which its tensors were.
    assert tensors() <= before + (64 if ON == "cuda" else 0)
