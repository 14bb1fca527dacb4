"""The one table of layers that the tests run over, with the reason for each, and a generator of random ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A layer: torch's class name, its size arguments, and why it is here."""

    layer: str
    args: tuple[int, ...]
    why: str
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.layer}{'x'.join(map(str, self.args))}" + (f"g{self.groups}" if self.groups > 1 else "")

    def build(self, prefix: str = "", **kwargs: object) -> nn.Module:
        """torch's layer, or fastsn's for a prefix such as "BSSN"."""
        import fastsn

        extra = {"groups": self.groups} if self.groups > 1 else {}
        return getattr(fastsn if prefix else nn, prefix + self.layer)(*self.args, **extra, **kwargs)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Something the layer accepts."""
        if self.layer == "Embedding":
            return torch.arange(self.args[0])
        if self.layer == "Linear":
            return torch.randn(3, self.args[0], dtype=dtype)
        dims = int(self.layer[-2])
        return torch.randn(2, self.args[0], *([self.args[2] + 2] * dims), dtype=dtype)


TABLE = (
    Case("Linear", (7, 5), "odd sizes, wide"),
    Case("Linear", (5, 12), "tall"),
    Case("Linear", (6, 1), "one output: the last layer of a discriminator"),
    Case("Linear", (1, 6), "one input"),
    Case("Conv1d", (4, 6, 5), "three dimensions"),
    Case("Conv1d", (8, 12, 7), "grouped, as in vocoders", groups=4),
    Case("Conv2d", (3, 8, 3), "the first layer of an image network: few input channels"),
    Case("Conv2d", (8, 4, 4), "even kernel, narrowing"),
    Case("Conv2d", (5, 7, 1), "1x1: one view, like a Linear"),
    Case("Conv2d", (1, 6, 3), "one input channel"),
    Case("Conv2d", (6, 1, 3), "one output channel"),
    Case("Conv2d", (6, 6, 3), "depthwise: one input channel per group", groups=6),
    Case("Conv3d", (2, 3, 2), "five dimensions"),
    Case("ConvTranspose1d", (3, 5, 4), "output channels second"),
    Case("ConvTranspose2d", (6, 4, 4), "the generator's layer"),
    Case("ConvTranspose2d", (4, 6, 3), "grouped, output channels second", groups=2),
    Case("ConvTranspose3d", (2, 3, 2), "five dimensions, output channels second"),
    Case("Embedding", (9, 4), "rows are looked up"),
)

LAYERS = tuple(dict.fromkeys(case.layer for case in TABLE))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def truth(weight: Tensor, dim: int) -> dict[str, float]:
    """The norms of both reshapes by SVD in float64, written without fastsn's views."""
    w = weight.detach().double().movedim(dim, 0)
    w = w.reshape(w.shape[0], w.shape[1], -1)
    return {
        "out": float(torch.linalg.matrix_norm(w.reshape(w.shape[0], -1), 2)),
        "in": float(torch.linalg.matrix_norm(w.transpose(0, 1).reshape(w.shape[1], -1), 2)),
    }


def drawn(count: int, seed: int = 0) -> list[tuple[Case, torch.dtype, str]]:
    """Random layers: every type, sizes 1 to 12 (odd ones and ones included), K of 1 to 25, dtypes, memory layouts."""
    rng = random.Random(seed)
    cases = []
    for n in range(count):
        layer = LAYERS[n % len(LAYERS)]
        sizes = tuple(rng.choice((1, 2, 3, 5, 8, 11, 12)) for _ in range(2))
        kernel = {"1": 25, "2": 5, "3": 2}.get(layer[-2], 0)
        args = (*sizes, rng.randint(1, kernel)) if kernel else sizes
        layout = rng.choice(("contiguous", "channels_last", "sliced", "offset"))
        cases.append((Case(layer, args, "drawn"), DTYPES[(n // len(LAYERS)) % len(DTYPES)], layout))
    return cases


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last" and weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        big = weight.new_full([2 * s for s in weight.shape], torch.nan)
        big[tuple(slice(None, None, 2) for _ in weight.shape)] = weight
        return big[tuple(slice(None, None, 2) for _ in weight.shape)]
    if layout == "offset":
        return torch.cat([weight.new_full((1,), torch.nan), weight.reshape(-1)])[1:].view(weight.shape)
    return weight
