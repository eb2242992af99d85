"""Progress is sparse where it is not shown live."""

from __future__ import annotations

from functools import partial

from hetis.planner.cli.searching import SparseLines, SparseRequests, by_one_clock, describe
from hetis.solver.budget import Progress


def test_a_line_every_two_seconds_however_often_phases_change() -> None:
    lines = list[str]()
    news = ((100.0, 0.0), (100.5, 0.5), (102.1, 2.1), (102.2, 0.0), (103.0, 0.9), (104.2, 2.2))
    clock = iter([now_s for now_s, _ in news])
    report = SparseLines(lines.append, partial(describe, unit="requests/s"), clock=lambda: next(clock))
    for _, elapsed_s in news:
        report(Progress(phase=f"strategy {elapsed_s}: pricing", elapsed_s=elapsed_s))
    assert [line.split()[0] for line in lines] == ["0.0", "2.1", "2.2"]


def test_the_clock_of_a_command_never_runs_backwards() -> None:
    lines, times_s = list[str](), iter((50.0, 77.3, 78.5))
    report = by_one_clock(lambda news: lines.append(describe(news, "requests/s")), clock=lambda: next(times_s))
    report(Progress(phase="plans for any", elapsed_s=27.3))
    report(Progress(phase="simulating the plan", elapsed_s=20.4))
    assert lines == [" 27.3 s  plans for any", " 28.5 s  simulating the plan"]


def test_a_line_tells_incumbent_bound_and_gap() -> None:
    news = Progress(phase="pricing", elapsed_s=4.06, incumbent=1.61, bound=1.63, gap=0.0124)
    assert describe(news, "requests/s") == "  4.1 s  pricing: incumbent 1.610, bound 1.630 requests/s, gap 1.24%"


def test_what_is_not_known_yet_is_left_out() -> None:
    assert describe(Progress(phase="pricing", elapsed_s=0), "requests/s") == "  0.0 s  pricing"


def test_a_sweep_says_which_rate_it_is_at_and_how_far() -> None:
    lines, times_s = list[str](), iter((0.0, 1.0, 5.0, 6.0, 9.9, 10.0, 11.0))
    news = SparseRequests(lines.append, clock=lambda: next(times_s))
    news.begins("rate 1 of 40 at most: 1.5 requests/s")
    for _ in range(4):
        news(1_000, 2_000)
    news.begins("rate 2 of 40 at most: 2 requests/s")
    for _ in range(2):
        news(50, 2_000)
    assert lines == [
        "simulating: rate 1 of 40 at most: 1.5 requests/s, 1,000 of 2,000 requests have arrived",
        "simulating: rate 2 of 40 at most: 2 requests/s, 50 of 2,000 requests have arrived",
    ]
