"""Triton's kernels: interpreted on this machine they attend as defined; compiled they fit every GPU they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hetis.runtime.attention.backends import choose_backend
from hetis.runtime.attention.kv import PagePool
from tests.runtime.attention.test_ranges import ArrayDevice, Case, check, local, run

ROOT = Path(__file__).parents[3]
# Triton specialises kernels on pointer alignment, too: ours always have it, as tensors or as whole layers of pages.
POINTERS = {"qkv", "k", "v", "where", "slots", "table", "tiles", "out", "sums", "parts"}
FLOATS = {"scale", "soft_cap"}  # Triton never specialises on their values

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="NOT TESTED: kernels of GPUs, as Triton is not installed (extra dev)"
)


def test_interpreted_kernels_attend_as_defined_and_alone_as_among_others() -> None:
    lines = run_apart("interpreted").splitlines()
    assert len(lines) == 9
    assert lines[-1] == "the same bits"


def test_it_is_not_chosen_without_a_gpu() -> None:
    for dtype, name in (("float16", "torch"), ("bfloat16", "compiled"), ("float32", "compiled")):
        assert choose_backend(PagePool("d", Case(tokens=(), cuts=(), dtype=dtype).shape(), 1)).name == name


def test_no_number_of_a_step_has_a_kernel_of_its_own() -> None:
    """Triton compiles anew for integers that are 1 or multiples of 16, which takes half a second in a running step."""
    from hetis.runtime.attention import paged_triton

    for kernel in (paged_triton.store, paged_triton.attend, paged_triton.combine):
        for parameter in kernel.params:
            is_never = parameter.name in POINTERS | FLOATS
            assert parameter.is_constexpr or parameter.do_not_specialize or is_never, parameter.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_on_a_gpu_chunks_are_attended_to_as_defined(dtype: str, soft_cap: float) -> None:
    case = Case(
        tokens=(700, 1, 1100), cuts=((600, 601), (), (1098, 1099)), r=4, d=64, page_tokens=16, window=300,
        soft_cap=soft_cap, dtype=dtype,
    )  # fmt: skip
    check(local(case, choose_backend, device="cuda"), case, on_gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_on_a_gpu_graphs_give_the_bits_that_kernels_give_one_by_one(dtype: str) -> None:
    from hetis.runtime.attention.decode_graphs import GraphBackend

    tokens = (700, 1300, 40, 33, *[9] * 8)
    cuts = tuple(tuple(range(n - 6, n)) for n in tokens)
    case = Case(tokens=tokens, cuts=cuts, r=4, d=64, page_tokens=16, window=300, dtype=dtype)
    device = local(case, choose_backend, device="cuda", kind=ArrayDevice)
    assert isinstance(device.backend, GraphBackend)
    for together in (True, False):
        plain = run(local(case, choose_backend, device="cuda"), case, together=together)
        mine = run(device, case, together=together)
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
        device.drop(device.pool.sequences)
    graphs = [graph for graph in device.backend._graphs.values() if graph is not None]
    assert len(graphs) > 2, "most steps were captured before they ran"


def test_kernels_compile_for_every_gpu_and_fit_into_its_shared_memory() -> None:
    """Compiled kernels stay in Triton's own cache, where a kernel is found by its source, target and options."""
    compile_all("--quick")


@pytest.mark.soak
def test_kernels_of_every_kind_compile_for_every_gpu(tmp_path: Path) -> None:
    compile_all(TRITON_CACHE_DIR=str(tmp_path))


def compile_all(*arguments: str, **variables: str) -> None:
    lines = run_apart("ahead_of_time", *arguments, **variables)
    rows = [json.loads(line) for line in lines.splitlines()]
    assert {row["capability"] for row in rows} == {75, 80, 86, 89, 90, 100}
    for row in rows:
        assert row["cubin_bytes"] > 0, row
        assert row["shared_bytes"] <= row["limit_bytes"], row
        if row["kernel"] == "attend" and row["capability"] >= 80 and row["constants"]["D"] % 16 == 0:
            is_wide = set(row["copies"]) == {"0x10"} and not row["single_loads"]
            assert is_wide, f"keys or values are read in small pieces: {row}"


def run_apart(program: str, *arguments: str, **variables: str) -> str:
    """Return the output of a program beside this file, in a new process: Triton interprets all kernels or none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", f"tests.runtime.attention.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
