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


def test_without_it_evaluation_would_be_garbage():
    source, target = trained(), model()
    target.load_state_dict(
        {
            k: v if k in without_vectors(source.state_dict()) else target.state_dict()[k]
            for k, v in source.state_dict().items()
        }
    )
    assert any(
        abs(a.sigma) < 0.5 * b.sigma
        for a, b in zip(*(fastsn.sigmas(m).values() for m in (target, source)), strict=True)
    )


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
    with pytest.warns(UserWarning, match="no u and v for ''"):
        target.load_state_dict(source.state_dict(), strict=False)
    assert fastsn.sigmas(target)[""].sigma_in == pytest.approx(fastsn.sigmas(source)[""].sigma_in, rel=0.02)


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
