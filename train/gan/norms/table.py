"""The methods of ``--norm``, as rows: layers, and what is done at the start, in a step and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastsn
from gan.config import Numbers
from gan.norms import baselines, sn_conv


class Start(NamedTuple):
    """What a method may need at the start: the shape (C, H, W) of an image, and a source of random numbers."""

    image: tuple[int, int, int]
    draw: torch.Generator


class Vectors(NamedTuple):
    """How u and v of all layers of a network are handled; ``fastsn.step`` and ``fastsn.advance`` say what is meant."""

    step: Callable[[nn.Module, bool], contextlib.AbstractContextManager[None]]
    advance: Callable[[nn.Module], object]
    sigmas: Callable[[nn.Module], Mapping[str, Mapping[str, float]]]
    """{layer: {"sigma": what its weight is divided by, ...}}."""


class Method(NamedTuple):
    """One way to normalize a discriminator."""

    layers: tuple[type[nn.Module], type[nn.Module], type[nn.Module]]
    """Convolution, linear layer, embedding: subclasses of torch's, with the same parameters."""
    takes_scale: bool = False
    """Whether the layers have an argument ``scale``."""
    with_factor: str = ""
    """The row whose layers take a trainable factor in the place of the scale."""
    vectors: Vectors | None = None
    start: Callable[[nn.Module, Start], object] = lambda *_: None
    after_a_d_step: Callable[[nn.Module, Numbers], None] = lambda *_: None
    penalty: Callable[[nn.Module], Tensor] | None = None


def _sigmas(model: nn.Module) -> dict[str, dict[str, float]]:
    return {layer: values._asdict() for layer, values in fastsn.sigmas(model).items()}


def _warm_up(model: nn.Module, _: Start) -> None:
    fastsn.warm_up(model)  # u and v were drawn before the weights


def _start_sn_conv(model: nn.Module, given: Start) -> None:
    fastsn.warm_up(model)
    sn_conv.start(model, given.image)


def _start_orthonormal(model: nn.Module, given: Start) -> None:
    baselines.make_orthonormal(model, given.draw)


def _clip(model: nn.Module, config: Numbers) -> None:
    baselines.clip(model, config.clip)


_PLAIN = (nn.Conv2d, nn.Linear, nn.Embedding)
_FAMILY: dict[str, Any] = {"takes_scale": True, "start": _warm_up}
_FAMILY["vectors"] = Vectors(fastsn.step, fastsn.advance, _sigmas)

METHODS: dict[str, Method] = {
    "none": Method(_PLAIN),
    "sn": Method((fastsn.SNConv2d, fastsn.SNLinear, fastsn.SNEmbedding), with_factor="ssn", **_FAMILY),
    "ssn": Method((fastsn.SSNConv2d, fastsn.SSNLinear, fastsn.SSNEmbedding), with_factor="ssn", **_FAMILY),
    "bsn": Method((fastsn.BSNConv2d, fastsn.BSNLinear, fastsn.BSNEmbedding), with_factor="bssn", **_FAMILY),
    "bssn": Method((fastsn.BSSNConv2d, fastsn.BSSNLinear, fastsn.BSSNEmbedding), with_factor="bssn", **_FAMILY),
    "sn_conv": Method(
        (sn_conv.OperatorConv2d, fastsn.SSNLinear, fastsn.SSNEmbedding),
        takes_scale=True,
        vectors=Vectors(sn_conv.step, sn_conv.advance, lambda model: _sigmas(model) | sn_conv.sigmas(model)),
        start=_start_sn_conv,
    ),
    "wn": Method((baselines.WNConv2d, baselines.WNLinear, baselines.WNEmbedding)),
    "ln": Method((baselines.LNConv2d, nn.Linear, nn.Embedding)),
    "bn": Method((baselines.BNConv2d, nn.Linear, nn.Embedding)),
    "clip": Method(_PLAIN, after_a_d_step=_clip),
    "orthonormal": Method(_PLAIN, start=_start_orthonormal, penalty=baselines.orthonormal_penalty),
}
