"""Who is compared. Each normalizes the same layers by a parametrization that keeps _u, _v (and _u_in, _v_in)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import fastsn

SCALE = 1.4  # of BSSN, from the grid of its paper

Forward = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Contestant:
    """How each layer is normalized, and how the weights of all of them are asked for."""

    normalize: Callable[[nn.Module], nn.Module]
    ask: Callable[[nn.ModuleList], Forward]
    bssn: bool = True
    compiled: bool = False

    @property
    def scale(self) -> float:
        return SCALE if self.bssn else 1.0

    def prepare(self, plain: nn.ModuleList) -> tuple[nn.ModuleList, Forward]:
        """Normalized copies of the layers, and the function that returns their weights."""
        layers = nn.ModuleList([self.normalize(layer) for layer in copy.deepcopy(plain)])
        return layers, self.ask(layers)


class ComposedBSSN(nn.Module):
    """BSSN in plain torch, as one writes it by hand: torch's own SN on both reshapes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrices = self.reshapes(weight.detach())
        self.suffixes = ("", "_in")[: len(matrices)]
        for suffix, matrix in zip(self.suffixes, matrices, strict=True):
            for name, size in zip(("_u", "_v"), matrix.shape, strict=True):
                self.register_buffer(name + suffix, F.normalize(matrix.new_empty(size).normal_(), dim=0))

    @staticmethod
    def reshapes(weight: Tensor) -> list[Tensor]:
        if weight.ndim == 2 or weight[0, 0].numel() == 1:  # one matrix up to transposition
            return [weight.flatten(1)]
        return [weight.flatten(1), weight.flatten(2).transpose(1, 2).flatten(0, 1)]

    def measured(self, weight: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(matrix, u, v) of every reshape."""
        vectors = [(getattr(self, "_u" + suffix), getattr(self, "_v" + suffix)) for suffix in self.suffixes]
        return [(matrix, *pair) for matrix, pair in zip(self.reshapes(weight), vectors, strict=True)]

    @torch.no_grad()
    def iterate(self, measured: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for matrix, u, v in measured:
            u.copy_(F.normalize(torch.mv(matrix, v), dim=0))
            v.copy_(F.normalize(torch.mv(matrix.T, u), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        measured = self.measured(weight)
        if self.training and not torch.compiler.is_compiling():
            self.iterate(measured)
        # Copies, as in torch: the next forward overwrites the vectors before this one's gradient is asked for.
        sigmas = [torch.dot(u.clone(), torch.mv(matrix, v.clone())) for matrix, u, v in measured]
        return SCALE * weight / (sum(sigmas) / len(sigmas))


def composed_bssn(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", ComposedBSSN(layer.weight))
    return layer


def layer_by_layer(layers: nn.ModuleList) -> Forward:
    return lambda: [layer.weight for layer in layers]


def compiled(layers: nn.ModuleList, mode: str | None = None) -> Forward:
    function = torch.compile(lambda: [layer.weight for layer in layers], fullgraph=True, mode=mode)
    # BSSN iterates in a graph of its own. In one graph with the rest, torch 2.13 makes a wrong gradient: it iterates
    # again in backward, from the vectors that forward has already overwritten. The gate found it.
    chains = [layer.parametrizations.weight for layer in layers]
    composed = [chain for chain in chains if isinstance(chain[0], ComposedBSSN)]

    @torch.compile(fullgraph=True, mode=mode)
    def iterate() -> None:
        for chain in composed:
            chain[0].iterate(chain[0].measured(chain.original.detach()))

    def forward() -> list[Tensor]:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        if composed:
            iterate()
        return function()

    with warnings.catch_warnings():  # the compiler imports modules that torch itself has deprecated
        warnings.simplefilter("ignore")
        weights = forward()
        torch.autograd.backward(weights, [torch.zeros_like(w) for w in weights])
    for layer in layers:
        layer.parametrizations.weight.original.grad = None
    return forward


def whole_model(layers: nn.ModuleList) -> Forward:
    def forward() -> list[Tensor]:
        with fastsn.step(layers):
            return [layer.weight for layer in layers]

    return forward


def fastsn_bssn(layer: nn.Module, impl: str = "auto") -> nn.Module:
    return fastsn.spectral_norm(layer, variant="bssn", scale=SCALE, impl=impl)


BASELINE = "torch SN eager"
GRAPHED = {  # CUDA graphs
    "torch SN compiled, reduce-overhead": Contestant(
        torch_spectral_norm, partial(compiled, mode="reduce-overhead"), bssn=False, compiled=True
    ),
    "composed BSSN compiled, reduce-overhead": Contestant(
        composed_bssn, partial(compiled, mode="reduce-overhead"), compiled=True
    ),
}
CONTESTANTS = {
    BASELINE: Contestant(torch_spectral_norm, layer_by_layer, bssn=False),
    "torch SN compiled": Contestant(torch_spectral_norm, compiled, bssn=False, compiled=True),
    "composed BSSN eager": Contestant(composed_bssn, layer_by_layer),
    "composed BSSN compiled": Contestant(composed_bssn, compiled, compiled=True),
    **(GRAPHED if torch.cuda.is_available() else {}),
    "fastsn SN per layer": Contestant(fastsn.spectral_norm, layer_by_layer, bssn=False),
    "fastsn BSSN reference": Contestant(partial(fastsn_bssn, impl="reference"), layer_by_layer),
    "fastsn BSSN per layer": Contestant(fastsn_bssn, layer_by_layer),
    "fastsn BSSN whole model": Contestant(fastsn_bssn, whole_model),
}
GROWING = (BASELINE, "fastsn BSSN per layer", "fastsn BSSN whole model")
