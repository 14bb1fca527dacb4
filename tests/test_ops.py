"""The list ops compute what the reference computes, and are good citizens of torch: autograd, compiler, transforms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastsn
from conftest import ON
from fastsn import ops, reference
from op_calls import alternating, call, table
from shapes import DTYPES, drawn, laid_out

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")


def assert_within_rounding(ours: Tensor, reference_: Tensor, exact: Tensor, size: Tensor | None = None) -> None:
    """At most twice the error of plain torch in the same dtype, plus some last bits of sums of ``size``: more of them
    in float64, where the truth has been rounded too."""
    size = exact.abs().max() if size is None else size
    width = reference.wide(ours.dtype)
    last_bits = torch.finfo(width).eps * (64 if width == torch.float64 else 16)
    allowed = 2 * (reference_.double() - exact).abs().max() + last_bits * size
    if ours.dtype != reference.wide(ours.dtype):
        allowed = allowed + torch.finfo(ours.dtype).eps * size
    assert ours.dtype == reference_.dtype
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_iterations_over_the_shape_table_are_the_references(dtype, layout, bits, n):
    weights, dims = table(dtype, layout)
    c = call(weights, dims, bits, v_first=alternating(len(weights), n // 2))
    theirs = ops.fallback.power_iteration(*c.iteration(), n)
    exact = ops.fallback.power_iteration(*c.exact().iteration(), n)
    ours = c.iterate(n)
    lengths = [x.numel() for pair in zip(c.u, c.v, strict=True) for x in pair]
    for parts in zip(*(vectors.split(lengths) for _, vectors in (ours, theirs, exact)), strict=True):
        assert_within_rounding(*parts)
    norms = [w.double().norm() for w, b in zip(weights, c.view_masks, strict=True) for _ in range(b.bit_count())]
    for *sigmas, norm in zip(ours[0], theirs[0], exact[0], norms, strict=True):
        assert_within_rounding(*sigmas, norm)  # u^T M v of vectors that do not belong to M yet may nearly cancel


def by_torchs_hook(weight: Tensor, dim: int, u: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and sigma of torch.nn.utils.spectral_norm after a forward; n = 0: in evaluation."""
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    nn.utils.spectral_norm(module, n_power_iterations=max(n, 1), dim=dim)
    module.weight_u.copy_(u)
    module.weight_v.copy_(v)
    module.train(n > 0)
    for prepare in module._forward_pre_hooks.values():
        prepare(module, None)
    return module.weight_u, module.weight_v, (module.weight_orig / module.weight).detach().mean()


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("iterate", [ops.power_iteration, ops.fallback.power_iteration], ids=["dispatched", "plain"])
def test_v_first_is_the_iteration_of_torchs_spectral_norm(iterate, n):
    """Linear, Conv and ConvTranspose weights, their output channels first and second; the second view by the hook on
    its matrix. A weight of the other order is among them."""
    shapes = {(5, 7): 0, (4, 6): 1, (6, 4, 5): 0, (8, 4, 4, 4): 1, (8, 3, 3, 3): 0, (3, 5, 4): 1}
    weights, dims = [torch.randn(shape) for shape in shapes], list(shapes.values())
    weights += [laid_out(w, "channels_last") for w in weights[3:5]]
    dims += dims[3:5]
    c = call([*weights, weights[0]], [*dims, 0], v_first=[1] * len(weights) + [0])
    sigma, vectors = iterate(*c.iteration(), n)
    ours = iter(vectors.split([x.numel() for pair in zip(c.u, c.v, strict=True) for x in pair]))
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        second = reference.matrix(fastsn.views.as_oik(w, dim), "in")
        for at, matrix, own in ((2 * i, w, dim), (2 * i + 1, second, 0)):
            u, v, norm = by_torchs_hook(matrix, own, c.u[at], c.v[at], n)
            torch.testing.assert_close(next(ours), u, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(next(ours), v, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(sigma[at], norm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["float", "tensor"])
@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, torch.bfloat16])
def test_weights_and_gradients_over_the_shape_table_are_the_references(dtype, layout, bits, scale, out):
    weights, dims = table(dtype, layout)
    c = call(weights, dims, bits, scale)
    c.dtypes = [ops.DTYPE_CODES[out or dtype]] * len(weights)
    e = c.exact()
    sigma, vectors = c.iterate()
    with torch.no_grad():
        outputs, mean = c.rescale(sigma, vectors)
        theirs, _ = ops.fallback.rescale(c.weights, c.scales, sigma, vectors, *c.numbers())
        exact, _ = ops.fallback.rescale(e.weights, e.scales, sigma.double(), vectors.double(), *e.numbers())
        for w, ours, plain, true in zip(weights, outputs, theirs, exact, strict=True):
            assert_within_rounding(ours, plain, true)
            assert ours.stride() == torch.empty_like(w).stride()

        gradients, g_sigma = [torch.randn_like(x) for x in outputs], torch.randn_like(mean)
        bases = weights if scale == "tensor" else outputs
        c.dtypes = [ops.DTYPE_CODES[dtype]] * len(weights)
        arguments = (gradients, g_sigma, bases, c.scales, mean, vectors, *c.numbers())
        wide = ([g.double() for g in gradients], g_sigma.double(), [b.double() for b in bases], e.scales)
        d_weights, d_scales = ops.rescale_backward(*arguments)
        theirs, their_scales = ops.fallback.differentiable_backward(*arguments)
        exact, exact_scales = ops.fallback.differentiable_backward(*wide, mean.double(), vectors.double(), *e.numbers())
    for ours, plain, true in zip(d_weights, theirs, exact, strict=True):
        assert_within_rounding(ours, plain, true)
    # The sum that gives the gradient of a scale may nearly cancel: its rounding is that of its summands.
    terms = [(g.double() * b.double()).abs().sum() / s for g, b, s in zip(gradients, bases, mean.double(), strict=True)]
    for ours, plain, true in zip(d_scales, their_scales, exact_scales, strict=True):
        assert_within_rounding(ours, plain, true, sum(x * f for x, f in zip(terms, c.scale_factor, strict=True)))


def test_a_gradient_in_another_layout_is_the_same_gradient():
    """Sums give expanded gradients, convolutions channels_last ones."""
    c = call([torch.randn(6, 4, 3, 3), torch.randn(4, 6, 3, 3)], [0, 1])
    state = c.iterate()
    with torch.no_grad():
        outputs, mean = c.rescale(*state)
        rest = (None, outputs, [], mean, state[1], *c.numbers())
        expected = ops.rescale_backward([torch.ones_like(x) for x in outputs], *rest)[0]
        for layout in ("channels_last", "sliced", "offset"):
            found = ops.rescale_backward([laid_out(torch.ones_like(x), layout) for x in outputs], *rest)[0]
            torch.testing.assert_close(expected, found)
        found = ops.rescale_backward([torch.ones(()).expand(x.shape) for x in outputs], *rest)[0]
        torch.testing.assert_close(expected, found)


def small(scale: str = "tensor") -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], object]:
    """Weights of both views, turned and not, in float64, iterated once."""
    weights = [torch.randn(s, dtype=torch.float64) for s in ((3, 2, 2), (2, 3, 2), (3, 4))]
    c = call(weights, [0, 1, 0], [3, 3, 1], scale)
    sigma, vectors = c.iterate()
    return weights, sigma, vectors, c.scales, c


def through_sigma(c: object, vectors: Tensor):
    """rescale as a function of weights and scales: sigma follows the weights, as its rule assumes."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        c.weights, c.scales = list(tensors[: len(c.weights)]), list(tensors[len(c.weights) :])
        pairs = iter(vectors.split([x.numel() for pair in zip(c.u, c.v, strict=True) for x in pair]))
        u, v = zip(*((next(pairs), next(pairs)) for _ in c.u), strict=True)
        sigma, _ = ops.power_iteration(c.weights, list(u), list(v), c.dims, c.view_masks, c.v_first, 0)
        outputs, mean = c.rescale(sigma, vectors)
        return (*outputs, mean)

    return function


@pytest.mark.parametrize("scale", ["float", "tensor"])
@pytest.mark.parametrize("value", [1.7, 0.0])
def test_finite_differences_confirm_first_and_second_derivatives(scale, value):
    weights, _, vectors, scales, c = small(scale)
    inputs = [w.requires_grad_() for w in weights]
    inputs += [torch.full_like(s, value).requires_grad_() for s in scales]
    assert gradcheck(through_sigma(c, vectors), inputs)
    assert gradgradcheck(through_sigma(c, vectors), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("v_first", [0, 1])
def test_a_zero_weight_gives_zeros_and_the_gradient_scale_times_g(v_first, dtype):
    """torch divides by eps, and 1e-12 is nothing in float16."""
    c = call([torch.zeros(3, 2, 2, dtype=dtype), torch.randn(3, 2)], [0, 0], [3, 1], v_first=[v_first, 0])
    c.weights[0].requires_grad_()
    before = [x.clone() for x in c.u + c.v]
    sigma, vectors = c.iterate(in_place=True)
    assert all(map(torch.equal, before[:2], c.u[:2]))  # a zero vector is not stored
    outputs, mean = c.rescale(sigma, vectors)
    assert float(mean[0].detach()) == 0
    assert not outputs[0].any()
    g = torch.randn_like(outputs[0])
    torch.testing.assert_close(torch.autograd.grad(outputs[0], c.weights[0], g)[0], 1.3 * g)


def test_a_weight_that_was_not_used_gets_no_gradient():
    weights = [torch.randn(3, 2, 2, requires_grad=True) for _ in range(3)]
    c = call(weights, [0] * 3, scale="tensor")
    c.scales[0].requires_grad_()
    outputs, _ = c.rescale(*c.iterate())
    alone = call(weights[1:2], [0], scale="tensor")
    alone.u, alone.v, alone.scales = c.u[2:4], c.v[2:4], c.scales
    (expected,), _ = alone.rescale(*alone.iterate())
    wanted = torch.autograd.grad(expected.square().sum(), [weights[1], c.scales[0]])
    outputs[1].square().sum().backward()
    assert weights[0].grad is None
    assert weights[2].grad is None
    torch.testing.assert_close(weights[1].grad, wanted[0])
    torch.testing.assert_close(c.scales[0].grad, wanted[1])


def test_frozen_weights_get_no_gradient_and_cost_the_others_nothing():
    weights = [torch.randn(3, 2, 2, requires_grad=i == 1) for i in range(3)]
    c = call(weights, [0] * 3)
    outputs, mean = c.rescale(*c.iterate())
    (sum(x.square().sum() for x in outputs) + mean.sum()).backward()
    assert [w.grad is None for w in weights] == [True, False, True]


def test_forward_optimizer_step_backward_is_legal_and_uses_the_weights_of_the_forward():
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    c = call([w], [0])
    outputs, _ = c.rescale(*c.iterate())
    expected = torch.autograd.grad(outputs[0].square().sum(), w, retain_graph=True)[0]
    with torch.no_grad():
        w -= 0.1
    outputs[0].square().sum().backward()
    assert torch.equal(w.grad, expected)


def test_buffers_are_updated_in_place_and_autograd_notices():
    c = call([torch.randn(4, 3, 3)], [0])
    used = c.u[0] * torch.ones(4, requires_grad=True)
    versions = [x._version for x in c.u + c.v]
    c.iterate()
    assert [x._version for x in c.u + c.v] == versions
    before = [x.clone() for x in c.u + c.v]
    _, vectors = c.iterate(in_place=True)
    assert all(x._version > version for x, version in zip(c.u + c.v, versions, strict=True))
    assert not any(map(torch.equal, before, c.u + c.v))
    assert torch.equal(vectors, torch.cat([c.u[0], c.v[0], c.u[1], c.v[1]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


def test_vectors_that_are_not_contiguous_are_updated_too():
    a, b = call([torch.randn(4, 3, 3)], [0]), call([torch.randn(4, 3, 3)], [0])
    b.weights, b.u, b.v = a.weights, [laid_out(x, "sliced") for x in a.u], [laid_out(x, "sliced") for x in a.v]
    assert torch.equal(a.iterate(in_place=True)[1], b.iterate(in_place=True)[1])
    assert all(map(torch.equal, a.u + a.v, b.u + b.v))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck asks, torch 2.14
@pytest.mark.parametrize("scale", ["float", "tensor"])
def test_opcheck(scale):
    c = call([torch.randn(3, 2, 2, 2), torch.randn(2, 3, 2), torch.randn(4, 3)], [0, 1, 0], [3, 3, 1], scale, [1, 1, 0])
    if scale == "float":  # of which an iteration knows nothing
        torch.library.opcheck(ops.power_iteration, (*c.iteration(), 1))
        torch.library.opcheck(ops.power_iteration_, (*c.iteration(), 1))
    sigma, vectors = c.iterate()
    for w in c.weights + c.scales:
        w.requires_grad_()
    torch.library.opcheck(ops.rescale, (c.weights, c.scales, sigma, vectors, *c.numbers()))
    with torch.no_grad():
        outputs, mean = c.rescale(sigma, vectors)
    bases = [w.detach() for w in (c.weights if scale == "tensor" else outputs)]
    gradients = [torch.randn_like(x) for x in outputs]
    scales = [s.detach() for s in c.scales]
    arguments = (gradients, torch.randn(3), bases, scales, mean, vectors, *c.numbers())
    torch.library.opcheck(ops.rescale_backward, arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_under_the_compiler(backend):
    """Iterate in place, rescale, backward: the same numbers and buffers as without."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(3)
        weights = [torch.randn(3, 2, 2, 2, requires_grad=True), torch.randn(4, 3, requires_grad=True)]
        c = call(weights, [0, 0], [3, 1], v_first=[0, 1])

        def run(weights, u, v, c=c):
            sigma, vectors = ops.power_iteration_(weights, u, v, c.dims, c.view_masks, c.v_first, 1)
            outputs, mean = ops.rescale(weights, [], sigma, vectors, *c.numbers())
            return sum(x.pow(3).sum() for x in outputs) + mean.sum()

        function = torch.compile(run, fullgraph=True, backend=backend) if compiled else run
        for _ in range(3):
            loss = function(c.weights, c.u, c.v)
            loss.backward()
        results.append([loss.detach(), *c.u, *c.v, *(w.grad for w in c.weights)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)


def test_vmap_over_the_functional_op():
    batch = torch.randn(4, 3, 2, 2)
    c = call([batch[0]], [0])
    sigma, vectors = c.iterate()

    def one(w: Tensor, s: Tensor) -> Tensor:
        return ops.rescale([w], [s], sigma, vectors, c.dims, c.view_masks, [0], [1.0], c.dtypes)[0][0]

    scales = torch.rand(4) + 1
    together = torch.vmap(one)(batch, scales)
    for w, s, row in zip(batch, scales, together, strict=True):
        assert torch.equal(one(w, s), row)


def test_vmap_over_the_op_that_writes_is_a_clear_error():
    c = call([torch.randn(3, 2, 2)], [0])
    with pytest.raises(RuntimeError, match=r"[Bb]atching rule not implemented"):
        torch.vmap(lambda w: ops.power_iteration_([w], c.u, c.v, c.dims, c.view_masks, c.v_first, 1)[0])(
            torch.randn(4, 3, 2, 2)
        )


@pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason="torch's own sums depend on the threads")
def test_results_are_the_same_bits_for_any_number_of_threads_and_run():
    """Weights large enough to be cut into pieces, in every arrangement."""
    shapes = [(256, 64, 3, 3), (64, 200, 4, 4), (700, 300), (1, 300, 5), (37, 1000, 3)]
    weights = [torch.randn(s) for s in shapes]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    gradients = [torch.randn_like(w) for w in weights]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            copies = [w.clone(memory_format=torch.preserve_format).requires_grad_() for w in weights]
            c = call([*copies, copies[-1]], [0, 0, 0, 0, 1, 1], v_first=[0, 1, 1, 0, 1, 0])
            sigma, vectors = c.iterate(2)
            outputs, mean = c.rescale(sigma, vectors)
            d_weights = torch.autograd.grad(outputs, copies, [*gradients, gradients[-1]])
            results.append([sigma, vectors, mean, *outputs, *d_weights])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_weights_of_any_size_give_the_vectors_of_their_direction(size):
    """A power of two in the weight is one in sigma and changes nothing else, to the bit."""
    power = 2.0 ** round(torch.log2(torch.tensor(size, dtype=torch.float64)).item())
    for dim in (0, 1):
        c = call([torch.randn(6, 4, 3, 3) for _ in range(2)], [dim, dim], v_first=[0, 1])
        sigma, vectors = c.iterate(2)
        c.weights = [w * power for w in c.weights]
        scaled, same = c.iterate(2)
        assert torch.equal(vectors, same)
        assert torch.equal(sigma * power, scaled)


def test_random_layers_of_one_model_in_one_call_equal_each_alone():
    layers = [(case.build(), layout) for case, dtype, layout in drawn(60, seed=3) if dtype == torch.float32]
    weights = [laid_out(layer.weight.detach(), layout) for layer, layout in layers]
    dims = [fastsn.views.output_dim(layer) for layer, _ in layers]
    c = call(weights, dims, v_first=alternating(len(weights)))
    sigma, vectors = c.iterate(2)
    outputs, mean = c.rescale(sigma, vectors)
    # To the bit, but for a GPU's compiler: the kernel for a list has code for all of its weights, and rounds otherwise.
    same = partial(torch.testing.assert_close, rtol=1e-6 if ON == "cuda" else 0, atol=0)
    for i, w in enumerate(weights):
        alone = call([w], c.dims[i : i + 1], v_first=c.v_first[i])
        alone.u, alone.v = c.u[2 * i : 2 * i + 2], c.v[2 * i : 2 * i + 2]
        s, x = alone.iterate(2)
        (output,), _ = alone.rescale(s, x)
        same(s, sigma[2 * i : 2 * i + 2])
        same(output, outputs[i])
    assert mean.shape == (len(weights),)


@pytest.mark.parametrize("size", [1e-42, 1e-40, 2e-39, 1e-37, 1e37])
@pytest.mark.parametrize("dim", [0, 1])
def test_weights_at_the_ends_of_the_range_are_finite_and_right(size, dim):
    w = torch.randn(6, 4, 3, 3) * size
    c = call([w, w], [dim, dim], v_first=[0, 1])
    outputs, mean = c.rescale(*c.iterate(3))
    for output, sigma in zip(outputs, mean.double(), strict=True):
        assert output.isfinite().all()
        torch.testing.assert_close(output.double(), 1.3 * w.double() / sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-310, 1e-300, 1e300])
def test_float64_weights_at_the_ends_of_the_range(size):
    weight = torch.randn(5, 4, 3, dtype=torch.float64)
    c = call([weight * size] * 2, [0, 0], v_first=[0, 1])
    _, vectors = c.iterate(2)
    c.weights = [weight] * 2
    torch.testing.assert_close(vectors, c.iterate(2)[1], rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own rules of forward mode
def test_forward_mode_differentiation_goes_through_the_reference():
    weight, tangent = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    layer = fastsn.SNConv1d(3, 4, 2, dtype=torch.float64).eval()
    results = []
    for impl in ("auto", "reference"):
        layer.spectral_norm.impl = impl
        with torch.autograd.forward_ad.dual_level():
            dual = layer.spectral_norm(torch.autograd.forward_ad.make_dual(weight, tangent))
            results.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
    assert torch.equal(*results)
    c = call([weight], [0])
    sigma, vectors = c.iterate()
    if fastsn.backends()["cpp"].available:
        with torch.autograd.forward_ad.dual_level():
            c.weights = [torch.autograd.forward_ad.make_dual(weight, tangent)]
            with pytest.raises(NotImplementedError, match="no forward-mode"):
                c.rescale(sigma, vectors)
