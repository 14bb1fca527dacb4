"""FSDP2: weights are whole inside forward, where the norms meet them, and shards outside."""

from __future__ import annotations

import pytest

import sharded_jobs


def test_training_a_sharded_model_equals_the_whole_one(two):
    two(sharded_jobs.fsdp)


def test_vectors_stay_float32_when_weights_are_gathered_in_bfloat16(two):
    assert {dtype for dtypes in two(sharded_jobs.fsdp_in_half) for dtype in dtypes} == {"torch.float32"}


@pytest.mark.parametrize("kind", ["layer", "drop-in"])
def test_outside_forward_functions_on_a_model_say_that_its_weights_are_sharded(two, kind):
    for errors in two(sharded_jobs.fsdp_outside_forward, kind):
        assert set(errors) == {"step", "sigmas", "warm_up", "fold"}
        expected = "0 must be a whole tensor, got a sharded DTensor: gather it first, as FSDP's forward does"
        assert set(errors.values()) == {expected}


def test_a_step_inside_the_forward_of_a_module_sharded_as_one(two):
    two(sharded_jobs.fsdp_step_in_forward)


@pytest.mark.parametrize("first", ["fuse", "shard"])
def test_a_fused_model_that_is_sharded_as_one(two, first):
    two(sharded_jobs.fsdp_fused, first)


def test_gathered_by_hand_a_model_is_measured_and_warmed_up(two):
    two(sharded_jobs.fsdp_gathered)


def test_a_learnt_scale_that_is_sharded_can_be_printed(two):
    assert all("scale=sharded (learnable)" in text for text in two(sharded_jobs.fsdp_repr))
