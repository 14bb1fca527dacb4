"""Finds the norms of a model and the tensors that they normalize."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import checks
from fastsn.layers import NormalizedLayer
from fastsn.norm import SpectralNorm


class Site(NamedTuple):
    """A norm of the tensor ``owner.tensor``, in a fastsn layer or in a chain of parametrizations (ParametrizationList).

    Attributes:
        name: its name in results: that of the owner, plus the tensor's unless that is ``weight``, plus the position if
            the tensor has several norms.
        norm: a SpectralNorm, or one of the classes that ``sites_of`` was asked for.
        chain: the tensor's parametrizations, if it has any.
        position: the norm's index in the chain; None for that of a fastsn layer, which comes after its chain.
        depth: how many other norms of the tensor come before it.
    """

    name: str
    owner: nn.Module
    tensor: str
    norm: Any
    chain: ParametrizationList | None
    position: int | None
    depth: int

    def value(self) -> Tensor:
        """The input of the norm, computed in evaluation mode so that no vector is updated."""
        if self.chain is None:
            value: Tensor = getattr(self.owner, self.tensor)
            return value
        if self.position == 0 and self.chain.is_tensor:
            return self.chain.original
        return evaluate_chain(self.chain, self.position)

    def weight(self) -> Tensor:
        """``value()``; TypeError or ValueError if it cannot be normalized."""
        return checks.weight(self.value(), self.where())

    def where(self) -> str:
        """Its name in errors: ``name``, or the class if the model itself is the layer."""
        return self.name or type(self.owner).__name__


def evaluate_chain(chain: ParametrizationList, count: int | None = None, use_cache: bool = True) -> Tensor:
    """The tensor after the first ``count`` parametrizations (default: all), each in evaluation mode; ``use_cache``:
    with the vectors of an active step."""
    names = ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]
    values = [getattr(chain, name) for name in names]
    for part in list(chain)[:count]:
        if isinstance(part, SpectralNorm):
            values = [part.evaluate_cached(*values) if use_cache else part.evaluate(*values)]
            continue
        modes = [(module, module.training) for module in part.modules()]
        try:
            values = [part.eval()(*values)]
        finally:
            for module, training in modes:
                module.training = training
    (value,) = values
    return value  # type: ignore[no-any-return]


def sites_of(module: nn.Module, prefix: str, kinds: tuple[type[nn.Module], ...] = (SpectralNorm,)) -> list[Site]:
    """The norms, of the classes ``kinds``, of tensors of this module, not of its children. ``prefix``: its name."""
    container = module._modules.get("parametrizations")
    chains = container._modules if isinstance(container, nn.ModuleDict) else {}
    own = module.spectral_norm if isinstance(module, NormalizedLayer) else None
    found: list[Site] = []
    for tensor in chains if own is None else {**chains, "weight": own}:
        chain = chains.get(tensor)
        norms: list[tuple[int | None, Any]] = []
        if not isinstance(chain, ParametrizationList):
            chain = None
        else:
            norms += [(i, part) for i, part in enumerate(chain._modules.values()) if isinstance(part, kinds)]
        if own is not None and tensor == "weight":
            norms.append((None, own))
        for depth, (position, norm) in enumerate(norms):
            name = prefix if tensor == "weight" else f"{prefix}.{tensor}".lstrip(".")
            if len(norms) > 1:
                name = f"{name}.{'spectral_norm' if position is None else position}".lstrip(".")
            found.append(Site(name, module, tensor, norm, chain, position, depth))
    return found


def sites(model: nn.Module) -> list[Site]:
    """Every norm of the model once, in the order of ``named_modules``.

    Takes about half a microsecond per module, normalized or not.
    """
    checks.module(model, "model")
    found: list[Site] = []
    _visit(model, "", found, {_identity(model)})
    return found


def _visit(module: nn.Module, prefix: str, found: list[Site], seen: set[object]) -> None:
    """Recursion of ``sites``. A nested function would be a reference cycle that keeps the model alive until a gc."""
    children = module._modules
    if isinstance(module, NormalizedLayer) or "parametrizations" in children:
        found.extend(sites_of(module, prefix))
    for name, child in children.items():
        if child is not None and (identity := _identity(child)) not in seen:
            seen.add(identity)
            if child._modules:
                _visit(child, f"{prefix}.{name}" if prefix else name, found, seen)


def _identity(module: nn.Module) -> object:
    """The same for all objects as which torch.export shows a shared module: these have one ``__dict__``, whose id
    Dynamo, which shows the modules themselves, cannot trace in torch 2.11."""
    return module if torch.compiler.is_dynamo_compiling() else id(module.__dict__)


def weights(model: nn.Module, vectors_too: bool = True) -> list[tuple[Site, Tensor]]:
    """All sites with their weights. Raises ValueError if a weight (or, with ``vectors_too``, a vector) is on meta."""
    found = []
    for site in sites(model):
        weight, scale = site.weight(), site.norm.scale
        if weight.is_meta:
            raise ValueError(
                f"weight of {site.where()!r} must have values, got a meta tensor: materialize the model first"
            )
        if vectors_too and isinstance(scale, Tensor) and scale.is_meta:
            raise ValueError(f"scale of {site.where()!r} must have values, got a meta tensor")
        if vectors_too and any(x is not None and x.is_meta for x in site.norm._buffers.values()):
            raise ValueError(
                f"u and v of {site.where()!r} must have values, got meta tensors: call fastsn.warm_up first"
            )
        found.append((site, weight))
    return found
