"""Sketches of traffic: they add up, their means are exact, and what they become keeps them."""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.errors import InvalidProblemError
from hetis.solver.traffic import SCALES, SECONDS, TOKENS, Histogram, Scale, TrafficSketch

VALUES = st.lists(st.integers(1, 30_000_000).map(float), max_size=12)
TIMES = st.lists(st.integers(1, 4_000_000).map(lambda n: n / 1024), max_size=12)


def histogram_of(scale: Scale, values: list[float]) -> Histogram:
    counts = [0.0] * (len(scale.edges) + 1)
    for value in values:
        counts[bisect.bisect_left(scale.edges, value)] += 1
    return Histogram(scale=scale, counts=tuple(counts), total=sum(values))


@st.composite
def sketches(draw: st.DrawFn) -> TrafficSketch:
    drawn = {name: histogram_of(scale, draw(VALUES if scale is TOKENS else TIMES)) for name, scale in SCALES.items()}
    seconds, arrivals, cached = (float(draw(st.integers(0, 2**20))) for _ in range(3))
    return TrafficSketch(seconds=seconds, arrivals=arrivals, cached_tokens=cached, **drawn)


@given(sketches(), sketches(), sketches())
def test_sums_do_not_depend_on_the_order(a: TrafficSketch, b: TrafficSketch, c: TrafficSketch) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a.beside(b).beside(c) == a.beside(b.beside(c))
    assert a + TrafficSketch() == a == a.beside(TrafficSketch())


@given(sketches(), sketches())
def test_a_difference_is_what_was_added(before: TrafficSketch, added: TrafficSketch) -> None:
    assert (before + added).since(before) == added


@given(sketches(), sketches())
def test_replicas_beside_each_other_have_the_sum_of_their_rates(a: TrafficSketch, b: TrafficSketch) -> None:
    a, b = replace(a, seconds=60.0), replace(b, seconds=60.0)
    assert a.beside(b).rate_per_s == pytest.approx(a.rate_per_s + b.rate_per_s)
    assert (a + b).rate_per_s == pytest.approx((a.rate_per_s + b.rate_per_s) / 2)


def test_an_engine_that_started_again_counts_from_zero() -> None:
    before = TrafficSketch(seconds=100.0, arrivals=9.0, prompt_tokens=histogram_of(TOKENS, [100.0] * 9))
    after = TrafficSketch(seconds=130.0, arrivals=3.0, prompt_tokens=histogram_of(TOKENS, [200.0, 400.0]))
    assert after.since(before) == replace(after, seconds=30.0)
    rebooted = replace(after, seconds=20.0)
    assert rebooted.since(before).seconds == 20.0


@given(VALUES.filter(len), VALUES.filter(len), st.integers(1, 20))
def test_a_workload_keeps_means_and_hits(prompts: list[float], outputs: list[float], strata: int) -> None:
    sketch = TrafficSketch(
        seconds=10.0,
        arrivals=25.0,
        prompt_tokens=histogram_of(TOKENS, prompts),
        output_tokens=histogram_of(TOKENS, outputs),
        cached_tokens=sum(prompts) / 4,
    )
    workload = sketch.workload("measured", strata=strata)
    moments = workload.moments(block_tokens=1)
    assert moments.mean_prompt == pytest.approx(sum(prompts) / len(prompts))
    assert moments.mean_output == pytest.approx(sum(outputs) / len(outputs))
    assert sum(one.weight for one in workload.bins) == pytest.approx(1.0)
    assert workload.prefix_hit_rate == pytest.approx(0.25)
    assert workload.rate_rps == 2.5


@given(VALUES.filter(len), st.floats(0, 1))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(values: list[float], share: float) -> None:
    found, exact = histogram_of(TOKENS, values), sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    low, high = TOKENS.bounds(bisect.bisect_left(TOKENS.edges, exact))
    assert low <= found.quantile(share) <= high
    assert found.quantile(0.0) <= found.quantile(share) <= found.quantile(1.0)


@given(TIMES.filter(len), st.floats(0.01, 0.99))
def test_the_share_within_a_quantile_is_its_share(values: list[float], share: float) -> None:
    found = histogram_of(SECONDS, values)
    if 0 < found.skew < 100:  # else all values of a bucket are at one of its ends
        assert found.share_within(found.quantile(share)) == pytest.approx(share, abs=1e-6)


def test_lengths_of_a_long_tail_are_met_within_the_width_of_buckets() -> None:
    draws = random.Random(7)
    values = [math.ceil(draws.lognormvariate(7, 1)) * 1.0 for _ in range(20_000)]
    found = histogram_of(TOKENS, values)
    for share in (0.5, 0.9, 0.95):
        assert found.quantile(share) == pytest.approx(sorted(values)[int(share * len(values))], rel=0.25)
    exact = sum(x * x for x in values) / len(values)
    assert sum(x * x * n for x, n in found.strata()) / found.count == pytest.approx(exact, rel=0.15)


def test_buckets_of_vllm_are_taken_as_they_are() -> None:
    # max_model_len 3000: vLLM's last finite bound is 2000, and longer prompts are in its open bucket.
    buckets = {1.0: 0.0, 1000.0: 4.0, 500.0: 1.0, 2000.0: 9.0, math.inf: 11.0}
    found = Histogram.of_buckets(TOKENS, buckets, 15_000.0)
    counts = dict(zip(TOKENS.edges, found.counts, strict=False))
    assert (counts[1000.0], counts[2000.0], counts[5000.0]) == (3.0, 5.0, 2.0)
    assert found.count == 11.0
    assert found.mean == pytest.approx(15_000 / 11)


@given(st.dictionaries(st.floats(0.5, 1e8), st.integers(0, 50), min_size=1, max_size=9))
def test_buckets_of_other_edges_keep_the_count_below_common_edges(increments: dict[float, int]) -> None:
    bounds = sorted({*increments, 100.0, 20_000.0})
    below, buckets = 0.0, dict[float, float]()
    for bound in (*bounds, math.inf):
        below += increments.get(bound, 2)
        buckets[bound] = below
    found = Histogram.of_buckets(TOKENS, buckets, below * 300)
    assert found.count == pytest.approx(below)
    for edge in (100.0, 20_000.0):
        at_most = sum(found.counts[: TOKENS.edges.index(edge) + 1])
        assert at_most == pytest.approx(buckets[edge])


def test_values_that_cannot_be_counts_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match="must be 23 for tokens"):
        Histogram(scale=TOKENS, counts=(1.0,))
    with pytest.raises(InvalidProblemError, match="has nan, must be >= 0 and finite"):
        Histogram(scale=TOKENS, total=math.nan)
    with pytest.raises(InvalidProblemError, match=r"arrivals of a sketch is -1\.0"):
        TrafficSketch(arrivals=-1.0)
    with pytest.raises(InvalidProblemError, match="ttft_s of a sketch is in tokens, must be in s"):
        TrafficSketch(ttft_s=Histogram(scale=TOKENS))
    with pytest.raises(InvalidProblemError, match="has no requests that have ended"):
        TrafficSketch(seconds=1.0, arrivals=1.0).workload("w")
