"""Batch norms whose statistics are those of fixed parts of the global batch ("ghost groups"), and conditional ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan import distributed, group_mean


class _Grouped(nn.modules.batchnorm._BatchNorm):
    """torch's batch norm; in training, the batch of all ranks is ``groups`` equal contiguous parts, each normalized by
    its own mean and variance:

        y = (x - mean) / sqrt(var + eps) * weight + bias

    A rank holds whole groups, or ranks share one. Running statistics move by the mean over this rank's groups of their
    means and unbiased variances: they are linear in these, so that their mean over ranks is that over all groups.

    Raises ValueError in training where neither of groups and ranks is a multiple of the other.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, groups: int = 1, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(features, eps, affine=affine)
        self.groups, self.ranks = groups, distributed.ranks().size

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002 - the conditional one's
        if not self.training or self.groups == self.ranks == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if self.groups % self.ranks == 0:
            output, mean, var = self._of_whole_groups(input, self.groups // self.ranks)
        elif self.ranks % self.groups == 0:
            output, mean, var = self._of_a_shared_group(input, self.ranks // self.groups)
        else:
            raise ValueError(f"bn_groups must be a multiple or a divisor of the {self.ranks} ranks, got {self.groups}")
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return output

    def _of_whole_groups(self, input: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output (N, C, ...); mean over the groups of mean and unbiased variance, (C,)."""
        means, variances, outputs = [], [], []
        for part in input.unflatten(0, (count, -1)):
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            # With momentum 1 the running statistics are those of this part.
            outputs.append(F.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            means.append(mean)
            variances.append(var)
        return torch.cat(outputs), torch.stack(means).mean(0), torch.stack(variances).mean(0)

    def _of_a_shared_group(self, input: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of one group of which ``ranks`` ranks have equal parts: two passes, so that nothing cancels."""
        x = input.to(torch.promote_types(input.dtype, self.running_mean.dtype))
        dims, shape = [d for d in range(x.ndim) if d != 1], [-1, *[1] * (x.ndim - 2)]
        mean = group_mean.mean_of_group(x.mean(dims), self.groups)
        centred = x - mean.view(shape)
        var = group_mean.mean_of_group(centred.square().mean(dims), self.groups)
        output = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        count = ranks * x.numel() // x.shape[1]
        return output.to(input.dtype), mean.detach(), var.detach() * (count / (count - 1))


class BatchNorm1d(_Grouped, nn.BatchNorm1d):
    """Of (N, C), in ghost groups; labels are not used."""


class BatchNorm2d(_Grouped, nn.BatchNorm2d):
    """Of (N, C, H, W), in ghost groups; labels are not used."""


class ConditionalBatchNorm2d(BatchNorm2d):
    """y = (x - mean) / sqrt(var + eps) * gamma[label] + beta[label] of x (N, C, H, W) and labels (N,): gamma and beta
    (classes, C) begin at 1 and 0, the statistics are those of all classes together (Dumoulin et al., ICLR 2017; Miyato
    and Koyama, ICLR 2018)."""

    def __init__(self, features: int, classes: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__(features, groups, eps, affine=False)
        self.gamma = nn.Parameter(torch.ones(classes, features))
        self.beta = nn.Parameter(torch.zeros(classes, features))

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        x = super().forward(input)
        gamma, beta = (F.embedding(labels, table)[:, :, None, None] for table in (self.gamma, self.beta))
        output: Tensor = (gamma * x + beta).to(x.dtype)
        return output
