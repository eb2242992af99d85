"""Traffic between prefill and decode replicas of a fixed plan is the most that both sides and the links allow."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.use_cases.robustness.fixed_plan import most_routed

ZONES = ("a", "b", "c")
RATES = st.floats(0, 100) | st.just(0.0)
SENDERS = st.dictionaries(
    st.sampled_from([(zone, allowed) for zone in ZONES for allowed in ((zone,), ZONES)]), RATES, max_size=6
)
RECEIVERS = st.dictionaries(st.sampled_from(ZONES), RATES, max_size=3)
LINKS = st.dictionaries(st.sampled_from([(a, b) for a in ZONES for b in ZONES if a != b]), RATES)


@given(SENDERS, RECEIVERS, LINKS)
def test_it_is_the_least_cut(
    prefill: dict[tuple[str, tuple[str, ...]], float], decode: dict[str, float], links: dict[tuple[str, str], float]
) -> None:
    """Return the maximum flow as the minimum cut: the least capacity without which nothing flows, over all cuts."""

    def cut(sending: tuple[bool, ...], closed: tuple[bool, ...]) -> float:
        senders = [sender for sender, on in zip(prefill, sending, strict=True) if on]
        receivers = [zone for zone, shut in zip(decode, closed, strict=True) if not shut]
        pairs = {(here, there) for here, allowed in senders for there in receivers if there in allowed}
        over_links = sum(math.inf if here == there else links.get((here, there), 0.0) for here, there in pairs)
        stopped = sum(rate for sender, rate in prefill.items() if sender not in senders)
        return over_links + stopped + sum(rate for zone, rate in decode.items() if zone not in receivers)

    choices = itertools.product(
        itertools.product((True, False), repeat=len(prefill)), itertools.product((True, False), repeat=len(decode))
    )
    least = min(cut(sending, closed) for sending, closed in choices)
    assert most_routed(prefill, decode, links) == pytest.approx(least, abs=1e-9)


def test_one_zone_serves_what_the_slower_side_does() -> None:
    assert most_routed({("a", ("a",)): 3.0}, {"a": 2.0}, {}) == 2.0
    assert most_routed({("a", ("a",)): 3.0}, {"b": 2.0}, {("a", "b"): 9.0}) == 0.0
    assert most_routed({("a", ("a", "b")): 3.0}, {"b": 2.0}, {("a", "b"): 0.5}) == 0.5
