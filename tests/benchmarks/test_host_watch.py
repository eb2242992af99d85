"""Calls that the host left undisturbed, without which percentiles on a shared machine mean nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring.service_planner import (
    AFTERMATH_S,
    HOST_WATCH_S,
    MOST_STOLEN_SHARE,
    HostWatch,
    stolen_s,
    undisturbed,
)

TAKEN_S = [0.0, MOST_STOLEN_SHARE * HOST_WATCH_S * 0.9, MOST_STOLEN_SHARE * HOST_WATCH_S * 1.1, HOST_WATCH_S]
SAMPLES = st.lists(st.sampled_from(TAKEN_S), min_size=1, max_size=40).map(
    lambda taken: [(100 + HOST_WATCH_S * n, sum(taken[:n])) for n in range(len(taken) + 1)]
)
CALLS = st.lists(st.tuples(st.floats(90, 130), st.floats(0, 10)), min_size=1, max_size=20)


def let_be(samples: Sequence[tuple[float, float]], began_s: float, seconds: float) -> bool:
    """Decide call by call, as an oracle, that no interval with much stolen time touches the call."""
    for (from_s, before), (until_s, after) in itertools.pairwise(samples):
        touches = from_s < began_s + seconds and until_s >= began_s - AFTERMATH_S
        if touches and (after - before) / (until_s - from_s) > MOST_STOLEN_SHARE:
            return False
    return True


@given(SAMPLES, CALLS)
def test_a_call_is_undisturbed_if_the_host_took_little_during_it_and_just_before(
    samples: Sequence[tuple[float, float]], calls: Sequence[tuple[float, float]]
) -> None:
    began_s, seconds = zip(*calls, strict=True)
    found = undisturbed(samples, began_s, seconds)
    assert found.tolist() == [let_be(samples, *call) for call in calls]


def test_what_was_taken_between_two_samples_is_felt_for_two_seconds() -> None:
    """The host keeps a whole processor from 104.0 to 104.5, and nothing else."""
    samples = [(100 + 0.5 * n, 7.0 if n < 9 else 7.5) for n in range(21)]
    calls = {
        (103.0, 0.9): True,  # over before the theft
        (103.0, 1.1): False,  # reaches into it
        (104.2, 0.1): False,  # in the middle of it
        (103.0, 5.0): False,  # around it
        (106.4, 0.1): False,  # 1.9 s after it
        (106.6, 0.1): True,  # 2.1 s after it
        (90.0, 1.0): True,  # before the first sample
        (200.0, 1.0): True,
    }
    began_s, seconds = zip(*calls, strict=True)
    assert undisturbed(samples, began_s, seconds).tolist() == list(calls.values())


def test_a_watch_knows_what_the_host_took_since_it_began() -> None:
    before = stolen_s()
    with HostWatch() as host:
        pass
    assert stolen_s() >= before >= 0
    assert host.undisturbed([0.0], [1e9]).shape == (1,)
