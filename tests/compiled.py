"""Compiles every Triton kernel for a GPU that need not be there, and prints what each needs, as JSON.

    python tests/compiled.py sm90

Run apart from the tests: there the kernels are made for the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsn.triton import power_iteration, rescale
from fastsn.triton.arrangement import arrangement
from fastsn.triton.settings import DEFAULT, vector_width

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# All are compiled for this one, for the others each kernel once or twice.
WHOLE = "sm90"
ELSEWHERE = ("iterate network wide", "iterate 3x3 wide", "iterate 3x3 narrow", "reduce", "rescale fp32 wide")
ELSEWHERE += ("rescale strided", "inner_products fp32 wide", "gradient 3x3 wide", "gradient Linear wide")
POINTERS = {"table": "*i64", "work": "*i32", "phases": "*i32", "counters": "*i32", "barrier": "*i64"}
NUMBERS = ("first", "store", "rounds", "has_grad_sigma", "layers", "scales")
F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16


def shape_of(
    shape: tuple[int, ...], dtype: Any, aligned: bool = True, channels_last: bool = False
) -> Callable[[int], tuple[Any, ...]]:
    """The kind of a weight's tiles of at most so many elements, by the default settings."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    like = torch.empty(shape, device="meta", memory_format=order)
    a = arrangement(shape, like.stride(), 0)
    assert a is not None

    def kind(tile: int) -> tuple[Any, ...]:
        t = DEFAULT.tiles(a, tile)
        return t.kind(vector_width(a, dtype.primitive_bitwidth // 8, aligned, t))

    return kind


def weights(aligned: bool) -> dict[str, tuple[Callable[[int], tuple[Any, ...]], Any, bool]]:
    """Weights by name: (their tiles, dtype, whether there is a class matrix)."""
    if not aligned:
        shapes = {"3x3": (512, 256, 3, 3), "41": (1024, 64, 41)}
        found = {name: (shape_of(shape, F32, False), F32, True) for name, shape in shapes.items()}
        return {**found, "4x4": (shape_of((256, 256, 4, 4), F16, False), F16, True)}
    return {
        "3x3": (shape_of((512, 256, 3, 3), F32), F32, True),
        "3x3 of many rows": (shape_of((4096, 256, 3, 3), F32), F32, True),
        "4x4": (shape_of((256, 256, 4, 4), F32), F32, True),
        "4x4 bfloat16": (shape_of((256, 256, 4, 4), BF16), BF16, True),
        "3x3 channels_last": (shape_of((512, 256, 3, 3), F32, channels_last=True), F32, True),
        "Linear": (shape_of((4096, 4096), F32), F32, False),
        "Linear to 1": (shape_of((1, 8192), F32), F32, False),
    }


def programs() -> dict[str, tuple[Any, dict[str, Any]]]:
    """(kernel, its constants) by name. "wide": every read of a weight is one of 16 bytes; "narrow": none is."""
    modes = {"iterate": 0, "first half": 1, "second half": 2, "measure": 3}
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    finish = {"FINISH": DEFAULT.finish}
    for aligned, word in ((True, "wide"), (False, "narrow")):
        all_weights = weights(aligned)
        tiles = {name: (kind(DEFAULT.tile), dtype, q) for name, (kind, dtype, q) in all_weights.items()}
        for name, (shape, dtype, q) in tiles.items():
            kinds = ((0, True, q, *shape, dtype),)
            found[f"iterate {name} {word}"] = (power_iteration.iterate, {"KINDS": kinds, **finish})
        shape, dtype, q = tiles["4x4"]
        for mode, number in list(modes.items())[1:]:
            kinds = ((number, True, q, *shape, dtype),)
            found[f"iterate {mode} {word}"] = (power_iteration.iterate, {"KINDS": kinds, **finish})
        kinds = tuple((0, True, q, *shape, dtype) for shape, dtype, q in tiles.values())[-3:]
        found[f"iterate network {word}"] = (power_iteration.iterate, {"KINDS": kinds, **finish})
        sizes = {"CHUNK": DEFAULT.chunk, "STEP": DEFAULT.step}
        for dtype, width in ((F32, 4), (BF16, 8)):
            kinds = ((False, width if aligned else 1, dtype, dtype),)
            found[f"rescale {dtype} {word}"] = (rescale.rescale, {"KINDS": kinds, **sizes})
            found[f"inner_products {dtype} {word}"] = (rescale.inner_products, {"KINDS": kinds, **sizes, "BC": 1024})
        for name, (kind, dtype, q) in all_weights.items():
            kinds = ((True, q, *kind(DEFAULT.step), dtype, dtype),)
            found[f"gradient {name} {word}"] = (rescale.gradient, {"KINDS": kinds, "BL": 128})
    kinds = ((True, 1, F32, F32),)
    found["rescale strided"] = (rescale.rescale, {"KINDS": kinds, **sizes})
    found["inner_products strided"] = (rescale.inner_products, {"KINDS": kinds, **sizes, "BC": 1024})
    found["reduce"] = (power_iteration.reduce, finish)
    return found


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    """As for arguments whose addresses are multiples of 16, as torch's are."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "i32" if name in NUMBERS else POINTERS.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
    signature |= dict.fromkeys(constants, "constexpr")
    warps, registers = {"iterate": (DEFAULT.warps, DEFAULT.registers), "reduce": (DEFAULT.warps, None)}.get(
        kernel.__name__, (DEFAULT.rescale_warps, None)
    )
    options = DEFAULT.options(warps)
    if registers and target.backend == "cuda":
        options |= {"maxnreg": registers}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


def needs(binary: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers per thread, loads of 16 bytes in the PTX, and what ``counted`` counts of the whole program and of each
    of its loops over tiles."""
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = int(re.search(r"\bREG:(\d+)", text)[1])
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4", binary.asm["ptx"]))
    instructions, loops = disassembled(code)
    over_tiles = [found for found in map(counted, loops) if found["loads of 16 bytes"]]
    return {"registers": registers, "wide": wide, "program": counted(instructions), "loops": over_tiles}


def disassembled(code: str) -> tuple[list[str], list[list[str]]]:
    """Machine instructions, and those of every loop without another one inside: from a label to a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?);", line):
            target = re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction[1])
            instructions.append(instruction[1])
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(instructions)))
    inner = [(a, z) for a, z in spans if not any(a <= b and y <= z and (a, z) != (b, y) for b, y in spans)]
    return instructions, [instructions[a:z] for a, z in inner]


def counted(instructions: list[str]) -> dict[str, int]:
    """How many there are, shuffles between lanes, barriers, loads from global memory, how many of those are wide, and
    accesses of the memory that takes what registers have no room for."""
    loads = [x for x in instructions if x.startswith("LDG")]
    return {
        "instructions": sum(not x.startswith("NOP") for x in instructions),
        "shuffles": sum(x.startswith("SHFL") for x in instructions),
        "barriers": sum(x.startswith("BAR") for x in instructions),
        "loads": len(loads),
        "loads of 16 bytes": sum(".128" in x for x in loads),
        "spills": sum(x.startswith(("STL", "LDL")) for x in instructions),  # a stack may be there and never be used
    }


if __name__ == "__main__":
    target, chosen = TARGETS[sys.argv[1]], programs()
    names = chosen if sys.argv[1] == WHOLE else ELSEWHERE
    kernels = {name: needs(compiled(*chosen[name], target), target) for name in names}
    print(json.dumps({"triton": triton.__version__, "kernels": kernels}))
