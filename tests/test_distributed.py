"""DistributedDataParallel and fastsn.sync, on processes of this machine."""

from __future__ import annotations

import pytest
from torch import nn

import fastsn
import rank_jobs
from ranks import started


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    with started(3, tmp_path_factory.mktemp("three")) as ranks:
        yield ranks


# How many ranks there are is a matter of sync alone: three of them in one case.
@pytest.mark.parametrize(
    ("size", "broadcast_buffers", "scope"),
    [
        *(("two", buffers, scope) for buffers in (True, False) for scope in ("step", "fuse", "no")),
        ("three", False, "no"),
    ],
)
def test_after_sync_all_ranks_have_the_same_bits_at_every_step(request, size, broadcast_buffers, scope):
    first, *others = request.getfixturevalue(size)(rank_jobs.train, broadcast_buffers, True, scope)
    assert all(found == first for found in others)
    assert len(set(first)) == rank_jobs.STEPS  # and they do move


def test_a_run_is_repeatable_to_the_bit(two):
    assert two(rank_jobs.train, False, True, "no") == two(rank_jobs.train, False, True, "no")


def test_without_sync_ranks_keep_different_vectors(two):
    a, b = two(rank_jobs.train, False, False, "step")
    assert all(x[0] != y[0] and x[1] != y[1] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scope", ["module", "wrapper", "fuse", "no"])
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_forwards_and_a_backward_equal_one_process_with_all_data(two, broadcast_buffers, scope):
    two(rank_jobs.gradients, {"broadcast_buffers": broadcast_buffers}, scope)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_evaluation_between_two_forwards_equals_one_process_with_all_data(two, broadcast_buffers):
    two(rank_jobs.evaluation_between, broadcast_buffers)


@pytest.mark.parametrize("scope", ["wrapper", "fuse", "no"])
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_ways_of_ddp_to_walk_the_graph(two, option, scope):
    two(rank_jobs.gradients, {option: True}, scope)


# A step around the compiled model hands it weights: test_steps_and_the_compiler.
@pytest.mark.parametrize("scope", ["fuse", "no"])
def test_ddp_compiled(two, scope):
    two(rank_jobs.gradients, {}, scope, "aot_eager")


def test_accumulated_gradients_equal_the_big_batch(two):
    two(rank_jobs.accumulation)


def test_frozen_layers_iterate_alike_on_all_ranks(two):
    assert len(set(two(rank_jobs.frozen))) == 1


def test_sync_writes_in_place_and_only_what_belongs_to_norms(two):
    found = two(rank_jobs.sync_storage)
    assert len({digest for digest, _ in found}) == 1
    assert all(same for _, same in found)


def test_sync_of_a_group_takes_the_groups_first_rank(three):
    first, second, third = three(rank_jobs.sync_group)
    assert first == rank_jobs.digest(rank_jobs.network(0).buffers())
    assert second == third == rank_jobs.digest(rank_jobs.network(1).buffers())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fewer", "got 1.spectral_norm._u (torch.float32, [5], cpu 0) on rank 0 and nothing on rank 1 of the group"),
        ("shape", "got 1.spectral_norm._u (torch.float32, [5], cpu 0) on rank 0 and 1.spectral_norm._u "),
        ("dtype", "on rank 0 and 1.spectral_norm._u (torch.float64, [5], cpu 0) on rank 1"),
        ("name", "got 0.spectral_norm._u (torch.float32, [4], cpu 0) on rank 0 and 1.spectral_norm._u "),
        ("meta", "1.spectral_norm._u must have values, got a meta tensor on rank 1: materialize it"),
    ],
)
def test_models_that_differ_raise_on_every_rank(two, how, message):
    found = two(rank_jobs.unequal, how)
    assert found[0] == found[1]
    assert message in found[0]


def test_sync_needs_processes_and_a_model(two):
    message = r"sync needs an initialized torch.distributed: call torch.distributed.init_process_group on every rank"
    with pytest.raises(RuntimeError, match=message):
        fastsn.sync(nn.Linear(2, 2))
    assert two(rank_jobs.not_a_model) == ["model must be an nn.Module, got list"] * 2


def test_sync_of_a_model_without_norms_raises_on_every_rank(two):
    message = "model must have norms of fastsn, got none: call fastsn.convert on it first"
    assert two(rank_jobs.nothing_to_sync) == [message] * 2


def test_vectors_are_copied_out_of_ddp(two):
    two(rank_jobs.copy_through_ddp)
