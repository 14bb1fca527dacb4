"""A conditional generator whose images show their labels, in the file of a run's weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gan.config import Config

CLASSES, LATENT, SIZE = 3, 8, 32
CONFIG = Config(name="x", architecture="sngan-resnet", conditional="projection", image_size=SIZE, latent=LATENT, seed=5)


class Shown(nn.Module):
    """The first channel is 40 times the label, the others are of z; keeps the labels that it was given."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(LATENT, 2 * SIZE**2, generator=draw) / 2)
        self.seen: list[int] = []

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        assert labels.dtype == torch.int64
        if not torch.onnx.is_in_onnx_export():
            self.seen += labels.tolist()
        others = (z @ self.weight).tanh().view(-1, 2, SIZE, SIZE)
        first = (labels * 40 / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)
        return torch.cat([first, others], 1)


def saved(path: Path, classes: int = CLASSES) -> Path:
    """The file; reading it takes ``gan.models.build`` to give (Shown(), None)."""
    about = {**CONFIG.identity(), "channels": 3, "classes": classes, "data": "x", "data_key": "", "step": 1}
    tensors = {f"generator.{name}": x for name, x in Shown().state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(about)})
    return path
