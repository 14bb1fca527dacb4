"""Networks so small that a spectral norm costs nothing but the host: Python, dispatcher, autograd.

A chain of ``nn.Linear(4, 4)``, one row of input, one thread. A weight has 64 bytes and a product with it 16
multiplications: nanoseconds, where an op costs a microsecond and more, so all that a norm adds is spent by the host.
Linear, because all figures are differences to the network without norms, and a Conv2d's own call is slower and less
even; torch's SN runs the same ops for both, but for a reshape of the convolution's weight. The rest is the usual case:
training mode, one forward and one backward of the whole network, every parameter gets its gradient.

The floor is one call of each list op, power_iteration_ and rescale, with the lists of all weights made beforehand, and
the backward of its one node, above a backward that goes straight to the weights: what is left if Python costs nothing.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import measure
import torch
import torch.nn.functional as F
from contestants import BASELINE, torch_spectral_norm
from measure import Step
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as torch_hook

import fastsn
from fastsn import ops

SIDE = 4
SECONDS = {8: 30.0, 64: 60.0}  # by the number of layers: what the interleaved measurement may take
PLAIN, BARE_OPS, BARE_BACKWARD = "no normalization", "bare ops", "bare backward"

Forward = Callable[[Tensor], Tensor]


def per_layer(net: nn.Module) -> Forward:
    return net


def in_step(net: nn.Module) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with fastsn.step(net):
            y: Tensor = net(x)
            return y

    return forward


def sn_linear(plain: nn.Linear) -> nn.Module:
    layer = fastsn.SNLinear(plain.in_features, plain.out_features)
    with torch.no_grad():
        layer.weight.copy_(plain.weight)
        layer.bias.copy_(plain.bias)
    return layer


def converted(plain: nn.Linear) -> nn.Module:
    return fastsn.convert(torch_spectral_norm(plain))


@dataclass(frozen=True)
class Contestant:
    """How each layer is normalized, how the network is called, and how many times less than torch it is to cost."""

    normalize: Callable[[nn.Linear], nn.Module]
    call: Callable[[nn.Module], Forward] = per_layer
    targets: dict[int, float] = field(default_factory=dict)  # by the number of layers
    v_first: bool = False


_PER_LAYER, _IN_STEP = {8: 2.5, 64: 2.5}, {8: 6.0, 64: 12.0}
CONTESTANTS = {
    BASELINE: Contestant(torch_spectral_norm),
    "torch SN, old hook": Contestant(torch_hook, v_first=True),
    "fastsn layers": Contestant(sn_linear, targets=_PER_LAYER),
    "fastsn layers, fused": Contestant(sn_linear, fastsn.fuse),
    "fastsn layers, in a step": Contestant(sn_linear, in_step, _IN_STEP),
    "fastsn converted": Contestant(converted, targets=_PER_LAYER),
    "fastsn converted, fused": Contestant(converted, fastsn.fuse),
    "fastsn converted, in a step": Contestant(converted, in_step, _IN_STEP),
}


def plain_network(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(layers)))


def _step(net: nn.Module, forward: Forward) -> Step:
    """Forward and backward of the whole network."""
    x, gradient, parameters = torch.ones(1, SIDE), torch.ones(1, SIDE), list(net.parameters())

    def step() -> None:
        forward(x).backward(gradient)
        for parameter in parameters:
            parameter.grad = None

    return step


@lru_cache
def step(layers: int, name: str) -> Step:
    """What is timed. Raises AssertionError if the contestant computes something wrong."""
    net = plain_network(layers)
    if name == PLAIN:
        return _step(net, net)
    contestant = CONTESTANTS[name]
    normalized = nn.Sequential(*(contestant.normalize(layer) for layer in copy.deepcopy(net)))
    forward = contestant.call(normalized)
    _check(contestant, net, normalized, forward)
    return _step(normalized, forward)


def _weight(layer: nn.Module) -> Tensor:
    """The parameter, wherever a contestant keeps it."""
    return next(parameter for parameter in layer.parameters() if parameter.ndim == 2)


def _vectors(layer: nn.Module) -> dict[str, Tensor]:
    """u and v, wherever a contestant keeps them."""
    return {name.rsplit("_", 1)[1]: buffer for name, buffer in layer.named_buffers()}


def _check(contestant: Contestant, plain: nn.Sequential, net: nn.Sequential, forward: Forward) -> None:
    """One iteration of each layer from random vectors, the output and the gradients that belong to it, in float64."""
    y, weights, vectors = torch.ones(1, SIDE, dtype=torch.float64), [], []
    for layer, normalized in zip(plain, net, strict=True):
        for vector in _vectors(normalized).values():
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        weight = layer.weight.detach().double().requires_grad_()
        matrix, found = weight.detach(), {name: x.double() for name, x in _vectors(normalized).items()}
        for letter in ("v", "u") if contestant.v_first else ("u", "v"):
            found[letter] = F.normalize(matrix @ found["v"] if letter == "u" else matrix.T @ found["u"], dim=0)
        y = F.linear(y, weight / (found["u"] @ weight @ found["v"]), layer.bias.detach().double())
        weights.append(weight)
        vectors.append(found)
    output, gradient = forward(torch.ones(1, SIDE)), torch.ones(1, SIDE)
    _close(output, y, "output")
    output.backward(gradient)
    y.backward(gradient.double())
    for layer, weight, expected in zip(net, weights, vectors, strict=True):
        _close(_weight(layer).grad, weight.grad, "gradient")
        for name, vector in _vectors(layer).items():
            _close(vector, expected[name], name)
    net.zero_grad()


def _close(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    """To 1e-3 of the largest entry: rounding adds up over 64 layers, an iteration too many is far from it."""
    assert found is not None
    assert expected is not None
    found, expected = found.detach(), expected.detach()
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < 1e-3, f"{what} is off by {error:.1e} of its largest entry"


def bare(layers: int) -> dict[str, Step]:
    """The ops on lists that are there, their backward, and the backward that the plain network has anyway."""
    weights = [layer.weight for layer in plain_network(layers)]
    gradients = [torch.ones_like(w) for w in weights]
    u, v = ([F.normalize(torch.randn(SIDE), dim=0) for _ in weights] for _ in range(2))
    dims, view_masks, v_first = [0] * layers, [ops.VIEW_BITS["out"]] * layers, [0] * layers
    numbers = [-1] * layers, [1.0] * layers, [ops.DTYPE_CODES[torch.float32]] * layers

    def backward(outputs: list[Tensor]) -> None:
        torch.autograd.backward(outputs, gradients)
        for weight in weights:
            weight.grad = None

    def ops_and_backward() -> None:
        sigma, vectors = ops.power_iteration_(weights, u, v, dims, view_masks, v_first, 1)
        backward(ops.rescale(weights, [], sigma, vectors, dims, view_masks, *numbers)[0])

    return {BARE_OPS: ops_and_backward, BARE_BACKWARD: lambda: backward(weights)}


@lru_cache
def compare(layers: int) -> dict[str, dict[str, float | str]]:
    """The figures of every contestant, in microseconds of the process above the network without normalization."""
    steps = {name: step(layers, name) for name in (PLAIN, *CONTESTANTS)}
    times = measure.interleaved({**steps, **bare(layers)}, SECONDS[layers], clock=time.process_time)
    # Others on the machine take caches, too: the fastest turn, itself a median, is the one that was disturbed least.
    least = {name: min(found) * 1e6 for name, found in times.items()}
    costs = {name: least[name] - least[PLAIN] for name in CONTESTANTS}
    floor = least[BARE_OPS] - least[BARE_BACKWARD]
    figures: dict[str, dict[str, float | str]] = {}
    for name, contestant in CONTESTANTS.items():
        differences = [a - b for a, b in zip(times[name], times[PLAIN], strict=True)]
        figures[name] = {
            "contestant": name,
            "layers": layers,
            "cost_us": costs[name],
            "cost_per_layer_us": costs[name] / layers,
            "median_cost_us": statistics.median(differences) * 1e6,
            "times_less_than_torch_SN_eager": costs[BASELINE] / costs[name],
            "floor_us": floor,
            "times_floor": costs[name] / floor,
            "without_normalization_us": least[PLAIN],
            "rounds": len(differences),
            "threads": torch.get_num_threads(),
        }
        if layers in contestant.targets:
            figures[name]["target_times_less"] = contestant.targets[layers]
    return figures
