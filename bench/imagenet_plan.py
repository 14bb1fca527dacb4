"""What a training of ImageNet takes, counted: python bench/imagenet_plan.py --out bench/results/imagenet_plan.json

For the presets of train/imagenet.py, at full width with a batch of 2 on a CPU: floating-point operations (a product and
its sum are two), bytes that autograd keeps for the backward, parameters; all but the parameters grow with the batch and
are given for the preset's. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import commit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from gan import models
from gan.presets import IMAGENET
from imagenet import ImageNet

CLASSES, BATCH, FLOAT = 1000, 2, 4


def counted(forward: Callable[[], Tensor], own: set[int]) -> tuple[float, float]:
    """Operations of forward and backward, bytes that were kept for the backward; ``own``: storages that are there
    anyway."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = forward()
        bytes_kept = sum(kept.values())
        loss.backward()
    return flops.get_total_flops(), bytes_kept


def plan(preset: str) -> dict[str, Any]:
    """Per step: n_dis steps of the discriminator, one of the generator."""
    fields = {**IMAGENET[preset], "bn_groups": 1}
    config = ImageNet(name="x", data=Path("x"), norm="sn", **fields)
    generator, discriminator = models.build(config, 3, CLASSES)
    parameters = [sum(p.numel() for p in net.parameters()) for net in (generator, discriminator)]
    own = {x.untyped_storage().data_ptr() for net in (generator, discriminator) for x in net.state_dict().values()}
    z, labels = torch.randn(BATCH, config.latent), torch.arange(BATCH) if config.conditional != "none" else None
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        images = generator(z, labels)
    of_fakes = flops.get_total_flops()
    d_flops, d_kept = counted(lambda: discriminator(images, labels).sum(), own)
    discriminator.requires_grad_(False)
    g_flops, g_kept = counted(lambda: discriminator(generator(z, labels), labels).sum(), own)
    size, size_g = config.batch_size / BATCH, (config.batch_size_g or config.batch_size) / BATCH
    per_step = config.n_dis * (2 * d_flops + of_fakes) * size + g_flops * size_g
    states = 4 * FLOAT * sum(parameters)  # weight, gradient, two moments
    activations = max(2 * d_kept * size, g_kept * size_g)
    return {
        "parameters": dict(zip(("generator", "discriminator"), parameters, strict=True)),
        "steps": config.steps,
        "batch_sizes": [config.batch_size, config.batch_size_g],
        "tflop_per_step": round(per_step / 1e12, 2),
        "gb_of_weights_gradients_moments": round(states / 1e9, 2),
        "gb_kept_for_backward_float32": round(activations / 1e9, 2),
        "mb_of_images_read_per_step": round(config.n_dis * config.batch_size * 3 * config.image_size**2 / 1e6, 2),
        "mb_reduced_per_step": round(FLOAT * (parameters[0] + config.n_dis * parameters[1]) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {preset: plan(preset) for preset in IMAGENET}
    result = {"torch": torch.__version__, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "presets": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
