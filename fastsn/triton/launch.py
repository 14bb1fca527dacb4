"""The list ops of fastsn/ops/, same arguments, for tensors that kernels can read. Arguments are not checked here.

``tune`` measures how they are launched best.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton.testing
from torch import Tensor

from fastsn.tensor_lists import addresses
from fastsn.triton import iteration_calls, rescale_calls, settings
from fastsn.triton.plan import Prepared
from fastsn.triton.settings import Settings

# What is tried, one after the other, each from the best so far.
CANDIDATES: tuple[dict[str, Any], ...] = (
    *({"warps": warps} for warps in (4, 16)),
    {"elements": 512},
    {"elements": 2048},
    *({"rows": rows} for rows in (4, 16)),
    {"near": 1 << 30},
    {"last_tiles": 8},
    *({"group": group, "columns": columns} for group, columns in ((64, 32), (128, 32), (32, 128), (64, 128))),
    *({"vector": vector} for vector in (2048, 8192)),
    *({"rescale_warps": warps} for warps in (2, 8)),
    {"chunk": 16384},
)


_PREPARED: dict[str, Callable[..., Prepared]] = {
    "power_iteration": partial(iteration_calls.prepared, False),
    "power_iteration_": partial(iteration_calls.prepared, True),
    "rescale": rescale_calls.prepared_rescale,
    "rescale_backward": rescale_calls.prepared_rescale_backward,
}


def prepared(name: str, arguments: tuple[Any, ...]) -> Prepared:
    """What runs an op on all lists of tensors whose shapes, strides, dtypes, devices and alignment, and whose numbers,
    are these."""
    return _PREPARED[name](*arguments)


def call(name: str, *arguments: Any) -> Any:
    """The op, once."""
    lists = [x for x in arguments if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    return prepared(name, arguments).run(addresses(*lists), *arguments)


def tune(weights: Sequence[Tensor] | None = None, measure: Callable[[Settings], float] | None = None) -> Settings:
    """Measure launch settings on this GPU, keep the best in the user's cache folder, and put them in force.

    Takes a minute or two, most of it compiling. Results stay the same up to rounding: sums are cut differently.

    Args:
        weights: the weights of a network, on the GPU; default: the CNN discriminator of CIFAR10, both views.
        measure: milliseconds of a step with given settings; default: iteration, rescaling and gradient of ``weights``,
            as a CUDA graph, median with the caches flushed.

    Raises RuntimeError without a GPU that the kernels serve.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune measures on a GPU, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    measure = measure or _step_of(weights if weights is not None else _discriminator(device), device)
    before = settings.current(device)
    try:
        best = settings.DEFAULT
        fastest = measure(best)
        for changes in CANDIDATES:
            tried = replace(best, **changes)
            found = _measured(measure, tried)
            if found < fastest:
                best, fastest = tried, found
    finally:
        settings.use(before, device)
    settings.store(best, device)
    return best


def _measured(measure: Callable[[Settings], float], tried: Settings) -> float:
    """Infinity where this GPU cannot: too many registers, too much shared memory."""
    try:
        return measure(tried)
    except (RuntimeError, triton.TritonError) as error:
        logging.getLogger("fastsn").info("%s cannot be launched here: %s", tried, error)
        return math.inf


def _discriminator(device: torch.device) -> list[Tensor]:
    shapes = ((3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3))
    return [*(torch.randn(o, i, k, k, device=device) for i, o, k in shapes), torch.randn(1, 8192, device=device)]


def _step_of(weights: Sequence[Tensor], device: torch.device) -> Callable[[Settings], float]:
    view_masks = [3 if w.ndim > 2 and w[0, 0].numel() > 1 else 1 for w in weights]
    count = len(weights)
    numbers = [0] * count, view_masks, [-1] * count, [1.0] * count, [6] * count
    u: list[Tensor] = []
    v: list[Tensor] = []
    for w, bits in zip(weights, view_masks, strict=True):
        o, i, k = w.shape[0], w.shape[1], w[0, 0].numel()
        for sizes in ((o, i * k), (o * k, i))[: bits.bit_count()]:
            for vectors, size in zip((u, v), sizes, strict=True):
                vectors.append(torch.nn.functional.normalize(torch.randn(size, device=device), dim=0))
    gradients = [torch.randn_like(w) for w in weights]

    def step() -> None:
        sigma, vectors = call("power_iteration_", weights, u, v, *numbers[:2], [0] * count, 1)
        outputs, mean = call("rescale", weights, [], sigma, vectors, *numbers)
        call("rescale_backward", gradients, None, outputs, [], mean, vectors, *numbers)

    def measure(tried: Settings) -> float:
        settings.use(tried, device)
        step()
        graph = torch.cuda.CUDAGraph()  # without it, what Python costs would hide what the GPU does
        with torch.cuda.graph(graph):
            step()
        return float(triton.testing.do_bench(graph.replay, warmup=10, rep=50, return_mode="median"))

    return measure
