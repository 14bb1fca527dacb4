"""What every recipe does with its config and its data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Protocol

from gan import devices, loop
from gan.config import Config
from gan.data.staging import staged
from gan.data.store import Store, open_store
from gan.distributed import ranks
from gan.training import Training


class OnDisk(Protocol):
    """What a config says of its data."""

    @property
    def data(self) -> Path: ...

    @property
    def stage(self) -> Path | None: ...


def open_data(config: OnDisk) -> Store:
    """The data folder of every rank, from its node's own disk where the config says so: the same images everywhere."""
    with ranks().together():
        store = open_store(staged(config.data, config.stage))
    ranks().same("data", store.key)
    return store


def train(config: Config, store: Store, resume: bool = False, dry_run: bool = False) -> None:
    """Train, continue, or with ``dry_run`` say what would be trained. All ranks of a run call it."""
    here = ranks()
    here.same("the configuration", dataclasses.asdict(config))
    if dry_run:
        here.of_first(lambda: print(described(config, store)))
    else:
        loop.train(config, store, resume)


def described(config: Config, store: Store) -> str:
    """The whole configuration, the networks and their parameters, the folder, the size of a checkpoint."""
    loop.check_data(config, store)
    training = Training(config, store.channels, store.classes, devices.pick_device("cpu"))
    parts = [json.dumps(dataclasses.asdict(config), indent=2, default=str)]
    floats = 0
    for name, net in (("generator", training.generator), ("discriminator", training.discriminator)):
        count = sum(p.numel() for p in net.parameters())
        floats += 3 * count + sum(b.numel() for b in net.buffers())
        parts += [str(net), f"{name}: {count:,} parameters"]
    floats += sum(x.numel() for x in training.evaluated.state_dict().values()) if training.average is not None else 0
    sizes = f"{store.count:,} images of {store.channels} x {store.image_size} x {store.image_size}"
    parts += [f"data: {store.name}, {sizes}, {store.classes} classes, key {store.key}"]
    parts += [
        f"folder: {config.folder}",
        f"checkpoint: about {4 * floats / 1e6:.1f} MB, {config.keep_checkpoints} kept",
    ]
    return "\n".join(parts)
