"""Networks that several tests use: one with everything that whole-model functions meet, one that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn


def network() -> nn.Sequential:
    """Layers and drop-ins, nested, one used twice, one weight normalized by something else."""
    shared = fastsn.BSSNConv2d(4, 4, 3, padding=1, scale=1.3)
    block = nn.Sequential(shared, nn.ReLU(), shared, fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1), variant="bsn"))
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 4, 3, padding=1)),
        block,
        fastsn.spectral_norm(nn.ConvTranspose2d(4, 3, 2)),
        nn.Flatten(),
        fastsn.SNLinear(3 * 7 * 7, 2),
    )


def batch() -> Tensor:
    return torch.randn(2, 2, 6, 6)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.named_buffers()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {k for k, v in model.named_buffers() if not torch.equal(before[k], v)}


def replica(module: nn.Module, own_buffers: bool = False) -> nn.Module:
    """As torch.nn.parallel.replicate makes them, which needs a GPU: shallow, with tensors in a graph. Only the replica
    on the model's own device shares its buffers."""
    copies = {each: each._replicate_for_data_parallel() for each in module.modules()}
    for original, copied in copies.items():
        for name, child in original._modules.items():
            copied._modules[name] = copies[child]
        for name, p in original._parameters.items():
            if p is not None:
                copied._parameters.pop(name, None)
                setattr(copied, name, p * 1)
        for name, b in original._buffers.items():
            copied._buffers[name] = b.clone() if own_buffers else b
    return copies[module]


def discriminator(dtype: torch.dtype = torch.float32, variant: str = "bssn") -> nn.Sequential:
    """A small one that learns ``task`` in some steps: layers and a drop-in of one variant."""
    torch.manual_seed(3)
    scale = {"scale": 1.4} if variant == "bssn" else {}
    return nn.Sequential(
        getattr(fastsn, f"{variant.upper()}Conv2d")(1, 8, 3, dtype=dtype, **scale),
        nn.Tanh(),
        fastsn.spectral_norm(nn.Conv2d(8, 8, 3, stride=2, dtype=dtype), variant=variant, **scale),
        nn.Tanh(),
        nn.Flatten(),
        getattr(fastsn, f"{variant.upper()}Linear")(32, 1, dtype=dtype, **scale),
    )


def task(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images with and without a bright corner."""
    draw = torch.Generator(torch.get_default_device()).manual_seed(1)
    x = torch.randn(32, 1, 7, 7, generator=draw)
    x[::2, :, :3, :3] += 1.5
    return x.to(dtype), (torch.arange(32) % 2 == 0).to(dtype)[:, None]
