"""Launches of whole lists through Triton's real JIT, with a driver that stands in for that of an sm_90 GPU: everything
up to the launch itself, so that arguments are specialized as they will be. Prints, as JSON, what every list launches,
the first time, again, and again with flat vectors that begin anywhere: per launch the kernel, what it was compiled to,
and its arguments, tensors by their dtypes and whether they are aligned to 16 bytes.

Run apart from the tests: there the kernels are made for the interpreter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CPU = torch.device("cpu")
launched: list[list[Any]] = []


def looks(x: Tensor) -> str:
    return str(x.dtype) + (" not aligned" if x.data_ptr() % 16 else "")


class Launcher:
    """What Triton makes for a compiled kernel, to launch it."""

    def __init__(self, _: Any, metadata: Any) -> None:
        self.kernel = [metadata.name, metadata.hash]

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        _function, _metadata, _launch_metadata, _enter_hook, _exit_hook, *arguments = rest
        found = [looks(x) if isinstance(x, Tensor) else str(x) for x in arguments]
        launched.append([*self.kernel, [x, y, z, stream], found])


class Utils:
    def load_binary(self, name: str, binary: bytes, *_: int) -> tuple[int, int, int, int, int]:
        assert binary, name
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return CPU


def moved(x: Tensor, begin: int) -> Tensor:
    """The same numbers, where so many lie before them."""
    return torch.cat([torch.zeros(begin), x])[begin:]


def run(
    shapes: list[tuple[int, ...]],
    dims: list[int],
    n: int,
    dtype: torch.dtype,
    scale: str = "float",
    v_first: list[int] | int = 0,
) -> dict[str, list[list[Any]]]:
    from fastsn.triton import launch
    from op_calls import call

    c = call([torch.randn(shape).to(dtype) for shape in shapes], dims, 3, scale, v_first)
    sizes = len(c.u), sum(x.numel() for x in (*c.u, *c.v)), len(dims)
    flat = [*map(torch.ones, sizes), torch.ones(len(dims)) if n == 2 else None]
    found = []
    for begin in (0, 0, 1):
        launched.clear()
        sigma, vectors, mean, grad_sigma = (x if x is None else moved(x, begin) for x in flat)
        launch.call("power_iteration_", *c.iteration(), n)
        outputs, _ = launch.call("rescale", c.weights, c.scales, sigma, vectors, *c.numbers())
        bases = c.weights if c.scales else outputs
        launch.call("rescale_backward", outputs, grad_sigma, bases, c.scales, mean, vectors, *c.numbers())
        found.append(list(launched))
    return dict(zip(("first", "again", "not aligned"), found, strict=True))


if __name__ == "__main__":
    driver.set_active(Driver())
    from fastsn.triton import settings

    # Numbers of which the JIT would make constants: 1 and no 1, 0 and no 0. And a network beside one of its layers.
    alike = [
        run([(8, 4, 4, 4)], [0], 1, torch.float32, "tensor"),
        run([(8, 4, 4, 4)] * 3, [0] * 3, 2, torch.float32, "tensor"),
    ]
    others = [
        run(
            [(8, 4, 4, 4), (16, 8, 3, 3), (8, 4, 4, 4), (6, 16)], [0, 0, 1, 0], 2, torch.bfloat16, "float", [0, 1, 1, 0]
        ),
        run([(8, 4, 7)], [0], 0, torch.float16),
    ]
    settings.use(replace(settings.DEFAULT, last_tiles=1 << 10), CPU)
    others.append(run([(8, 4, 4, 4)], [0], 1, torch.float32))
    print(json.dumps({"alike": alike, "others": others}))
