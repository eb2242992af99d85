"""Checks Triton's kernels by its interpreter, which must be enabled before Triton is imported: a line for each case.

bfloat16 is tested as on older devices, widened to float32: the interpreter cannot multiply it.
"""

from __future__ import annotations

import copy
import os
import warnings
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

os.environ["TRITON_INTERPRET"] = "1"

from hetis.runtime.attention import paged_triton
from hetis.runtime.attention.decode_graphs import GraphBackend
from hetis.runtime.attention.kv import PagePool
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


class RecordedBackend(GraphBackend):
    """Stands in for CUDA graphs, which the interpreter lacks: a graph keeps the buffers that it was captured with."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool, capability=(9, 0))
        self._captures = True
        self._pages = self._pages[:8]  # few pages, so that more are soon needed

    def _captured(self, size: Any, window: int) -> Any:
        then = copy.copy(self)
        return SimpleNamespace(replay=lambda: then._launch_all(size, window))


def graphs_give_the_same_bits() -> None:
    shape = FULL | {"page_tokens": 1}
    short = Case(tokens=(3,) * 9, cuts=((1, 2),) * 9, **shape, dtype="float32")
    long = Case(tokens=(70, 33, *[3] * 7), cuts=((68, 69), (31, 32), *[(1, 2)] * 7), **shape, dtype="float32")
    device = local(long, RecordedBackend, kind=ArrayDevice)
    plain = local(long, lambda pool: TritonBackend(pool, capability=(9, 0)))
    for case in (short, long, short):
        outputs = [run(each, case, together=True) for each in (device, plain)]
        assert all(map(torch.equal, *outputs)), case.tokens
        for each in (device, plain):
            each.drop(each.pool.sequences)
    graphs = device.backend._graphs
    assert {size for size, _ in graphs} == {(16, 1), (16, 2)}, graphs
    assert any(graphs.values()), "some were captured"
    print("graphs", flush=True)


def a_gpu_that_refuses_graphs_attends_without() -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = Case(tokens=(4,), cuts=((1, 2, 3),), **FULL, dtype="float32")
    device = local(case, lambda pool: GraphBackend(pool, capability=(9, 0)), kind=ArrayDevice)
    device.backend._captures = True
    there = SimpleNamespace(current_stream=lambda _: None, set_stream=lambda _: None, CUDAGraph=object, graph=refuse)
    with patch.object(torch, "cuda", there):
        check(device, case)
    assert not device.backend._captures
    assert set(device.backend._graphs.values()) == {None}
    print("no graphs", flush=True)


def first_outputs(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of the first sequence, which has ``rows``, whatever other sequences there are."""
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
    paged_triton.SPLIT = 64  # the smallest split: one block
    attends_as_defined()
    graphs_give_the_same_bits()
    a_gpu_that_refuses_graphs_attends_without()
    gives_the_same_bits_among_others()
