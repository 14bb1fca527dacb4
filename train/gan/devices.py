"""The device of a run, and how it is used."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import torch
from torch import Tensor

from gan.distributed import ranks


def pick_device(name: str) -> torch.device:
    """The device of a config. Under torchrun, each process has the GPU of its local rank.

    Raises:
        ValueError: "cuda" without a GPU, or more processes than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'auto' or 'cpu' on a machine without CUDA, got 'cuda'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    here = ranks()
    if here.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device must be 'cpu' with more processes than GPUs, got {name!r} with {here.local_size} processes and "
            f"{torch.cuda.device_count()} GPUs on a node"
        )
    return torch.device("cuda", here.local_rank)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` of the CPU on a device, without waiting for what the device has to do before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@contextlib.contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Products of float32 on a GPU with factors rounded to TF32, or exactly."""
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    held = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, before in zip(flags, held, strict=True):
            flag.allow_tf32 = before


def peak_memory(device: torch.device) -> float:
    """Most that this process has held, in 10^9 bytes: of tensors on a GPU, of all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
