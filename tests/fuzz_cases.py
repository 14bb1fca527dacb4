"""The cases of the fuzz: a weight of any shape, memory layout, dtype and size, and how it is normalized."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import oracle

DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
}
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "expanded", "broadcast", "offset")
CONTENTS = ("normal", "normal", "normal", "normal", "sparse", "rank1", "wide range", "zeros", "nan", "inf")
VARIANTS = ("sn", "ssn", "bsn", "bssn")
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33)
TAILS = (3, 5, 7, 9, 12, 17, 20, 24, 33, 72, 257)  # input channels that fill no vector of 16, 8 or 4 lanes
GUARD, GUARDS = 777.0, 32


@dataclass(frozen=True)
class Case:
    """One call of one norm. Everything random in it is drawn from ``seed``."""

    seed: int = 0
    shape: tuple[int, ...] = (3, 4)
    dim: int = 0
    dtype: str = "float32"
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    content: str = "normal"
    exponent: float = 0.0  # of ten: the size of the entries
    variant: str = "sn"
    scale: str = "float"  # or "tensor", "parameter"
    scale_value: float = 1.0
    scale_dtype: str = "float32"
    rounds: int = 1  # 0: evaluation mode
    start: str = "unit"  # or "zero": v is zero, as torch's norm leaves it under a zero weight
    autocast: str = ""
    threads: int = 1
    v_first: bool = False  # the other order of a round, too

    def __str__(self) -> str:
        default = asdict(Case())
        return json.dumps({key: value for key, value in asdict(self).items() if value != default[key]})

    @classmethod
    def parse(cls, text: str) -> Case:
        given = json.loads(text)
        return cls(**given | ({"shape": tuple(given["shape"])} if "shape" in given else {}))


def drawn(seed: int, complex_too: bool = False, interpreted: bool = False) -> Case:
    """``interpreted``: weights that Triton's interpreter can do: small ones, since it is slow, and none of subnormal
    bfloat16 numbers, which it converts wrongly. Otherwise also large ones, which are worked on in pieces by threads."""
    rng = random.Random(seed)
    kind = rng.random()
    layout, dim = rng.choice(LAYOUTS), None
    if kind < 0.01 and not interpreted:
        shape: tuple[int, ...] = (rng.choice((64, 128, 513)), rng.choice((72, 257, 513)), 3, 3)
        layout, dim = rng.choice(("contiguous", "channels_last", "channels_last")), rng.choice((0, 0, 1))
    elif kind < 0.2:
        k = rng.choice((2, 3, 4))
        shape = (rng.choice((1, 4, 16, 65)), rng.choice(TAILS), k, k)
        layout, dim = "channels_last", 0
    elif kind < 0.23:
        shape = (rng.choice(SIZES),)
    else:
        shape = tuple(rng.choice(SIZES) for _ in range(rng.choice((2, 2, 3, 4, 4, 5, 6))))
    largest = 200 if interpreted else math.inf if kind < 0.01 else 80_000 if kind < 0.2 else 4096
    while math.prod(shape) > largest:
        shape = tuple(rng.choice(SIZES[:7]) if size == max(shape) else size for size in shape)
    names = list(DTYPES)[: 6 if complex_too else 4]
    dtype = rng.choice(["float32", *names])
    autocast = rng.choice(["", "", "", "bfloat16", "float16"])
    variant = rng.choice(VARIANTS)
    free = variant in ("ssn", "bssn")
    low, high = (-7, 4) if dtype == "float16" else (-45, 38)
    if interpreted and dtype == "bfloat16":
        low, high = -20, 20
    exponent = rng.uniform(-3, 3) if rng.random() < 0.6 else rng.uniform(low, high)
    return Case(
        seed=seed,
        shape=shape,
        dim=rng.randrange(-len(shape), len(shape)) if dim is None else dim,
        dtype=dtype,
        layout=layout,
        gradient_layout=rng.choice(LAYOUTS),
        content=rng.choice(CONTENTS),
        exponent=round(exponent, 2),
        variant=variant,
        scale=rng.choice(("float", "tensor", "parameter")) if free else "float",
        scale_value=round(10 ** rng.uniform(-3, 3), 6) if free else 1.0,
        scale_dtype=rng.choice(("float32", "float32", "float64", "float16")),
        rounds=rng.randrange(4),
        start=rng.choice(("unit",) * 9 + ("zero",)),
        autocast=autocast,
        threads=rng.choice((1, 1, 1, 2, 2, 4)),
        v_first=rng.random() < 0.5,
    )


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less, for the search of the smallest that fails."""
    plain = asdict(Case())
    for key in ("autocast", "gradient_layout", "layout", "content", "start", "exponent", "v_first"):
        yield replace(case, **{key: plain[key]})
    yield replace(case, scale="float", scale_value=1.0, scale_dtype="float32")
    yield replace(case, variant="sn", scale="float", scale_value=1.0, scale_dtype="float32")
    for key in ("dtype", "threads", "dim"):
        yield replace(case, **{key: plain[key]})
    yield replace(case, rounds=min(case.rounds, 1))
    for i, size in enumerate(case.shape):
        for less in (1, size // 2, size - 1):
            if 0 < less < size:
                yield replace(case, shape=(*case.shape[:i], less, *case.shape[i + 1 :]))
    if len(case.shape) > 2:
        yield replace(case, shape=case.shape[:-1], dim=0)


def weight(case: Case, generator: torch.Generator) -> Tensor:
    dtype = DTYPES[case.dtype]
    draw_as = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=draw_as, generator=generator)

    x = normal(*case.shape)
    if case.content == "zeros":
        x = torch.zeros_like(x)
    elif case.content == "sparse":
        x = torch.where(torch.rand(case.shape, generator=generator) < 0.8, 0.0, x)
    elif case.content == "rank1":
        x = x[:1] * normal(case.shape[0], *[1] * (x.ndim - 1))
    elif case.content == "wide range":
        x = x * 10 ** (12 * torch.rand(case.shape, generator=generator, dtype=torch.float64) - 6)
    x = (x * 10**case.exponent).to(dtype)
    if case.content in ("nan", "inf"):
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(case.content)
    return laid_out(x, case.layout, generator)


def gradient(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    draw_as = torch.complex64 if dtype.is_complex else torch.float32
    x = torch.randn(case.shape, dtype=draw_as, generator=generator).to(dtype)
    return laid_out(x, case.gradient_layout, generator)


def vectors(case: Case, like: Tensor, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Each lies inside a larger piece of memory, see ``guards_hold``."""
    found = {}
    for view, m in oracle.matrices(oracle.exact(like), case.dim, case.variant).items():
        pair = []
        for size in m.shape:
            x = torch.randn(size, dtype=oracle.wide(like.dtype), generator=generator)
            memory = x.new_full((size + 2 * GUARDS,), GUARD)
            pair.append(memory[GUARDS:-GUARDS].copy_(x / torch.linalg.vector_norm(x)))
        if case.start == "zero":
            pair[1].zero_()
        found[view] = (pair[0], pair[1])
    return found


def guards_hold(vector: Tensor) -> bool:
    memory = vector._base
    assert memory is not None
    return bool((memory[:GUARDS] == GUARD).all() and (memory[-GUARDS:] == GUARD).all())


def laid_out(x: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """In another memory layout, and what lies between the entries is NaN. "expanded" and "broadcast" change values."""
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        steps = [int(torch.randint(1, 4, (), generator=generator)) for _ in x.shape]
        inside = tuple(slice(1, 1 + size * step, step) for size, step in zip(x.shape, steps, strict=True))
        around = x.new_full([1 + size * step + 1 for size, step in zip(x.shape, steps, strict=True)], torch.nan)
        around[inside] = x
        return around[inside]
    if layout == "permuted":
        order = torch.randperm(x.ndim, generator=generator).tolist()
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    if layout == "expanded":
        at = int(torch.randint(x.ndim, (), generator=generator))
        return x.narrow(at, 0, 1).contiguous().expand(x.shape)
    if layout == "broadcast":
        return x.flatten()[:1].view([1] * x.ndim).expand(x.shape)
    if layout == "offset":
        return torch.cat([x.new_full((1,), torch.nan), x.reshape(-1)])[1:].view(x.shape)
    return x
