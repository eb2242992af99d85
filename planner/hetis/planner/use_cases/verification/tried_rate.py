"""A simulation at one rate, and whether it keeps the limits: by chance, or for sure."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.planner.use_cases.simulation.judging import Measured
from hetis.simulator.metrics import Summary
from hetis.solver.plan import Objective

UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)
BY_FAR = 1.1  # times the limit, above which a probe's whole interval is
BY_CHANCE = 0.02  # share of a limit above which an excess is no chance, however wide the interval
MOST_GROWTH = 0.02  # seconds by which the wait may grow per second at these rates


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedRate:
    """A simulation at one rate."""

    summary: Summary
    measured: Measured
    num_requests: int
    within: bool  # whether the load was carried and nothing exceeded its limit
    kept: bool  # whether the limits were kept, up to chance: a plan may well use its limits up
    sure: bool  # whether they were kept by more than chance, so that other traffic at this rate keeps them, too
    close: bool  # whether a longer run may give another result
    missed_by_far: bool  # whether longer runs would miss the limits, too


def hardly_grows(summary: Summary) -> bool:
    """Return whether the wait hardly grows.

    In a run that is too short to tell whether the queue is steady, that must hold by more than chance.
    """
    growth = summary.growth
    if summary.steady is None:
        return growth.is_below(MOST_GROWTH)
    return summary.steady and growth.value <= MOST_GROWTH


def judged(summary: Summary, found: Measured, num_requests: int) -> TriedRate:
    """Return whether a run keeps the limits, and how sure that is.

    The queues of a busy plan need time to fill, so the tail of latencies is too low in a run that starts empty.
    """
    limited, carried = found.limited, summary.within(UNLIMITED)
    within = carried and all(one.value <= one.limit for one in limited)
    by_chance = all(one.low <= one.limit and one.value <= (1.0 + BY_CHANCE) * one.limit for one in limited)
    is_close = any(one.low <= one.limit < one.high / one.close for one in limited)
    return TriedRate(
        summary=summary,
        measured=found,
        num_requests=num_requests,
        within=within,
        kept=within or (summary.steady is not False and by_chance),
        sure=within and all(one.high <= one.limit for one in limited),
        missed_by_far=summary.steady is False or any(one.low > BY_FAR * one.limit for one in limited),
        close=summary.steady is not False and is_close,
    )
