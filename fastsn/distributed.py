"""Keep u and v equal across copies of a model: the ranks of a distributed run, and an averaged (EMA) copy."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastsn import checks
from fastsn.norm import SpectralNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Module = TypeVar("Module", bound=nn.Module)

_WRAPPERS = (AveragedModel, DataParallel, DistributedDataParallel)


class _Entry(NamedTuple):
    """Description of a buffer that all ranks must agree on before it is sent; ``broadcast``: index of its broadcast."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    broadcast: int


@torch.no_grad()
def sync(model: Module, group: ProcessGroup | None = None) -> Module:
    """Give every rank the vectors of the group's rank 0, in place: u and v of every norm, and tensor scales that are
    not learnt.

    Ranks that draw from different seeds start with different u and v, and ``DistributedDataParallel`` with
    ``broadcast_buffers=False`` does not change that: same weights, different W̄. torch 2.13 deprecates that argument for
    ``forward_sync_buffers=False``, which gives all ranks the buffers of rank 0 once, at wrapping, so that ``sync`` is
    needed only for what changes u and v later on one rank alone. After one ``sync`` before training, ranks with equal
    weights keep equal bits, because the same input gives the same bits everywhere. It does not matter whether the model
    is wrapped before or after; weights and learnt scales are not touched. Collective: every rank of the group has to
    call it. One broadcast per device with vectors::

        model = DistributedDataParallel(build(), broadcast_buffers=False)  # from torch 2.13: forward_sync_buffers
        fastsn.sync(model)

    Args:
        model: a model with the same norms on every rank.
        group: the ranks that take part; all by default.

    Returns:
        The same model.

    Raises:
        RuntimeError: torch.distributed is missing or not initialized.
        TypeError: ``model`` is not a module.
        ValueError: this rank is not in the group; or, on every rank, models that differ or have no norms of fastsn, or
            vectors on the meta device. u and v are unchanged.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sync needs an initialized torch.distributed: call torch.distributed.init_process_group on every rank first"
        )
    checks.module(model, "model")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this rank, got one that does not")
    state = _state(model)
    devices = list(dict.fromkeys(x.device for x in state.values()))
    mine = [_Entry(n, (*x.shape,), str(x.dtype), x.device.type, devices.index(x.device)) for n, x in state.items()]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    _check_equal(gathered)
    checks.has_norms(_norms(model), "model")
    for device in devices:
        buffers = [x for x in state.values() if x.device == device]
        # As bytes: one call for all dtypes, also complex ones, which not every backend supports.
        parts = [x.reshape(-1).view(torch.uint8) for x in buffers]
        sent = torch.cat(parts)
        dist.broadcast(sent, group=group, group_src=0)
        for buffer, part in zip(buffers, torch.split(sent, [p.numel() for p in parts]), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # cloned: a wide dtype must be aligned
    return model


def _check_equal(gathered: list[list[_Entry]]) -> None:
    """The same ValueError on every rank, or none: a rank that raised alone would leave the others waiting."""
    for rank, theirs in enumerate(gathered):
        for entry in theirs:
            if entry.device == "meta":
                raise ValueError(f"{entry.name} must have values, got a meta tensor on rank {rank}: materialize it")
        for first, other in zip_longest(gathered[0], theirs):
            if first != other:
                raise ValueError(
                    f"model must have the same norms on every rank, got {_describe(first)} on rank 0 and "
                    f"{_describe(other)} on rank {rank} of the group"
                )


def _describe(entry: _Entry | None) -> str:
    if entry is None:
        return "nothing"
    return f"{entry.name} ({entry.dtype}, {list(entry.shape)}, {entry.device} {entry.broadcast})"


@torch.no_grad()
def copy_vectors(source: nn.Module, target: Module) -> Module:
    """Copy u and v of every norm of ``source`` into the norm of the same name in ``target``, in place.

    For the averaged copy of a model that trains. ``AveragedModel(use_buffers=True)`` averages u and v too, and an
    average of unit vectors is shorter than 1: evaluation, which takes them as they are, then divides by a sigma that is
    too small. After each update::

        ema.update_parameters(model)
        fastsn.copy_vectors(model, ema)

    The copied vectors belong to the weights of ``source``, which is close enough for an average that follows them
    closely. For one further away (an equal average of a whole run), and before any evaluation that must be exact,
    call ``fastsn.warm_up(ema)``.

    Args:
        source: the model that trains.
        target: its copy. Both may be wrapped in AveragedModel, DistributedDataParallel, DataParallel or by
            ``torch.compile``: names are those inside the wrappers.

    Returns:
        ``target``.

    Raises:
        TypeError: not modules.
        ValueError: a model without norms of fastsn, a norm that only one of them has, vectors of other shapes, vectors
            on the meta device. Nothing has been copied.
    """
    for model, argument in ((source, "source"), (target, "target")):
        checks.module(model, argument)
        checks.has_norms(_norms(model), argument)
    theirs, ours = (
        {name: x for name, x in _state(_unwrapped(model)).items() if name.rpartition(".")[2] != "scale"}
        for model in (source, target)
    )
    for name in [*theirs, *ours]:
        if name not in ours or name not in theirs:
            has, lacks = ("source", "target") if name in theirs else ("target", "source")
            raise ValueError(f"{lacks} must have the norms of {has}, got none with {name!r}")
        if theirs[name].shape != ours[name].shape:
            shapes = [list(x[name].shape) for x in (theirs, ours)]
            raise ValueError(f"{name!r} of target must have the shape in source, {shapes[0]}, got {shapes[1]}")
        for argument, found in (("source", theirs), ("target", ours)):
            if found[name].is_meta:
                raise ValueError(f"{name!r} of {argument} must have values, got a meta tensor")
    for name, vector in ours.items():
        vector.copy_(theirs[name])
    return target


def _norms(model: nn.Module) -> list[tuple[str, SpectralNorm]]:
    """Every SpectralNorm with its name, also those that are neither of a layer nor a parametrization."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, SpectralNorm)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of all norms by name: u and v, and ``scale`` where it is a tensor buffer."""
    return {name: x for path, norm in _norms(model) for name, x in norm.named_buffers(prefix=path, recurse=False)}


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        compiled = model._modules.get("_orig_mod")  # torch.compile's wrapper, whose class is slow to import
        inner = model.module if isinstance(model, _WRAPPERS) else compiled
        if not isinstance(inner, nn.Module):
            return model
        model = inner
