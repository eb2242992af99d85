"""The emulation's rules place heads as they should, its GPUs take the right time, and its quick form runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measuring.emulated import Pace, wait_until
from benchmarks.measuring.emulated_engine import EqualSplit, PaperRule, PrimaryOnly, use_rule
from hetis.runtime.transport.frames import HEADER_BYTES, Frame, FrameKind
from hetis.runtime.vllm import allocator
from hetis.solver.dispatch.problem import DeviceLoad, HeadShape, Primary, Requests, Stage
from tests.benchmarks.test_benchmarks import rows_of, run
from tests.runtime.launch.vllm_python import PYTHON, needs_vllm

HEADS = HeadShape(head_groups=8, queries_per_group=2, kv_bytes_per_token=128.0, exchange_bytes_per_head=192.0)


def stage(seconds: list[float], *, call_s: float = 0.0, transfer_s: float = 0.0) -> Stage:
    """Return devices that take these seconds per query head and no time for KV."""
    num = len(seconds)
    return Stage(
        heads=HEADS,
        devices=tuple(f"d{i}" for i in range(num)),
        head_s=np.array(seconds)[:, None],
        kv_byte_s=np.zeros((num, 1)),
        call_s=np.full((num, 1), call_s),
        transfer_byte_s=np.zeros(num),
        transfer_s=np.full(num, transfer_s),
        primary=Primary(device=0),
    )


def test_a_rule_places_the_heads_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "Dispatcher", allocator.Dispatcher)  # is restored at the end of the test
    heads = allocator.HeadAllocator(stage([1e-6, 1e-3]), free_here=lambda: 1000)
    heads.set_blocks(1, 1000)
    placed = {}
    for rule in (EqualSplit, PrimaryOnly):
        use_rule(heads, rule)
        heads.change_costs(stage([1e-6, 1e-3 * len(placed)]))
        heads.place(rule.__name__, tokens=16, most_output=16, has_hits=False)
        heads.admitted(rule.__name__, anchor=len(placed))
        placed[rule.__name__] = sorted(heads.devices(rule.__name__))
    assert placed == {"EqualSplit": [0] * 4 + [1] * 4, "PrimaryOnly": [0] * 8}


def request(tokens: int = 16) -> Requests:
    return Requests(ids=("r",), context_tokens=np.array([tokens]), growth_tokens=np.array([0]))


def load(heads: list[int], free: list[int]) -> DeviceLoad:
    return DeviceLoad(heads=np.array(heads), kv_bytes=np.zeros(len(heads)), free_blocks=np.array(free))


def test_equal_split_gives_every_device_as_much_and_evens_out_what_does_not_divide() -> None:
    rule = EqualSplit(stage([1.0, 1.0, 1.0]))
    placed = rule.dispatch(load([4, 0, 2], [99] * 3), request())
    assert placed.groups.tolist() == [[2, 3, 3]]
    assert rule.dispatch(load([0, 0, 0], [1, 99, 99]), request()).groups.tolist() == [[1, 4, 3]]
    assert list(rule.dispatch(load([0, 0, 0], [1, 1, 1]), request()).unplaced) == ["r"]


def test_primary_only_waits_for_the_primary() -> None:
    rule = PrimaryOnly(stage([1.0, 1.0]))
    assert rule.dispatch(load([0, 0], [8, 0]), request()).groups.tolist() == [[8, 0]]
    assert list(rule.dispatch(load([0, 0], [7, 99]), request()).unplaced) == ["r"]


def test_the_papers_rule_rounds_the_linear_program() -> None:
    # Speeds 1, 1, 1/2, 1/4 share 8 groups as 32 : 32 : 16 : 8 elevenths: 2.91, 2.91, 1.45, 0.73.
    rule = PaperRule(stage([1.0, 1.0, 2.0, 4.0]))
    everywhere = load([0] * 4, [99] * 4)
    assert rule.fractions(everywhere, request()) == pytest.approx(np.array([32, 32, 16, 8]) / 11)
    assert rule.dispatch(everywhere, request()).groups.tolist() == [[3, 3, 1, 1]]


@settings(deadline=None, max_examples=60)
@given(
    seconds=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    seed=st.integers(0, 2**16),
    call_s=st.floats(0, 20),
)
def test_what_the_papers_rule_fills_ends_at_the_same_time(seconds: list[float], seed: int, call_s: float) -> None:
    rng = np.random.default_rng(seed)
    rule, running = PaperRule(stage(seconds, call_s=call_s)), rng.integers(0, 9, len(seconds))
    free = rng.integers(0, 9, len(seconds))
    free[0] += 8
    now = load(running.tolist(), free.tolist())
    x = rule.fractions(now, request())
    assert x.sum() == pytest.approx(8, rel=1e-6)
    ends = np.array(seconds) * (running + 2 * x) + call_s
    partly = (x > 1e-9) & (x < free - 1e-9)
    z = ends[partly].max(initial=0.0)
    assert ends[partly] == pytest.approx(z, rel=1e-6)
    if partly.any():
        assert (ends[(x <= 1e-9) & (free > 0)] >= z * (1 - 1e-6)).all()
        assert (ends[x >= free - 1e-9][free[x >= free - 1e-9] > 0] <= z * (1 + 1e-6)).all()
    groups = rule.dispatch(now, request()).groups[0]
    assert groups.sum() == 8
    assert (groups <= free).all()


def test_a_pace_counts_heads_bytes_and_the_way_there_and_back(tmp_path: Path) -> None:
    pace = Pace(link_bytes_per_s=100.0, latency_s=3.0)
    frame = Frame(kind=FrameKind.PING, epoch=0, session=0)
    assert pace.link_s(frame, None) == pytest.approx(HEADER_BYTES / 100)
    assert pace.link_s(frame, frame) == pytest.approx(2 * HEADER_BYTES / 100 + 6)
    pace.write(tmp_path / "pace.json")
    assert Pace.read(tmp_path / "pace.json") == pace
    Pace().write(tmp_path / "pace.json")
    assert Pace.read(tmp_path / "pace.json").link_s(frame, frame) == 0.0


def test_waiting_ends_no_earlier_than_asked_and_at_once_for_what_has_passed() -> None:
    moment_s = time.perf_counter() + 0.01
    wait_until(moment_s)
    assert time.perf_counter() >= moment_s
    wait_until(moment_s)


@needs_vllm
@pytest.mark.soak
def test_the_quick_form_has_all_rules_and_they_agree_on_the_text() -> None:
    found = rows_of(run("benchmarks.emulation", "--quick", "--json", "--python", str(PYTHON)).splitlines())
    assert [row["name"].partition(": ")[2] for row in found] == ["hetis", "paper", "equal", "primary only"]
    assert found[-1]["heads"] == "100 : 0"
    assert found[-1]["over_primary"] == 1.0
