"""Adam of a network, for steps that Python carries out and for those that a CUDA graph holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def adam(net: nn.Module, rate: float, betas: tuple[float, float], captured: bool) -> torch.optim.Adam:
    """``captured``: steps can be in a CUDA graph, as the learning rate and the counts of steps are on the device. One
    kernel then makes a step, with corrections of the bias in float64."""
    parameters = list(net.parameters())
    if not captured:
        return torch.optim.Adam(parameters, lr=rate, betas=betas)
    on_device = torch.tensor(rate, dtype=torch.float32, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=on_device, betas=betas, capturable=True, fused=True)


def set_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    """In place where the learning rate is on the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Continue from a state of either kind of Adam. Raises KeyError or ValueError for one of another optimizer."""
    own = ("lr", "capturable", "fused")
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**theirs, **{name: ours[name] for name in own}} for theirs, ours in pairs]
    # Where a step is captured, torch itself brings the counts to the device.
    states = {i: {**held, "step": held["step"].cpu()} for i, held in state["state"].items()}
    optimizer.load_state_dict({**state, "state": states, "param_groups": groups})
