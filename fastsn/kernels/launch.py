"""How kernels are launched: tile shapes by the sizes of a weight.

Nothing here was measured on a GPU yet. What each number rests on stands beside it; ``tune`` measures on the user's.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsn.kernels.arrangement import Arrangement


@dataclass(frozen=True)
class Settings:
    """Sizes of tiles and of programs. Registers per thread were read from programs compiled for sm_90."""

    # Elements of a tile of the iteration and of the gradient: 16 floats per thread and accumulator with 4 warps, which
    # with two accumulators and the weight stays below the 128 registers that let 4 programs share a multiprocessor.
    tile: int = 2048
    # Rows of a block: each block writes sums of the length of a row (two for BSSN), so W/8 more traffic, nearly all in
    # the L2 cache. Fewer rows make more programs, which a small network needs to fill a GPU.
    rows: int = 8
    # Rows of a block where there are more than enough: from this many blocks of one weight on, four times the rows.
    many_blocks: int = 512
    # The last program of a weight adds up its blocks' sums, tile by tile, unless it has more tiles than this to go
    # through: then a second launch does. A tile waits for the L2 cache once, some 0.3 µs; a launch costs about 3.
    last_tiles: int = 16
    group: int = 8  # blocks added at a time
    columns: int = 256  # of how many columns
    vector: int = 1024  # elements of a vector that are normalised at a time
    # Elements that a program of the elementwise kernels goes through, in steps of a tile.
    chunk: int = 8192
    step: int = 2048
    warps: int = 4

    @property
    def finish(self) -> tuple[int, int, int]:
        """The tile sizes of the part that adds up and normalises."""
        return self.group, self.columns, self.vector


DEFAULT = Settings()


def power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """A tile of (BO rows, BI channels, KP >= K positions), of which ``blocks`` cover the rows of a weight."""

    bo: int
    bi: int
    kp: int
    blocks: int


def tiles(a: Arrangement, settings: Settings = DEFAULT) -> Tiles:
    """The tile for a weight: as many rows as the settings say, fewer where there are fewer, or where K is large."""
    kp = power_of_two(a.k)
    rows = settings.rows * (4 if a.rows > settings.many_blocks * settings.rows else 1)
    bo = min(rows, power_of_two(a.rows), max(settings.tile // kp, 1))
    bi = max(1, min(settings.tile // (bo * kp), power_of_two(a.b)))
    return Tiles(bo, bi, kp, -(-a.rows // bo))


def vector_width(a: Arrangement, element_size: int, aligned: bool) -> int:
    """How many elements a load of 16 bytes takes where rows begin at multiples of 16 bytes, otherwise 1."""
    width = 16 // element_size
    if a.k == 1 or a.kb:
        fits = a.b % width == 0
    else:
        fits = a.k == power_of_two(a.k) and a.k >= width
    return width if aligned and fits and (a.rows == 1 or a.stride % width == 0) else 1


def finished_apart(a: Arrangement, blocks: int, settings: Settings = DEFAULT) -> bool:
    """Whether a second launch adds up the blocks' sums."""
    tiles_to_go = -(-blocks // settings.group) * (-(-a.n // settings.columns) + -(-a.b // settings.columns))
    return tiles_to_go > settings.last_tiles
