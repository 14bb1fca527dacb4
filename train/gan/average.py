"""An average of a network's weights, which is evaluated in its place."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """Exponential moving average of a network's parameters: at the first update they are copied, then
    a <- decay · a + (1 - decay) · x. Buffers are copied.

    ``n_averaged``, on the CPU, is how many updates there were. Who updates counts: an update that a CUDA graph holds
    runs without Python, and torch's own, which counts, sends the number to the device, and waits for that.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.n_averaged = torch.tensor(0, device="cpu")

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards the network as it is now."""
        pairs = list(zip(self.module.buffers(), model.buffers(), strict=True))
        if self.n_averaged == 0:
            pairs += zip(self.module.parameters(), model.parameters(), strict=True)
        else:
            assert self.multi_avg_fn is not None
            # An exponential average does not depend on the count.
            self.multi_avg_fn(list(self.module.parameters()), list(model.parameters()), 0)
        for own, x in pairs:
            own.copy_(x)
