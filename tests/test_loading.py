"""Checkpoints without u and v: the vectors are brought to the loaded weights, and one warning says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn


def model() -> nn.Sequential:
    return nn.Sequential(
        fastsn.BSSNConv2d(3, 8, 3, scale=1.4),
        nn.Sequential(fastsn.spectral_norm(nn.Linear(20, 10)), fastsn.SNConvTranspose2d(4, 6, 3)),
        fastsn.spectral_norm(nn.Conv2d(8, 8, 3), variant="bsn"),
        nn.BatchNorm1d(3),
    )


def without_vectors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.split(".")[-1] not in ("_u", "_v", "_u_in", "_v_in")}


def trained() -> nn.Sequential:
    net = model()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return fastsn.warm_up(net, 50)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_vectors_that_a_checkpoint_lacks_are_warmed_up_with_one_warning(assign, mode):
    source, target = trained(), model().train(mode)
    with pytest.warns(UserWarning, match="no u and v for '0'.*brought to the loaded weights") as caught:
        missing, _ = target.load_state_dict(without_vectors(source.state_dict()), strict=False, assign=assign)
    assert len(caught) == 1
    assert len(missing) == 12
    for name, found in fastsn.sigmas(target).items():
        expected = fastsn.sigmas(source)[name]
        assert found.sigma == pytest.approx(expected.sigma, rel=0.1), name
    with pytest.warns(UserWarning, match="no u and v"):  # the next checkpoint warns again
        target.load_state_dict(without_vectors(source.state_dict()), strict=False)


def test_a_whole_checkpoint_and_one_of_another_part_change_no_vector_and_warn_of_nothing():
    source, target = trained(), model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(source.buffers(), target.buffers(), strict=True))
        before = copy.deepcopy(target.state_dict())
        target.load_state_dict({k: v for k, v in source.state_dict().items() if k.startswith("3")}, strict=False)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_a_view_that_the_checkpoint_does_not_know():
    """A checkpoint of SN in a layer of BSSN."""
    source = fastsn.warm_up(fastsn.SNConv2d(3, 8, 3), 50)
    target = fastsn.BSSNConv2d(3, 8, 3)
    with pytest.warns(UserWarning, match="no u_in and v_in for ''"):
        assert not target.load_state_dict(source.state_dict(), strict=True).missing_keys
    assert fastsn.sigmas(target)[""].sigma_in == pytest.approx(fastsn.sigmas(source)[""].sigma_in, rel=0.02)
    for name in ("_u", "_v"):  # those that came are taken as they are
        assert torch.equal(getattr(target.spectral_norm, name), getattr(source.spectral_norm, name))


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_sn_load_strictly_into_a_model_converted_to_bssn(wrap, assign):
    def make() -> nn.Sequential:
        return nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.Flatten(), wrap(nn.Linear(8 * 16, 2)))

    source, x = make(), torch.randn(2, 3, 6, 6)
    for _ in range(50):
        source(x)
    state = copy.deepcopy(source.state_dict())
    ours = fastsn.convert(make(), "bssn", scale=1.4)
    with pytest.warns(UserWarning, match="no u_in and v_in for '0") as caught:
        ours.load_state_dict(state, strict=True, assign=assign)
    assert len(caught) == 1
    loaded_first = fastsn.convert(source, "bssn", scale=1.4)
    for name, value in loaded_first.state_dict().items():
        if not name.endswith("_in"):
            assert torch.equal(ours.state_dict()[name], value), name
    for name, sigmas in fastsn.sigmas(loaded_first).items():
        assert fastsn.sigmas(ours)[name].sigma == pytest.approx(sigmas.sigma, rel=0.05)
    half = {key: value for key, value in loaded_first.state_dict().items() if not key.endswith("_v_in")}
    with (
        pytest.warns(UserWarning, match="has no u"),
        pytest.raises(RuntimeError, match=r'Missing key.*"0.parametrizations.weight.0._v_in'),
    ):
        ours.load_state_dict(half, strict=True)  # half a view is no checkpoint of another variant


FOREIGN = {
    "torch": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)).state_dict(),
    "torch_hook": lambda: nn.utils.spectral_norm(nn.Linear(3, 4)).state_dict(),
    "biggan": lambda: nn.Linear(3, 4).state_dict() | {"u0": torch.randn(1, 4), "sv0": torch.ones(1)},
    "mimicry": lambda: nn.Linear(3, 4).state_dict() | {"sn_u": torch.randn(1, 4), "sn_sigma": torch.ones(1)},
}


@pytest.mark.parametrize("layout", FOREIGN)
@pytest.mark.filterwarnings("ignore:the checkpoint has no u and v")
def test_the_error_for_a_checkpoint_of_another_implementation_names_convert_state_dict(layout):
    state = {f"{i}.{key}": value for i in (0, 1) for key, value in FOREIGN[layout]().items()}
    net = nn.Sequential(fastsn.SNLinear(3, 4), fastsn.SNLinear(3, 4))
    with pytest.raises(RuntimeError, match=r"Missing key.*fastsn\.convert_state_dict\(state, to='fastsn'\)") as error:
        net.load_state_dict(state)
    assert str(error.value).count("convert_state_dict") == 1
    missing, _ = net.load_state_dict(state, strict=False)  # nothing else is different
    assert {*missing} <= {*net.state_dict()}
    assert repr(missing).count("convert_state_dict") == 0
    net.load_state_dict(fastsn.convert_state_dict(state, to="fastsn"))


def test_the_error_for_a_plain_checkpoint_says_how_it_loads():
    net, plain = nn.Sequential(fastsn.SNLinear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    with (
        pytest.warns(UserWarning, match="has no u"),
        pytest.raises(RuntimeError, match=r"Missing key.*load_state_dict\(state, strict=False\)"),
    ):
        net.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="no u and v"):
        net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net[0].weight, plain[0].weight)
    assert fastsn.sigmas(net)["0"].sigma == pytest.approx(
        torch.linalg.matrix_norm(net[0].weight.detach(), 2).item(), rel=0.1
    )
    with pytest.raises(RuntimeError, match="Missing key") as error:
        net.load_state_dict({})
    assert "strict=False" not in str(error.value)


def test_strict_loading_still_says_what_is_missing():
    with pytest.warns(UserWarning, match="no u and v"), pytest.raises(RuntimeError, match=r"0\.spectral_norm\._u"):
        model().load_state_dict(without_vectors(model().state_dict()))


def test_stacked_norms_are_warmed_up_in_their_order():
    with pytest.warns(UserWarning, match="has a spectral norm already"):
        layer = fastsn.spectral_norm(fastsn.spectral_norm(nn.Linear(6, 5)), variant="ssn", scale=2.0)
    source = copy.deepcopy(layer)
    with torch.no_grad():
        source.parametrizations.weight.original.normal_()
    fastsn.warm_up(source, 100)
    with pytest.warns(UserWarning, match="no u and v"):
        layer.load_state_dict(without_vectors(source.state_dict()), strict=False)
    fastsn.warm_up(layer, 100)
    torch.testing.assert_close(layer.eval().weight, source.eval().weight)


def test_vectors_on_meta_are_drawn_for_the_weights_that_are_assigned():
    source = trained()
    with torch.device("meta"):
        target = model()
    with pytest.warns(UserWarning, match="no u and v"):
        target.load_state_dict(without_vectors(source.state_dict()), strict=False, assign=True)
    for name, found in fastsn.sigmas(target).items():
        assert found.sigma == pytest.approx(fastsn.sigmas(source)[name].sigma, rel=0.1), name


def test_copies_and_folded_layers_load():
    target = copy.deepcopy(model())
    with pytest.warns(UserWarning, match="no u and v"):
        target.load_state_dict(without_vectors(model().state_dict()), strict=False)
    folded = fastsn.fold(target)
    folded.load_state_dict(folded.state_dict())
    assert all(not module._load_state_dict_post_hooks for module in folded.modules())


@pytest.mark.parametrize("before", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("after", [fastsn.spectral_norm, None])
def test_a_weight_that_other_parametrizations_make(before, after):
    """Of a layer, or with the norm in the same chain: absent from one checkpoint, without vectors in another."""
    layer = before(fastsn.SNLinear(5, 5) if after is None else nn.Linear(5, 5))
    net = nn.Sequential(layer if after is None else after(layer), nn.Linear(5, 2))
    vectors = {k: v.clone() for k, v in net.state_dict().items() if k.endswith(("_u", "_v"))}
    assert len(vectors) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict({k: v for k, v in net.state_dict().items() if k.startswith("1")}, strict=False)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in vectors.items())
    with pytest.warns(UserWarning, match="no u and v"):
        net.load_state_dict(without_vectors(net.state_dict()), strict=False)
    assert not all(torch.equal(net.state_dict()[k], v) for k, v in vectors.items())


def test_a_norm_without_an_owner_that_could_bring_its_vectors_to_a_weight_promises_nothing():
    norm = fastsn.SpectralNorm(torch.randn(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm.load_state_dict({}, strict=False).missing_keys == ["_u", "_v"]
