"""Weights of a run as safetensors with the config inside, and how a generator is made of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gan import checkpoint, models, norms, streams
from gan.config import Config
from gan.training import Training

PARTS = ("generator", "average", "discriminator")


def save(path: Path, training: Training, about: dict[str, Any]) -> None:
    """Both networks, and the generator's average where there is one, in one file, whole or not at all."""
    parts = {"generator": training.generator, "discriminator": training.discriminator}
    if training.average is not None:
        parts["average"] = training.evaluated
    tensors = {
        f"{part}.{name}": x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, net in parts.items()
        for name, x in net.state_dict().items()
    }
    # One entry: of several, the order in the file changes from process to process.
    checkpoint.atomic_write(path, to_bytes(tensors, {"config": json.dumps({**about, "step": training.step})}))


@dataclass(frozen=True)
class Trained:
    """A generator for evaluation, the config of its run, the number of classes of its data (0: without labels), and
    the device that it is on."""

    generator: nn.Module
    config: Config
    classes: int
    device: torch.device

    @property
    def conditional(self) -> bool:
        """Whether the generator takes labels."""
        return self.config.conditional != "none"

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images in [-1, 1] of z (N, latent) and labels, int64 (N,); None for a generator that takes none."""
        inputs = (z,) if labels is None else (z, labels)
        images: Tensor = self.generator(*(x.to(self.device) for x in inputs))
        return images

    def numbered_labels(self, first: int, count: int) -> Tensor | None:
        """The labels of image number first, first + 1, ..., as in training; None for a generator that takes none."""
        return streams.numbered_labels(first, count, self.classes) if self.conditional else None


def load_generator(path: str | Path) -> tuple[nn.Module, Config]:
    """The generator and the config of ``load``."""
    trained = load(path)
    return trained.generator, trained.config


def load(path: str | Path, device: str = "cpu") -> Trained:
    """The generator of a run's folder (its last weights), a checkpoint of it (step-*.pt) or a .safetensors file, for
    evaluation: the average where training kept one. The networks are unpacked from data, never from code.

    Raises:
        ValueError: the path is none of these, or what it holds does not fit the config beside it.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "weights" / "last.safetensors"
        if not path.is_file():
            raise ValueError(f"path must be the folder of a run that has saved weights, got {path.parent.parent}")
    about, tensors = _checkpoint(path) if path.suffix == ".pt" else _safetensors(path)
    part = "average" if "average" in tensors else "generator"
    config = config_of(about)
    generator, _ = models.build(config, about["channels"], about["classes"])
    try:
        generator.load_state_dict(tensors[part])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"path must hold the weights of its config's generator, got {path}: {error}") from error
    return Trained(generator.eval().requires_grad_(False).to(device), config, about["classes"], torch.device(device))


def config_of(about: dict[str, Any]) -> Config:
    """The config from the identity of a run."""
    data = ("channels", "classes", "data", "data_key", "step")
    return Config(name="loaded", **{k: v for k, v in about.items() if k not in data})


def _checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    file = path.parent.parent / "config.json"
    if not file.is_file():
        raise ValueError(f"path must be a checkpoint in the folder of its run, got {path} without {file}")
    state = checkpoint.try_load(path)
    if state is None:
        raise ValueError(f"path must be a whole checkpoint, got {path}, which is damaged")
    parts = {name: state[name] for name in PARTS if name in state}
    if "average" in parts:  # AveragedModel's own names
        own = {k.removeprefix("module."): x for k, x in parts["average"].items() if k.startswith("module.")}
        parts["average"] = own
    return json.loads(file.read_text())["config"], parts


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    if not path.is_file():
        raise ValueError(f"path must be a run, a checkpoint or a .safetensors file, got {path}")
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["config"])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                part, _, name = key.partition(".")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path must be weights that a run has saved, got {path}: {error}") from error
    return about, parts


def normalized_of_discriminator(path: Path) -> dict[str, Tensor]:
    """Every layer's normalized weight in saved weights (.safetensors), as the discriminator uses it in evaluation.

    Raises:
        ValueError: the file holds something else, or weights that do not fit the config in it.
    """
    about, tensors = _safetensors(path)
    config = config_of(about)
    _, discriminator = models.build(config, about["channels"], about["classes"])
    try:
        discriminator.load_state_dict(tensors["discriminator"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"path must hold the weights of its config's discriminator, got {path}: {error}") from error
    return norms.Norm(config, discriminator.eval()).weights()


def shapes_of_discriminator(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every layer's weight, as torch stores it; a parametrized one has the shape of its largest part. Reads the head
    of the file only. Raises ValueError for a file that is not saved weights."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name = re.fullmatch(r"discriminator\.(.+?)\.(weight|parametrizations\.weight\.original\d*)", key)
                shape = tuple(file.get_slice(key).get_shape()) if name else ()
                if name and math.prod(shape) >= math.prod(found.get(name[1], (0,))) and len(shape) > 1:
                    found[name[1]] = shape
    except SafetensorError as error:
        raise ValueError(f"path must be weights that a run has saved, got {path}: {error}") from error
    return found
