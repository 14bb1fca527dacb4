"""How a discriminator is normalised: what its layers are, when u and v are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastsn
from gan.config import Numbers

_LAYERS = {
    "none": (nn.Conv2d, nn.Linear, nn.Embedding),
    "sn": (fastsn.SNConv2d, fastsn.SNLinear, fastsn.SNEmbedding),
    "ssn": (fastsn.SSNConv2d, fastsn.SSNLinear, fastsn.SSNEmbedding),
    "bsn": (fastsn.BSNConv2d, fastsn.BSNLinear, fastsn.BSNEmbedding),
    "bssn": (fastsn.BSSNConv2d, fastsn.BSSNLinear, fastsn.BSSNEmbedding),
}
_WITH_FACTOR = {"sn": "ssn", "ssn": "ssn", "bsn": "bssn", "bssn": "bssn"}


class Layers(NamedTuple):
    """What a discriminator is built from: torch's arguments, a layer that is normalised."""

    conv: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    embedding: Callable[..., nn.Module]


def layers(config: Numbers) -> Layers:
    """The layers of a method. With gamma, every weight and bias is multiplied by a trainable factor that begins at the
    scale, one for all layers or one for each, as in the code of Lin et al., NeurIPS 2021."""
    if config.gamma == "none":
        fixed = {} if config.norm == "none" else {"scale": config.scale}
        return Layers(*(_with(layer, lambda _: fixed) for layer in _LAYERS[config.norm]))
    shared = nn.Parameter(torch.tensor(config.scale))

    def arguments(has_bias: bool) -> dict[str, Any]:
        own = shared if config.gamma == "same" else nn.Parameter(torch.tensor(config.scale))
        return {"scale": own, "scale_bias": has_bias}

    return Layers(*(_with(layer, arguments) for layer in _LAYERS[_WITH_FACTOR[config.norm]]))


def _with(layer: type[nn.Module], arguments: Callable[[bool], dict[str, Any]]) -> Callable[..., nn.Module]:
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        has_bias = not issubclass(layer, nn.Embedding) and kwargs.get("bias", True)
        return layer(*args, **kwargs, **arguments(has_bias))

    return make


def layers_of(discriminator: nn.Module) -> dict[str, Any]:
    """What has a weight matrix, by name."""
    return {name: m for name, m in discriminator.named_modules() if isinstance(m, _LAYERS["none"])}


class Norm:
    """Of a discriminator that is built."""

    def __init__(self, config: Numbers, discriminator: nn.Module) -> None:
        self.discriminator, self.schedule = discriminator, config.u_schedule
        self.has_vectors = config.norm != "none"

    def during_a_step(self) -> contextlib.AbstractContextManager[None]:
        """Around all forwards of the discriminator in one step of either network, and their backward.

        per_forward: each forward iterates and stores. per_step: one iteration for all, stored. per_d_step: one
        iteration for all from what is stored, which stays.
        """
        if not self.has_vectors or self.schedule == "per_forward":
            return contextlib.nullcontext()
        return fastsn.step(self.discriminator, advance=self.schedule == "per_step")

    def after_a_d_step(self) -> None:
        """When the optimizer has changed the discriminator's weights."""
        if self.has_vectors and self.schedule == "per_d_step":
            fastsn.advance(self.discriminator)

    def at_rest(self) -> contextlib.AbstractContextManager[None]:
        """Around forwards that only look: nothing is stored."""
        return fastsn.step(self.discriminator, advance=False) if self.has_vectors else contextlib.nullcontext()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Every layer's weight as its forward uses it, with a scale or factor in it, by the layer's name; nothing is
        stored. In training mode u and v are iterated first, as in a forward; in evaluation they are the stored ones."""
        with self.at_rest():
            return {
                name: (layer.normalised()[0] if self.has_vectors else layer.weight).detach()
                for name, layer in layers_of(self.discriminator).items()
            }

    def sigmas(self) -> dict[str, float]:
        """sigma, sigma_out and sigma_in of every layer, by tag."""
        if not self.has_vectors:
            return {}
        found = fastsn.sigmas(self.discriminator)
        return {f"{kind}/{layer}": x for layer, values in found.items() for kind, x in values._asdict().items()}
