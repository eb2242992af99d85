"""Steps of sequences that write one position or many: every backend attends as defined, in chunks or whole."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetis.runtime.attention import backends
from hetis.runtime.attention.backends import Backend, CompiledBackend, TorchBackend
from hetis.runtime.attention.device import AttentionDevice, DeviceStep, LocalDevice, Ready
from hetis.runtime.attention.kv import KvShape, PagePool
from tests.runtime.worker.inproc import InprocWorker

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.03, "float16": 0.004}
GPU_TOLERANCE = 1e-4  # for float32: scores near 40 are rounded, an error of about 2e-5 (seen on an H100)
LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences of ``tokens`` positions each, which are written in the chunks that ``cuts`` begin."""

    r: int = 2
    d: int = 8
    page_tokens: int = 4
    window: int = 0
    soft_cap: float = 0.0
    dtype: str = "float64"
    tokens: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]

    def shape(self) -> KvShape:
        return KvShape(
            layers=LAYERS,
            head_dim=self.d,
            queries_per_group=self.r,
            page_tokens=self.page_tokens,
            dtype=self.dtype,
            scale=0.3,
            windows=(0, self.window),
            soft_cap=self.soft_cap,
        )

    def numbers(self) -> list[torch.Tensor]:
        """Queries, keys and values of each sequence, [layers, tokens, r + 2, d]."""
        generator = torch.Generator().manual_seed(sum(self.tokens) + self.r)
        kinds = {"generator": generator, "dtype": torch.float64}
        rows = [torch.randn(LAYERS, tokens, self.r + 2, self.d, **kinds) for tokens in self.tokens]
        return [2 * x.to(self.shape().torch_dtype) for x in rows]

    def chunks(self) -> list[list[tuple[int, int]]]:
        """First and last position of each chunk of each sequence."""
        return [
            list(itertools.pairwise(sorted({0, n, *(cut for cut in cuts if cut < n)})))
            for n, cuts in zip(self.tokens, self.cuts, strict=True)
        ]


def defined(rows: torch.Tensor, shape: KvShape, layer: int) -> torch.Tensor:
    """Outputs [tokens, r, d] of one sequence's rows [tokens, r + 2, d], in float64, computed query by query."""
    wide, window, outputs = rows.double(), shape.windows[layer], []
    for t in range(len(rows)):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        scores = shape.scale * wide[t, :-2] @ wide[seen, -2].T
        if shape.soft_cap:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        outputs.append(torch.softmax(scores, dim=-1) @ wide[seen, -1])
    return torch.stack(outputs)


def run(
    device: AttentionDevice, case: Case, numbers: list[torch.Tensor] | None = None, *, together: bool = False
) -> list[torch.Tensor]:
    """Return the outputs of each sequence, [layers, tokens, r, d].

    Each step has the next chunk of all sequences, or of some of them in any order.
    """
    chooser = random.Random(sum(case.tokens))
    numbers, left = numbers or case.numbers(), case.chunks()
    outputs = [torch.full_like(rows[:, :, :-2], torch.nan) for rows in numbers]
    for number in itertools.count():
        members = [i for i, chunks in enumerate(left) if chunks]
        if not members:
            return outputs
        members = members if together else chooser.sample(members, chooser.randint(1, len(members)))
        parts = [(i, *left[i].pop(0)) for i in members]
        index, first, last = (np.array(column) for column in zip(*parts, strict=True))
        counts = last - first
        device.begin(
            DeviceStep(
                epoch=1,
                number=number,
                requests=index,
                incarnations=np.zeros_like(index),
                heads=index % 3,
                positions=first,
                counts=None if counts.max() == 1 and chooser.random() < 0.5 else counts,
            )
        )
        for layer in range(LAYERS):
            qkv = torch.cat([numbers[i][layer, begin:end] for i, begin, end in parts])
            out = device.attend(layer, qkv).wait()
            for (i, begin, end), rows in zip(parts, out.split(counts.tolist()), strict=True):
                outputs[i][layer, begin:end] = rows
        device.finish(number)
    raise AssertionError


def check(device: AttentionDevice, case: Case, *, on_gpu: bool = False) -> None:
    shape, tolerance = case.shape(), GPU_TOLERANCE if on_gpu and case.dtype == "float32" else TOLERANCE[case.dtype]
    for rows, out in zip(case.numbers(), run(device, case), strict=True):
        for layer in range(LAYERS):
            wanted = defined(rows[layer], shape, layer)
            torch.testing.assert_close(out[layer].double(), wanted, rtol=tolerance, atol=tolerance)


def local(
    case: Case, make: Callable[[PagePool], Backend], *, device: str = "cpu", kind: type[LocalDevice] = LocalDevice
) -> LocalDevice:
    pages = sum(case.shape().pages(tokens) for tokens in case.tokens)
    made = kind("d", case.shape(), pages, device=device)
    made.backend = make(made.pool)
    return made


class ArrayDevice(LocalDevice):
    """Attends to arrays, as if they had arrived over a channel."""

    def attend(self, layer: int, qkv: torch.Tensor) -> Ready:
        out = self.attend_received(layer, qkv.view(torch.uint8).numpy().view(self.shape.numpy_dtype))
        return Ready(torch.from_numpy(out).view(self.shape.torch_dtype) if isinstance(out, np.ndarray) else out)


def cases(dtype: str = "float64") -> st.SearchStrategy[Case]:
    sequences = st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 39), max_size=6).map(tuple)), min_size=1, max_size=5
    )
    return st.builds(
        lambda sequences, **rest: Case(
            tokens=tuple(tokens for tokens, _ in sequences), cuts=tuple(cuts for _, cuts in sequences), **rest
        ),
        sequences=sequences,
        r=st.integers(1, 8),
        d=st.integers(1, 24),
        page_tokens=st.integers(1, 20),
        window=st.one_of(st.just(0), st.integers(1, 45)),
        soft_cap=st.one_of(st.just(0.0), st.floats(0.5, 50)),
        dtype=st.just(dtype),
    )


@given(cases())
@settings(max_examples=60)
def test_any_chunks_in_torch_are_attended_to_as_defined(case: Case) -> None:
    check(local(case, TorchBackend), case)


@given(cases())
@example(Case(tokens=(40, 1), cuts=((1, 2, 39), ()), window=1))
@settings(max_examples=60)
def test_any_chunks_compiled_are_attended_to_as_defined(case: Case) -> None:
    check(local(case, CompiledBackend), case)


MIXED = {"tokens": (70, 1, 33, 16, 17), "cuts": ((64, 65, 66), (), (32,), (3, 4, 5), (16,))}


@pytest.mark.parametrize("soft_cap", [0.0, 0.4, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [TorchBackend, CompiledBackend])
def test_every_dtype_is_attended_to_as_defined(
    make: Callable[[PagePool], Backend], dtype: str, soft_cap: float
) -> None:
    if (make, dtype) == (CompiledBackend, "float16"):
        pytest.skip("torch's")
    case = Case(**MIXED, r=3, d=16, page_tokens=16, window=19, soft_cap=soft_cap, dtype=dtype)
    check(local(case, make), case)


def test_short_and_long_chunks_of_a_step_meet_in_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    attend = backends.attend_paged

    def spy(pool: PagePool, layer: int, q: torch.Tensor, *rest: Any) -> None:
        computed.append(len(q))
        attend(pool, layer, q, *rest)

    monkeypatch.setattr(backends, "attend_paged", spy)
    case = Case(tokens=(50, 15, 16, 1), cuts=((), (), (), ()), window=7)
    numbers, device = case.numbers(), local(case, CompiledBackend)
    device.begin(step([0, 1, 2, 3], [0] * 4, list(case.tokens)))
    for layer in range(LAYERS):
        out = device.attend(layer, torch.cat([rows[layer] for rows in numbers])).wait()
        wanted = torch.cat([defined(rows[layer], case.shape(), layer) for rows in numbers])
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert computed == [sum(case.tokens)] * LAYERS


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_long_chunks_are_computed_in_pieces_and_wide_buckets_apart(
    soft_cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "PIECE_TOKENS", 7)
    monkeypatch.setattr(backends, "MOST_SCORES", 700)
    case = Case(**MIXED, window=19, soft_cap=soft_cap)
    check(local(case, TorchBackend), case)


@given(cases("float32"))
@settings(max_examples=25)
def test_chunks_go_through_frames_as_they_are(case: Case) -> None:
    pages = sum(case.shape().pages(tokens) for tokens in case.tokens)
    worker = InprocWorker("w0", pages)
    device = worker.join(case.shape())
    for here, there in zip(run(local(case, CompiledBackend), case), run(device, case), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("make", [TorchBackend, CompiledBackend])
@pytest.mark.parametrize("pages", [0, 1, 3, 400])
def test_a_device_that_was_warmed_holds_nothing_and_attends_as_defined(
    make: Callable[[PagePool], Backend], pages: int
) -> None:
    case = Case(tokens=(9,), cuts=((5,),))
    device = LocalDevice("d", case.shape(), pages)
    device.backend = make(device.pool)
    device.warm()
    assert (device.pool.free_pages, len(device.pool)) == (pages, 0)
    if pages >= 3:
        check(device, case)


def step(requests: list[int], positions: list[int], counts: list[int]) -> DeviceStep:
    zero = np.zeros(len(requests), np.int64)
    return DeviceStep(
        epoch=1,
        number=0,
        requests=np.array(requests),
        incarnations=zero,
        heads=zero,
        positions=np.array(positions),
        counts=np.array(counts),
    )
