"""The maximum flow equals what a person works out, and never overdraws a replica or a link."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.published.flow import Flow, Station, maximum_flow


def stations(*rates: float, zone: str = "east", is_wide: bool = False) -> list[Station]:
    return [Station(rate=rate, zone=zone, is_wide=is_wide) for rate in rates]


def test_the_weaker_side_limits_one_zone() -> None:
    """2 + 3 = 5 requests/s are prefilled, 1 + 1.5 = 2.5 decoded."""
    flow = maximum_flow(stations(2.0, 3.0), stations(1.0, 1.5), {})
    assert flow.value == pytest.approx(2.5)
    assert flow.decode == pytest.approx((1.0, 1.5))
    assert sum(flow.prefill) == pytest.approx(2.5)


def test_a_link_between_zones_carries_what_it_can() -> None:
    """East prefills 3 and decodes 1: of the 2 left the link takes 0.75, although west could decode 5."""
    prefill = stations(3.0, is_wide=True)
    decode = [*stations(1.0), *stations(5.0, zone="west")]
    flow = maximum_flow(prefill, decode, {("east", "west"): 0.75, ("west", "east"): 9.0})
    assert flow.value == pytest.approx(1.75)
    assert flow.routes == pytest.approx({(0, 0): 1.0, (0, 1): 0.75})


def test_a_replica_that_may_not_send_afar_serves_its_own_zone_only() -> None:
    decode = [*stations(1.0), *stations(5.0, zone="west")]
    flow = maximum_flow(stations(3.0), decode, {("east", "west"): 9.0})
    assert flow.routes == pytest.approx({(0, 0): 1.0})


def test_a_link_is_shared_by_all_replicas_on_both_ends() -> None:
    """Two senders and two receivers over one link of 1 request/s."""
    prefill = stations(2.0, 2.0, is_wide=True)
    flow = maximum_flow(prefill, stations(2.0, 2.0, zone="west"), {("east", "west"): 1.0})
    assert flow.value == pytest.approx(1.0)
    assert sum(flow.routes.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("prefill", "decode"), [((), ()), ((1.0,), ()), ((), (1.0,))])
def test_one_side_alone_serves_nothing(prefill: tuple[float, ...], decode: tuple[float, ...]) -> None:
    flow = maximum_flow(stations(*prefill), stations(*decode), {})
    assert flow.value == 0.0
    assert flow.routes == {}


RATES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.sampled_from(("east", "west"))), min_size=1, max_size=5)


@given(RATES, RATES, st.booleans(), st.floats(1e-3, 1e3))
def test_nothing_is_overdrawn_and_what_is_sent_arrives(
    prefill: list[tuple[float, str]], decode: list[tuple[float, str]], is_wide: bool, link: float
) -> None:
    senders = [Station(rate=rate, zone=zone, is_wide=is_wide) for rate, zone in prefill]
    receivers = [Station(rate=rate, zone=zone) for rate, zone in decode]
    flow = maximum_flow(senders, receivers, {("east", "west"): link, ("west", "east"): link})
    assert_within_capacity(flow, senders, receivers, link)
    assert flow.value == pytest.approx(sum(flow.routes.values()), rel=1e-6)
    if len({zone for _, zone in (*prefill, *decode)}) == 1:
        assert flow.value == pytest.approx(min(sum(r for r, _ in prefill), sum(r for r, _ in decode)), rel=1e-6)


def assert_within_capacity(flow: Flow, senders: list[Station], receivers: list[Station], link: float) -> None:
    sent: defaultdict[int, float] = defaultdict(float)
    received: defaultdict[int, float] = defaultdict(float)
    over: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (i, j), rate in flow.routes.items():
        sent[i] += rate
        received[j] += rate
        over[senders[i].zone, receivers[j].zone] += rate
    assert all(rate <= senders[i].rate * (1 + 1e-9) for i, rate in sent.items())
    assert all(rate <= receivers[j].rate * (1 + 1e-9) for j, rate in received.items())
    assert all(rate <= link * (1 + 1e-9) for (a, b), rate in over.items() if a != b)
    assert [sent[i] for i in range(len(senders))] == pytest.approx(list(flow.prefill), rel=1e-6, abs=1e-9)
    assert [received[j] for j in range(len(receivers))] == pytest.approx(list(flow.decode), rel=1e-6, abs=1e-9)
