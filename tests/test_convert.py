"""torch's spectral norms, old and new, become fastsn's: same numbers, same objects, same checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook

import fastsn

WRAPPERS = {"hook": hook, "parametrization": parametrizations.spectral_norm}
either = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def discriminator(wrap, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Nested, a layer used twice, tied weights, a custom dim, several iterations, a ConvTranspose."""
    shared = wrap(nn.Conv2d(8, 8, 3, padding=1), n_power_iterations=3)
    first, second = wrap(nn.Linear(8, 8), dim=1), nn.Linear(8, 8)
    second.weight = next(p for n, p in first.named_parameters() if "orig" in n)
    return nn.Sequential(
        wrap(nn.Conv2d(1, 8, 3, padding=1)),
        nn.Sequential(shared, nn.LeakyReLU(0.1), shared),
        wrap(nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        first,
        wrap(second),
        wrap(nn.Linear(8, 1), eps=1e-10),
    ).to(dtype)


def used(model: nn.Module, x: Tensor, times: int = 3) -> nn.Module:
    for _ in range(times):
        model(x)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def norm_of(layer: nn.Module, tensor: str = "weight") -> fastsn.SpectralNorm:
    chain = layer.parametrizations[tensor]
    assert type(chain[0]) is fastsn.SpectralNorm
    return chain[0]


@either
def test_evaluation_is_torchs_at_once_and_nothing_is_drawn_or_moved(wrap):
    x = torch.randn(4, 1, 8, 8)
    model = used(discriminator(wrap), x)
    expected = model.eval()(x)
    model.train()
    vectors = [b for n, b in model.named_buffers()]
    before = [b.clone() for b in vectors]
    chance = torch.get_rng_state()
    assert fastsn.convert(model) is model
    assert torch.equal(chance, torch.get_rng_state())
    now = dict(model.named_buffers())
    assert len(now) == len(vectors) == 12
    assert {id(b) for b in now.values()} == {id(b) for b in vectors}  # DDP and others hold on to the tensors
    assert all(torch.equal(a, b) for a, b in zip(before, vectors, strict=True))
    assert len(fastsn.sigmas(model)) == 6
    torch.testing.assert_close(model.eval()(x), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_on_from_the_parametrization_gives_torchs_numbers(dtype):
    """Two optimizers that go on for 40 steps, every weight and buffer at every step. Adam makes much of a last bit:
    float64 for it, float32 for SGD."""
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    theirs = used(discriminator(parametrizations.spectral_norm, dtype), x)
    ours = copy.deepcopy(theirs)
    models = theirs, ours
    double = dtype == torch.float64
    make = partial(torch.optim.Adam, lr=1e-3, eps=1e-4) if double else partial(torch.optim.SGD, lr=1e-2, momentum=0.5)
    optimizers = [make(m.parameters()) for m in models]
    bound = 1e-10 if double else 1e-5
    for step in range(45):
        real, fake = torch.randn(2, 4, 1, 8, 8, dtype=dtype)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (F.relu(1 - model(real)).mean() + F.relu(1 + model(fake)).mean()).backward()
            optimizer.step()
        if step == 4:
            fastsn.convert(ours)  # the optimizer and its moments stay
        states = [m.state_dict() for m in models]
        assert list(states[0]) == list(states[1])
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name], rtol=bound, atol=bound, msg=f"{step} {name}")
    assert all(isinstance(norm_of(m), fastsn.SpectralNorm) for m in (ours[0], ours[1][0], ours[7]))


def test_in_the_order_of_the_parametrization_the_difference_from_the_old_hook_vanishes():
    theirs = hook(nn.Conv2d(4, 8, 3))
    x = torch.randn(2, 4, 5, 5)
    theirs(x)
    ours = fastsn.convert(copy.deepcopy(used_without_graph(theirs)), order="torch")
    gaps = []
    for _ in range(300):  # slowly changing weights
        drift = 1e-5 * torch.randn(8, 4, 3, 3)
        weights = []
        for model, weight in ((theirs, theirs.weight_orig), (ours, ours.parametrizations.weight.original)):
            weight.data += drift
            model(x)
            model.eval()
            model(x)
            weights.append(model.weight.detach())
            model.train()
        gaps.append(float((weights[0] - weights[1]).abs().max()))
    assert gaps[0] > 1e-4
    assert max(gaps[-10:]) < 1e-5


def used_without_graph(layer: nn.Module) -> nn.Module:
    """After a forward the old hook's tensor has a graph, which cannot be copied."""
    layer.weight = layer.weight.detach()
    return layer


@either
def test_parameters_optimizers_ties_modes_and_settings_are_kept(wrap):
    x = torch.randn(4, 1, 8, 8)
    model = used(discriminator(wrap), x)
    model[2].eval()
    model[0].requires_grad_(False)
    parameters = set(model.parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(x).sum().backward()
    optimizer.step()
    fastsn.convert(model)
    assert set(model.parameters()) == parameters
    assert model[5].parametrizations.weight.original is model[6].parametrizations.weight.original
    assert not model[0].parametrizations.weight.original.requires_grad
    assert [norm_of(model[i]).training for i in (0, 2, 5)] == [True, False, True]
    assert [norm_of(model[i]).dim for i in (0, 2, 5, 6)] == [0, 1, 1, 0]
    assert [norm_of(m).n_power_iterations for m in (model[0], model[1][0])] == [1, 3]
    assert norm_of(model[7]).eps == 1e-10
    assert model[1][0] is model[1][2]
    before = snapshot(model)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"1.0.parametrizations.weight.original", "6.parametrizations.weight.0._u"} <= moved
    still = ("0.parametrizations.weight.original", "2.parametrizations.weight.0._")
    assert not any(name.startswith(still) for name in moved)


def test_the_mode_of_a_parametrization_may_differ_from_its_modules():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    layer.parametrizations.weight[0].eval()
    fastsn.convert(layer)
    assert (layer.training, norm_of(layer).training) == (True, False)


@either
def test_a_backward_that_is_due_still_works(wrap):
    x = torch.randn(4, 1, 8, 8)
    model = used(discriminator(wrap), x)
    gradients = []
    for convert in (False, True):
        output = model.eval()(x).sum()
        if convert:
            fastsn.convert(model)
        model.zero_grad()
        output.backward()
        gradients.append([p.grad.clone() for p in (*model[0].parameters(), *model[7].parameters())])
    assert all(any(torch.equal(a, b) for b in gradients[1]) for a in gradients[0])


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.reshape(len(self.kernel), -1)


def lstm(wrap):
    return wrap(wrap(nn.LSTM(3, 4), "weight_hh_l0"), "weight_ih_l0"), (torch.randn(5, 2, 3),)


def attention(wrap):
    layer = nn.MultiheadAttention(4, 2)
    wrap(layer, "in_proj_weight")
    if wrap is not hook:  # attention does not call out_proj, so the old hook there never runs
        wrap(layer.out_proj)
    return layer, tuple(torch.randn(3, 5, 2, 4))


CASES = {
    "LSTM": lstm,
    "attention": attention,
    "Embedding": lambda wrap: (wrap(nn.Embedding(7, 4)), (torch.arange(7),)),
    "ConvTranspose1d": lambda wrap: (wrap(nn.ConvTranspose1d(3, 5, 4)), (torch.randn(2, 3, 6),)),
    "grouped Conv3d": lambda wrap: (wrap(nn.Conv3d(4, 6, 2, groups=2)), (torch.randn(1, 4, 3, 3, 3),)),
    "custom name and dim": lambda wrap: (wrap(Holder(torch.randn(4, 3, 2)), "kernel", dim=2), (torch.randn(5, 4),)),
    "bias": lambda wrap: (wrap(wrap(nn.Linear(3, 4)), "bias"), (torch.randn(2, 3),)),
    "channels_last": lambda wrap: (
        wrap(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)),
        (torch.randn(1, 4, 5, 5),),
    ),
    "float64": lambda wrap: (wrap(nn.Linear(4, 5).double()), (torch.randn(2, 4, dtype=torch.float64),)),
}


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@either
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_tensor(case, wrap):
    layer, inputs = case(wrap)
    for _ in range(3):
        layer(*inputs)
    expected = first(layer.eval()(*inputs))
    strides = {p.stride() for p in layer.parameters()}
    fastsn.convert(layer)
    torch.testing.assert_close(first(layer(*inputs)), expected, rtol=3e-6, atol=1e-6)
    assert {p.stride() for p in layer.parameters()} == strides
    assert not layer._forward_pre_hooks
    first(layer.train()(*inputs)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    keys = list(layer.state_dict())
    assert not any(key.endswith(("_orig", "weight_u", "weight_v")) for key in keys)
    assert fastsn.convert(layer) is layer
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_of_the_parametrization(dtype):
    layer = parametrizations.spectral_norm(nn.Linear(4, 5, dtype=dtype))
    x = torch.randn(2, 4, dtype=dtype)
    expected = used(layer, x).eval()(x)
    fastsn.convert(layer)
    assert isinstance(norm_of(layer), fastsn.SpectralNorm)
    torch.testing.assert_close(layer(x), expected)


def test_normalized_buffers():
    layer = nn.Module()
    layer.register_buffer("kernel", torch.randn(4, 3))
    parametrizations.spectral_norm(layer, "kernel")
    original, expected = layer.parametrizations.kernel.original, layer.eval().kernel
    fastsn.convert(layer)
    assert layer.parametrizations.kernel.original is original
    torch.testing.assert_close(layer.kernel, expected)


@either
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_modules_get_float32_vectors(wrap, dtype):
    layer, x = wrap(nn.Linear(6, 5)), torch.randn(2, 6)
    used(layer, x)
    layer.to(dtype)
    expected = layer.eval()(x.to(dtype))
    halves = [b.clone() for b in layer.buffers()]
    fastsn.convert(layer)
    assert [b.dtype for b in layer.buffers()] == [torch.float32] * 2
    assert all(torch.equal(a.float(), b) for a, b in zip(halves, layer.buffers(), strict=True))
    torch.testing.assert_close(layer(x.to(dtype)), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-2)


@either
def test_models_on_meta(wrap):
    if wrap is hook:
        model = discriminator(wrap).to("meta")
    else:
        with torch.device("meta"):
            model = discriminator(wrap)
    for variant in (None, "bsn"):
        fastsn.convert(model, variant)
        assert all(t.is_meta for t in model.state_dict().values())
        assert model(torch.randn(4, 1, 8, 8, device="meta")).shape == (4, 1)


def test_the_place_in_a_chain_of_parametrizations_is_kept():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    parametrizations.weight_norm(layer)
    for _ in range(2):
        parametrizations.spectral_norm(layer)
        parametrize.register_parametrization(layer, "weight", nn.Hardtanh())
    chain = layer.parametrizations.weight
    others = chain[0], chain[2], chain[4]
    expected = used(layer, x).eval()(x)
    keys, before = list(layer.state_dict()), snapshot(layer)
    fastsn.convert(layer)
    assert [type(part) is fastsn.SpectralNorm for part in chain] == [False, True, False, True, False]
    assert (chain[0], chain[2], chain[4]) == others
    assert list(layer.state_dict()) == keys
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # only what comes last may come out in another dtype
        assert layer.weight.dtype == torch.float32


def test_a_norm_that_several_tensors_share_stays_shared():
    norm = parametrizations.spectral_norm(nn.Linear(4, 4)).parametrizations.weight[0]
    a, b = nn.Linear(4, 4), nn.Embedding(4, 4)
    for layer in (a, b):
        parametrize.register_parametrization(layer, "weight", norm)
    fastsn.convert(nn.ModuleList([a, b]))
    assert norm_of(a) is norm_of(b)
    assert norm_of(a)._u is norm._u
    assert not norm_of(a).follows_autocast


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
@either
def test_the_weights_of_linear_and_convolution_layers_follow_autocast(wrap, kind):
    layer = {"Linear": nn.Linear(4, 5), "Conv2d": nn.Conv2d(2, 3, 2), "Embedding": nn.Embedding(4, 5)}[kind]
    fastsn.convert(wrap(layer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == (torch.float32 if kind == "Embedding" else torch.bfloat16)


@either
def test_hooks_of_others_stay_in_their_order(wrap):
    layer, calls, x = nn.Linear(4, 4), [], torch.randn(2, 4)
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    wrap(layer)
    handle = layer.register_forward_pre_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(lambda *_, **__: calls.append("with kwargs"), with_kwargs=True)
    layer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    layer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    fastsn.convert(layer)
    layer(x)
    layer.load_state_dict(layer.state_dict())
    assert calls == ["before", "after", "with kwargs", "forward", "saved", "loading"]
    handle.remove()
    layer(x)
    assert calls[6:] == ["before", "with kwargs", "forward"]


def test_hooks_on_torchs_norm_itself_move_to_ours():
    layer, seen = parametrizations.spectral_norm(nn.Linear(4, 4)), []
    handle = layer.parametrizations.weight[0].register_forward_hook(lambda norm, *_: seen.append(type(norm)))
    fastsn.convert(layer)
    _ = layer.weight
    handle.remove()
    _ = layer.weight
    assert seen == [fastsn.SpectralNorm]


@either
def test_a_converted_model_can_be_copied_and_saved(wrap):
    x = torch.randn(4, 1, 8, 8)
    model = fastsn.convert(used(discriminator(wrap), x))
    clone = copy.deepcopy(model)
    assert torch.equal(clone.eval()(x), model.eval()(x))
    assert not {id(t) for t in clone.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    clone.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="only supported through state_dict"):  # as torch says it
        pickle.dumps(model)


def test_converting_a_copy_leaves_the_original_alone():
    """Copies of a parametrized module share a class, in which parametrized tensors are properties."""
    model = parametrizations.spectral_norm(hook(nn.Linear(4, 4)), "bias")
    clones = [copy.deepcopy(model) for _ in range(2)]
    x = torch.randn(2, 4)
    expected = model.eval()(x)
    for clone in clones:
        fastsn.convert(clone.eval())
        torch.testing.assert_close(clone(x), expected)
        assert "weight" in clone.parametrizations
    assert torch.equal(model(x), expected)
    fastsn.fold(clones[0])
    assert type(clones[0]) is nn.Linear
    torch.testing.assert_close(clones[1](x), expected)


def test_an_lstm_can_be_copied_right_after_converting_though_its_hook_left_a_graph():
    layer, inputs = lstm(hook)
    layer(*inputs)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    fastsn.convert(layer)
    clone = copy.deepcopy(layer.eval())
    assert torch.equal(clone(*inputs)[0], layer(*inputs)[0])


@pytest.mark.parametrize("how", ["as it is", "copied", "assigned", "wrapped"])
def test_checkpoints_of_the_old_hook_load_strictly(how, tmp_path):
    x = torch.randn(4, 1, 8, 8)
    theirs = used(discriminator(hook), x)
    torch.save(theirs.state_dict(), tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt")
    ours = fastsn.convert(discriminator(hook))
    if how == "copied":
        ours = copy.deepcopy(ours)
    outer = nn.ModuleDict({"D": nn.Sequential(ours)}) if how == "wrapped" else ours
    if how == "wrapped":
        state = {f"D.0.{key}": value for key, value in state.items()}
    keys = list(state)
    outer.load_state_dict(state, strict=True, assign=how == "assigned")
    assert list(state) == keys  # the caller's dict is not touched
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=2e-6, atol=1e-6)
    outer.load_state_dict(outer.state_dict(), strict=True)  # the new keys too
    del state[next(key for key in keys if key.endswith("_v"))]
    lacking = pytest.warns(UserWarning, match="no u and v for")
    with lacking, pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.0\._v"):
        outer.load_state_dict(state, strict=True)


def before_torch_1(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Its state dict as the old hook stored it before torch 1.0: W / sigma instead of v, and no version."""
    state = model.state_dict()
    for key in [key for key in state if key.endswith("_orig")]:
        v, base = state.pop(key.removesuffix("_orig") + "_v"), key.removesuffix("_orig")
        path, _, tensor = base.rpartition(".")
        dim = next(h.dim for h in model.get_submodule(path)._forward_pre_hooks.values() if h.name == tensor)
        matrix = state[key].movedim(dim, 0).flatten(1) if state[key].ndim > 1 else state[key][:, None]
        state[base] = state[key] / torch.dot(state[base + "_u"], matrix @ v)
    for facts in state._metadata.values():
        facts.pop("spectral_norm", None)
    return state


@pytest.mark.parametrize("how", ["with metadata", "as a plain dict", "of a bias"])
def test_checkpoints_of_the_old_hook_from_before_torch_1_load_as_torch_loads_them(how):
    x = torch.randn(4, 1, 8, 8)
    if how == "of a bias":
        x, make = torch.randn(2, 3), lambda: hook(nn.Linear(3, 4), "bias")
    else:
        make = partial(discriminator, hook)
    state = before_torch_1(used(make(), x, 30))
    state = state if how == "with metadata" else dict(state)
    theirs, ours = make(), fastsn.convert(make())
    theirs.load_state_dict(state, strict=True)
    keys = list(state)
    ours.load_state_dict(state, strict=True)
    assert list(state) == keys
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=2e-6, atol=2e-6)
    current = fastsn.convert(theirs).state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, current[key], rtol=0, atol=0, msg=key)


def test_a_spare_weight_beside_the_current_keys_of_the_old_hook_is_as_unexpected_as_to_torch():
    state = hook(nn.Linear(3, 4)).state_dict()
    state["weight"] = state["weight_orig"].clone()
    for layer in (hook(nn.Linear(3, 4)), fastsn.convert(hook(nn.Linear(3, 4)))):
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
            layer.load_state_dict(state, strict=True)


def test_old_checkpoints_of_biases_have_vectors_that_nobody_needs_any_more():
    theirs = hook(nn.Linear(3, 4), "bias")
    theirs(torch.randn(2, 3))
    ours = fastsn.convert(hook(nn.Linear(3, 4), "bias"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_keys_are_renamed_only_where_there_is_a_parametrization():
    layer = fastsn.fold(fastsn.convert(hook(nn.Linear(3, 4))))
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"(.|\n)*Unexpected key.*"weight_orig"'):
        layer.load_state_dict(hook(nn.Linear(3, 4)).state_dict())
    plain = nn.Linear(3, 4)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(layer.weight, plain.weight)


def test_the_hook_for_old_keys_can_be_pickled():
    from fastsn.interop.torch_hook import OldKeys

    layer = fastsn.convert(hook(nn.Linear(3, 4)))
    state = dict(hook(nn.Linear(3, 4)).state_dict())
    (theirs,) = hook(nn.Linear(3, 4))._forward_pre_hooks.values()
    pickle.loads(pickle.dumps(OldKeys(theirs)))(layer, state, "", {}, True, [], [], [])
    assert sorted(state) == sorted(layer.state_dict())


@either
def test_a_compiled_model_is_compiled_anew(wrap):
    torch.compiler.reset()
    x = torch.randn(4, 1, 8, 8)
    shared = wrap(nn.Conv2d(4, 4, 3, padding=1), n_power_iterations=3)
    model = used(nn.Sequential(wrap(nn.Conv2d(1, 4, 3)), shared, shared, nn.Flatten(), wrap(nn.Linear(144, 1))), x)
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled.eval()(x)
    assert fastsn.convert(compiled, "ssn", scale=2.0) is compiled  # another scale shows what was run
    twin = copy.deepcopy(model)
    assert not torch.allclose(compiled(x), before, rtol=1e-3)
    torch.testing.assert_close(compiled(x), twin(x), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(compiled.train()(x), twin.train()(x), rtol=2e-6, atol=1e-6)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
