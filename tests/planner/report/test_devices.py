"""Short lists of device names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.use_cases.grouping import abbreviate


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (["a100/0"], "a100/0"),
        (["a100/0", "a100/1", "a100/2", "a100/3"], "a100/[0-3]"),
        (["l4-0/0", "l4-0/1", "l4-1/0", "l4-1/1"], "l4-[0-1]/[0-1]"),
        (["l4-7/3"], "l4-7/3"),
        (["a/0", "a/2", "a/3"], "a/[0,2-3]"),
        (["a-0/0", "a-1/1"], "a-0/0 a-1/1"),
    ],
)
def test_runs_of_nodes_and_indices_are_folded(devices: list[str], text: str) -> None:
    assert abbreviate(devices) == text


@given(
    st.sets(
        st.tuples(st.sampled_from(["a100", "l4-0", "l4-1", "l4-2", "rack-x-10", "rack-x-11"]), st.integers(0, 9)),
        min_size=1,
    )
)
def test_the_short_form_names_the_same_devices(pairs: set[tuple[str, int]]) -> None:
    devices = [f"{node}/{index}" for node, index in sorted(pairs)]
    assert sorted(_expanded(abbreviate(devices))) == sorted(devices)


def _expanded(text: str) -> list[str]:
    devices = []
    for word in text.split():
        node, _, indices = word.rpartition("/")
        match = re.fullmatch(r"(.*)(\[.*\])", node)
        names = [f"{match[1]}{number}" for number in _numbers(match[2])] if match else [node]
        devices += [f"{name}/{index}" for name in names for index in _numbers(indices)]
    return devices


def _numbers(text: str) -> list[int]:
    numbers = []
    for run in text.strip("[]").split(","):
        first, _, last = run.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
