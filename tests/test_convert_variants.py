"""convert with a variant, what it leaves alone, what it skips, what it refuses, and what it says."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

import fastsn
from networks import batch, network


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="fastsn")
    return lambda: [record.getMessage() for record in caplog.records]


def fingerprint(model: nn.Module) -> list[object]:
    """Everything that a failed call must leave as it was."""
    found: list[object] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        names = [n for n in module.__dict__ if "hook" in n]
        found += [name, type(module), module.training, [list(getattr(module, n) or ()) for n in names]]
    for name, value in model.state_dict(keep_vars=True).items():
        found += [name, id(value), value._version, None if value.is_meta else value.tolist()]
    return found


def mixed() -> nn.Sequential:
    """torch's norms of both kinds, and fastsn's layers and drop-ins."""
    return nn.Sequential(
        hook(nn.Conv2d(2, 4, 3)),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        fastsn.spectral_norm(nn.Conv2d(4, 4, 1)),
        fastsn.SSNConv2d(4, 4, 2, scale=1.2, scale_bias=True),
        nn.Flatten(),
        nn.Linear(4, 4),
        fastsn.BSSNLinear(4, 2, scale=1.3),
    )


def norms(model: nn.Module) -> list[fastsn.SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, fastsn.SpectralNorm)]


def top(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def test_without_a_variant_only_torchs_change_and_a_second_call_changes_nothing(log):
    net, x = mixed(), torch.randn(3, 2, 6, 6)
    net(x)
    expected = net.eval()(x)
    own = norms(net)
    fastsn.convert(net)
    assert [n.variant for n in norms(net)] == ["sn", "sn", "sn", "ssn", "bssn"]
    assert all(n in norms(net) for n in own)
    torch.testing.assert_close(net(x), expected)
    assert log() == [
        "converted 0.weight: torch's old hook, now 'sn'",
        "converted 1.weight: torch's parametrization, now 'sn'",
        "left alone 2.weight: it is fastsn's",
        "left alone 3.weight: it is fastsn's",
        "left alone 6.weight: it is fastsn's",
    ]
    before = fingerprint(net)
    assert fastsn.convert(net) is net
    assert fingerprint(net) == before
    assert fastsn.convert(net, "bsn") is net
    before = fingerprint(net)
    assert fastsn.convert(net, "bsn") is net
    assert fingerprint(net) == before


@pytest.mark.parametrize("variant", list(fastsn.VARIANTS))
def test_every_norm_takes_the_variant_and_keeps_what_it_knows(variant):
    row = fastsn.VARIANTS[variant]
    net, x = mixed(), torch.randn(3, 2, 6, 6)
    net(x)
    parameters = [net[0].weight_orig, net[1].parametrizations.weight.original, net[3].weight, net[6].weight]
    vectors = {id(b): b.clone() for n, b in net.named_buffers() if n.endswith(("_u", "_v"))}
    chance = torch.get_rng_state()
    gamma = nn.Parameter(torch.tensor(1.5))
    fastsn.convert(net, variant, scale=gamma if row.free_scale else None)
    assert [n.variant for n in norms(net)] == [variant] * 5
    assert [type(net[i]).__name__ for i in (3, 6)] == [f"{variant.upper()}Conv2d", f"{variant.upper()}Linear"]
    assert set(parameters) <= set(net.parameters())
    assert (gamma in set(net.parameters())) == row.free_scale
    assert net[3].scale_bias == row.free_scale
    kept = [b for n, b in net.named_buffers() if n.endswith(("_u", "_v"))]
    assert {id(b) for b in kept} == set(vectors)
    assert all(torch.equal(vectors[id(b)], b) for b in kept)
    assert torch.equal(chance, torch.get_rng_state()) == ("in" not in row.views)
    for name, (sigma, sigma_out, sigma_in) in fastsn.sigmas(net).items():
        expected = (sigma_out + sigma_in) / 2 if row.views == ("out", "in") else sigma_out
        assert sigma == pytest.approx(expected, rel=1e-6), name
    y = net(x)
    y.sum().backward()
    assert (gamma.grad is not None and float(gamma.grad) != 0) == row.free_scale
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    fastsn.fold(net)
    assert type(net[3]) is nn.Conv2d


def test_only_the_new_view_is_drawn_and_it_is_warmed_up():
    layer = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    chance = torch.get_rng_state()
    fastsn.convert(layer, "bsn")
    norm, after = layer.parametrizations.weight[0], torch.rand(1)
    torch.set_rng_state(chance)
    _, v = torch.randn(8 * 9), nn.functional.normalize(torch.randn(8), dim=0)
    assert torch.equal(after, torch.rand(1))
    m = layer.parametrizations.weight.original.detach().flatten(2).transpose(1, 2).flatten(0, 1)
    for _ in range(15):
        u = nn.functional.normalize(m @ v, dim=0)
        v = nn.functional.normalize(m.T @ u, dim=0)
    torch.testing.assert_close((norm._u_in, norm._v_in), (u, v), rtol=1e-5, atol=1e-6)


def test_what_stands_before_a_norm_is_evaluated_outside_of_autocast():
    class Rotated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return (torch.ones(4, 4) @ weight.flatten(1)).reshape(weight.shape)

    layer = parametrize.register_parametrization(nn.Conv2d(4, 4, 3), "weight", Rotated())
    parametrizations.spectral_norm(layer)
    drawn = []
    for enabled in (False, True):
        clone = copy.deepcopy(layer)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            drawn.append(norms(fastsn.convert(clone, "bsn"))[0]._v_in)
    assert torch.equal(*drawn)


def test_vectors_can_be_given_to_a_norm():
    weight = torch.randn(4, 3, 2)
    u, v = torch.randn(4), torch.randn(6)
    norm = fastsn.SpectralNorm(weight, vectors={"out": (u, v)})
    assert norm._u is u
    assert norm._v is v
    half = fastsn.SpectralNorm(weight.half(), vectors={"out": (u.half(), v.half())})
    assert half._u.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"vectors\['out'\] must have shapes \[\(4,\), \(6,\)\], got \[\(6,\), \(4,\)\]"
    ):
        fastsn.SpectralNorm(weight, vectors={"out": (v, u)})


def test_layers_of_a_new_variant_can_be_pickled():
    net, x = nn.Sequential(fastsn.SNConv2d(2, 3, 3), fastsn.SSNConv2d(3, 3, 1, scale=2.0)), torch.randn(1, 2, 4, 4)
    clone = pickle.loads(pickle.dumps(fastsn.convert(net, "bssn")))
    assert [type(layer) for layer in clone] == [fastsn.BSSNConv2d] * 2
    assert torch.equal(clone(x), net(x))


def test_scales():
    net = nn.Sequential(fastsn.SSNLinear(3, 3, scale=1.2), fastsn.BSNLinear(3, 3), hook(nn.Linear(3, 3)))
    fastsn.convert(net, "bssn")
    assert [n.scale for n in norms(net)] == [1.2, 1.0, 1.0]  # what there is stays
    fastsn.convert(net, "bssn", scale=1.4)
    assert [n.scale for n in norms(net)] == [1.4] * 3
    fastsn.convert(net, "ssn", scale=torch.tensor(1.5))
    assert [float(n._buffers["scale"]) for n in norms(net)] == [1.5] * 3
    fastsn.convert(net, "bssn")
    assert [float(n._buffers["scale"]) for n in norms(net)] == [1.5] * 3
    fastsn.convert(net, "sn")
    assert [n.scale for n in norms(net)] == [1.0] * 3


def test_a_model_without_any_norm():
    embedding = nn.Embedding(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = embedding.weight
    net = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "attention": nn.MultiheadAttention(4, 2),
            "convolutions": nn.ModuleList([kind(2, 3, 2) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]),
            "up": nn.ModuleList(
                [kind(2, 3, 2) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)]
            ),
            "low rank": parametrizations.weight_norm(nn.Linear(4, 4)),
            "norm": nn.BatchNorm2d(4),
        }
    )
    parameters = list(net.parameters())
    net["up"].eval()
    net["low rank"].eval()
    fastsn.convert(net, "bsn")
    assert set(parameters) == set(net.parameters())
    assert tied.parametrizations.weight.original is embedding.weight
    assert set(fastsn.sigmas(net)) == {
        *("tied", "attention.out_proj", "low rank"),
        *(f"{name}.{i}" for name in ("convolutions", "up") for i in range(3)),
    }
    assert all(n.dim == 1 and not n.training for n in norms(net["up"]))
    assert all(n.follows_autocast for n in norms(net))
    assert type(net["low rank"].parametrizations.weight[1]) is fastsn.SpectralNorm
    assert not norms(net["low rank"])[0].training
    assert not tied.parametrizations.weight.unsafe
    for name, layer in (("tied", tied), ("low rank", net["low rank"])):
        fastsn.warm_up(layer, 500)
        assert top(layer.eval().weight) == pytest.approx(1, rel=1e-5), name
    query = torch.randn(3, 1, 4)
    net["attention"](query, query, query)[0].sum().backward()
    assert net["attention"].out_proj.parametrizations.weight.original.grad is not None


def test_a_plain_layer_gets_what_spectral_norm_gives_it_without_the_use():
    results = []
    for wrap in (lambda m: fastsn.spectral_norm(m.eval(), variant="bssn", scale=1.4), None):
        torch.manual_seed(1)
        layer = nn.Conv2d(3, 4, 3)
        fastsn.convert(layer, "bssn", scale=1.4) if wrap is None else wrap(layer)
        results.append([*layer.state_dict().items(), ("chance", torch.rand(1))])
    assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(*results, strict=True))


@pytest.mark.parametrize(
    "skip",
    ["1", {"1"}, ("1.0", "1.3"), lambda name, _: name == "1", lambda _, m: isinstance(m, nn.Conv2d)],
    ids=["name", "set", "parts", "predicate of names", "predicate of modules"],
)
def test_skip(skip, log):
    net = network()
    block = fingerprint(net[1])
    fastsn.convert(net, "bsn", skip=skip)
    assert fingerprint(net[1])[1:] == block[1:]
    assert [norm.variant for norm in norms(net)] == ["bssn", "bsn", "bsn", "bsn"]
    net(batch()).sum().backward()
    assert sum(line.endswith(": skip") for line in log()) == 2


def test_skip_in_a_model_without_norms_and_of_a_single_norm():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    fastsn.convert(net, "sn", skip=["1.1", "0"])
    assert set(fastsn.sigmas(net)) == {"1.0"}
    layer = parametrizations.spectral_norm(parametrizations.spectral_norm(nn.Linear(3, 3)))
    fastsn.convert(layer, skip="parametrizations.weight.0")
    assert [type(part) for part in layer.parametrizations.weight] == [_SpectralNorm, fastsn.SpectralNorm]
    plain = nn.Linear(3, 3)
    shared = nn.ModuleDict({"a": plain, "b": nn.Sequential(plain), "c": nn.Linear(3, 3)})
    for name in ("a", "b", "b.0"):  # any of its names
        fastsn.convert(shared, "sn", skip=[name])
        assert type(plain) is nn.Linear


def test_names_in_skip_that_no_module_has():
    net = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"skip must name modules .*, got 'encodr'; names near it: 'encoder'"):
        fastsn.convert(net, "sn", skip=["decoder", "encodr"])
    with pytest.raises(ValueError, match="names near it: none"):
        fastsn.convert(net, "sn", skip="zzzzzzzz")
    assert fastsn.sigmas(net) == {}


@pytest.mark.parametrize(
    ("skip", "came"), [(3, "3"), ([3], "3"), (nn.Linear, "class"), (nn.Sequential(), "Sequential")]
)
def test_skip_of_another_kind(skip, came):
    with pytest.raises(TypeError, match=rf"skip must .*{came}"):
        fastsn.convert(nn.Linear(3, 3), "sn", skip=skip)


class MineTorch(_SpectralNorm):
    pass


class MineHook(TorchHook):
    pass


class MineLayer(fastsn.SNLinear):
    pass


def subclass_of_the_hook():
    layer = hook(nn.Linear(3, 3))
    (theirs,) = layer._forward_pre_hooks.values()
    theirs.__class__ = MineHook
    return layer


def subclass_of_the_parametrization():
    layer = nn.Linear(3, 3)
    return parametrize.register_parametrization(layer, "weight", MineTorch(layer.weight))


def norm_of_its_own():
    layer = nn.Linear(3, 3)
    layer.norm = _SpectralNorm(layer.weight)
    return layer


def bound_loading_hook():
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    layer.parametrizations.weight[0].register_load_state_dict_pre_hook(lambda *_: None)
    return layer


def changed_vectors():
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    norm = layer.parametrizations.weight[0]
    u = norm._u
    del norm._u
    norm._u = nn.Parameter(u)
    return layer


def parameter_again():
    layer = hook(nn.Linear(3, 3))
    layer.weight = nn.Parameter(torch.randn(3, 3))
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (subclass_of_the_hook, "MineHook is a subclass of torch's SpectralNorm"),
        (subclass_of_the_parametrization, "MineTorch is a subclass of a spectral norm"),
        (lambda: MineLayer(3, 3), "MineLayer is a subclass of a fastsn layer"),
        (lambda: parametrizations.orthogonal(fastsn.SNLinear(3, 3)), "is a subclass of a fastsn layer"),
        (norm_of_its_own, "a norm that is no parametrization of a tensor"),
        (bound_loading_hook, "hooks of its own for loading"),
        (changed_vectors, "its u and v are not its own"),
        (parameter_again, "weight is not the hook's own"),
        (lambda: hook(nn.Linear(3, 3, dtype=torch.complex64)), "the weight is complex"),
        (
            lambda: nn.utils.weight_norm(hook(nn.Linear(3, 3)), "weight_orig"),
            "_u and _v are not the hook's",
        ),
        (
            lambda: parametrizations.orthogonal(hook(nn.Linear(3, 3)), "weight_orig"),
            "_u and _v are not the hook's",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_norms_that_are_left_alone(make, why, log):
    net = nn.Sequential(make(), parametrizations.spectral_norm(nn.Linear(3, 3)))
    before = fingerprint(net[0])
    fastsn.convert(net, "bssn", scale=1.3)
    assert fingerprint(net[0]) == before
    assert [line for line in log() if line.startswith("left alone 0") and why in line]
    assert norms(net[1])[0].variant == "bssn"
    fastsn.convert(nn.Sequential(net[0]), "bssn")  # there is a norm: nobody else gets one
    assert fingerprint(net[0]) == before


def test_old_hooks_on_top_of_each_other_are_left_alone(log):
    layer = hook(hook(nn.Linear(3, 3)), "weight_orig")
    before = fingerprint(layer)
    fastsn.convert(layer)
    assert fingerprint(layer) == before
    assert len([line for line in log() if line.startswith("left alone")]) == 2


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_layers_that_get_no_norm(log):
    integers = nn.Linear(3, 3)
    integers.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    net = nn.Sequential(
        torch.jit.trace(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 3)),
        torch.ao.nn.quantized.dynamic.Linear(3, 3),
        integers,
        nn.utils.weight_norm(nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    before = [fingerprint(net[i]) for i in (2, 3)]
    keys = list(net[0].state_dict())
    fastsn.convert(net, "sn")
    assert [fingerprint(net[i])[1:] for i in (2, 3)] == [b[1:] for b in before]
    assert list(net[0].state_dict()) == keys
    assert log() == [
        "converted 4.weight: plain layer, now 'sn'",
        "left alone 0: a ScriptModule cannot be changed",
        "left alone 1.weight: its weight is a method, as in quantized modules",
        "left alone 2.weight: its weight is torch.int8, as in quantized modules",
        "left alone 3.weight: its weight is no parameter: a hook makes it, as the old weight_norm does",
    ]


def test_nothing_to_do():
    with pytest.raises(ValueError, match="model must have a spectral norm, got one without: pass variant= to"):
        fastsn.convert(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model must have a spectral norm or a Linear or convolution layer"):
        fastsn.convert(nn.ReLU(), "sn")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
        fastsn.convert([nn.Linear(3, 3)], "sn")


def test_bad_variants_and_scales():
    for variant in ("SN", "", 3):
        with pytest.raises(ValueError, match="variant must be one of 'sn', 'ssn', 'bsn', 'bssn', got"):
            fastsn.convert(hook(nn.Linear(3, 3)), variant)
    for variant in (None, "sn", "bsn"):
        with pytest.raises(ValueError, match=r"scale must be 1.0 for variant '(sn|bsn)', got 1.4"):
            fastsn.convert(hook(nn.Linear(3, 3)), variant, 1.4)
    with pytest.raises(ValueError, match="scale must be finite and positive, got -1"):
        fastsn.convert(hook(nn.Linear(3, 3)), "ssn", -1)


def lazy():
    return nn.LazyLinear(3), ValueError, r"'1.weight' of a LazyLinear: the weight must be initialized, got a lazy"


def empty():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(0, 3))
    return layer, ValueError, r"'1.weight' of a Linear: the weight must have at least one dimension and one element"


def sharded(tmp_path):
    from torch.distributed import init_process_group
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(distribute_tensor(torch.randn(3, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    return layer, TypeError, r"'1.weight' of a Linear: the weight must be a whole tensor, got a sharded DTensor"


@pytest.mark.parametrize("make", [lazy, empty, sharded])
def test_one_bad_layer_and_nothing_has_changed(make, tmp_path):
    try:
        bad, error, message = make(tmp_path) if make is sharded else make()
        net = nn.Sequential(nn.Conv2d(3, 3, 3), bad)
        before = fingerprint(net[0])
        with pytest.raises(error, match=message):
            fastsn.convert(net, "bsn")
        assert fingerprint(net[0]) == before
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_one_bad_norm_and_nothing_has_changed(log):
    net = nn.Sequential(mixed(), parametrizations.spectral_norm(nn.Linear(3, 3)))
    net[1].parametrizations.weight[0].n_power_iterations = 0
    before = fingerprint(net)
    with pytest.raises(
        ValueError, match=r"because of '1.weight' of a ParametrizedLinear: n_power_iterations must be at"
    ):
        fastsn.convert(net)
    assert fingerprint(net) == before
    assert log() == []
