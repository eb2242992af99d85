"""The maximum flow equals results worked out by hand, and never exceeds a replica or a link."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.published import hexgen2
from hetis.solver.published.hexgen2 import Station

Routes = dict[tuple[int, int], float]


def stations(*rates: float, zone: str = "east") -> list[Station]:
    return [(rate, zone) for rate in rates]


def maximum_flow(prefill: list[Station], decode: list[Station], links: dict[tuple[str, str], float]) -> Routes:
    return hexgen2.maximum_flow(dict(enumerate(prefill)), dict(enumerate(decode)), links)


def test_the_weaker_side_limits_one_zone() -> None:
    """2 + 3 = 5 requests/s are prefilled, 1 + 1.5 = 2.5 decoded."""
    routes = maximum_flow(stations(2.0, 3.0), stations(1.0, 1.5), {})
    assert [sum(rate for (_, j), rate in routes.items() if j == end) for end in (0, 1)] == pytest.approx([1.0, 1.5])


def test_a_link_between_zones_carries_what_it_can() -> None:
    """East prefills 3 and decodes 1: of the remaining 2 the link takes 0.75, although west could decode 5."""
    decode = [*stations(1.0), *stations(5.0, zone="west")]
    routes = maximum_flow(stations(3.0), decode, {("east", "west"): 0.75, ("west", "east"): 9.0})
    assert routes == pytest.approx({(0, 0): 1.0, (0, 1): 0.75})


def test_without_links_a_zone_serves_itself_only() -> None:
    decode = [*stations(1.0), *stations(5.0, zone="west")]
    assert maximum_flow(stations(3.0), decode, {}) == pytest.approx({(0, 0): 1.0})


def test_a_link_is_shared_by_all_replicas_on_both_ends() -> None:
    """Two senders and two receivers over one link of 1 request/s."""
    routes = maximum_flow(stations(2.0, 2.0), stations(2.0, 2.0, zone="west"), {("east", "west"): 1.0})
    assert sum(routes.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("prefill", "decode"), [((), ()), ((1.0,), ()), ((), (1.0,))])
def test_one_side_alone_serves_nothing(prefill: tuple[float, ...], decode: tuple[float, ...]) -> None:
    assert maximum_flow(stations(*prefill), stations(*decode), {}) == {}


def test_routes_are_the_same_in_every_process() -> None:
    """The order of sets of strings differs between processes, and here many flows are maximal."""
    code = """
from hetis.solver.published.hexgen2 import maximum_flow
zones = "abcd"
links = {(here, there): 1.0 for here in zones for there in zones if here != there}
prefill = {i: (3.0, zone) for i, zone in enumerate(zones)}
print(maximum_flow(prefill, {9 - i: (2.0, zone) for i, zone in enumerate(zones[:3])}, links))
"""
    environments = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(4)]
    found = {subprocess.check_output([sys.executable, "-c", code], env=environment) for environment in environments}
    assert len(found) == 1


ZONES = ("east", "west")
RATES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.sampled_from(ZONES)), min_size=1, max_size=5)


@given(RATES, RATES, st.booleans(), st.floats(1e-3, 1e3))
def test_nothing_is_overdrawn_and_no_cut_is_narrower(
    prefill: list[Station], decode: list[Station], sends_afar: bool, link: float
) -> None:
    links = {("east", "west"): link, ("west", "east"): link} if sends_afar else {}
    routes = maximum_flow(prefill, decode, links)
    assert_within_capacity(routes, prefill, decode, link)
    send, receive = (
        {zone: sum(rate for rate, other in side if other == zone) for zone in ZONES} for side in (prefill, decode)
    )
    subsets = [(), ("east",), ("west",), ZONES]
    narrowest = min(
        sum(send[zone] for zone in ZONES if zone not in senders)
        + sum(receive[zone] for zone in receivers)
        + sum(math.inf if a == b else links.get((a, b), 0.0) for a in senders for b in ZONES if b not in receivers)
        for senders in subsets  # on the side of the source
        for receivers in subsets
    )
    assert sum(routes.values()) == pytest.approx(narrowest, rel=1e-6)


def assert_within_capacity(routes: Routes, senders: list[Station], receivers: list[Station], link: float) -> None:
    sent: defaultdict[int, float] = defaultdict(float)
    received: defaultdict[int, float] = defaultdict(float)
    over: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (i, j), rate in routes.items():
        sent[i] += rate
        received[j] += rate
        over[senders[i][1], receivers[j][1]] += rate
    assert all(rate <= senders[i][0] * (1 + 1e-9) for i, rate in sent.items())
    assert all(rate <= receivers[j][0] * (1 + 1e-9) for j, rate in received.items())
    assert all(rate <= link * (1 + 1e-9) for (a, b), rate in over.items() if a != b)
