"""The searches of a solver process, one after another, each from a problem to an answer."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from hetis.formats.documents import Value, from_data, to_data
from hetis.formats.files import canonical_json
from hetis.planner.convert.plans import result_to_proto
from hetis.planner.export.carrying import not_carried
from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.messages import (
    Answer,
    FoundPlan,
    PosedProblem,
    ProgressReporter,
    answer_to_frame,
    posed_from_json,
)
from hetis.planner.use_cases.place import make_plan, simulated_plan
from hetis.planner.use_cases.verification.rates import ITERATIONS
from hetis.solver.backends.search_clock import SearchClock, reporting_compilations
from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError


class Searcher:
    """Solves in the calling thread; `cancel` may be called from another one."""

    def __init__(self, send: Callable[[JobFrame], None]) -> None:
        self._send = send
        self._cancelled = threading.Event()

    def expect(self) -> threading.Event:
        """Prepare for the next search: from now on `cancel` refers to it."""
        self._cancelled = threading.Event()
        return self._cancelled

    def solve(self, posed_json: bytes, cancelled: threading.Event) -> None:
        """Search and send the answer.

        The time limit starts at ``searching``. At ``verifying`` the plan is found, and is simulated: kernels of the
        dispatcher may then be compiled, which stops the clock and is reported as ``compiling``.
        """
        posed = posed_from_json(posed_json)
        report = ProgressReporter(self._send)

        phase, began_s = "searching", 0.0
        found = Progress(phase="", elapsed_s=0.0)

        def begin(new: str) -> None:
            nonlocal phase, began_s
            phase, began_s = new, clock()
            self._send(JobFrame(kind=phase, fields={"spent_s": 0.0}))

        def on_change(compiles: bool) -> None:
            if compiles:
                self._send(JobFrame(kind="compiling", fields={}))
            else:
                self._send(JobFrame(kind=phase, fields={"spent_s": clock() - began_s}))

        def report_all(progress: Progress) -> None:
            nonlocal found
            if phase == "searching":
                found = progress
            else:  # a simulation has no bound
                progress = replace(progress, incumbent=found.incumbent, bound=found.bound, gap=found.gap)
            report(replace(progress, elapsed_s=clock() - started_s))  # each of several searches counts from zero

        clock = SearchClock(on_change=on_change)
        started_s = clock()
        with reporting_compilations(clock.note):
            answer = solve(posed, cancelled=cancelled, report=report_all, clock=clock, begin=begin)
        self._send(answer_to_frame(answer))

    def cancel(self) -> None:
        """Make the search return its incumbent, if there is one."""
        self._cancelled.set()


def solve(
    posed: PosedProblem,
    *,
    cancelled: threading.Event,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
    begin: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Search until the answer is good enough, the time is up, or ``cancelled`` is set, and check the plan found.

    Then simulate the plan if requested. ``begin`` is called with ``searching`` before each search and with
    ``verifying`` before the simulation, whose work is limited, not its time.
    """
    settings = posed.settings

    def budget() -> Budget:
        return Budget(time_limit_s=settings.time_limit_s, clock=clock, cancelled=cancelled)

    try:
        loaded, problem = posed.inputs_for_engine(), posed.problem()
        made = make_plan(
            loaded, problem, settings, budget=budget(), report=report, requested=posed.objective,
            on_search=lambda: begin("searching"), carriers=not_carried,
        )  # fmt: skip
    except (InfeasibleError, NoPlanFoundError, UncheckedPlanError, InvalidProblemError) as error:
        return error
    if posed.verify:
        begin("verifying")
        try:
            made = simulated_plan(
                made, loaded, settings, level=posed.service_level, report=report, losses=False,
                budget=replace(budget(), time_limit_s=math.inf, work_limit=ITERATIONS),
            )  # fmt: skip
        except (InvalidProblemError, UncheckedPlanError) as error:  # the plan that was found is checked nevertheless
            made = replace(made, plan=replace(made.plan, notes=(*made.plan.notes, f"could not be simulated: {error}")))
    plan = made.plan
    document = document_bytes(plan)
    if document_bytes(from_data(json.loads(document))) != document:
        return UncheckedPlanError(("its document describes a different plan",))
    return FoundPlan(document, result_to_proto(plan, document).SerializeToString())


def document_bytes(plan: Value) -> bytes:
    """Return the bytes over which a plan's digest is computed."""
    return canonical_json(to_data(plan, self_contained=True))
