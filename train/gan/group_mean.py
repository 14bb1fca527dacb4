"""The mean of tensors over the ranks that share a part of the batch, for batch norms."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gan.distributed import naming_peers


class _MeanOfGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _mean(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mean: Tensor = _MeanOfGroup.apply(gradient, ctx.group)
        return mean, None


def mean_of_group(x: Tensor, groups: int) -> Tensor:
    """Mean over the ranks that have parts of the same of ``groups`` equal parts of a batch; differentiable to any
    order."""
    mean: Tensor = _MeanOfGroup.apply(x, _neighbours(groups, dist.group.WORLD))
    return mean


def _mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with naming_peers():
        dist.all_reduce(total, group=group)
    return total / group.size()


@lru_cache
def _neighbours(groups: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that have parts of the same group as this one. Every rank makes all groups, as torch wants it."""
    size = world.size()
    each = size // groups
    made = [dist.new_group(list(range(first, first + each))) for first in range(0, size, each)]
    return made[dist.get_rank() // each]
