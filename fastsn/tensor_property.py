"""A faster property for tensors whose only parametrization is a SpectralNorm: torch's own takes as long as the norm
itself, and three times as long as reading a cached W̄."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsn import torch_private
from fastsn.norm import SpectralNorm


def install_fast_property(module: nn.Module, tensor: str) -> None:
    """Replace torch's property on the class of a parametrized module, which only its copies share."""
    kind = type(module)
    torchs = kind.__dict__[tensor]
    if not hasattr(torchs.fget, "is_fast"):
        setattr(kind, tensor, property(_getter(tensor, torchs.fget), torchs.fset))


def _getter(tensor: str, torchs: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def get(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or torch_private.parametrizations_are_cached():
            return torchs(self)
        chain: Any = self._modules["parametrizations"]._modules[tensor]  # type: ignore[union-attr]
        own = chain.__dict__
        parts, original = own["_modules"], own["_parameters"].get("original")
        norm = parts.get("0")
        if (
            len(parts) == 1
            and original is not None
            and isinstance(norm, SpectralNorm)
            and "forward" not in own  # replaced during initialization, see fastsn/initialization.py
            and not torch_private.has_hooks(own)
        ):
            return norm.fast_call(original, eager=True)
        return torchs(self)

    get.is_fast = True  # type: ignore[attr-defined]
    return get
