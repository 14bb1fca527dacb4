"""Initialisation of modules that are normalised already: what ``model.apply(fn)`` and ``reset_parameters`` write into a
normalised tensor becomes the tensor that is normalised. By itself it would be lost with W̄, which is made anew for each
use, as under torch's parametrization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastsn.norm import SpectralNorm
from fastsn.sites import evaluated


def initialisable(module: nn.Module) -> None:
    """Give a parametrized module, whose class is its own or that of its copies, methods that see to it."""
    kind: Any = type(module)
    if kind.apply is not _apply:
        kind.apply = _apply
        if hasattr(kind, "reset_parameters"):
            kind.reset_parameters = _reset_parameters


def _apply(self: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    def keeping(module: nn.Module) -> None:
        if module is self:
            with _kept(module):
                fn(module)
        else:
            fn(module)

    _before(self).apply(self, keeping)
    return self


def _reset_parameters(self: nn.Module) -> None:
    with _kept(self):
        _before(self).reset_parameters(self)


def _before(module: nn.Module) -> Any:
    """The class that it had before it was parametrized."""
    return type(module).__bases__[0]


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Serve one W̄ for the block. Where something has been written into it, store that and bring u and v to it."""
    chains = {tensor: chain for tensor, chain in _chains(module) if _has_values(chain)}
    with torch.no_grad():
        served = {tensor: evaluated(chain, held=False).clone() for tensor, chain in chains.items()}
        before = {tensor: value.clone() for tensor, value in served.items()}
    try:
        for tensor, chain in chains.items():  # not by parametrize.cached(), whose keys copies share
            chain.forward = partial(_itself, served[tensor])  # type: ignore[method-assign]
        yield
    finally:
        for chain in chains.values():
            del chain.forward
    with torch.no_grad():
        for tensor, chain in _chains(module):
            if chains.get(tensor) is chain and not _same(served[tensor], before[tensor]):
                _store(module, tensor, chain, served[tensor])


def _itself(value: Tensor) -> Tensor:
    return value


def _chains(module: nn.Module) -> list[tuple[str, ParametrizationList]]:
    """Those with a norm of fastsn."""
    found = module._modules.get("parametrizations")
    items = found.items() if isinstance(found, nn.ModuleDict) else ()
    return [
        (tensor, chain)
        for tensor, chain in items
        if isinstance(chain, ParametrizationList) and any(isinstance(part, SpectralNorm) for part in chain)
    ]


def _has_values(chain: ParametrizationList) -> bool:
    stored = [*chain.parameters(), *chain.buffers()]
    return not any(x.is_meta or hasattr(x, "_local_tensor") for x in stored)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _store(module: nn.Module, tensor: str, chain: ParametrizationList, value: Tensor) -> None:
    if len(chain) == 1:
        chain.original.copy_(value)
    else:
        setattr(module, tensor, value)  # each parametrization is asked for what gives it
    for place, part in enumerate(chain):
        if isinstance(part, SpectralNorm):
            part.warm_up(evaluated(chain, place, held=False))
