"""A trained generator for other programs.

python train/export.py runs/cifar10/bssn --out bssn.safetensors     # both networks, the average, the config
python train/export.py runs/cifar10/bssn --out bssn.onnx            # the generator: z (N, latent) to images in [-1, 1]

A conditional generator's ONNX has a second input, labels, int64 (N,).
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gan import checkpoint, cli
from gan.weights import load


def main(path: Annotated[Path, tyro.conf.Positional], out: Path) -> None:
    """Write the weights in PATH to OUT, whose suffix says how.

    Args:
        path: The folder of a run (its last weights), a checkpoint, or weights (.safetensors).
        out: A .safetensors or .onnx file.
    """
    if out.suffix not in (".safetensors", ".onnx"):
        raise ValueError(f"out must be a .safetensors or .onnx file, got {out}")
    if out.suffix == ".safetensors":
        source = path / "weights" / "last.safetensors" if path.is_dir() else path
        load(source)  # that it is whole, and fits its config
        if source.suffix != ".safetensors":
            raise ValueError(f"path must be a run or its weights for a .safetensors file, got {path}")
        checkpoint.atomic_write(out, source.read_bytes())
        return
    trained = load(path)
    inputs = {"z": torch.zeros(2, trained.config.latent)}
    if trained.conditional:
        inputs["labels"] = torch.zeros(2, dtype=torch.int64)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs one more package
        torch.onnx.export(
            trained.generator,
            tuple(inputs.values()),
            data,
            input_names=list(inputs),
            output_names=["images"],
            dynamic_axes={name: {0: "count"} for name in (*inputs, "images")},
            dynamo=False,
        )
    checkpoint.atomic_write(out, data.getbuffer())


if __name__ == "__main__":
    cli.start(main)
