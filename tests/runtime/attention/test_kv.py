"""Pages belong to one sequence or to none, and hold what was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.attention.kv import (
    KvShape,
    OutOfPagesError,
    PagePool,
    SequenceKey,
    UnknownSequenceError,
    use_cuda_device,
)


def shape(**fields: object) -> KvShape:
    given_fields = {"layers": 2, "head_dim": 3, "queries_per_group": 2, "page_tokens": 4, "dtype": "float32"}
    return KvShape(**(given_fields | {"scale": 0.5, "windows": (0, 0)} | fields))  # type: ignore[arg-type]


def key(number: int) -> SequenceKey:
    return SequenceKey(number, 0, number % 3)


def test_a_page_counts_k_and_v_of_all_layers() -> None:
    assert shape().page_bytes == 2 * 2 * 4 * 3 * 4
    assert shape(dtype="bfloat16").page_bytes == 2 * 2 * 4 * 3 * 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), max_size=30))
def test_what_was_written_is_read_whatever_comes_and_goes(acts: list[tuple[int, int, bool]]) -> None:
    pool = PagePool("d", shape(), 12)
    wanted: dict[SequenceKey, torch.Tensor] = {}
    for number, more, drops in acts:
        name = key(number)
        if drops:
            pool.drop([name])
            wanted.pop(name, None)
            continue
        before = wanted.get(name, torch.zeros(2, 0, 3))
        first, last = before.shape[1], before.shape[1] + more
        fresh = torch.randn(2, more, 3)
        free = pool.free_pages
        needed = pool.shape.pages(last) - pool.shape.pages(first)
        if needed > free:
            with pytest.raises(OutOfPagesError) as caught:
                pool.extend([name], [first], [last])
            assert (caught.value.needed, caught.value.free) == (needed, free)
        else:
            pool.extend([name], [first], [last])
            pool.write(name, first, fresh, -fresh)
            wanted[name] = torch.cat((before, fresh), dim=1)
        pool.check_invariants()
    assert set(pool.sequences) == set(wanted)
    for name, values in wanted.items():
        k, v = pool.read(name, 0, values.shape[1])
        assert torch.equal(k, values)
        assert torch.equal(v, -values)


def test_several_sequences_get_room_together_or_not_at_all() -> None:
    pool = PagePool("d", shape(), 3)
    with pytest.raises(OutOfPagesError, match="d: 4 KV pages are needed, 3 are free"):
        pool.extend([key(0), key(1)], [0, 0], [8, 5])
    assert (len(pool), pool.free_pages) == (0, 3)


def test_there_are_no_gaps() -> None:
    pool = PagePool("d", shape(), 3)
    pool.extend([key(0)], [0], [3])
    with pytest.raises(UnknownSequenceError, match="holds 3 positions, 4 come before"):
        pool.extend([key(0)], [4], [5])
    with pytest.raises(UnknownSequenceError, match="is not here"):
        pool.read(key(1), 0, 1)
    with pytest.raises(UnknownSequenceError, match="holds 3 positions, 4 were requested"):
        pool.read(key(0), 0, 4)


def test_the_same_positions_may_be_written_again() -> None:
    pool = PagePool("d", shape(), 3)
    for value in (1.0, 2.0):
        pool.extend([key(0)], [0], [5])
        pool.write(key(0), 0, torch.full((2, 5, 3), value), torch.full((2, 5, 3), value))
    assert pool.free_pages == 1
    assert torch.all(pool.read(key(0), 0, 5)[0] == 2.0)


def test_tables_grow_with_sequences_and_their_length() -> None:
    pool = PagePool("d", shape(page_tokens=1), 60)
    pool.extend([key(i) for i in range(20)], [0] * 20, [1] * 20)
    pool.extend([key(7)], [1], [40])
    pool.check_invariants()
    assert pool.table.shape[0] >= 20
    assert pool.table.shape[1] >= 40


def test_a_process_uses_the_gpu_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    fakes = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert [use_cuda_device(name) for name in ("cuda", "cuda:1", "cuda:2")] == [True, True, False]
    assert chosen == [0, 1]
