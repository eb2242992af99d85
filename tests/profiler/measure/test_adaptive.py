"""The next point to measure and when to stop, on known surfaces."""

from __future__ import annotations

import numpy as np

from hetis.profiler.measure.adaptive import Campaign, SeriesState, StoppingRule, first_points
from hetis.profiler.measure.points import Measured, MeasuredPoint, PointSeries, TimedSample


def surface(name: str, *, bend: float = 1.0) -> tuple[PointSeries, dict[object, float]]:
    """A roofline over two sizes: launch, memory, compute; and the true seconds of every candidate."""
    points = [
        MeasuredPoint(op="decode_attention", kernel=name, columns={"batch": 2**i, "context_tokens": 2**j})
        for i in range(8)
        for j in range(7, 15)
    ]
    work = {p.key: p.columns["batch"] * p.columns["context_tokens"] * 1e-9 for p in points}
    seconds = {key: max(1e-5, value) ** bend for key, value in work.items()}
    return PointSeries(name=name, candidates=tuple(points), axes=("batch", "context_tokens")), seconds


def measured_to_the_end(campaign: Campaign, seconds: dict[object, float], limit: int = 500) -> int:
    count = 0
    while (choice := campaign.next()) is not None and count < limit:
        key = choice.point.key
        campaign.add(Measured(point=choice.point, sample=TimedSample(seconds=seconds[key], spread=0.01)))
        count += 1
    return count


def test_it_stops_before_all_is_measured_and_predicts_the_rest() -> None:
    series, seconds = surface("a")
    campaign = Campaign([series], StoppingRule(uncertainty=0.1, min_points=10))
    count = measured_to_the_end(campaign, seconds)
    assert 10 <= count < len(series.candidates) / 2
    predicted = campaign.states[0].predict(series.candidates).seconds
    true = np.array([seconds[point.key] for point in series.candidates])
    assert np.abs(predicted / true - 1).mean() < 0.1


def test_a_finer_rule_measures_more() -> None:
    series, seconds = surface("a")
    coarse, fine = (
        measured_to_the_end(Campaign([series], StoppingRule(uncertainty=u, min_points=5)), seconds) for u in (0.2, 0.03)
    )
    assert coarse < fine


def test_no_point_is_measured_twice_and_the_most_is_kept() -> None:
    series, seconds = surface("a")
    campaign = Campaign([series], StoppingRule(uncertainty=0.0, max_points=20))
    assert measured_to_the_end(campaign, seconds) == 20
    assert len({found.point.key for found in campaign.measured}) == 20


def test_every_series_gets_its_least_points_first() -> None:
    (one, first), (two, second) = surface("a"), surface("b", bend=0.5)
    campaign = Campaign([one, two], StoppingRule(min_points=12))
    for _ in range(24):
        choice = campaign.next()
        seconds = (first | second)[choice.point.key]
        campaign.add(Measured(point=choice.point, sample=TimedSample(seconds=seconds, spread=0.01)))
    assert [len(state.measured) for state in campaign.states] == [12, 12]
    assert campaign.is_started()


def test_points_that_would_take_too_long_are_left_out() -> None:
    series, seconds = surface("a")
    campaign = Campaign([series], StoppingRule(max_point_s=1e-4, uncertainty=0.01))
    measured_to_the_end(campaign, seconds)
    assert max(found.sample.seconds for found in campaign.measured[2:]) < 3e-4


def test_one_of_a_group_brings_the_others() -> None:
    series, seconds = surface("a")
    groups = {point.key: str(point.columns["batch"]) for point in series.candidates}
    grouped = PointSeries(name="a", candidates=series.candidates, axes=series.axes, groups=groups)
    campaign = Campaign([grouped], StoppingRule(min_points=9, uncertainty=0.2))
    measured_to_the_end(campaign, seconds)
    found = {point.key for point in (m.point for m in campaign.measured)}
    for group in {groups[key] for key in found}:
        assert {key for key in groups if groups[key] == group} <= found


def test_the_first_points_span_the_candidates() -> None:
    series, _ = surface("a")
    chosen = first_points(series)
    for axis in series.axes:
        sizes = {point.columns[axis] for point in series.candidates}
        assert {min(sizes), max(sizes)} <= {point.columns[axis] for point in chosen}


def test_a_series_of_one_point_is_measured_and_done() -> None:
    point = MeasuredPoint(op="step", kernel="x", columns={"batch": 1})
    state = SeriesState(series=PointSeries(name="s", candidates=(point,), axes=("batch",)), rule=StoppingRule())
    choice = state.next()
    assert choice.point == point
    state.add(Measured(point=point, sample=TimedSample(seconds=1.0, spread=0.0)))
    assert state.next() is None


def test_what_cannot_be_measured_further_is_not_called_known() -> None:
    series, seconds = surface("a")
    campaign = Campaign([series], StoppingRule(uncertainty=0.05, min_points=5))
    for point in series.candidates:
        campaign.add(Measured(point=point, sample=TimedSample(seconds=seconds[point.key], spread=2.0)))
    assert campaign.next() is None
    assert campaign.worst() > 0.05
