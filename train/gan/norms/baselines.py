"""What spectral normalization is compared with in Miyato et al., ICLR 2018, Table 2: weight, layer and batch
normalization without multipliers, weight clipping, orthonormal weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan import distributed
from gan.group_mean import mean_of_group

EPS = 1e-5  # of layer and batch norms


def unit_rows(weight: Tensor) -> Tensor:
    """W[i] / ‖W[i]‖ of every row i of a weight (O, ...): an output channel, or an entry of a table. Rows of zeros stay
    zero. Weight normalization (Salimans and Kingma, NeurIPS 2016) without its multiplier g."""
    norms = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return weight / torch.where(norms == 0, torch.ones_like(norms), norms)


class WNConv2d(nn.Conv2d):
    """Convolution with ``unit_rows`` of the weight; the bias as it is."""

    def normalized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a forward."""
        return unit_rows(self.weight), self.bias

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.normalized())


class WNLinear(nn.Linear):
    """Linear layer with ``unit_rows`` of the weight; the bias as it is."""

    def normalized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a forward."""
        return unit_rows(self.weight), self.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.normalized())


class WNEmbedding(nn.Embedding):
    """Table of ``unit_rows``."""

    def normalized(self) -> tuple[Tensor, None]:
        """The table of a forward."""
        return unit_rows(self.weight), None

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.normalized()[0])


class LNConv2d(nn.Conv2d):
    """y = (x - mean) / sqrt(var + 1e-5) + bias, x (N, C, H, W) the convolution without its bias, mean and var those of
    a sample over (C, H, W): layer normalization (Ba et al., 2016) without multiplier."""

    def forward(self, input: Tensor) -> Tensor:
        x = self._conv_forward(input, self.weight, None)
        return _plus(F.layer_norm(x, x.shape[1:], eps=EPS).to(x.dtype), self.bias)


class BNConv2d(nn.Conv2d):
    """y = (x - mean) / sqrt(var + 1e-5) + bias, x (N, C, H, W) the convolution without its bias, mean and var (C,)
    those of a channel in the batch of all ranks: batch normalization (Ioffe and Szegedy, ICML 2015) without multiplier
    and without running statistics. A discriminator is always in training: evaluation mode is the same.

    Raises ValueError for a batch with one value per channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = self._conv_forward(input, self.weight, None)
        return _plus(batch_normalized(x), self.bias)


def batch_normalized(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) of x (N, C, H, W), by the mean and the biased variance of a channel over all ranks;
    differentiable to any order."""
    if distributed.ranks().size == 1:
        return F.batch_norm(x, None, None, training=True, eps=EPS)
    return _over_ranks(x)


@torch.compiler.disable
def _over_ranks(x: Tensor) -> Tensor:
    wide, dims = x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3)
    centered = wide - mean_of_group(wide.mean(dims), 1)[:, None, None]
    var = mean_of_group(centered.square().mean(dims), 1)[:, None, None]
    return (centered * (var + EPS).rsqrt()).to(x.dtype)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias[:, None, None].to(x.dtype)


def _weights(model: nn.Module) -> list[Tensor]:
    """Of all convolutions, linear layers and embeddings."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]


@torch.no_grad()
def clip(model: nn.Module, limit: float) -> None:
    """Every parameter into [-limit, limit], in place (Arjovsky et al., ICML 2017, algorithm 1)."""
    for parameter in model.parameters():
        parameter.clamp_(-limit, limit)


def make_orthonormal(model: nn.Module, draw: torch.Generator) -> None:
    """Replace every weight, as a matrix (O, I·k·k), by one with orthonormal rows, or columns where these are fewer,
    uniform among such (Saxe et al., ICLR 2014)."""
    for weight in _weights(model):
        nn.init.orthogonal_(weight, generator=draw)


def orthonormal_penalty(model: nn.Module) -> Tensor:
    """Sum over all weights W, as matrices (O, I·k·k), of ‖WᵀW - I‖²_F, or ‖WWᵀ - I‖²_F where that is smaller: the
    regularization of Brock et al., ICLR 2017, in the form of Miyato et al., ICLR 2018, section 3."""
    return torch.stack([_distance_from_orthonormal(weight.flatten(1)) for weight in _weights(model)]).sum()


def _distance_from_orthonormal(m: Tensor) -> Tensor:
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    return (gram - torch.eye(len(gram), dtype=m.dtype, device=m.device)).square().sum()
