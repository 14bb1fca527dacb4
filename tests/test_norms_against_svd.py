"""sigma is the norm that it claims to be, and the variants are the combinations that they claim to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastsn
from fastsn import reference, views
from shapes import TABLE, Case, drawn, laid_out, truth

ITERATIONS = 300


def predicted(m: Tensor, v: Tensor, iterations: int) -> float:
    """sigma = |M^T u_n| after n exact iterations from v, by SVD: u_n is c_i s_i^(2n - 1) in singular vectors.
    Where the iteration has converged this is the largest singular value."""
    _, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    u = (vh @ v.double()) * (s / s[0]) ** (2 * iterations - 1)
    return float((s * u).norm() / u.norm())


@pytest.mark.parametrize("chunk", range(8))
def test_sigma_of_both_views_agrees_with_svd_on_random_weights(chunk):
    converged = views_seen = 0
    for case, dtype, layout in drawn(40, seed=chunk):
        layer = case.build().to(dtype)
        dim = views.output_dim(layer)
        weight = laid_out(torch.randn(layer.weight.shape, dtype=torch.float64).to(dtype), layout)
        norm = fastsn.SpectralNorm(weight, dim=dim, variant="bsn")
        oik = views.as_oik(weight, dim)
        start = {view: v.clone() for view, (_, v) in norm.vectors().items()}
        norm.warm_up(weight, ITERATIONS)
        sigmas, svd = norm.measure(weight), truth(weight, dim)
        # u and v are float32 or wider whatever the weight's dtype: rounding of sums over at most 300 entries.
        rounding = 1e-12 if dtype == torch.float64 else 2e-6
        for view, sigma in sigmas.items():
            expected = predicted(reference.matrix(oik, view), start[view], ITERATIONS)
            assert abs(float(sigma) - expected) <= rounding * svd[view], (case, dtype, layout, view)
            assert float(sigma) == pytest.approx(svd[view], rel=0.01), (case, dtype, layout, view)
            views_seen += 1
            converged += abs(float(sigma) - svd[view]) <= 1e-5 * svd[view]
        assert set(sigmas) == ({"out", "in"} if oik.shape[2] > 1 else {"out"})
    assert converged >= 0.9 * views_seen  # equal largest singular values converge slowly, and are rare


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_normalized_weight_has_the_norm_that_the_equation_gives(case):
    for prefix, scale in (("SN", 1.0), ("SSN", 1.7), ("BSN", 1.0), ("BSSN", 1.7)):
        layer = case.build(prefix, dtype=torch.float64, scale=scale)
        fastsn.warm_up(layer, 2000)
        dim = views.output_dim(layer)
        svd = truth(layer.weight, dim)
        sigma = svd["out"] if prefix in ("SN", "SSN") else (svd["out"] + svd["in"]) / 2
        torch.testing.assert_close(layer.eval().normalized()[0], scale * layer.weight / sigma, rtol=1e-6, atol=0)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def test_a_known_spectrum_is_found_exactly():
    q, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(12, 9, dtype=torch.float64))
    layer = nn.Linear(12, 9, dtype=torch.float64)
    layer.weight.data = q @ torch.diag(torch.tensor([3.0, 1, 0.9, 0.5, 0.1, 0.1, 0.1, 0, 0])).double() @ p.T
    fastsn.spectral_norm(layer)
    fastsn.warm_up(layer, 20)
    assert fastsn.sigmas(layer)[""].sigma == pytest.approx(3.0, rel=1e-14)
    assert top(layer.eval().weight) == pytest.approx(1.0, rel=1e-14)


def twins(case: Case, first: str, second: str, second_scale: float = 1.0) -> tuple[nn.Module, nn.Module]:
    """Two variants of a layer with the same draws."""
    torch.manual_seed(1)
    a = case.build(first)
    torch.manual_seed(1)
    return a, case.build(second, scale=second_scale)


@pytest.mark.parametrize(("first", "second", "c"), [("SN", "SSN", 1.0), ("BSN", "BSSN", 2.5)])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_free_scale_is_a_constant_factor(case, first, second, c):
    plain, scaled = twins(case, first, second, c)
    for _ in range(3):
        assert torch.equal(c * plain.normalized()[0], scaled.normalized()[0])


@pytest.mark.parametrize("case", [c for c in TABLE if c.layer in ("Linear", "Embedding") or c.args[-1] == 1], ids=str)
def test_bsn_of_a_matrix_is_sn_and_keeps_no_second_state(case):
    sn, bsn = twins(case, "SN", "BSN")
    for _ in range(3):
        assert torch.equal(sn.normalized()[0], bsn.normalized()[0])
    assert sn.state_dict().keys() == bsn.state_dict().keys()


def operator(weight: Tensor, size: int) -> Tensor:
    """The matrix of the convolution on images of this size, zeros around them: a column for each pixel of the input."""
    inputs = torch.eye(weight.shape[1] * size * size, dtype=weight.dtype).view(-1, weight.shape[1], size, size)
    return nn.functional.conv2d(inputs, weight, padding=weight.shape[-1] - 1).flatten(1).t()


@pytest.mark.parametrize("variant", ["sn", "bsn"])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_the_norms_of_the_reshapes_bound_that_of_the_convolution(variant, kernel):
    """max(σ_out, σ_in) <= the operator's norm <= sqrt(K) · min(σ_out, σ_in) for K kernel positions; so the operator's
    norm is at least 1 after normalization, and not 1 unless K is."""
    layer = fastsn.spectral_norm(nn.Conv2d(2, 3, kernel, dtype=torch.float64), n_power_iterations=500, variant=variant)
    weight = layer.weight.detach()
    out, into = top(weight.flatten(1)), top(weight.transpose(0, 1).flatten(1))
    assert (out if variant == "sn" else (out + into) / 2) == pytest.approx(1, rel=1e-6)
    found = top(operator(weight, 5))
    assert max(out, into) <= found * (1 + 1e-9)
    assert found <= kernel * min(out, into) * (1 + 1e-9)
    assert (found > 1.01) == (kernel > 1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_complex_weights(dtype, variant):
    layer = fastsn.spectral_norm(nn.Conv1d(4, 5, 3, dtype=dtype), n_power_iterations=300, variant=variant)
    w = layer.parametrizations.weight.original.detach()
    out, into = top(w.flatten(1)), top(w.transpose(0, 1).flatten(1))
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-9
    expected = w / (out if variant == "sn" else (out + into) / 2)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=tolerance, atol=tolerance)


def test_sigma_follows_a_changing_weight_in_training_and_stays_in_evaluation():
    layer = fastsn.SNLinear(20, 30)
    layer.weight.data = torch.randn(30, 20)
    for _ in range(200):
        layer(torch.randn(1, 20))
    assert top(layer.eval().normalized()[0]) == pytest.approx(1, abs=1e-3)
    layer.weight.data = torch.randn(30, 20)
    stale = top(layer.normalized()[0])
    assert abs(stale - 1) > 0.1
    before = copy.deepcopy(layer.state_dict())
    for _ in range(5):
        layer(torch.randn(1, 20))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert top(layer.normalized()[0]) == stale


@pytest.mark.parametrize("n", [1, 2, 5])
def test_n_power_iterations_are_n_single_ones(n):
    torch.manual_seed(3)
    many = fastsn.BSNConv2d(4, 6, 3, n_power_iterations=n)
    torch.manual_seed(3)
    single = fastsn.BSNConv2d(4, 6, 3)
    together, _ = many.normalized()
    for _ in range(n):
        weight, _ = single.normalized()
    assert torch.equal(together, weight)
    assert all(torch.equal(p, q) for p, q in zip(many.state_dict().values(), single.state_dict().values(), strict=True))
