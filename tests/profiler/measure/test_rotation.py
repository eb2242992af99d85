"""Cold is cold: between two uses of an operand twice the cache's size is read, and that size is known."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.profiler.measure.host import MAX_SETS, TIMES, Cache, last_level_cache


def hits(cache_bytes: int, sets: int, num_bytes: int, rounds: int = 3) -> int:
    """Return the number of cache hits after the first round, in a cache that replaces the oldest lines."""
    held: OrderedDict[int, None] = OrderedDict()
    found = 0
    for turn in range(rounds * sets):
        first = turn % sets * num_bytes
        for line in range(first, first + num_bytes):
            found += turn >= sets and line in held
            held.pop(line, None)
            held[line] = None
            if len(held) > cache_bytes:
                held.popitem(last=False)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 120))
def test_nothing_that_rotates_is_found_in_the_cache_again(cache_bytes: int, num_bytes: int) -> None:
    cache = Cache(num_bytes=cache_bytes, origin="a test")
    sets = cache.sets(num_bytes)
    assert cache.is_evicted(sets, num_bytes)
    assert hits(cache_bytes, sets, num_bytes) == 0


def test_one_set_or_two_are_found_again_unless_they_are_large() -> None:
    assert hits(10, 1, 9) > 0
    assert hits(10, 2, 5) > 0
    assert not Cache(num_bytes=10, origin="a test").is_evicted(2, 5)


def test_sets_too_small_for_the_largest_rotation_are_not_called_cold() -> None:
    cache = Cache(num_bytes=50 * 2**20, origin="a test")
    sets = cache.sets(4096)
    assert sets == MAX_SETS
    assert not cache.is_evicted(sets, 4096)
    assert cache.is_evicted(cache.sets(64 * 1024), 64 * 1024)


def cpus(folder: Path, *cores: tuple[tuple[str, str, str], ...]) -> Path:
    """Make a folder like the kernel's, with the level, size and sharers of each core's caches."""
    for core, caches in enumerate(cores):
        for index, values in enumerate(caches):
            where = folder / f"cpu{core}" / "cache" / f"index{index}"
            where.mkdir(parents=True)
            for name, value in zip(("level", "size", "shared_cpu_list"), values, strict=True):
                (where / name).write_text(f"{value}\n")
    return folder


def test_the_caches_of_the_cores_in_use_add_up(tmp_path: Path) -> None:
    first, second = ("3", "32768K", "0-1"), ("3", "32768K", "2-3")
    own = ("2", "1024K", "0")
    where = cpus(tmp_path, (own, first), (own, first), (own, second), (own, second))
    assert last_level_cache(where, [0, 1]) == Cache(num_bytes=32 * 2**20, origin="as reported by the system")
    assert last_level_cache(where, [1, 2]).num_bytes == 64 * 2**20


def test_a_core_other_than_the_first_counts_with_its_own(tmp_path: Path) -> None:
    where = cpus(tmp_path, (("3", "8M", "0"),), (("3", "96M", "1"),))
    assert last_level_cache(where, [1]).num_bytes == 96 * 2**20


def test_a_system_that_says_nothing_is_assumed_to_have_much(tmp_path: Path) -> None:
    cache = last_level_cache(tmp_path, [0])
    assert cache.origin == "assumed"
    assert cache.num_bytes >= 64 * 2**20


@pytest.mark.parametrize("num_bytes", [1, 4096, 2**20, 2**30])
def test_a_rotation_is_no_longer_than_it_must_be(num_bytes: int) -> None:
    cache = Cache(num_bytes=32 * 2**20, origin="a test")
    assert (cache.sets(num_bytes) - 2) * num_bytes < TIMES * cache.num_bytes
