"""Launches of whole lists through Triton's real JIT, with a driver that stands in for that of an sm_90 GPU: everything
up to the launch itself, so that arguments are specialized as they will be. Prints the kernels, one per line, with what
they were compiled to.

Run apart from the tests: there the kernels are made for the interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CPU = torch.device("cpu")


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return CPU


class Compiled:
    """A kernel that is compiled and not launched."""

    def __init__(self, name: str, kernel: Any) -> None:
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            binary = self.kernel.warmup(*arguments, grid=grid, **options)
            print(self.name, binary.hash, len(binary.asm["cubin"]) > 0)

        return run


def run(
    shapes: list[tuple[int, ...]],
    dims: list[int],
    n: int,
    dtype: torch.dtype,
    scale: str = "float",
    v_first: list[int] | int = 0,
) -> None:
    from fastsn.triton import launch
    from op_calls import call

    c = call([torch.randn(shape).to(dtype) for shape in shapes], dims, 3, scale, v_first)
    launch.call("power_iteration_", *c.iteration(), n)
    sigma, vectors = torch.ones(len(c.u)), torch.ones(sum(x.numel() for x in (*c.u, *c.v)))
    outputs, mean = launch.call("rescale", c.weights, c.scales, sigma, vectors, *c.numbers())
    bases, grad_sigma = (c.weights if c.scales else outputs), (torch.ones(len(dims)) if n == 2 else None)
    launch.call("rescale_backward", outputs, grad_sigma, bases, c.scales, mean, vectors, *c.numbers())


if __name__ == "__main__":
    driver.set_active(Driver())
    from fastsn.triton import power_iteration, rescale, settings

    kernels = {
        power_iteration: ("iterate", "reduce"),
        rescale: ("rescale", "inner_products", "gradient"),
    }
    for module, names in kernels.items():
        for name in names:
            setattr(module, name, Compiled(name, getattr(module, name)))
    # Numbers of which the JIT would make constants: 1 and no 1, 0 and no 0. And a network beside one of its layers.
    run([(8, 4, 4, 4)], [0], 1, torch.float32, "tensor")
    run([(8, 4, 4, 4)] * 3, [0] * 3, 2, torch.float32, "tensor")
    print()
    run([(8, 4, 4, 4), (16, 8, 3, 3), (8, 4, 4, 4), (6, 16)], [0, 0, 1, 0], 2, torch.bfloat16, v_first=[0, 1, 1, 0])
    run([(8, 4, 7)], [0], 0, torch.float16)
    settings.use(replace(settings.DEFAULT, last_tiles=0), CPU)
    run([(8, 4, 4, 4)], [0], 1, torch.float32)
