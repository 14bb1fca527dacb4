"""A small part of ``make fuzz``, and that it sees what is wrong."""

import pytest
import torch

import fastsn
import fuzz
from conftest import ON
from fuzz_cases import Case, drawn

pytestmark = pytest.mark.skipif(bool(ON), reason="the fuzz is of the CPU, and brings the interpreter itself")


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_single_weights_are_normalized_as_the_oracle_says(impl):
    if not fastsn.backends()[impl].available:
        pytest.skip(fastsn.backends()[impl].detail)
    done, failures, _ = fuzz.run(impl, cases=250, seed=0)
    assert failures == []
    for what in ("vectors", "W̄", "gradients"):
        claimed, not_claimed = done.claimed[what, True], done.claimed[what, False]
        assert claimed > 8 * not_claimed, what


@pytest.mark.usefixtures("triton_kernels")
def test_the_interpreted_kernels_normalize_as_the_oracle_says():
    pytest.importorskip("triton")
    assert fuzz.run("triton", cases=5, seed=0)[1] == []


def _a_little_off(norm, weight):
    return _forward(norm, weight) * 1.0001


def _iterates_in_evaluation(norm, weight):
    return _forward(norm.train(), weight)


def _writes_to_the_weight(norm, weight):
    result = _forward(norm, weight)
    weight.data.mul_(0.5)
    return result


def _hangs_on_chance(norm, weight):
    result = _forward(norm, weight)
    value = result.detach()  # torch before 2.13 cannot differentiate nextafter
    return result + (torch.nextafter(value, value + torch.randn(())) - value)


_forward = fastsn.SpectralNorm.forward


@pytest.mark.parametrize("wrong", [_a_little_off, _iterates_in_evaluation, _writes_to_the_weight, _hangs_on_chance])
def test_a_norm_that_is_wrong_fails(monkeypatch, wrong):
    monkeypatch.setattr(fastsn.SpectralNorm, "forward", wrong)
    case = Case(shape=(5, 4, 3), rounds=0, variant="bsn")
    with pytest.raises(fuzz.Failure):
        fuzz.Fuzz("reference").check(case)


def test_a_case_is_printed_as_what_repeats_it():
    cases = [drawn(seed, complex_too=True) for seed in range(50)]
    assert [Case.parse(str(case)) for case in cases] == cases


def test_the_smallest_case_still_fails(monkeypatch):
    def wrong_for_convolutions(norm, weight):
        return _forward(norm, weight) * (2 if weight.ndim > 2 else 1)

    monkeypatch.setattr(fastsn.SpectralNorm, "forward", wrong_for_convolutions)
    found = fuzz.Fuzz("reference").smallest(Case(shape=(5, 4, 3, 3), variant="bssn", scale_value=2.0, layout="sliced"))
    assert found == Case(shape=(1, 1, 1), rounds=found.rounds)
