"""How a discriminator is normalized: what its layers are, how it starts, when u and v are stored, what is added to its
loss, and what its weights are as a forward uses them. One row of ``table.METHODS`` for each method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gan.config import Numbers
from gan.norms.table import METHODS, Start

__all__ = ["METHODS", "Layers", "Norm", "layers", "layers_of", "start"]


class Layers(NamedTuple):
    """What a discriminator is built from: torch's arguments, a layer that is normalized."""

    conv: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    embedding: Callable[..., nn.Module]


def layers(config: Numbers) -> Layers:
    """The layers of a method. With gamma, every weight and bias is multiplied by a trainable factor that begins at the
    scale, one for all layers or one for each, as in the code of Lin et al., NeurIPS 2021."""
    method = METHODS[config.norm]
    if config.gamma == "none":
        fixed = {"scale": config.scale} if method.takes_scale else {}
        return Layers(*(_with(layer, lambda _: fixed) for layer in method.layers))
    shared = nn.Parameter(torch.tensor(config.scale))

    def arguments(has_bias: bool) -> dict[str, Any]:
        own = shared if config.gamma == "same" else nn.Parameter(torch.tensor(config.scale))
        return {"scale": own, "scale_bias": has_bias}

    return Layers(*(_with(layer, arguments) for layer in METHODS[method.with_factor].layers))


def _with(layer: type[nn.Module], arguments: Callable[[bool], dict[str, Any]]) -> Callable[..., nn.Module]:
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        has_bias = not issubclass(layer, nn.Embedding) and kwargs.get("bias", True)
        return layer(*args, **kwargs, **arguments(has_bias))

    return make


def start(discriminator: nn.Module, config: Numbers, channels: int, draw: torch.Generator) -> None:
    """What a method does once, when the weights of a discriminator for images with so many channels have been drawn:
    u and v are brought to them (SN and its variants), or they are replaced by others from ``draw`` (orthonormal)."""
    METHODS[config.norm].start(discriminator, Start((channels, config.image_size, config.image_size), draw))


class Norm:
    """Of a discriminator that is built."""

    def __init__(self, config: Numbers, discriminator: nn.Module) -> None:
        self.config, self.discriminator, self.method = config, discriminator, METHODS[config.norm]

    def during_a_step(self) -> contextlib.AbstractContextManager[None]:
        """Around all forwards of the discriminator in one step of either network, and their backward.

        per_forward: each forward iterates and stores. per_step: one iteration for all, stored. per_d_step: one
        iteration for all from what is stored, which stays.
        """
        if self.method.vectors is None or self.config.u_schedule == "per_forward":
            return contextlib.nullcontext()
        return self.method.vectors.step(self.discriminator, self.config.u_schedule == "per_step")

    def after_a_d_step(self) -> None:
        """When the optimizer has changed the discriminator's weights."""
        if self.method.vectors is not None and self.config.u_schedule == "per_d_step":
            self.method.vectors.advance(self.discriminator)
        self.method.after_a_d_step(self.discriminator, self.config)

    def at_rest(self) -> contextlib.AbstractContextManager[None]:
        """Around forwards that only look: nothing is stored."""
        vectors = self.method.vectors
        return contextlib.nullcontext() if vectors is None else vectors.step(self.discriminator, False)

    def penalty(self) -> Tensor | None:
        """What the method adds to the discriminator's loss, before its weight in the config; None: nothing."""
        return None if self.method.penalty is None else self.method.penalty(self.discriminator)

    def sigmas(self) -> dict[str, float]:
        """The norms by which weights are divided, by tag: sigma of every layer, of fastsn's layers sigma_out and
        sigma_in, too."""
        vectors = self.method.vectors
        found = {} if vectors is None else vectors.sigmas(self.discriminator)
        return {f"{kind}/{layer}": x for layer, values in found.items() for kind, x in values.items()}

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weight of every convolution, linear layer and embedding of the discriminator as its next forward uses
        it, by the layer's name; nothing is stored. Where a method leaves weights as they are, these share the memory of
        the parameters."""
        with self.at_rest():
            return {name: _used(layer).detach() for name, layer in layers_of(self.discriminator).items()}


def layers_of(discriminator: nn.Module) -> dict[str, nn.Module]:
    """Its convolutions, linear layers and embeddings, by name."""
    kinds = nn.Conv2d | nn.Linear | nn.Embedding
    return {name: m for name, m in discriminator.named_modules() if isinstance(m, kinds)}


def _used(layer: nn.Module) -> Tensor:
    """Layers whose weight is not the parameter itself have a method ``normalized``: weight and bias of a forward."""
    weight: Tensor = layer.normalized()[0] if hasattr(layer, "normalized") else layer.weight
    return weight
