"""A user's mistake raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastsn
from fastsn import reference


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, math.nan, math.inf, torch.tensor(-1.0), nn.Parameter(torch.tensor(math.nan))]
)
def test_scale_that_is_not_finite_and_positive(scale):
    for make in (
        lambda: fastsn.BSSNConv2d(3, 4, 3, scale=scale),
        lambda: fastsn.spectral_norm(nn.Linear(3, 4), variant="ssn", scale=scale),
    ):
        with pytest.raises(ValueError, match=r"scale must be finite and positive, got (0|-1|nan|inf)"):
            make()


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("1", TypeError, "scale must be a float or a tensor, got '1'"),
        (True, TypeError, "scale must be a float or a tensor, got True"),
        (None, TypeError, "scale must be a float or a tensor, got None"),
        (torch.ones(2), ValueError, r"scale must be one floating-point number, got torch.float32 of shape \(2,\)"),
        (torch.tensor(1), ValueError, "scale must be one floating-point number, got torch.int64"),
        (torch.ones((), requires_grad=True), TypeError, "scale must be a float, a Parameter or a tensor without"),
    ],
)
def test_scale_of_another_kind(scale, error, message):
    with pytest.raises(error, match=message):
        fastsn.SSNLinear(3, 4, scale=scale)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        *((value, TypeError, f"scale must be a float or a tensor, got {value!r}") for value in ("x", None, True)),
        *((value, ValueError, f"scale must be finite and positive, got {value}") for value in (-1.0, float("nan"))),
    ],
)
def test_a_scale_is_checked_when_it_is_assigned(value, error, message):
    layer = fastsn.BSSNLinear(4, 4, scale=1.4)
    with pytest.raises(error, match=message):
        layer.spectral_norm.scale = value
    assert layer.spectral_norm.scale == 1.4
    with pytest.raises(ValueError, match=r"scale must be 1.0 for variant 'bsn', got 2"):
        fastsn.BSNLinear(4, 4).spectral_norm.scale = 2


@pytest.mark.parametrize("scale", [1.5, nn.Parameter(torch.tensor(1.0))])
def test_scale_of_a_variant_that_has_none_names_those_that_have(scale):
    with pytest.raises(ValueError, match=r"scale must be 1.0 for variant 'bsn', got .* free for 'ssn', 'bssn'"):
        fastsn.BSNLinear(3, 4, scale=scale)


@pytest.mark.parametrize("variant", ["SN", "spectral", "", None, 3])
def test_unknown_variants_list_the_known(variant):
    with pytest.raises(ValueError, match=r"variant must be one of 'sn', 'ssn', 'bsn', 'bssn', got "):
        fastsn.spectral_norm(nn.Linear(3, 4), variant=variant)


@pytest.mark.parametrize("n", [0, -1])
def test_too_few_iterations(n):
    with pytest.raises(ValueError, match=f"n_power_iterations must be at least 1, got {n}"):
        fastsn.SNLinear(3, 4, n_power_iterations=n)
    with pytest.raises(ValueError, match=f"iterations must be at least 1, got {n}"):
        fastsn.warm_up(fastsn.SNLinear(3, 4), n)
    with pytest.raises(ValueError, match=f"rounds must be at least 1, got {n}"):
        fastsn.advance(fastsn.SNLinear(3, 4), n)


@pytest.mark.parametrize("n", [1.0, True, "1"])
def test_iterations_that_are_no_integer(n):
    with pytest.raises(TypeError, match="n_power_iterations must be an integer, got "):
        fastsn.spectral_norm(nn.Linear(3, 4), n_power_iterations=n)


@pytest.mark.parametrize(
    ("eps", "error"), [(-1e-12, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("0", TypeError)]
)
def test_eps(eps, error):
    with pytest.raises(error, match="eps must be "):
        fastsn.SNLinear(3, 4, eps=eps)


@pytest.mark.parametrize("dim", ["0", 0.0, True, torch.ones(2)])
def test_a_dim_that_is_no_integer(dim):
    with pytest.raises(TypeError, match="dim must be an integer, got "):
        fastsn.spectral_norm(nn.Linear(3, 4), dim=dim)


@pytest.mark.parametrize("dim", [4, -5])
def test_dim_out_of_range(dim):
    with pytest.raises(IndexError, match=rf"dim must be in \[-4, 3\] for a weight of 4 dimensions, got {dim}"):
        fastsn.spectral_norm(nn.Conv2d(3, 4, 3), dim=dim)


@pytest.mark.parametrize("name", ["wieght", "training", "forward"])
def test_no_tensor_of_that_name(name):
    with pytest.raises(
        ValueError, match=f"name must be a parameter or buffer of Linear, got '{name}'; it has weight, bias"
    ):
        fastsn.spectral_norm(nn.Linear(3, 4), name)


def test_a_module_that_is_none():
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got Tensor"):
        fastsn.spectral_norm(torch.ones(3))
    for function in (fastsn.sigmas, fastsn.warm_up, fastsn.advance, fastsn.fold, fastsn.fuse):
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
            function([nn.Linear(3, 4)])
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"), fastsn.step([]):
        pass


def entered(model: nn.Module) -> None:
    with fastsn.step(model):
        pass


@pytest.mark.parametrize("call", [entered, fastsn.fuse, fastsn.warm_up, fastsn.advance, fastsn.fold])
def test_a_model_without_norms_is_refused_by_whatever_would_change_them(call):
    with pytest.raises(
        ValueError, match=r"model must have norms of fastsn, got none: call fastsn\.convert on it first"
    ):
        call(nn.Linear(2, 2))


def test_lazy_weights():
    with pytest.raises(ValueError, match=r"LazyLinear.weight must be initialized, got a lazy parameter"):
        fastsn.spectral_norm(nn.LazyLinear(4))
    layer = nn.LazyLinear(4)
    layer(torch.randn(2, 6))
    assert fastsn.spectral_norm(layer)(torch.randn(2, 6)).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_without_a_norm(dtype):
    module = nn.Module()
    module.register_buffer("weight", torch.ones(3, 4).to(dtype))
    with pytest.raises(TypeError, match=f"Module.weight must be floating point or complex, got {dtype}"):
        fastsn.spectral_norm(module)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
def test_weights_that_are_not_dense(layout):
    sparse = torch.eye(4).to_sparse(layout=getattr(torch, layout))
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(sparse)
    with pytest.raises(TypeError, match=rf"Linear.weight must be dense, got layout torch.{layout}: .*to_dense\(\)"):
        fastsn.spectral_norm(layer)
    with pytest.raises(TypeError, match="weight must be dense"):
        fastsn.SpectralNorm(torch.eye(4))(sparse)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0, 2)])
def test_weights_without_elements(shape):
    module = nn.Module()
    module.register_buffer("weight", torch.ones(shape))
    with pytest.raises(ValueError, match="must have at least one dimension and one element, got shape"):
        fastsn.spectral_norm(module)


def test_meta_weights_have_no_numbers_and_no_vector_of_others_moves():
    net = nn.Sequential(fastsn.SNLinear(3, 3), fastsn.SNLinear(3, 4, device="meta"))
    before = [b.clone() for b in net[0].buffers()]
    for function in (fastsn.sigmas, fastsn.warm_up, fastsn.advance, fastsn.fold, entered):
        with pytest.raises(ValueError, match="weight of '1' must have values, got a meta tensor: materialize"):
            function(net)
    assert isinstance(net[0], fastsn.SNLinear)
    assert all(torch.equal(a, b) for a, b in zip(before, net[0].buffers(), strict=True))


def test_sharded_weights(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, module = fastsn.SNLinear(3, 4), nn.Linear(3, 4)
        sharded = distribute_tensor(torch.randn(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        layer.weight = module.weight = nn.Parameter(sharded)
        for use in (
            lambda: layer(torch.randn(1, 3)),
            lambda: fastsn.spectral_norm(module),
            lambda: fastsn.warm_up(layer),
        ):
            with pytest.raises(TypeError, match="must be a whole tensor, got a sharded DTensor"):
                use()
    finally:
        destroy_process_group()


def test_embeddings_that_cannot_be_normalized():
    with pytest.raises(ValueError, match=r"max_norm must be None, got 1.0"):
        fastsn.SNEmbedding(3, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="sparse must be False, got True"):
        fastsn.SNEmbedding(3, 4, sparse=True)


@pytest.mark.parametrize("name", ["SNLinear", "BSNLinear", "BSSNEmbedding"])
def test_scale_bias_without_a_scale_or_a_bias(name):
    with pytest.raises(ValueError, match=f"scale_bias must be False, got True: {name} has no free scale or no bias"):
        getattr(fastsn, name)(3, 4, scale_bias=True)
    with pytest.raises(ValueError, match="BSSNLinear has no free scale or no bias"):
        fastsn.BSSNLinear(3, 4, bias=False, scale_bias=True)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("learnable", [False, True])
def test_a_scale_without_values_beside_a_weight_that_has_some(impl, learnable):
    scale = torch.tensor(1.4, device="meta")
    scale = nn.Parameter(scale) if learnable else scale
    with pytest.raises(ValueError, match="scale must have values as the weight has, got a meta tensor"):
        fastsn.BSSNLinear(4, 4, scale=scale, impl=impl)
    layer = fastsn.BSSNLinear(4, 4, scale=scale, impl=impl, device="meta")  # all of it on meta
    assert layer(torch.randn(2, 4, device="meta")).is_meta
    state = fastsn.BSSNLinear(4, 4).state_dict()
    layer.load_state_dict(state, strict=False, assign=True)  # all of it but the scale
    for train in (True, False):
        with pytest.raises(ValueError, match="scale must have values as the weight has, got a meta tensor"):
            layer.train(train)(torch.randn(2, 4))
    for use in (lambda: fastsn.step(layer).__enter__(), lambda: fastsn.fold(layer), lambda: fastsn.sigmas(layer)):
        with pytest.raises(ValueError, match="scale of 'BSSNLinear' must have values, got a meta tensor"):
            use()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items() if name in state)
    fastsn.warm_up(layer)  # needs none
    layer.to_empty(device="cpu")
    for empty in (layer.weight, layer.bias, layer.spectral_norm.scale):
        nn.init.ones_(empty)
    assert fastsn.warm_up(layer)(torch.ones(1, 4)).isfinite().all()


def test_fold_refuses_a_users_subclass_and_changes_nothing():
    class Mine(fastsn.SNLinear):
        pass

    net = nn.Sequential(fastsn.SNLinear(3, 4), Mine(4, 2))
    with pytest.raises(TypeError, match="model has Mine at '1', a subclass that cannot be folded"):
        fastsn.fold(net)
    assert isinstance(net[0], fastsn.SNLinear)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_flags_are_true_or_false(value):
    with pytest.raises(TypeError, match=f"advance must be True or False, got {value!r}"):
        fastsn.step(fastsn.SNLinear(3, 4), advance=value)
    with pytest.raises(TypeError, match=f"scale_bias must be True or False, got {value!r}"):
        fastsn.SSNLinear(3, 4, scale_bias=value)


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        ({"x": ()}, ValueError, "vectors must have the views 'out' and 'in' as keys, got 'x'"),
        ([torch.ones(3)], TypeError, r"vectors must be a mapping of view to \(u, v\), got list"),
    ],
)
def test_vectors_of_something_that_is_no_view(vectors, error, message):
    with pytest.raises(error, match=message):
        fastsn.SpectralNorm(torch.randn(3, 4), vectors=vectors)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("made", "called"), [((4, 4, 3, 3), (4, 36)), ((4, 4), (4,)), ((4,), (4, 4))])
def test_a_norm_is_called_with_as_many_dimensions_as_it_was_made_for(made, called, impl):
    norm = fastsn.SpectralNorm(torch.randn(made), impl=impl)
    before = [x.clone() for x in norm.buffers()]
    with pytest.raises(ValueError, match=f"weight must have {len(made)} dimensions as at .*, got {len(called)}"):
        norm(torch.randn(called))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))
    for nothing in (None, 3.0):
        with pytest.raises(TypeError, match=f"weight must be a tensor, got {type(nothing).__name__}"):
            norm(nothing)


def test_unknown_gradient():
    with pytest.raises(ValueError, match="gradient must be 'fixed' or 'through', got 'exact'"):
        reference.power_iteration([], [], gradient="exact")


def test_arguments_of_the_torch_layer_are_still_checked_by_torch():
    with pytest.raises(TypeError, match="unexpected keyword argument 'strid'"):
        fastsn.SNConv2d(3, 4, 3, strid=2)
