"""Compiles Triton's kernels for GPUs that this machine lacks: a JSON line for each, with its needs."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hetis.runtime.attention import paged_triton
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.attention.paged_triton import Sizes, sizes_of

# Shared memory that a block may have, by compute capability: CUDA's programming guide, table of technical limits.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
PLACE = {"where": "*i64", "layer_slots": "i32"}


def shape_of(dtype: str, d: int, soft_cap: float) -> KvShape:
    return KvShape(
        layers=1,
        head_dim=d,
        queries_per_group=4,
        page_tokens=16,
        dtype=dtype,
        scale=0.1,
        windows=(0,),
        soft_cap=soft_cap,
    )


def compiled(kernel: str, capability: int, types: dict[str, str], constants: dict[str, Any], sizes: Sizes) -> None:
    """Prints the needs of one kernel."""
    function = getattr(paged_triton, kernel)
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={argument: types.get(argument, "constexpr") for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        # Named as Triton names our kernels' arguments, see `test_no_number_of_a_step_has_a_kernel_of_its_own`.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"},
    )
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    row = {
        "kernel": kernel,
        "capability": capability,
        "constants": constants,
        "cubin_bytes": len(made.asm["cubin"]),
        "copies": re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+)", made.asm["ptx"]),
        "single_loads": len(re.findall(r"ld\.global(?:\.\w+)*\.[bu]16 ", made.asm["ptx"])),
        "shared_bytes": made.metadata.shared,
        "limit_bytes": SHARED_KIB[capability] * 1024,
    }
    print(json.dumps(row), flush=True)


def attend(shape: KvShape, capability: int, *, is_chunk: bool, has_splits: bool, has_window: bool) -> None:
    sizes = sizes_of(shape, divmod(capability, 10), is_chunk=is_chunk)
    pointer = POINTERS[shape.dtype]
    out, integers, floats = "*fp32" if has_splits else pointer, "*i32", "fp32"
    types = {"qkv": pointer, "k": pointer, "v": pointer, "table": integers, "tiles": integers} | PLACE
    types |= {"out": out, "sums": out, "scale": floats, "soft_cap": floats, "window": "i32"}
    constants = sizes.constants(shape, has_splits=has_splits, has_window=has_window)
    compiled("attend", capability, types, constants, sizes)


def around(shape: KvShape, capability: int) -> None:
    """Compile the small kernels."""
    sizes = sizes_of(shape, divmod(capability, 10), is_chunk=False)
    pointer, constants = POINTERS[shape.dtype], {"D": shape.head_dim, "R": shape.queries_per_group}
    constants |= {"BLOCK_D": sizes.block_d}
    compiled(
        "store", capability, PLACE | {"qkv": pointer, "k": pointer, "v": pointer, "slots": "*i64"}, constants, sizes
    )
    types = {"parts": "*fp32", "sums": "*fp32", "tiles": "*i32", "splits": "i32", "out": pointer}
    compiled("combine", capability, types, constants | {"BLOCK_M": sizes.block_m}, sizes)


def quick() -> Iterator[tuple[KvShape, int, bool, bool]]:
    """A decode and a chunk for each GPU, and those that need the most memory where there is the least."""
    for capability in SHARED_KIB:
        shape = shape_of("float16" if capability == 75 else "bfloat16", 128, 0.0)
        yield from ((shape, capability, is_chunk, not is_chunk) for is_chunk in (False, True))
    for dtype, capability in itertools.product(("float16", "float32"), (75, 86)):
        yield shape_of(dtype, 256, 50.0), capability, True, False


def everything() -> Iterator[tuple[KvShape, int, bool, bool]]:
    for dtype, d, soft_cap, capability in itertools.product(POINTERS, (32, 64, 80, 128, 256), (0.0, 50.0), SHARED_KIB):
        for is_chunk, has_splits in ((False, False), (False, True), (True, False)):
            yield shape_of(dtype, d, soft_cap), capability, is_chunk, has_splits


if __name__ == "__main__":
    is_quick = "--quick" in sys.argv
    for shape, capability, is_chunk, has_splits in quick() if is_quick else everything():
        for has_window in (shape.soft_cap > 0,) if is_quick else (False, True):
            attend(shape, capability, is_chunk=is_chunk, has_splits=has_splits, has_window=has_window)
    for capability in (min(SHARED_KIB), max(SHARED_KIB)) if is_quick else SHARED_KIB:
        around(shape_of("float16", 128, 0.0), capability)
