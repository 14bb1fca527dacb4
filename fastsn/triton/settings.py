"""How kernels are launched: tile shapes by the sizes of a weight.

What each number rests on stands beside it. ``launch.tune`` measures what suits another GPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastsn.triton.arrangement import Arrangement


def power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """A tile of BO rows, of which ``blocks`` cover those of a weight, by BI flat elements; with ``kb`` (channels_last)
    by BI channels and KP >= K positions."""

    bo: int
    bi: int
    k: int
    kp: int
    kb: bool
    blocks: int

    def kind(self, width: int) -> tuple[Any, ...]:
        """For kernels that load ``width`` elements at a time: of the BI elements, tiles use so many that each begins
        at position 0 and at a wide load."""
        if self.kb:
            return self.bo, self.bi, self.bi, 0, self.kp, True, width
        period = math.lcm(self.k, width)
        return self.bo, self.bi, self.bi // period * period, self.k, self.kp, False, width

    def own(self, n: int) -> int:
        """Floats of the scratch that each block of rows of ``n`` elements has to itself: for a tile, or for a row."""
        return 0 if self.kb or self.k == self.kp else -(-max(self.bo * self.bi, n) // 4) * 4


@dataclass(frozen=True)
class Settings:
    """Sizes of tiles and of programs. Measured on an H200 (bench/results/nvidia-h200), registers per thread read from
    programs compiled for sm_90.

    Iteration: a warp's loads of 16 bytes cover 128 columns of a row, and each of its threads has the same columns of
    all rows of the block: sums over rows stay in a thread, and x and z arrive where they are used, without a barrier.
    Two programs of 8 warps fit on a multiprocessor, so that one reads while the other waits at a barrier of its own.
    """

    # Elements of a tile for each warp: 32 floats per thread, of 8 rows.
    elements: int = 1024
    warps: int = 8
    # Registers per thread that an iteration may have: two programs of 8 warps have 128.
    registers: int = 128
    # Rows of a block: each block writes sums of the length of a row (two for BSSN), so 2/8 of W is written and read
    # again. Fewer rows make more programs, which a small network needs to fill a GPU.
    rows: int = 8
    # More rows, up to four times as many, as long as a weight has this many blocks: one for each multiprocessor.
    many_blocks: int = 128
    # Elements of the rows that the programs of a multiprocessor may hold where blocks have more rows, for the second
    # half of an iteration comes back for them: 132 times 80 Ki floats are 43 MB of an H100's 50 MB of L2, 108 times as
    # much 35 of an A100's 40. Blocks of 4096 columns stay at 8 rows, of 32 they would take 145 µs instead of 99; rows
    # that are longer still (1024 x 3 x 3) are not worth smaller blocks: 158 µs with 4 rows, 129 with 8.
    near: int = 80 << 10
    # The last program of a weight adds up its blocks' sums, tile by tile, unless it has more tiles than this to go
    # through: then a second launch does, in as many programs as there are tiles. On an H200 that is faster for any
    # network: 13 of 60 µs for the CNN of CIFAR10.
    last_tiles: int = 0
    # Blocks that are added at a time, and of how many columns: 16 floats per thread.
    group: int = 64
    columns: int = 64
    vector: int = 4096  # elements of a vector that are normalized at a time: 16 per thread, in float64 where multiplied
    # Elements that a program of the kernels of rescaling goes through, in steps of a tile.
    chunk: int = 8192
    rescale_warps: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not type(getattr(type(self), name)):
                raise ValueError(f"{name} must be of type {type(getattr(type(self), name)).__name__}, got {value!r}")
            if name not in ("last_tiles", "many_blocks", "registers", "near") and (
                value < 1 or value != power_of_two(value)
            ):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if not 32 <= self.registers <= 255:
            raise ValueError(f"registers must be from 32 to 255, got {self.registers}")
        for name in ("last_tiles", "many_blocks", "near"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.chunk < self.step:
            raise ValueError(f"chunk must be at least elements times rescale_warps, {self.step}, got {self.chunk}")

    def options(self, warps: int) -> dict[str, Any]:
        """Of every launch. Fused multiply-add is asked for: Triton 3.10 no longer uses it by default."""
        return {"num_warps": warps, "enable_fp_fusion": True}

    @property
    def finish(self) -> tuple[int, int, int]:
        """The tile sizes of the part that adds up and normalizes."""
        return self.group, self.columns, self.vector

    @property
    def tile(self) -> int:
        """Elements that a program of an iteration takes at a time."""
        return self.elements * self.warps

    @property
    def step(self) -> int:
        """Elements that a program of the kernels of rescaling takes at a time."""
        return self.elements * self.rescale_warps

    def tiles(self, a: Arrangement, tile: int) -> Tiles:
        """The tile of at most so many elements for a weight, and its blocks of rows."""
        kp = power_of_two(a.k)
        bo = min(self.block(a), power_of_two(a.rows), max(tile // kp, 1))
        flat = max(kp, min(tile // bo, power_of_two(a.n)))
        bi = max(1, min(tile // (bo * kp), power_of_two(a.b))) if a.kb else flat
        return Tiles(bo, bi, a.k, kp, a.kb, -(-a.rows // bo))

    def block(self, a: Arrangement) -> int:
        """Rows of a block: those that are set, more where there are many and they are not too long."""
        most = max(self.near * min(self.warps, 16) // 16 // a.n, 1)  # 16 warps of 128 registers fill a multiprocessor
        bo = self.rows
        while bo < 4 * self.rows and 2 * bo <= most and a.rows >= self.many_blocks * 2 * bo:
            bo *= 2
        return bo

    def finished_apart(self, a: Arrangement, blocks: int) -> bool:
        """Whether a second launch adds up the blocks' sums."""
        columns = -(-a.n // self.columns) + -(-a.b // self.columns)
        return -(-blocks // self.group) * columns > self.last_tiles


DEFAULT = Settings()

# Registers per thread that no kernel may exceed with the default settings, on any of NVIDIA's GPUs that the tests
# compile for. A multiprocessor has 128 for each of 16 warps. "strided" are the elementwise kernels of weights with gaps
# between their rows: rare, and they divide.
REGISTERS = {
    "iterate": 128,
    "reduce": 128,
    "rescale": 168,
    "inner_products": 128,
    "gradient": 240,
    "strided": 255,
}
_known: dict[torch.device, Settings] = {}
on_change: list[Callable[[], None]] = []  # what has been prepared with other settings is forgotten


def current(device: torch.device) -> Settings:
    """What is in force for a device: what ``launch.tune`` has stored for it, otherwise the defaults."""
    found = _known.get(device)
    if found is None:
        found = _known[device] = (stored(device) if device.type == "cuda" else None) or DEFAULT
    return found


def use(settings: Settings, device: torch.device) -> None:
    """Put the settings in force for a device."""
    _known[device] = settings
    for forget in on_change:
        forget()


def stored(device: torch.device) -> Settings | None:
    """What ``launch.tune`` has stored for GPUs of this name; None, with a warning, if it cannot be used."""
    path = file(torch.cuda.get_device_name(device))
    if not path.exists():
        return None
    try:
        return Settings(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{path} is not used, the default launch settings are: {error}", stacklevel=2)
        return None


def store(settings: Settings, device: torch.device) -> Path:
    """Keep the settings for GPUs of this name, and put them in force."""
    path = file(torch.cuda.get_device_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}.part")  # of several processes that tune, one wins, with a whole file
    whole.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    whole.replace(path)
    use(settings, device)
    return path


def file(name: str) -> Path:
    """Where the settings for GPUs of a name are kept: in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastsn" / f"launch-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"


def vector_width(a: Arrangement, element_size: int, aligned: bool, tiles: Tiles) -> int:
    """How many elements a load of 16 bytes takes where rows begin at multiples of 16 bytes, otherwise 1."""
    width = 16 // element_size
    fits = a.b % width == 0 if a.kb else a.n % width == 0 and math.lcm(a.k, width) <= tiles.bi
    return width if aligned and fits and (a.rows == 1 or a.stride % width == 0) else 1
