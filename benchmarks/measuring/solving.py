"""Measurement of one placement, in this process or in a new one with separate memory and first calls."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from hetis.solver.budget import Budget, Progress
from hetis.solver.errors import HetisError, InfeasibleError
from hetis.solver.plan import Plan, Status
from hetis.solver.problem import PlacementProblem

A = TypeVar("A")
R = TypeVar("R")

FAILED = "failed"  # status of a solve that crashed
WHOLE_COUNTS = "whole counts"  # phase of column generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """A solve to measure: the first one of a process, then ``warm`` more, whose median counts."""

    problem: PlacementProblem
    time_limit_s: float
    strategy: str = "hetis"
    gap_target: float = 0.001
    warm: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """CPU seconds of a solve, including binding.

    It also holds the seconds until the first plan and the first bound of the whole family, and until a gap of 1% and of
    0.5% was proved; None if never.
    """

    seconds: float
    first_plan_s: float | None = None
    first_bound_s: float | None = None
    to_1_percent_s: float | None = None
    to_half_percent_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A solve that was measured.

    Attributes:
        status: the plan's; ``infeasible`` if none exists, whose bound is 0; ``none`` if time ran out before one was
            found, ``failed`` if the solver crashed.
        import_s: time to load the solver, numba and HiGHS.
        first: the first solve of the process, which loads compiled kernels from numba's cache (or fills it).
        warm: the median of the others.
        check_s: time of the independent checker, which is not part of the times above.
        violations: what the checker found wrong with the plan.
        peak_mib: peak memory of the process until the first plan was there.
        note: pools in use, or why there is no plan.
    """

    status: str
    value: float
    bound: float
    gap: float
    import_s: float
    first: Timing
    warm: Timing | None
    check_s: float
    violations: tuple[str, ...]
    peak_mib: float
    note: str


def in_own_process(work: Callable[[A], R], argument: A, *, environment: Mapping[str, str] | None = None) -> R:
    """Run ``work(argument)`` in a new interpreter that sees ``environment`` before any library is loaded."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=_set_environment, initargs=(dict(environment or {}),)
    ) as executor:
        return executor.submit(work, argument).result()


def measure(solve: Solve) -> Measured:
    """Solve, check the plan with the checker, and return the measurements.

    All seconds, including the limit, are CPU seconds of this process, so that a busy machine hardly changes plan and
    figures.
    """
    started = time.process_time()
    from hetis.solver.check import check_plan
    from hetis.solver.placement.families import STRATEGIES
    from hetis.solver.planning import solve_placement

    import_s = time.process_time() - started
    timings, plan, status, note = list[Timing](), None, "none", ""
    for run in range(1 + solve.warm):
        reports = list[Progress]()
        started = time.process_time()
        try:
            plan = solve_placement(
                solve.problem,
                strategy=solve.strategy,
                budget=Budget(time_limit_s=solve.time_limit_s, clock=time.process_time),
                gap_target=solve.gap_target,
                report=reports.append,
            )
        except InfeasibleError as error:
            status, note = Status.INFEASIBLE.value, str(error)
        except HetisError as error:
            note = str(error)
        except Exception as error:  # a bug: the row reports it, and later rows are still measured
            traceback.print_exc()
            return failed(repr(error))
        timings.append(_timing(time.process_time() - started, reports, plan))
        if run == 0:
            first_peak_mib = peak_mib()
    started = time.process_time()
    family = STRATEGIES[solve.strategy].restrict(solve.problem.family)
    violations = check_plan(plan, replace(solve.problem, family=family)) if plan is not None else ()
    return Measured(
        status=plan.result.status.value if plan is not None else status,
        value=float(plan.result.value) if plan is not None else 0.0,
        bound=float(plan.result.bound) if plan is not None else 0.0 if status == Status.INFEASIBLE else math.inf,
        gap=float(plan.result.gap) if plan is not None else math.inf,
        import_s=import_s,
        first=timings[0],
        warm=sorted(timings[1:], key=lambda timing: timing.seconds)[solve.warm // 2] if solve.warm else None,
        check_s=time.process_time() - started,
        violations=tuple(str(violation) for violation in violations),
        peak_mib=first_peak_mib,
        note=note or pools(plan),
    )


def failed(note: str) -> Measured:
    """Return the measurement of a solve that crashed."""
    return Measured(
        status=FAILED,
        value=0.0,
        bound=math.inf,
        gap=math.inf,
        import_s=0.0,
        first=Timing(seconds=math.nan, to_1_percent_s=None, to_half_percent_s=None),
        warm=None,
        check_s=0.0,
        violations=(),
        peak_mib=peak_mib(),
        note=note,
    )


def _timing(seconds: float, reports: Sequence[Progress], plan: Plan | None) -> Timing:
    maximises = plan is None or plan.objective.maximises
    family = _of_the_whole_family(reports, maximises=maximises)
    return Timing(
        seconds=seconds,
        first_plan_s=next((report.elapsed_s for report in reports if report.incumbent is not None), None),
        first_bound_s=next((report.elapsed_s for report in family if report.bound is not None), None),
        to_1_percent_s=time_to_gap(reports, plan, seconds, 0.01),
        to_half_percent_s=time_to_gap(reports, plan, seconds, 0.005),
    )


def time_to_gap(reports: Sequence[Progress], plan: Plan | None, solve_s: float, gap: float) -> float | None:
    """Return the seconds until the search had proved its incumbent within ``gap``, or None if it never did."""
    if plan is None or not plan.result.gap <= gap:
        return None
    for report in _of_the_whole_family(reports, maximises=plan.objective.maximises):
        incumbent, bound = report.incumbent, report.bound
        if incumbent is not None and bound is not None and abs(bound - incumbent) <= gap * incumbent:
            return report.elapsed_s
    return solve_s


def _of_the_whole_family(reports: Sequence[Progress], *, maximises: bool) -> Sequence[Progress]:
    """Return the reports about the whole family.

    Column generation first solves a smaller family, down to whole counts, and its reports until then bound only that
    family. A bound that moves away from the plans also marks such reports, because a proven bound only closes in.
    """
    start = 0
    for i, (before, after) in enumerate(itertools.pairwise(reports), start=1):
        counted = before.phase.startswith(WHOLE_COUNTS) and not after.phase.startswith(WHOLE_COUNTS)
        widened = (
            before.bound is not None
            and after.bound is not None
            and (after.bound > before.bound * (1 + 1e-12) if maximises else after.bound < before.bound * (1 - 1e-12))
        )
        if counted or widened:
            start = i
    return reports[start:]


def pools(plan: Plan | None) -> str:
    """Return the attention workers of a plan, counted by GPU type."""
    if plan is None:
        return ""
    counted: dict[str, int] = {}
    for replica in plan.replicas:
        for pool in replica.attention_workers:
            counted[pool.gpu] = counted.get(pool.gpu, 0) + len(pool.devices)
    return ", ".join(f"{count:,} {gpu}" for gpu, count in counted.items())


def peak_mib() -> float:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)
