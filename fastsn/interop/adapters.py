"""Adapters through which ``convert`` reads and replaces norms: one per kind of norm, and one for plain layers.

That of torch's old hook is in ``torch_hook``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchNorm
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import layers, normalize, variants, views
from fastsn.layers import NormalizedLayer
from fastsn.model.sites import Site, evaluate_chain
from fastsn.norm import SpectralNorm
from fastsn.parametrize import adapt, chain_of, follows_autocast, unshare_class


class Adapter(ABC):
    """A tensor of a model that may get a norm. ``kind``: its name in the log; ``where``: the name of the tensor;
    ``norm``: the module that normalizes it now, if there is one."""

    def __init__(self, kind: str, path: str, owner: nn.Module, tensor: str, norm: nn.Module | None = None) -> None:
        self.kind, self.owner, self.tensor, self.norm = kind, owner, tensor, norm
        self.where = f"{path}.{tensor}".strip(".")

    def modules(self) -> set[nn.Module]:
        """The modules that skip the tensor if they are named in ``skip``."""
        return {self.owner} if self.norm is None else {self.owner, self.norm}

    @abstractmethod
    def obstacle(self) -> str | None:
        """Why the tensor cannot be converted; None if it can. The other methods require None."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The input of the norm; no vector is updated."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of a SpectralNorm that continues from the current state."""

    @abstractmethod
    def put(self, norm: SpectralNorm) -> None:
        """Install the norm on the tensor, without calling it, so that no vector is updated."""


class _NormAdapter(Adapter):
    """Base class for norms that are modules."""

    norm: nn.Module

    def __init__(self, kind: str, path: str, site: Site) -> None:
        super().__init__(kind, path, site.owner, site.tensor, site.norm)
        self._site = site

    def obstacle(self) -> str | None:
        norm = self.norm
        if type(norm) not in (TorchNorm, SpectralNorm):
            return f"{type(norm).__name__} is a subclass of a spectral norm"
        if type(norm) is TorchNorm and set(norm._buffers) not in (set(), {"_u", "_v"}):
            return "its u and v are not its own: something else has changed them"
        if norm._load_state_dict_pre_hooks:
            return "it has hooks of its own for loading, which are bound to it"
        return None

    def weight(self) -> Tensor:
        with nullcontext() if self._site.chain is None else _no_autocast(self._site.chain):
            return self._site.value()

    def settings(self) -> dict[str, Any]:
        norm, chain = self.norm, self._site.chain
        rounds = getattr(norm, "n_power_iterations", 1)  # a norm of a 1-D tensor has none
        settings = {"n_power_iterations": rounds, "dim": norm.dim, "eps": norm.eps}
        if isinstance(norm, SpectralNorm):
            settings |= {"impl": norm.impl, "v_first": norm.v_first}
            return {**settings, "vectors": norm.vectors(), "follows_autocast": norm.follows_autocast}
        last = chain is not None and self._site.position == len(chain) - 1
        castable = follows_autocast(self.owner, self.tensor) and not isinstance(self.owner, NormalizedLayer)
        vectors = {"out": (norm._buffers["_u"], norm._buffers["_v"])} if norm._buffers else {}  # none for a 1-D tensor
        return {**settings, "vectors": vectors, "follows_autocast": last and castable}

    def put(self, norm: SpectralNorm) -> None:
        """Copy the training mode and user hooks of the old norm."""
        norm.training = self.norm.training
        norm.__dict__.update({name: value for name, value in self.norm.__dict__.items() if "_hook" in name})


class Parametrization(_NormAdapter):
    """A norm in a chain of parametrizations, torch's or fastsn's."""

    def __init__(self, path: str, site: Site) -> None:
        whose = "fastsn's" if isinstance(site.norm, SpectralNorm) else "torch's"
        super().__init__(f"{whose} parametrization", path, site)
        assert site.chain is not None
        self._chain = site.chain

    def modules(self) -> set[nn.Module]:
        return {*super().modules(), self._chain}

    def put(self, norm: SpectralNorm) -> None:
        super().put(norm)
        self._chain[self._site.position] = norm  # type: ignore[index]
        unshare_class(self.owner)
        adapt(self.owner, self.tensor)


class Layer(_NormAdapter):
    """The norm of a fastsn layer."""

    owner: NormalizedLayer

    def __init__(self, path: str, site: Site) -> None:
        super().__init__("fastsn's layer", path, site)

    def obstacle(self) -> str | None:
        if type(self.owner) is not self._class(self.owner.variant):
            return f"{type(self.owner).__name__} is a subclass of a fastsn layer"
        return super().obstacle()

    def put(self, norm: SpectralNorm) -> None:
        super().put(norm)
        self.owner.spectral_norm = norm
        self.owner.scale_bias = self.owner.scale_bias and variants.get(norm.variant).free_scale
        self.owner.__class__ = self._class(norm.variant)  # type: ignore[assignment]

    def _class(self, variant: str) -> type | None:
        return getattr(layers, variant.upper() + self.owner.plain.__name__, None)


class PlainLayer(Adapter):
    """A layer without a norm."""

    def __init__(self, path: str, owner: nn.Module) -> None:
        super().__init__("plain layer", path, owner, "weight")

    def obstacle(self) -> str | None:
        if callable(getattr(type(self.owner), "weight", None)):
            return "its weight is a method, as in quantized modules"
        if parametrize.is_parametrized(self.owner, "weight"):
            return None
        weight = self.owner._parameters.get("weight", self.owner._buffers.get("weight"))
        if weight is None:
            return "its weight is no parameter: a hook makes it, as the old weight_norm does"
        if not (weight.dtype.is_floating_point or weight.dtype.is_complex):
            return f"its weight is {weight.dtype}, as in quantized modules"
        return None

    def weight(self) -> Tensor:
        if not parametrize.is_parametrized(self.owner, "weight"):
            weight: Tensor = self.owner.weight  # type: ignore[assignment]
            return weight
        chain = chain_of(self.owner, "weight")
        with _no_autocast(chain):
            return evaluate_chain(chain)

    def settings(self) -> dict[str, Any]:
        return {"dim": views.output_dim(self.owner), "follows_autocast": follows_autocast(self.owner, "weight")}

    def put(self, norm: SpectralNorm) -> None:
        register(self.owner, "weight", norm)


def register(owner: nn.Module, tensor: str, norm: SpectralNorm) -> None:
    """Register ``norm`` as the last parametrization, without the forward and the ``set_`` that torch runs."""
    if parametrize.is_parametrized(owner, tensor):
        chain_of(owner, tensor).append(norm.train(owner.training))
    else:
        unshare_class(owner)
        # torch calls set_ on the tensor, which would break a pending backward: register a temporary one instead.
        original = getattr(owner, tensor)
        temporary = nn.Parameter(original.data, False) if isinstance(original, nn.Parameter) else original.data
        setattr(owner, tensor, temporary)
        parametrize.register_parametrization(owner, tensor, norm, unsafe=True)  # unsafe: torch does not call it
        chain = chain_of(owner, tensor)
        chain.original, chain.unsafe = original, False
    adapt(owner, tensor)


def _no_autocast(chain: ParametrizationList) -> AbstractContextManager[object]:
    return normalize.no_autocast(next(itertools.chain(chain.parameters(recurse=False), chain.buffers(recurse=False))))
