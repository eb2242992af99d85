"""Traffic: lengths and arrivals are as requested, and reproducible by seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats.traces import Trace
from hetis.simulator.arrivals import Arrivals, Load, Saturation, draw_traffic, requests_of
from hetis.simulator.values import SaturatingSource
from hetis.solver.errors import InvalidProblemError
from hetis.solver.workload import LengthBin, Workload

TRACE = Trace(
    name="four",
    arrival_s=np.array([10.0, 11.0, 11.5, 14.0]),
    prompt_tokens=np.array([100, 200, 300, 5000]),
    output_tokens=np.array([10, 20, 30, 40]),
)
WORKLOAD = Workload(
    name="bins",
    bins=(
        LengthBin(prompt_tokens=100.25, output_tokens=7.5, weight=3.0),
        LengthBin(prompt_tokens=900.0, output_tokens=50.0, weight=1.0),
    ),
)


def drawn(rate: float = 2.0, cv: float = 1.0) -> Load:
    return Load(lengths=WORKLOAD, max_position=4096, rate_rps=rate, gap_cv=cv)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(draw_traffic(drawn(4.0, cv), 40_000, seed=1).arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08, abs=1e-9)


def test_drawn_lengths_keep_the_means_of_the_bins() -> None:
    traffic = draw_traffic(drawn(), 40_000, seed=3)
    assert traffic.prompt_tokens.mean() == pytest.approx((3 * 100.25 + 900) / 4, rel=0.02)
    assert traffic.output_tokens.mean() == pytest.approx((3 * 7.5 + 50) / 4, rel=0.02)
    assert set(np.unique(traffic.output_tokens)) == {7, 8, 50}
    assert traffic.num_clipped == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.floats(0.1, 10.0), st.floats(0.0, 4.0), st.integers(1, 60), st.integers(1, 60))
def test_rates_and_more_requests_change_nothing_but_the_scale_and_the_end(
    seed: int, rate: float, cv: float, fewer: int, more: int
) -> None:
    base = draw_traffic(drawn(1.0, cv), fewer, seed=seed)
    other = draw_traffic(drawn(rate, cv), fewer + more, seed=seed)
    assert np.array_equal(base.prompt_tokens, other.prompt_tokens[:fewer])
    assert np.array_equal(base.output_tokens, other.output_tokens[:fewer])
    assert np.allclose(base.arrival_s / rate, other.arrival_s[:fewer])
    assert (np.diff(other.arrival_s) >= 0).all()


def test_seeds_differ() -> None:
    first, second = (draw_traffic(drawn(), 50, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.arrival_s, second.arrival_s)
    assert not np.array_equal(first.prompt_tokens, second.prompt_tokens)


def test_a_trace_is_replayed_as_recorded_and_from_its_start_again() -> None:
    load = Load(lengths=TRACE, max_position=4096, arrivals=Arrivals.RECORDED)
    traffic = draw_traffic(load, 6, seed=0)
    # After the last request, a mean gap of 4 s / 3 until the trace starts again.
    assert traffic.arrival_s.tolist() == pytest.approx([0.0, 1.0, 1.5, 4.0, 4 + 4 / 3, 5 + 4 / 3])
    assert traffic.prompt_tokens.tolist() == [100, 200, 300, 4056, 100, 200]
    assert traffic.output_tokens.tolist() == [10, 20, 30, 40, 10, 20]
    assert traffic.num_clipped == 1  # 5000 tokens and 40 more do not fit into 4096


def test_recorded_arrivals_stretch_to_a_rate() -> None:
    load = Load(lengths=TRACE, max_position=4096, arrivals=Arrivals.RECORDED, rate_rps=1.5)  # recorded: 0.75
    assert draw_traffic(load, 4, seed=0).arrival_s.tolist() == pytest.approx([0.0, 0.5, 0.75, 2.0])


def test_other_seeds_start_a_trace_elsewhere() -> None:
    load = Load(lengths=TRACE, max_position=10_000, arrivals=Arrivals.RECORDED)
    starts = {int(draw_traffic(load, 4, seed=seed).prompt_tokens[0]) for seed in range(20)}
    assert starts == {100, 200, 300, 5000}


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=8))
def test_every_request_fits_the_context(context: int, lengths: list[tuple[int, int]]) -> None:
    trace = Trace(
        name="t",
        arrival_s=np.arange(len(lengths), dtype=np.float64),
        prompt_tokens=np.array([p for p, _ in lengths]),
        output_tokens=np.array([o for _, o in lengths]),
    )
    bins = tuple(LengthBin(prompt_tokens=p + 0.5, output_tokens=o + 0.25, weight=1.0) for p, o in lengths)
    for source in (trace, Workload(name="w", bins=bins)):
        traffic = draw_traffic(Load(lengths=source, max_position=context, rate_rps=1.0), 30, seed=0)
        assert (traffic.prompt_tokens + traffic.output_tokens <= context).all()
        assert min(traffic.prompt_tokens.min(), traffic.output_tokens.min()) >= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.floats(0, 0.999), st.integers(1, 500))
def test_hits_are_a_share_of_the_prompt_as_it_is_served(context: int, rate: float, prompt: int) -> None:
    trace = Trace(
        name="t",
        arrival_s=np.arange(2.0),
        prompt_tokens=np.array([prompt, prompt]),
        output_tokens=np.array([3, 3]),
        prefix_share=np.full(2, rate),
    )
    bins = (LengthBin(prompt_tokens=prompt, output_tokens=3, weight=1.0),)
    for source in (trace, Workload(name="w", bins=bins, prefix_hit_rate=rate)):
        traffic = draw_traffic(Load(lengths=source, max_position=context, rate_rps=1.0), 5, seed=0)
        assert (traffic.prefix_tokens < traffic.prompt_tokens).all()
        assert (abs(traffic.prefix_tokens - rate * traffic.prompt_tokens) <= 1).all()
        assert [request.prefix_tokens for request in requests_of(traffic)] == traffic.prefix_tokens.tolist()
        saturated = Saturation(traffic)
        drawn_again = [saturated.next_request(0.0) for _ in range(5)]
        assert [request.prefix_tokens for request in drawn_again if request] == traffic.prefix_tokens.tolist()


def test_hits_that_were_counted_stay_with_their_requests() -> None:
    shares = np.array([0.0, 0.5, 0.9, 0.1])
    trace = replace(TRACE, prefix_share=shares)
    traffic = draw_traffic(Load(lengths=trace, max_position=10_000, rate_rps=1.0), 6, seed=0)
    assert traffic.prefix_tokens.tolist() == [0, 100, 270, 500, 0, 100]
    assert draw_traffic(Load(lengths=TRACE, max_position=10_000, rate_rps=1.0), 6, seed=0).prefix_tokens.sum() == 0


def test_saturation_gives_every_request_once_when_asked() -> None:
    traffic = draw_traffic(Load(lengths=TRACE, max_position=9000, arrivals=Arrivals.SATURATED), 4, seed=0)
    source = Saturation(traffic)
    assert isinstance(source, SaturatingSource)
    requests = [source.next_request(7.0 * i) for i in range(6)]
    assert [(r.id, r.arrival_s, r.prompt_tokens) for r in requests if r] == [
        (0, 0.0, 100),
        (1, 7.0, 200),
        (2, 14.0, 300),
        (3, 21.0, 5000),
    ]
    assert requests[4:] == [None, None]


def test_traffic_ends_when_told_to() -> None:
    traffic = draw_traffic(drawn(), 50, seed=0)
    assert [r.id for r in requests_of(traffic, keep_going=lambda given: given < 3)] == [0, 1, 2]
    source = Saturation(traffic, keep_going=lambda given: given < 2)
    assert [source.next_request(0.0) is None for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_rps": 0.0}, "arrival rate is 0 requests/s, must be 1e-06 to 1e+09"),
        ({"rate_rps": 1e-300}, "arrival rate is 1e-300 requests/s, must be 1e-06 to 1e+09"),
        ({"rate_rps": 1e170}, "arrival rate is 1e+170 requests/s, must be 1e-06 to 1e+09"),
        ({"rate_rps": float("nan")}, "arrival rate is nan requests/s, must be 1e-06 to 1e+09"),
        ({"gap_cv": -1.0, "rate_rps": 1.0}, "gap_cv is -1.0, must be 0 to 100"),
        ({}, "arrivals that are drawn need a rate"),
        (
            {"arrivals": Arrivals.RECORDED},
            "bins is a distribution of lengths: it has no recorded arrivals",
        ),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidProblemError) as caught:
        Load(lengths=WORKLOAD, max_position=4096, **changes)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_trace_without_a_rate_is_not_replayed_as_recorded() -> None:
    at_once = Trace(name="burst", arrival_s=np.zeros(2), prompt_tokens=np.ones(2, int), output_tokens=np.ones(2, int))
    with pytest.raises(InvalidProblemError, match="all requests of burst arrive at once"):
        Load(lengths=at_once, max_position=10, arrivals=Arrivals.RECORDED)
