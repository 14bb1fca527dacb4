"""What the ranks of test_distributed do. Every job runs on each rank at once, ``rank`` first."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsn

EACH = 4  # images of a rank and batch
STEPS = 20
ALIKE = {"rtol": 1e-9, "atol": 1e-12}  # float64: only the order of sums differs


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers and drop-ins, both views, u and v, fixed and learnt scales by ``seed``."""
    torch.manual_seed(seed)
    learnt = nn.Parameter(torch.tensor(1.3, dtype=dtype))
    return nn.Sequential(
        fastsn.BSSNConv2d(1, 4, 3, scale=torch.tensor(1.2 + seed / 10, dtype=dtype), dtype=dtype),
        nn.Tanh(),
        fastsn.spectral_norm(nn.Conv2d(4, 4, 3, dtype=dtype), variant="bssn", scale=learnt),
        nn.Tanh(),
        nn.Flatten(),
        fastsn.spectral_norm(nn.Linear(16, 8, dtype=dtype)),
        fastsn.SNLinear(8, 1, dtype=dtype),
    )


def batches(size: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """(rank, real or fake, image, ...): the same numbers on every rank."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, EACH, 1, 6, 6, dtype=dtype, generator=draw)


def digest(tensors: Any) -> str:
    """The bits of tensors as a text that can be compared between ranks."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def normalized(model: nn.Module) -> list[Tensor]:
    """Each W̄ that the next forward would use."""
    with torch.no_grad(), fastsn.step(model, advance=False):
        layers = [m for m in model.modules() if hasattr(m, "normalized") or hasattr(m, "parametrizations")]
        return [m.normalized()[0] if hasattr(m, "normalized") else m.weight for m in layers]


def loss_of(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Two forwards before one backward, as discriminators have it."""
    return model(real).square().mean() - model(fake).mean()


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """And the same buffers; at least one gradient is there."""
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), **ALIKE)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, **ALIKE)


def train(rank: int, broadcast_buffers: bool, synced: bool, scope: str) -> list[tuple[str, str]]:
    """Steps from other vectors, scales and data on each rank; digests of u, v and of W̄ at the start of each.
    ``scope``: "step", "fuse" or "no"."""
    model = network(rank, torch.float32)
    if scope == "fuse":
        fastsn.fuse(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    if synced:
        assert fastsn.sync(ddp) is ddp
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for i in range(STEPS):
        real, fake = batches(dist.get_world_size(), torch.float32, i)[rank]
        found.append((digest(model.buffers()), digest(normalized(model))))
        optimizer.zero_grad()
        with fastsn.step(model) if scope == "step" else nullcontext():
            loss_of(ddp, real, fake).backward()
        optimizer.step()
    return found


def gradients(rank: int, options: dict[str, Any], scope: str, backend: str | None = None) -> None:
    """Three steps equal those of a single process with all batches joined. ``scope``: the module that is stepped,
    "fuse" or "no". ``backend``: compiled by it."""
    model = network()
    if scope == "fuse":
        fastsn.fuse(model)
    twin = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, **options)
    forward = torch.compile(ddp, backend=backend) if backend else ddp
    data = batches(dist.get_world_size())
    joined = data.transpose(0, 1).flatten(1, 2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        stepped = {"module": model, "wrapper": ddp}.get(scope)
        with fastsn.step(stepped) if stepped else nullcontext():
            loss_of(forward, *data[rank]).backward()
        with fastsn.step(twin) if stepped else nullcontext():
            loss_of(twin, *joined).backward()
        assert_same_gradients(model, twin)
        for optimizer in optimizers:
            optimizer.step()


def evaluation_between(rank: int, broadcast_buffers: bool) -> None:
    """Training, evaluation, training, then one backward of it all equals one process with all data, and the buffers
    stay the objects that they were, where they were."""
    model = network()
    twin = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    places, before = [(x, x.data_ptr()) for x in model.buffers()], digest(model.buffers())
    data = batches(dist.get_world_size())
    for _ in range(2):
        for net, (real, fake) in ((ddp, data[rank]), (twin, data.transpose(0, 1).flatten(1, 2))):
            loss = net.train()(real).square().mean() + 0.1 * net.eval()(fake).mean()
            (loss - net.train()(fake).square().mean()).backward()
        assert_same_gradients(model, twin)
    assert digest(model.buffers()) != before
    for x, (buffer, pointer) in zip(model.buffers(), places, strict=True):
        assert x is buffer
        assert x.data_ptr() == pointer


def accumulation(rank: int) -> None:
    """Two halves of the data, the first without communication, equal the big batch."""
    model = network()
    twin = copy.deepcopy(model)
    ddp = DistributedDataParallel(model)
    data = batches(dist.get_world_size())
    halves = [data[rank][:, : EACH // 2], data[rank][:, EACH // 2 :]]
    with fastsn.step(ddp):
        with ddp.no_sync():
            (loss_of(ddp, *halves[0]) / 2).backward(retain_graph=True)
        (loss_of(ddp, *halves[1]) / 2).backward()
    with fastsn.step(twin):
        loss_of(twin, *data.transpose(0, 1).flatten(1, 2)).backward()
    assert_same_gradients(model, twin)


def frozen(rank: int) -> str:
    """A layer without gradients iterates like any other; the rest trains. Digest of all vectors and weights."""
    model = network()
    model[0].requires_grad_(False)
    twin, before = copy.deepcopy(model), digest(model[0].buffers())
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    data = batches(dist.get_world_size())
    loss_of(ddp, *data[rank]).backward()
    loss_of(twin, *data.transpose(0, 1).flatten(1, 2)).backward()
    assert_same_gradients(model, twin)
    assert model[0].weight.grad is None
    assert digest(model[0].buffers()) != before
    return digest([*model.buffers(), *model.parameters()])


def sync_storage(rank: int) -> tuple[str, bool]:
    """Digest after sync of a model of many dtypes, and whether every buffer stayed where it was."""
    torch.manual_seed(rank)
    model = nn.ModuleList(
        [
            fastsn.BSSNConv2d(2, 3, 3, scale=torch.tensor(1.0 + rank / 8, dtype=torch.float16)),
            fastsn.spectral_norm(nn.Linear(3, 5, dtype=torch.complex64)),
            fastsn.spectral_norm(nn.Linear(3, 5, dtype=torch.float64)),
            fastsn.SNLinear(3, 5, dtype=torch.bfloat16),
            nn.BatchNorm1d(3),
            fastsn.SpectralNorm(torch.randn(3, 4)),  # of a module that calls it by itself
        ]
    )
    model[4].running_mean.fill_(rank)
    places = {name: (x, x.data_ptr()) for name, x in model.named_buffers()}
    weights = digest(model.parameters())
    fastsn.sync(model)
    same = all(x is places[name][0] and x.data_ptr() == places[name][1] for name, x in model.named_buffers())
    assert digest(model.parameters()) == weights
    assert float(model[4].running_mean[0]) == rank  # not a norm's
    return digest(x for name, x in model.named_buffers() if not name.startswith("4.")), same


def sync_group(rank: int) -> str:
    """The first rank stays as it is, the others follow the second."""
    group = dist.new_group([1, 2])
    model = network(rank)
    if rank == 0:
        with pytest.raises(ValueError, match="group must contain this rank, got one that does not"):
            fastsn.sync(model, group)
    else:
        fastsn.sync(model, group)
    return digest(model.buffers())


def unequal(rank: int, how: str) -> str:
    """The error of every rank for models that differ; afterwards the group still works."""
    layers = [fastsn.SNLinear(3, 4), fastsn.SNLinear(4, 5)]
    if rank == 1:
        if how == "fewer":
            del layers[1]
        elif how == "shape":
            layers[1] = fastsn.SNLinear(4, 6)
        elif how == "dtype":
            layers[1].double()
        elif how == "name":
            layers.insert(0, nn.ReLU())
        elif how == "meta":
            layers[1].to("meta")
    model = nn.Sequential(*layers)
    before = digest(x for x in model.buffers() if not x.is_meta)
    with pytest.raises(ValueError, match="rank 1") as error:
        fastsn.sync(model)
    assert digest(x for x in model.buffers() if not x.is_meta) == before
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == dist.get_world_size()
    return str(error.value)


def not_a_model(_: int) -> str:
    """The error for something that is no module."""
    with pytest.raises(TypeError) as error:
        fastsn.sync([])  # type: ignore[type-var]
    return str(error.value)


def nothing_to_sync(_: int) -> str:
    """The error for a model without norms."""
    with pytest.raises(ValueError, match="norms") as error:
        fastsn.sync(nn.Linear(2, 2))
    return str(error.value)


def copy_through_ddp(rank: int) -> None:
    """copy_vectors looks inside DistributedDataParallel."""
    model, target = network(rank), network(rank + 10)
    fastsn.copy_vectors(DistributedDataParallel(model), target)
    scales = {name for name, _ in target.named_buffers() if name.endswith(".scale")}
    assert len(scales) == 1
    for name, vector in target.named_buffers():
        assert name in scales or torch.equal(vector, model.get_buffer(name))
