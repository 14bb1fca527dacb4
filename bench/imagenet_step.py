"""A training step of train/imagenet.py on synthetic images: python bench/imagenet_step.py --out OUT.json [--compile]

The presets bsn and sngan-projection at full width, on a GPU where there is one, in float32 (TF32) and bf16: images per
second of the discriminator's batches, peak memory, and what normalizing adds: none, torch's spectral norm, SN and BSSN
of fastsn. Networks are too large to take turns in memory: each has its rounds by itself, "none" before and after all
others, which shows how far the machine has drifted. First SN is checked to give the scores that torch's gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from gan import norms
from gan.devices import peak_memory
from gan.presets import IMAGENET
from gan.training import Training
from imagenet import ImageNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES, WARM_UP = 1000, 2
CONTESTANTS = {"none": "none", "torch SN": "none", "fastsn SN": "sn", "fastsn BSSN": "bssn", "none again": "none"}


def by_torch(layer: type[nn.Module]) -> Any:
    return lambda *args, **kwargs: spectral_norm(layer(*args, **kwargs))


def training_of(contestant: str, preset: str, **changes: Any) -> Training:
    """On the device; torch's spectral norm as a user has it, in the place of plain layers."""
    norm = CONTESTANTS[contestant]
    fields = {**IMAGENET[preset], "norm": norm, "scale": 1.4 if norm == "bssn" else 1.0, **changes}
    config = ImageNet(name="x", data=Path("x"), **fields)
    plain = norms.layers
    if contestant == "torch SN":
        norms.layers = lambda _: norms.Layers(*(by_torch(x) for x in (nn.Conv2d, nn.Linear, nn.Embedding)))
    try:
        return Training(config, 3, CLASSES if config.conditional != "none" else 0, DEVICE)
    finally:
        norms.layers = plain


def batches(training: Training) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The same images again and again, on the device."""
    config, draw = training.config, torch.Generator().manual_seed(0)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).to(DEVICE)
    labels = torch.randint(CLASSES, shape[:1], generator=draw).to(DEVICE) if training.classes else None
    while True:
        yield images, labels


def measured(training: Training, rounds: int) -> dict[str, float]:
    config, stream, seconds = training.config, batches(training), []
    for _ in range(WARM_UP):
        training.advance(stream)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        _finish()
        begin = time.perf_counter()
        training.advance(stream)
        _finish()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    images = config.n_dis * config.batch_size
    return {
        "seconds_per_step": round(median, 5),
        "images_per_s": round(images / median, 1),
        "peak_memory_gb": round(peak_memory(DEVICE), 2),
    }


def _finish() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(preset: str, **changes: Any) -> None:
    """One step of fastsn's SN from torch's u and v and weights."""
    ours, torchs = (
        training_of(x, preset, **{**changes, "u_schedule": "per_forward"}) for x in ("fastsn SN", "torch SN")
    )
    names = [name for name, m in torchs.discriminator.named_modules() if hasattr(m, "parametrizations")]
    for name in names:
        mine, theirs = ours.discriminator.get_submodule(name), torchs.discriminator.get_submodule(name)
        found = theirs.parametrizations.weight
        with torch.no_grad():
            found.original.copy_(mine.weight)
            ((u, v),) = mine.spectral_norm.vectors().values()
            found[0]._u.copy_(u)
            found[0]._v.copy_(v)
    stream = batches(ours)
    images, labels = next(stream)
    x = images.float() / 127.5 - 1
    torch.testing.assert_close(ours.discriminator(x, labels), torchs.discriminator(x, labels), rtol=2e-2, atol=2e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--presets", nargs="+", default=["bsn", "sngan-projection"], choices=list(IMAGENET))
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for preset in arguments.presets:
        size = {"width": arguments.width, "image_size": arguments.image_size}
        check(preset, **size)
        for precision in ("float32", "bf16"):
            rows = found.setdefault(preset, {}).setdefault(precision, {})
            for contestant in CONTESTANTS:
                training = training_of(contestant, preset, precision=precision, compile=arguments.compile, **size)
                rows[contestant] = measured(training, arguments.rounds)
                print(preset, precision, contestant, rows[contestant], flush=True)
                result = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
                result |= {"compiled": arguments.compile, **size, "presets": found}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")  # what there is, if time runs out
                del training
                torch.compiler.reset()
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
