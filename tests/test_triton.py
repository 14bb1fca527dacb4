"""The Triton kernels: on a GPU, or in their interpreter, where one program runs after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsn
from conftest import ON
from fastsn import ops, reference
from fastsn.ops import checks
from op_calls import Call, alternating, call, table
from shapes import laid_out

pytest.importorskip("triton")
import interpreted
from fastsn.triton.plan import described

pytestmark = [pytest.mark.usefixtures("triton_kernels")]
on_cpu = pytest.mark.skipif(ON == "cuda", reason="for the interpreter")

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")
# The interpreter takes its time: there, halves of both kinds share a table.
TABLES = [("float32", layout) for layout in LAYOUTS] + [("halves", "contiguous")]
if ON == "cuda":
    TABLES = [(dtype, layout) for dtype in ("float32", "float16", "bfloat16") for layout in LAYOUTS]
DEVICE = torch.device("cuda", 0) if ON == "cuda" else torch.device("cpu")


@contextmanager
def launched_with(**changes: object):
    from fastsn.triton import settings

    before = settings.current(DEVICE)
    settings.use(replace(before, **changes), DEVICE)
    try:
        yield
    finally:
        settings.use(before, DEVICE)


def off(ours: Tensor, exact: Tensor) -> float:
    """The error, relative to the norm."""
    return float((ours.detach().double() - exact).norm() / exact.norm())


def assert_same(ours: Iterable[Tensor], theirs: Iterable[Tensor], exactly: bool) -> None:
    """The same bits; within rounding where a GPU lays threads out in another way, which then add in another order."""
    for x, y in zip(ours, theirs, strict=True):
        if exactly or ON != "cuda":
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def views_of(weights: list[Tensor]) -> list[int]:
    return [3 if w.ndim > 2 and w[0, 0].numel() > 1 else 1 for w in weights]


def read(w: Tensor, dim: int) -> tuple[object, ...]:
    """How kernels read a weight, in an iteration and for W̄; of a copy, only that."""
    found: list[object] = []
    for dense in (False, True):
        place, weight = described(w, dim, dense)
        tiles = interpreted.SMALL.tiles(weight.arrangement, interpreted.SMALL.tile)
        ways = weight.arrangement.kb, weight.strided(), weight.vector_width(tiles), weight.flat_width()
        found.append(ways if place is w else (w.ndim, dim))
    return tuple(found)


def chosen(dtype: str, layout: str) -> tuple[list[Tensor], list[int]]:
    """The shape table. In the interpreter: of another layout than the usual one the weights that are read in another
    way for it, and of those that are copied first, which then are as usual, one of each number of dimensions."""
    if dtype == "halves":
        weights, dims = table()
        return [w.to(HALVES[i % 2]) for i, w in enumerate(weights)], dims
    weights, dims = table(getattr(torch, dtype), layout)
    if ON == "cuda" or layout == "contiguous":
        return weights, dims
    usual, _ = table(getattr(torch, dtype))
    kept: dict[object, int] = {}
    for i, (w, other, dim) in enumerate(zip(weights, usual, dims, strict=True)):
        ways = read(w, dim)
        if ways != read(other, dim):
            kept.setdefault(ways if layout == "sliced" else i, i)
    return [weights[i] for i in kept.values()], [dims[i] for i in kept.values()]


def some() -> tuple[list[Tensor], list[int]]:
    """Of the table, for what has nothing to do with how a kernel reads a weight: one block of rows and several, one
    view and two, both orders of rows and columns."""
    weights, dims = table()
    kept = range(len(weights)) if ON == "cuda" else (1, 5, 10, 14, 17)
    return [weights[i] for i in kept], [dims[i] for i in kept]


@pytest.mark.parametrize(("dtype", "layout"), TABLES)
def test_vectors_sigmas_weights_and_gradients_of_the_shape_table_are_right(dtype, layout):
    weights, dims = chosen(dtype, layout)
    assert weights
    for first in (0, 1):
        c = call(weights, dims, views_of(weights), v_first=alternating(len(weights), first))
        sigma, vectors = c.iterate()
        exact_sigma, exact = ops.fallback.power_iteration(*c.exact().iteration(), 1)
        assert ((sigma.double() - exact_sigma) / exact_sigma).abs().max() <= 1e-6
        lengths = [x.numel() for pair in zip(c.u, c.v, strict=True) for x in pair]
        for ours, true in zip(vectors.split(lengths), exact.split(lengths), strict=True):
            assert off(ours, true) <= 1e-6
    for scale in ("float", "tensor"):
        assert_rescaled_and_derived(call(weights, dims, c.view_masks, scale), sigma, vectors)


def assert_rescaled_and_derived(c: Call, sigma: Tensor, vectors: Tensor) -> None:
    e = c.exact()
    # Interpreters of Triton up to 3.6 cut bfloat16 off where GPUs round.
    allowed = [2e-6 if w.dtype == torch.float32 else torch.finfo(w.dtype).eps for w in c.weights]
    with torch.no_grad():
        outputs, mean = c.rescale(sigma, vectors)
        exact, _ = ops.fallback.rescale(e.weights, e.scales, sigma.double(), vectors.double(), *e.numbers())
        for w, ours, true, rounding in zip(c.weights, outputs, exact, allowed, strict=True):
            assert off(ours, true) <= rounding
            assert ours.stride() == torch.empty_like(w).stride()
        gradients, grad_sigma = [torch.randn_like(x) for x in outputs], torch.randn_like(mean)
        bases = c.weights if c.scales else outputs
        wide = ([x.double() for x in gradients], grad_sigma.double(), [x.double() for x in bases], e.scales)
        ours = ops.rescale_backward(gradients, grad_sigma, bases, c.scales, mean, vectors, *c.numbers())
        true = ops.fallback.rescale_backward(*wide, mean.double(), vectors.double(), *e.numbers())
    for mine, theirs, rounding in zip(ours[0], true[0], allowed, strict=True):
        assert off(mine, theirs) <= rounding
    for mine, theirs in zip(ours[1], true[1], strict=True):
        assert off(mine, theirs) <= max(allowed)


def test_ways_to_launch_an_iteration_give_the_same():
    weights, dims = some()
    c = call(weights, dims, views_of(weights), v_first=alternating(len(weights)))
    with launched_with(last_tiles=1 << 30):
        expected = c.iterate(2)
    with launched_with(last_tiles=0):
        assert_same(c.iterate(2), expected, exactly=True)


def test_without_an_iteration_sigma_is_measured():
    weights, dims = some()
    c = call(weights, dims, views_of(weights), v_first=alternating(len(weights)))
    (sigma, vectors), (exact, same) = c.iterate(0), ops.fallback.power_iteration(*c.exact().iteration(), 0)
    assert off(sigma, exact) <= 1e-6
    assert torch.equal(vectors.double(), same)


def test_a_weight_alone_and_among_others_has_the_same_bits():
    weights, dims = some()
    c = call(weights, dims, 3, v_first=alternating(len(weights), 1))
    sigma, vectors = c.iterate()
    outputs, mean = c.rescale(sigma, vectors)
    at = 0
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        size = checks.vector_size(w, dim, 3)
        u, v = c.u[2 * i : 2 * i + 2], c.v[2 * i : 2 * i + 2]
        alone = Call([w], [dim], [3], c.v_first[i : i + 1], u, v, [], [-1], c.scale_factor[:1], c.dtypes[:1])
        own_sigma, own_vectors = alone.iterate()
        assert torch.equal(own_vectors, vectors[at : at + size])
        own_outputs, own_mean = alone.rescale(own_sigma, own_vectors)
        assert torch.equal(own_outputs[0], outputs[i])
        assert own_mean == mean[i]
        at += size


def test_dtypes_mixed_in_one_call_are_those_of_calls_apart():
    weights = [torch.randn(6, 4, 3, 3).to(dtype) for dtype in DTYPES]
    c = call(weights, [0, 1, 0], 3, v_first=[1, 1, 0])
    outputs, _ = c.rescale(*c.iterate())
    for i, (w, ours) in enumerate(zip(weights, outputs, strict=True)):
        pairs = slice(2 * i, 2 * i + 2)
        own = slice(i, i + 1)
        alone = Call(
            [w], c.dims[own], [3], c.v_first[own], c.u[pairs], c.v[pairs], [], [-1], c.scale_factor[own], c.dtypes[own]
        )
        assert torch.equal(alone.rescale(*alone.iterate())[0][0], ours)


def test_weights_that_are_not_aligned_give_the_same():
    aligned = [torch.randn(12, 8, 4, 4), torch.randn(16, 32)]
    shifted = [laid_out(w, "offset") for w in aligned]
    assert all(w.data_ptr() % 16 for w in shifted)
    c = call(aligned, [0, 0], [3, 1])
    other = replace(c, weights=shifted)
    for x, y in zip(c.iterate(), other.iterate(), strict=True):  # wide loads are added up on their own
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    ours, theirs = (x.rescale(*x.iterate())[0] for x in (c, other))
    assert_same(ours, theirs, exactly=False)


def test_rows_of_several_tiles_whose_positions_are_no_power_of_two():
    weights = [torch.randn(1, 200, 3, 3), torch.randn(5, 50, 7), torch.randn(3, 100, 3, 3).half()]
    c = call(weights * 2, [0] * 6, 3, v_first=[0] * 3 + [1] * 3)
    sigma, vectors = c.iterate()
    exact_sigma, exact = ops.fallback.power_iteration(*c.exact().iteration(), 1)
    assert off(sigma, exact_sigma) <= 1e-6
    assert off(vectors, exact) <= 1e-6


def test_kernels_of_many_positions():
    weights = [torch.randn(6, 4, 41), torch.randn(4, 3, 5, 5, 5), torch.randn(3, 2, 32, 16)]
    c = call(weights * 2, [0] * 6, 3, v_first=[0] * 3 + [1] * 3)
    sigma, vectors = c.iterate()
    exact_sigma, exact = ops.fallback.power_iteration(*c.exact().iteration(), 1)
    assert off(sigma, exact_sigma) <= 1e-6
    assert off(vectors, exact) <= 1e-6


@pytest.mark.parametrize("dim", [0, 1])
def test_bad_vectors_are_not_stored_and_weights_recover(dim):
    for bad in (torch.zeros(6, 5, 3), torch.full((6, 5, 3), torch.nan), torch.full((6, 5, 3), torch.inf)):
        c = call([bad, bad, torch.randn(6, 5, 3)], [dim, dim, 0], 3, v_first=[0, 1, 0])
        before = [x.clone() for x in (*c.u[:4], *c.v[:4])]
        sigma, vectors = c.iterate(in_place=True)
        assert all(map(torch.equal, before, (*c.u[:4], *c.v[:4])))
        assert bool((sigma[:4] == 0).all()) if not bad.any() else bool(sigma[:4].isnan().all())
        assert bool(sigma[4:].isfinite().all())
        outputs, _ = c.rescale(sigma, vectors)
        for output in outputs[:2]:
            assert bool(output.isnan().all() if bad.any() else (output == 0).all())
        c.weights[:2] = torch.randn(2, 6, 5, 3)
        sigma, _ = c.iterate(in_place=True)
        assert bool((sigma > 0).all())


def test_where_every_product_is_zero_the_old_vector_moves_the_other():
    """v lies in what the weight maps to 0: u stays, and v still follows M^T u, as in the reference; with v first the
    other way round."""
    weight = torch.zeros(6, 4, 3)
    weight[:4, :2] = torch.randn(4, 2, 3)
    transposed = weight.transpose(0, 1).contiguous()
    c = call([weight, transposed] * 2, [0, 1] * 2, 3, v_first=[0, 0, 1, 1])
    for x in c.v[:4] + c.u[4:]:
        x.zero_()
        x[-1] = 1
    sigma, vectors = c.iterate()
    exact_sigma, exact = ops.fallback.power_iteration(*c.exact().iteration(), 1)
    assert off(vectors, exact) <= 1e-6
    assert off(sigma, exact_sigma) <= 1e-6


@pytest.mark.parametrize("rows", [6, 8])
def test_vectors_that_are_not_finite_heal(rows):
    """v from a bad checkpoint: u stays, v follows M^T u, as in the reference; with v first the other way round."""
    c = call([torch.randn(rows, 4, 3) for _ in range(4)], [0, 1] * 2, 3, v_first=[0, 0, 1, 1])
    for x in c.v[:4] + c.u[4:]:
        x[0] = torch.nan
    before = [x.clone() for x in c.u[:4] + c.v[4:]]
    sigma, vectors = c.iterate(in_place=True)
    assert all(map(torch.equal, before, c.u[:4] + c.v[4:]))
    assert bool(vectors.isfinite().all())
    assert bool((sigma > 0).all())


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-15, 1e15, 1e30, 2e37, 3e38])
def test_vectors_stay_finite_at_any_size_and_right_while_the_norm_has_room(size):
    weight = torch.randn(8, 8).clamp(-3, 3) / 3
    orders = [0, 1] * 2, 1, "float", [0, 0, 1, 1]
    small, large = call([weight] * 4, *orders), call([weight * size] * 4, *orders)
    large.u, large.v = ([x.clone() for x in each] for each in (small.u, small.v))
    sigma, vectors = large.iterate(in_place=True)
    assert all(bool(x.isfinite().all()) for x in (*large.u, *large.v))
    if 1e-37 < size < 1e37:
        exact_sigma, exact = small.iterate()
        torch.testing.assert_close(sigma / size, exact_sigma, rtol=1e-5, atol=0)
        torch.testing.assert_close(vectors, exact, rtol=1e-4, atol=1e-6)


def test_kernels_with_more_positions_than_a_tile_are_served_by_the_reference():
    c = call([torch.randn(2, 3, 50, 50)], [0], 3)
    found, plain = c.iterate(), ops.fallback.power_iteration(*c.iteration(), 1)
    assert all(map(torch.equal, found, plain))


def test_a_factor_that_a_float32_has_no_room_for():
    c = call([torch.ones(2, 3)], [0], 1)
    c.scale_factor = [1e300]
    assert bool(c.rescale(*c.iterate())[0][0].isinf().all())


def test_counters_are_zero_again_after_every_launch():
    from fastsn.triton import memory

    weights, dims = some()
    c = call(weights, dims, 3)
    state = c.iterate(2)
    with torch.no_grad():
        outputs, mean = c.rescale(*state)
        ops.rescale_backward(outputs, None, outputs, [], mean, state[1], *c.numbers())
    assert memory._counters
    assert all(not bool(found.any()) for found in memory._counters.values())


def test_weights_that_move_are_found_again_and_few_tables_are_kept(monkeypatch):
    from fastsn.triton import memory

    monkeypatch.setattr(memory, "_TABLES", 2)
    monkeypatch.setattr(memory, "_NUMBERS", 2)
    c = call([torch.randn(6, 4, 3)], [0], 3)
    expected = c.iterate()
    held = []
    for _ in range(5):
        held.append(c.weights)  # so that the next one lies elsewhere
        c = replace(c, weights=[c.weights[0].clone()])
        assert all(map(torch.equal, c.iterate(), expected))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: object, seen: list[object]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: object) -> object:
        self.seen.append(self.kernel)
        return self.kernel[grid]


@pytest.mark.parametrize("layers", [1, 20])
def test_any_number_of_layers_is_two_launches_forward_and_two_backward(layers, monkeypatch):
    from fastsn.triton import power_iteration, rescale

    seen: list[object] = []
    kernels = {power_iteration: ("iterate", "reduce"), rescale: ("rescale", "inner_products", "gradient")}
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), seen))
    c = call([torch.randn(3, 2, 3, 3, requires_grad=True) for _ in range(layers)], [0] * layers, 3)
    with launched_with(last_tiles=6):
        outputs, _ = c.rescale(*c.iterate(in_place=True))
        assert len(seen) == 2
        torch.autograd.backward(outputs, [torch.ones_like(w) for w in outputs])
        assert len(seen) == 4
        with torch.no_grad():
            replace(c, v_first=alternating(layers, 1)).iterate()  # two halves of the first, and of every other layer
        assert len(seen) == 6


def test_weights_with_many_blocks_take_one_launch_more(monkeypatch):
    from fastsn.triton import power_iteration

    seen: list[object] = []
    for name in ("iterate", "reduce"):
        monkeypatch.setattr(power_iteration, name, Counted(getattr(power_iteration, name), seen))
    c = call([torch.randn(64, 16, 3), torch.randn(4, 4, 3)], [0, 0], 3)
    with launched_with(rows=4, columns=16, group=2, last_tiles=4):
        c.iterate()
        assert len(seen) == 2
        seen.clear()
        c.iterate(3)
    assert len(seen) == 6


def test_a_network_trains_as_on_the_reference():
    """Layers, drop-ins, a shared learnt scale and ConvTranspose in one step: weights, gradients and buffers."""

    def network(impl: str) -> nn.Module:
        torch.manual_seed(1)
        scale = nn.Parameter(torch.tensor(1.3))
        layers = [fastsn.BSSNConv2d(3, 6, 3, scale=scale, impl=impl), nn.ReLU()]
        layers += [fastsn.BSSNConvTranspose2d(6, 4, 4, stride=2, scale=scale, impl=impl), nn.Flatten()]
        return nn.Sequential(*layers, fastsn.spectral_norm(nn.Linear(4 * 8 * 8, 1), impl=impl))

    ours, theirs = network("auto"), network("reference")
    images = torch.randn(2, 3, 5, 5)
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(3):
            with fastsn.step(net):
                net(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, x), y in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bits", [1, 2])
def test_a_single_view_of_a_kernel(bits):
    weights, dims = table()
    c = call(weights, dims, bits, v_first=alternating(len(weights), bits))
    exact_sigma, exact = ops.fallback.power_iteration(*c.exact().iteration(), 2)
    sigma, vectors = c.iterate(2)
    assert off(sigma, exact_sigma) <= 1e-6
    assert off(vectors, exact) <= 1e-6


def test_float64_is_served_by_the_reference():
    c = call([torch.randn(4, 3, 3, dtype=torch.float64)], [0], 3)
    found, exact = c.iterate(), ops.fallback.power_iteration(*c.iteration(), 1)
    assert all(map(torch.equal, found, exact))
    assert found[0].dtype == torch.float64


def test_halves_iterate_in_float32():
    c = call([torch.randn(5, 4, 3).half()], [0], 3)
    sigma, vectors = c.iterate()
    assert sigma.dtype == vectors.dtype == reference.wide(torch.float16) == torch.float32


@on_cpu
def test_the_op_tests_pass_on_the_interpreter():
    """The same files that test the C++ kernels; what they draw of large weights and whole tables is left out for the
    time it takes, the tables are above; so is what the reference serves here too."""
    tests = Path(__file__).parent
    files = [str(tests / f"test_{name}.py") for name in ("ops", "op_errors")]
    slow = "shape_table or number_of_threads or one_graph or random_layers"
    elsewhere = "finite_differences or float64 or forward_mode or reference]"
    environment = {**os.environ, "FASTSN_TEST_ON": "interpreter"}
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-qx", *plugins, "-k", f"not ({slow} or {elsewhere})", *files]
    result = subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
