"""What the ranks of test_users_distributed do, as rank_jobs has it for test_distributed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastsn
from rank_jobs import assert_same_gradients, batches, digest, network, normalized
from sharded_jobs import shardable, sharded


def around_evaluation(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Training, evaluation, training, then one backward of it all."""
    loss = model.train()(real).square().mean()
    loss = loss + 0.1 * model.eval()(fake).mean()
    return loss - model.train()(fake).square().mean()


def mixed_modes(rank: int, broadcast_buffers: bool) -> None:
    """Equals one process with all data, and the buffers stay the objects that they were, where they were."""
    model = network()
    twin = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    places, before = [(x, x.data_ptr()) for x in model.buffers()], digest(model.buffers())
    data = batches(dist.get_world_size())
    for _ in range(2):
        around_evaluation(ddp, *data[rank]).backward()
        around_evaluation(twin, *data.transpose(0, 1).flatten(1, 2)).backward()
        assert_same_gradients(model, twin)
    assert digest(model.buffers()) != before
    for x, (buffer, pointer) in zip(model.buffers(), places, strict=True):
        assert x is buffer
        assert x.data_ptr() == pointer


def other_seeds(rank: int, synced: bool) -> list[str]:
    """Each rank draws its own vectors, and nothing is broadcast but weights; digests of W̄ in 50 steps."""
    model = network(rank, torch.float32)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    if synced:
        fastsn.sync(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for i in range(50):
        optimizer.zero_grad()
        ddp(batches(dist.get_world_size(), torch.float32, i)[rank, 0]).square().mean().backward()
        optimizer.step()
        found.append(digest(normalized(model)))
    return found


def a_sharded_step(rank: int) -> str:
    """FSDP2: one training step equals that of the whole model. The error of a step on shards."""
    model = shardable()
    twin = copy.deepcopy(model)
    model = sharded(model)
    data = batches(dist.get_world_size())
    model(data[rank, 0]).square().mean().backward()
    twin(data[:, 0].flatten(0, 1)).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
    before = digest(model.buffers())
    with pytest.raises(TypeError) as error, fastsn.step(model):
        pass
    assert digest(model.buffers()) == before
    return str(error.value)
