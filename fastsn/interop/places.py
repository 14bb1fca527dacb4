"""Where a norm can sit in a model, whoever made it, and how a ``SpectralNorm`` takes its place."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchNorm
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import jobs, layers, variants, views
from fastsn.initialization import initializable
from fastsn.layers import NormalizedLayer
from fastsn.model.sites import evaluated
from fastsn.norm import SpectralNorm
from fastsn.parametrize import brought_up_after_loading, follows_autocast, own_class


class Place(ABC):
    """A tensor's norm, or a tensor that can have one. ``part``: the norm that is there, if it is a module."""

    part: nn.Module | None = None

    def __init__(self, kind: str, name: str, owner: nn.Module, tensor: str) -> None:
        self.kind, self.owner, self.tensor = kind, owner, tensor
        self.where = f"{name}.{tensor}".strip(".")

    def within(self) -> set[nn.Module]:
        """The modules that stand for the norm: who skips one of them skips it."""
        return {self.owner} if self.part is None else {self.owner, self.part}

    @abstractmethod
    def obstacle(self) -> str | None:
        """Why nothing can take the place, if that is so. The methods below may be called where it is not."""

    @abstractmethod
    def weight(self) -> Tensor:
        """What the norm is applied to; nothing moves."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of a SpectralNorm that goes on from what is there."""

    @abstractmethod
    def take(self, norm: SpectralNorm) -> None:
        """Put ``norm`` there. It is not used, so that no vector moves."""


class Link(Place):
    """Number ``place`` of a chain of parametrizations."""

    part: nn.Module

    def __init__(self, name: str, owner: nn.Module, tensor: str, chain: ParametrizationList, place: int) -> None:
        self.part, self._chain, self._place = chain[place], chain, place
        kind = "fastsn's" if isinstance(self.part, SpectralNorm) else "torch's"
        super().__init__(f"{kind} parametrization", name, owner, tensor)

    def within(self) -> set[nn.Module]:
        return {*super().within(), self._chain}

    def obstacle(self) -> str | None:
        return _obstacle(self.part)

    def weight(self) -> Tensor:
        return _evaluated(self._chain, self._place) if self._place else self._chain.original

    def settings(self) -> dict[str, Any]:
        if isinstance(self.part, SpectralNorm):
            return _settings(self.part)
        last = self._place == len(self._chain) - 1 and not isinstance(self.owner, NormalizedLayer)
        buffers = self.part._buffers  # none for a 1-D tensor
        return {
            "n_power_iterations": getattr(self.part, "n_power_iterations", 1),
            "dim": self.part.dim,
            "eps": self.part.eps,
            "vectors": {"out": (buffers["_u"], buffers["_v"])} if buffers else {},
            "follows_autocast": last and follows_autocast(self.owner, self.tensor),
        }

    def take(self, norm: SpectralNorm) -> None:
        _continue(self.part, norm)
        self._chain[self._place] = norm
        brought_up_after_loading(self._chain)
        own_class(self.owner)
        initializable(self.owner)


class Layer(Place):
    """The norm of a fastsn layer."""

    part: SpectralNorm
    owner: NormalizedLayer

    def __init__(self, name: str, owner: NormalizedLayer) -> None:
        self.part = owner.spectral_norm
        super().__init__("fastsn's layer", name, owner, "weight")

    def obstacle(self) -> str | None:
        if type(self.owner) is not self._class(self.owner.variant):
            return f"{type(self.owner).__name__} is a subclass of a fastsn layer"
        return _obstacle(self.part)

    def weight(self) -> Tensor:
        return self.owner.weight

    def settings(self) -> dict[str, Any]:
        return _settings(self.part)

    def take(self, norm: SpectralNorm) -> None:
        _continue(self.part, norm)
        self.owner.spectral_norm = norm
        self.owner.scale_bias = self.owner.scale_bias and variants.get(norm.variant).free_scale
        self.owner.__class__ = self._class(norm.variant)  # type: ignore[assignment]

    def _class(self, variant: str) -> type | None:
        return getattr(layers, variant.upper() + self.owner.plain.__name__, None)


class Plain(Place):
    """A layer without a norm."""

    def __init__(self, name: str, owner: nn.Module) -> None:
        super().__init__("plain layer", name, owner, "weight")

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
        return _evaluated(chain_of(self.owner, "weight"))

    def settings(self) -> dict[str, Any]:
        return {"dim": views.output_dim(self.owner), "follows_autocast": follows_autocast(self.owner, "weight")}

    def take(self, norm: SpectralNorm) -> None:
        register(self.owner, "weight", norm)


def register(owner: nn.Module, tensor: str, norm: SpectralNorm) -> None:
    """Register ``norm`` as the last parametrization, without the use and the write to the tensor that torch makes."""
    if parametrize.is_parametrized(owner, tensor):
        chain_of(owner, tensor).append(norm.train(owner.training))
        brought_up_after_loading(chain_of(owner, tensor))
        initializable(owner)
        return
    own_class(owner)
    # torch calls set_ on the tensor, after which a backward that is due would fail. A stand-in takes that.
    original = getattr(owner, tensor)
    setattr(owner, tensor, nn.Parameter(original.data, False) if isinstance(original, nn.Parameter) else original.data)
    parametrize.register_parametrization(owner, tensor, norm, unsafe=True)  # unsafe: it is not called for a check
    chain = chain_of(owner, tensor)
    chain.original, chain.unsafe = original, False
    brought_up_after_loading(chain)
    initializable(owner)


def chain_of(owner: nn.Module, tensor: str) -> ParametrizationList:
    """The parametrizations of a tensor that has some."""
    chain = owner.get_submodule(f"parametrizations.{tensor}")
    assert isinstance(chain, ParametrizationList)
    return chain


def _evaluated(chain: ParametrizationList, count: int | None = None) -> Tensor:
    original = next(itertools.chain(chain.parameters(recurse=False), chain.buffers(recurse=False)))
    with jobs.no_autocast(original):
        return evaluated(chain, count)


def _obstacle(part: nn.Module) -> str | None:
    if type(part) not in (TorchNorm, SpectralNorm):
        return f"{type(part).__name__} is a subclass of a spectral norm"
    if type(part) is TorchNorm and set(part._buffers) not in (set(), {"_u", "_v"}):
        return "its u and v are not its own: something else has changed them"
    if part._load_state_dict_pre_hooks:
        return "it has hooks of its own for loading, which are bound to it"
    return None


def _settings(norm: SpectralNorm) -> dict[str, Any]:
    return {
        "n_power_iterations": getattr(norm, "n_power_iterations", 1),  # not there for a 1-D tensor
        "dim": norm.dim,
        "eps": norm.eps,
        "impl": norm.impl,
        "follows_autocast": norm.follows_autocast,
        "vectors": norm.vectors(),
        "v_first": norm.v_first,
    }


def _continue(old: nn.Module, norm: SpectralNorm) -> None:
    """What a norm takes over from its predecessor beside its state: the mode, and the hooks that others put on it."""
    norm.training = old.training
    norm.__dict__.update({name: value for name, value in old.__dict__.items() if "_hook" in name})
