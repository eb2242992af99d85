"""Attention of an attention worker compared with torch's over the same KV: microseconds of one layer.

    python -m benchmarks.attention [--quick] [--json] [--device cpu|cuda:N] [--rounds N]

Ours reads pages of 16 tokens through tables, in any order, and stores the step's own keys and values first; torch's
`scaled_dot_product_attention` reads KV that lies in one piece and stores nothing. Head dimension 128, bfloat16. In
*decode* every sequence has one token, of r query heads, after a context; in *prompt* all of its tokens at once. A round
times both, one after the other, launches included; seconds are medians over rounds. A CPU computes with one thread.

``ratio`` is torch's time over ours: below 1, torch is faster. ``gb_s`` is KV read per second, ``tflop_s`` the rate of
multiplications and additions, each of ours. ``received_us`` is ours where a channel brings the rows and takes the
outputs, both in the host's memory.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from hetis.runtime.attention.device import DeviceStep, LocalDevice
from hetis.runtime.attention.kv import KvShape, SequenceKey, cuda_count, use_cuda_device

DIM, PAGE, DTYPE = 128, 16, torch.bfloat16
LEAST_S = 0.002  # least time of a timed batch of calls on a GPU, long enough for the host's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sequences of ``context`` tokens with ``queries`` query heads; the last ``count`` tokens are computed."""

    sequences: int
    context: int
    queries: int
    count: int = 1

    @property
    def name(self) -> str:
        what = "decode" if self.count == 1 else "prompt"
        return f"{what}, {self.sequences} x {self.context:,}, {self.queries} queries"


ON_CPU = (
    Case(sequences=8, context=1024, queries=4),
    Case(sequences=64, context=1024, queries=4),
    Case(sequences=64, context=1024, queries=1),
    Case(sequences=8, context=8192, queries=8),
    Case(sequences=8, context=512, queries=4, count=512),
)
ON_GPU = (
    *(Case(sequences=n, context=c, queries=r) for n, c in ((8, 1024), (64, 1024), (512, 1024)) for r in (1, 4, 8)),
    *(Case(sequences=n, context=c, queries=4) for n, c in ((2048, 1024), (8, 16_384), (64, 16_384), (256, 8192))),
    *(Case(sequences=n, context=c, queries=r, count=c) for n, c, r in ((64, 512, 4), (8, 2048, 1), (8, 2048, 8))),
    Case(sequences=8, context=8192, queries=4, count=8192),
)


def main() -> None:
    """Print one row per case."""
    parser = rows.parser("benchmarks.attention", __doc__)
    rows.add_rounds(parser, "timings of each; 15, with --quick 3")
    parser.add_argument("--device", default="cuda:0" if cuda_count() else "cpu", help="the first GPU, or else cpu")
    arguments = parser.parse_args()
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", arguments.device):
        parser.error(f"argument --device: {arguments.device!r} must be cpu, cuda or cuda:N")
    if arguments.device != "cpu" and not use_cuda_device(arguments.device):
        parser.error(f"argument --device: {arguments.device} is not there: torch finds {cuda_count()} CUDA devices")
    torch.set_num_threads(1)
    cases = ON_CPU if arguments.device == "cpu" else ON_GPU
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    chosen = (case for case in (cases[::4] if arguments.quick else cases) if arguments.only in case.name)
    name = "attention" if arguments.device == "cpu" else "attention gpu"
    rows.show((compare(case, arguments.device, rounds) for case in chosen), arguments, name=name)


def compare(case: Case, device: str, rounds: int) -> Row:
    """Return the row that compares both."""
    timed = *_ours(case, device), _theirs(case, device)
    calls = [max(1, round(LEAST_S / _seconds(call, device, 1))) if device != "cpu" else 1 for call in timed]
    took = [[_seconds(call, device, n) for call, n in zip(timed, calls, strict=True)] for _ in range(rounds)]
    ours_s, received_s, theirs_s = (statistics.median(column) for column in zip(*took, strict=True))
    attended = case.count * (case.context - (case.count - 1) / 2)
    return {
        "name": case.name,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "ours_us": 1e6 * ours_s,
        "torch_us": 1e6 * theirs_s,
        "ratio": theirs_s / ours_s,
        "gb_s": 1e-9 * case.sequences * case.context * 2 * DIM * DTYPE.itemsize / ours_s,
        "received_us": 1e6 * received_s,
        "tflop_s": 1e-12 * 4 * DIM * case.queries * case.sequences * attended / ours_s,
    }


def _ours(case: Case, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two calls of the worker's own attention: with a tensor on the device, and with a channel's rows."""
    shape = KvShape(
        layers=1, head_dim=DIM, queries_per_group=case.queries, page_tokens=PAGE, dtype="bfloat16", scale=DIM**-0.5,
        windows=(0,),
    )  # fmt: skip
    n = case.sequences
    worker = LocalDevice("w", shape, n * shape.pages(case.context), device=device)
    keys = [SequenceKey(number, 0, 0) for number in range(n)]
    for last in range(PAGE, case.context + PAGE, PAGE):  # in turn, so that the pages of a sequence lie apart
        worker.pool.extend(keys, [last - PAGE] * n, [min(last, case.context)] * n)
    for kv in (worker.pool.k, worker.pool.v):
        kv.normal_()
    zeros = np.zeros(n, np.int64)
    first, counts = np.full(n, case.context - case.count), np.full(n, case.count)
    worker.begin(
        DeviceStep(
            epoch=1, number=1, requests=np.arange(n), incarnations=zeros, heads=zeros, positions=first, counts=counts
        )
    )
    qkv = torch.randn(n * case.count, case.queries + 2, DIM, dtype=DTYPE, device=device)
    words = qkv.cpu().view(torch.uint16).numpy()
    return lambda: worker.backend.attend(0, qkv), lambda: worker.backend.attend_array(0, words)


def _theirs(case: Case, device: str) -> Callable[[], object]:
    """Return a call of torch's attention; the query heads of a decode are rows of one head, so that KV is read once."""
    n, r = case.sequences, case.queries
    kinds: dict[str, Any] = {"dtype": DTYPE, "device": device}
    k, v = (torch.randn(n, 1, case.context, DIM, **kinds) for _ in range(2))
    if case.count == 1:
        q = torch.randn(n, 1, r, DIM, **kinds)
        return lambda: functional.scaled_dot_product_attention(q, k, v)
    q = torch.randn(n, r, case.count, DIM, **kinds)
    k, v = (x.expand(n, r, case.context, DIM) for x in (k, v))
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _seconds(call: Callable[[], object], device: str, count: int) -> float:
    """Return the seconds of one of ``count`` calls in a row, after a warm-up call."""
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    begun_s = time.perf_counter()
    for _ in range(count):
        call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun_s) / count


if __name__ == "__main__":
    main()
