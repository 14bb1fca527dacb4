"""Layers that are spectrally normalized as other packages do it, and one way to build and use those of all layouts."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

from shapes import Case


class RowNorm(nn.Module):
    """What BigGAN-PyTorch and torch_mimicry have in common: u is a row, stored in training only; iterates always."""

    names: tuple[str, str]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        u, sigma = self.names
        self.register_buffer(u, torch.randn(1, self.weight.shape[0]))  # not of length 1
        self.register_buffer(sigma, torch.ones(1))

    @torch.no_grad()
    def normalized(self) -> Tensor:
        u, stored = (getattr(self, name) for name in self.names)
        w = self.weight.view(self.weight.size(0), -1)
        v = F.normalize(u @ w)
        new = F.normalize(v @ w.t())
        sigma = (v @ w.t() @ new.t()).squeeze()
        if self.training:
            u.copy_(new)
            stored.fill_(sigma)
        return self.weight / sigma


def _row_class(plain: type[nn.Module], names: tuple[str, str]) -> type[RowNorm]:
    return type(f"Row{plain.__name__}", (RowNorm, plain), {"names": names})


ROWS = {"biggan": ("u0", "sv0"), "mimicry": ("sn_u", "sn_sigma")}
WITH_V = {
    "torch": lambda case, **kwargs: parametrizations.spectral_norm(case.build(**kwargs)),
    "torch_hook": lambda case, **kwargs: hook(case.build(**kwargs)),
    "fastsn": lambda case, **kwargs: case.build("SN", impl="reference", **kwargs),
}


def build(layout: str, case: Case, **kwargs: object) -> nn.Module:
    """The case's layer, normalized as those who write this layout do it."""
    if layout in WITH_V:
        return WITH_V[layout](case, **kwargs)
    plain = getattr(nn, case.layer)
    groups = {"groups": case.groups} if "groups" in inspect.signature(plain).parameters else {}
    return _row_class(plain, ROWS[layout])(*case.args, **groups, **kwargs)


@torch.no_grad()
def use(layer: nn.Module, case: Case) -> Tensor:
    """The normalized weight of one forward in the layer's mode."""
    if isinstance(layer, RowNorm):
        return layer.normalized()
    if hasattr(layer, "spectral_norm"):
        return layer.spectral_norm(layer.weight)
    if hasattr(layer, "weight_orig"):
        layer(case.input())  # the hook writes the attribute before a forward
    return layer.weight.detach().clone()


def trained(layout: str, case: Case, uses: int = 3, **kwargs: object) -> nn.Module:
    """A layer after some uses in training mode, now in evaluation mode."""
    layer = build(layout, case, **kwargs)
    for _ in range(uses):
        use(layer, case)
    return layer.eval()
