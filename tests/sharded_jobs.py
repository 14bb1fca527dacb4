"""What the ranks of test_sharded do, as rank_jobs has it for test_distributed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fastsn
from rank_jobs import ALIKE, batches, digest, loss_of


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shardable(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """``network`` with a learnt scale of one dimension: FSDP shards no scalars."""
    torch.manual_seed(0)
    return nn.Sequential(
        fastsn.BSSNConv2d(1, 4, 3, scale=1.2, dtype=dtype),
        nn.Tanh(),
        fastsn.spectral_norm(
            nn.Conv2d(4, 4, 3, dtype=dtype), variant="bssn", scale=nn.Parameter(torch.tensor([1.3], dtype=dtype))
        ),
        nn.Tanh(),
        nn.Flatten(),
        fastsn.spectral_norm(nn.Linear(16, 8, dtype=dtype)),
        fastsn.SNLinear(8, 1, dtype=dtype),
    )


def fsdp(rank: int) -> None:
    """Three training steps of a sharded model equal those of the whole one on all data: losses, weights, vectors."""
    model = shardable()
    twin = copy.deepcopy(model)
    model = sharded(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    data = batches(dist.get_world_size())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, *data[rank])
        loss.backward()
        expected = loss_of(twin, *data.transpose(0, 1).flatten(1, 2))
        expected.backward()
        dist.all_reduce(loss.detach_())
        torch.testing.assert_close(loss / dist.get_world_size(), expected.detach(), **ALIKE)
        for optimizer in optimizers:
            optimizer.step()
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    torch.testing.assert_close(whole, {name: p.detach() for name, p in twin.named_parameters()}, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-6, atol=1e-9)


def fsdp_in_half(rank: int) -> list[str]:
    """Weights gathered in bfloat16: u and v stay float32 and equal those of the bfloat16 weights."""
    model = shardable(torch.float32)
    twin = copy.deepcopy(model).bfloat16()
    model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    real, fake = batches(dist.get_world_size(), torch.float32)[rank]
    loss_of(model, real, fake).backward()
    loss_of(twin, real.bfloat16(), fake.bfloat16())
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=1e-6)
    return [str(x.dtype) for x in model.buffers()]


def fsdp_fused(rank: int, first: str) -> None:
    """A fused model that is sharded as one equals the whole one, whatever came ``first``; sharded layer by layer its
    weights are no weights yet when its forward begins."""
    model = shardable()
    twin = fastsn.fuse(copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = (
        fully_shard(fastsn.fuse(model), mesh=mesh) if first == "fuse" else fastsn.fuse(fully_shard(model, mesh=mesh))
    )
    data = batches(dist.get_world_size())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, *data[rank]).backward()
        loss_of(twin, *data.transpose(0, 1).flatten(1, 2)).backward()
        for optimizer in optimizers:
            optimizer.step()
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    torch.testing.assert_close(whole, {name: p.detach() for name, p in twin.named_parameters()}, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-6, atol=1e-9)
    by_layers = fastsn.fuse(sharded(shardable()))
    with pytest.raises(TypeError, match="0 must be a whole tensor, got a sharded DTensor"):
        by_layers(data[rank][0])


class InOneStep(nn.Module):
    """A network whose own forward holds the step: FSDP gathers before it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        with fastsn.step(self):
            return self.network(real).square().mean() - self.network(fake).mean()


def fsdp_step_in_forward(rank: int) -> None:
    """A module that is sharded as one unit may step in its forward."""
    model = InOneStep(shardable())
    twin = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    data = batches(dist.get_world_size())
    for _ in range(2):
        model(*data[rank]).backward()
        twin(*data.transpose(0, 1).flatten(1, 2)).backward()
    gathered = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.testing.assert_close(gathered, {name: p.grad for name, p in twin.named_parameters()}, **ALIKE)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), **ALIKE)


def fsdp_gathered(_: int) -> None:
    """After unshard() everything works as on the whole model."""
    model = shardable()
    twin = copy.deepcopy(model)
    model = sharded(model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    assert fastsn.sigmas(model) == fastsn.sigmas(twin)
    fastsn.warm_up(model)
    fastsn.warm_up(twin)
    assert digest(model.buffers()) == digest(twin.buffers())
    for unit in units:
        unit.reshard()
    with pytest.raises(TypeError):
        fastsn.sigmas(model)


def fsdp_repr(_: int) -> str:
    """Ranks may print alone, and some have no part of the scale."""
    return repr(sharded(shardable()))


def fsdp_outside_forward(_: int, kind: str) -> dict[str, str]:
    """The TypeErrors of functions on a whole model, called while its weights are sharded; then nothing has moved."""
    model = nn.Sequential(fastsn.SNLinear(4, 4) if kind == "layer" else fastsn.spectral_norm(nn.Linear(4, 4)))
    model = sharded(model)
    before, errors = digest(model.buffers()), {}
    calls = {
        "step": lambda: fastsn.step(model).__enter__(),
        "sigmas": lambda: fastsn.sigmas(model),
        "warm_up": lambda: fastsn.warm_up(model),
        "fold": lambda: fastsn.fold(model),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError) as error:
            call()
        errors[name] = str(error.value)
    assert digest(model.buffers()) == before
    model(torch.randn(2, 4)).sum().backward()  # and it still trains
    assert digest(model.buffers()) != before
    return errors
