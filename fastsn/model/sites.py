"""Where the norms of a model sit."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import checks
from fastsn.layers import NormalizedLayer
from fastsn.norm import SpectralNorm


class Site(NamedTuple):
    """A norm in a fastsn layer, or number ``place`` of the ``chain`` of parametrizations of ``owner.tensor``; a layer's
    own stands behind its chain. ``depth``: how many other norms it stands behind."""

    name: str
    owner: nn.Module
    tensor: str
    norm: SpectralNorm
    chain: ParametrizationList | None
    place: int | None
    depth: int

    def weight(self) -> Tensor:
        """What the norm is applied to, in evaluation, so that nothing moves."""
        if self.chain is None:
            weight = getattr(self.owner, self.tensor)
        elif self.place == 0 and self.chain.is_tensor:
            weight = self.chain.original
        else:
            weight = evaluated(self.chain, self.place)
        return checks.weight(weight, self.where())

    def where(self) -> str:
        """What errors call it: its name, and the class of a model that is itself the layer."""
        return self.name or type(self.owner).__name__


def evaluated(chain: ParametrizationList, count: int | None = None, held: bool = True) -> Tensor:
    """The tensor after the first ``count`` parametrizations (default: all), each in evaluation mode; ``held`` takes
    the vectors of a step in force."""
    names = ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]
    values = [getattr(chain, name) for name in names]
    for part in list(chain)[:count]:
        if isinstance(part, SpectralNorm):
            values = [part.peek(*values) if held else part.evaluate(*values)]
            continue
        modes = [(module, module.training) for module in part.modules()]
        try:
            values = [part.eval()(*values)]
        finally:
            for module, training in modes:
                module.training = training
    (value,) = values
    return value  # type: ignore[no-any-return]


def sites(model: nn.Module) -> list[Site]:
    """Every norm of the model once, in the order of ``named_modules``.

    A training step asks for it, and every module of the model, normalized or not, costs it half a microsecond.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found: list[Site] = []
    seen: set[nn.Module] = {model}

    def visit(module: nn.Module, prefix: str) -> None:
        children = module._modules
        if isinstance(module, NormalizedLayer) or "parametrizations" in children:
            found.extend(_sites_of(module, prefix))
        for name, child in children.items():
            if child is not None and child not in seen:
                seen.add(child)
                if child._modules:
                    visit(child, f"{prefix}.{name}" if prefix else name)

    visit(model, "")
    return found


def weights(model: nn.Module, vectors_too: bool = True) -> list[tuple[Site, Tensor]]:
    """All sites with their weights, once all of them (and all vectors) are known to have values: else nothing moves."""
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


def _sites_of(module: nn.Module, prefix: str) -> list[Site]:
    modules = module._modules.get("parametrizations")
    chains = modules._modules if isinstance(modules, nn.ModuleDict) else {}
    found: list[Site] = []
    for tensor, chain in chains.items():
        assert isinstance(chain, ParametrizationList)
        parts = [(i, part) for i, part in enumerate(chain._modules.values()) if isinstance(part, SpectralNorm)]
        several = len(parts) > 1 or (tensor == "weight" and isinstance(module, NormalizedLayer))
        for depth, (i, part) in enumerate(parts):
            found.append(Site(_name(prefix, tensor, str(i) if several else ""), module, tensor, part, chain, i, depth))
    if isinstance(module, NormalizedLayer):
        before, depth = chains.get("weight"), sum(site.tensor == "weight" for site in found)
        assert before is None or isinstance(before, ParametrizationList)
        name = _name(prefix, "weight", "spectral_norm" if depth else "")
        found.append(Site(name, module, "weight", module.spectral_norm, before, None, depth))
    return found


def _name(prefix: str, tensor: str, position: str) -> str:
    """Of the owner; of the tensor too, unless it is ``weight``; with a position among several norms of one tensor."""
    return ".".join(filter(None, (prefix, "" if tensor == "weight" else tensor, position)))
