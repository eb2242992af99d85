"""Checks Triton's kernels by its interpreter, which must be asked for before Triton is imported: a line for each case.

bfloat16 is tried as an older device computes it, widened: the interpreter cannot multiply it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "1"

from hetis.runtime.attention import paged_triton
from hetis.runtime.attention.decode_graphs import GraphBackend
from hetis.runtime.attention.paged_triton import TritonBackend
from tests.runtime.attention.test_ranges import MIXED, ArrayDevice, Case, check, local, run

FULL = {"r": 3, "d": 24, "page_tokens": 16, "window": 19, "soft_cap": 0.0}
ALONE = {"r": 1, "d": 8, "page_tokens": 5, "window": 0, "soft_cap": 5.0}
LARGE = {"r": 5, "d": 40, "page_tokens": 64, "window": 100, "soft_cap": 0.0}
CASES: tuple[tuple[dict[str, Any], str, tuple[int, int]], ...] = (
    (FULL, "float32", (9, 0)),
    (FULL, "bfloat16", (7, 5)),
    (ALONE, "float32", (7, 5)),
    (ALONE, "float16", (8, 0)),
    (LARGE, "float16", (7, 5)),
    (LARGE, "bfloat16", (7, 5)),
)


def attends_as_defined() -> None:
    for shape, dtype, capability in CASES:
        case = Case(**MIXED, **shape, dtype=dtype)
        check(local(case, lambda pool, of=capability: TritonBackend(pool, capability=of)), case)
        print(f"{dtype} {capability} {shape}", flush=True)


def graphs_attend_as_defined() -> None:
    """The interpreter captures no graphs: it runs what they would."""
    shape, dtype, capability = CASES[0]
    case = Case(tokens=(70, 33, *[3] * 7), cuts=((68, 69), (31, 32), *[(1, 2)] * 7), **shape, dtype=dtype)
    device = local(case, lambda pool: GraphBackend(pool, capability=capability), kind=ArrayDevice)
    plain = local(case, lambda pool: TritonBackend(pool, capability=capability))
    outputs = run(device, case, together=True)
    assert all(map(torch.equal, outputs, run(plain, case, together=True))), "the same bits as one by one"
    assert {size for size, _ in device.backend._graphs} == {(16, 2)}
    print("graphs", flush=True)


def first_outputs(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of the first sequence, which has ``rows`` whoever else is there."""
    device = local(case, lambda pool: TritonBackend(pool, capability=(9, 0)))
    return run(device, case, [rows, *case.numbers()[1:]])[0]


def gives_the_same_bits_among_others() -> None:
    alone = Case(tokens=(70,), cuts=((40, 69),), r=2, dtype="float32")
    among = Case(tokens=(70, 150), cuts=((40, 69), (5, 140)), r=2, dtype="float32")
    rows = alone.numbers()[0]
    assert torch.equal(first_outputs(alone, rows), first_outputs(among, rows))
    print("the same bits", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    paged_triton.SPLIT = 64  # the least: of one block
    attends_as_defined()
    graphs_attend_as_defined()
    gives_the_same_bits_among_others()
