"""One placement from the command line: solve with progress and Ctrl-C, save, print, decide the exit code."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.documents import to_data
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_failure, say_failure
from hetis.planner.cli.html_pages import save_page_or_tell
from hetis.planner.cli.plan_files import STDOUT, save_or_tell
from hetis.planner.cli.searching import search_interruptibly
from hetis.planner.jobs.kernels import compile_kernels
from hetis.planner.use_cases.market import catalogue_market
from hetis.planner.use_cases.place import Settings, make_plan, missed
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Plan, Status
from hetis.solver.problem import PlacementProblem

if TYPE_CHECKING:
    from hetis.planner.use_cases.robustness.study import Robustness
    from hetis.solver.wish_prices import WishPrice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A plan and what was found out about it."""

    plan: Plan
    robustness: Robustness | None = None
    prices: tuple[WishPrice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRun:
    """What ``place`` was asked for, inputs read.

    ``profile_error`` asks how the plan fares under profiles that are off by up to this share; None: nobody asks.
    ``price_pins`` asks what every wish costs. ``verify`` simulates the plan before it is shown.
    """

    terminal: Terminal
    loaded: LoadedInputs
    problem: PlacementProblem
    settings: Settings
    profile_error: float | None
    price_pins: bool
    out: Path | None
    html: Path | None
    strict: bool
    verify: bool

    def finish(self) -> ExitCode:
        """Solves and tells the outcome, whatever it is."""
        cancelled = threading.Event()
        try:
            answer = search_interruptibly(
                self.terminal,
                lambda report: self._plan_and_study(cancelled, report),
                unit=self.problem.objective.unit,
                cancelled=cancelled,
                so_far="the best plan",
            )
        except InfeasibleError as error:
            self._print_infeasible(error)
            return say_failure(error, self.terminal)
        except NoPlanFoundError as error:
            return ExitCode.INTERRUPTED if cancelled.is_set() else report_failure(error, self.terminal)
        plan = answer.plan
        saved = self.out is None or save_or_tell(self.terminal, plan, self.out)
        saved = self._save_page(plan) and saved
        if self.out != STDOUT:
            self._print(answer)
        if not saved:
            return ExitCode.INTERNAL
        if cancelled.is_set():
            return ExitCode.INTERRUPTED
        return self._judge(plan)

    def _plan_and_study(self, cancelled: threading.Event, report: Report) -> _Answer:
        compile_kernels(
            self.problem.cluster.num_gpus(), (self.settings.strategy,),
            for_engine=self.settings.engine is not None, report=report,
        )  # fmt: skip
        plan = make_plan(
            self.loaded,
            self.problem,
            self.settings,
            budget=self._budget(cancelled),
            report=report,
            market=catalogue_market,
            beside_equal_stages=True,
        )
        if self.verify:
            plan = self._verified(plan, cancelled, report)
        prices = self._wish_prices(plan, cancelled, report)
        if prices:
            from hetis.planner.report.wishes import WILL_PRICES, price_rows

            plan = replace(plan, inputs={**plan.inputs, WILL_PRICES: price_rows(prices)})
        if self.profile_error is None or not plan.replicas:
            return _Answer(plan=plan, prices=prices)
        from hetis.planner.use_cases.robustness.notes import with_robustness
        from hetis.planner.use_cases.robustness.study import study

        found = study(
            plan,
            self.problem,
            error=self.profile_error,
            seed=self.settings.seed,
            budget=self._budget(cancelled),
            threads=self.settings.threads,
            report=report,
        )
        return _Answer(plan=with_robustness(plan, found), robustness=found, prices=prices)

    def _verified(self, plan: Plan, cancelled: threading.Event, report: Report) -> Plan:
        from hetis.planner.use_cases.verify import verified

        def requests(given: int, total: int) -> None:
            if given * 4 // total == told[0]:
                return
            told[0] = given * 4 // total
            phase = f"simulating the plan, {given:,} of {total:,} requests"
            report(Progress(phase=phase, elapsed_s=time.monotonic() - started_s, incumbent=plan.result.value))

        started_s, told = time.monotonic() - plan.result.solve_s, [-1]  # quarters of the requests
        return verified(plan, self.problem, seed=self.settings.seed, cancelled=cancelled, report=requests)

    def _wish_prices(self, plan: Plan, cancelled: threading.Event, report: Report) -> tuple[WishPrice, ...]:
        """What every wish costs, in a time limit of its own; nothing where nobody asks."""
        if not self.price_pins or not self.problem.will:
            return ()
        from hetis.solver.wish_prices import price_wishes

        return price_wishes(
            self.problem,
            plan,
            budget=self._budget(cancelled),
            gap_target=self.settings.gap_target,
            seed=self.settings.seed,
            threads=self.settings.threads,
            report=report,
        )

    def _budget(self, cancelled: threading.Event) -> Budget:
        """The time limit is that of the search; a study may take as long again, and so may prices of wishes."""
        return Budget(time_limit_s=self.settings.time_limit_s, clock=time.monotonic, cancelled=cancelled)

    def _save_page(self, plan: Plan) -> bool:
        if self.html is None:
            return True
        from hetis.planner.report.page.pages import ShownPlan, plans_page

        page = plans_page([ShownPlan(name="The plan", plan=plan, problem=self.problem)])
        return save_page_or_tell(self.terminal, page, self.html)

    def _print(self, answer: _Answer) -> None:
        from rich.console import Group, RenderableType

        from hetis.planner.report.plan import render_plan
        from hetis.planner.report.robustness import render_robustness
        from hetis.planner.report.wishes import render_wish_prices

        def tables() -> RenderableType:
            parts = [render_plan(answer.plan, wide=self.terminal.output is OutputFormat.WIDE)]
            if answer.prices:
                parts.append(render_wish_prices(answer.prices, answer.plan.result.unit))
            if answer.robustness is not None:
                parts.append(render_robustness(answer.robustness, answer.plan.objective))
            return Group(*parts)

        self.terminal.emit(lambda: to_data(answer.plan), tables)

    def _print_infeasible(self, error: InfeasibleError) -> None:
        if not self.terminal.prints_tables:
            self.terminal.emit(lambda: self._infeasible_document(error), lambda: "")

    def _infeasible_document(self, error: InfeasibleError) -> dict[str, Any]:
        from hetis.planner.report.infeasible import infeasible_parts

        objective = self.problem.objective
        return {
            "apiVersion": "hetis/v1",
            "kind": "Plan",
            "strategy": self.settings.strategy,
            "result": {
                "status": Status.INFEASIBLE.value,
                "objective": objective.kind.value,
                "value": None,
                "bound": None,
                "gap": None,
                "unit": objective.unit,
            },
            **infeasible_parts(error),
            "replicas": [],
        }

    def _judge(self, plan: Plan) -> ExitCode:
        if not self.strict:
            return ExitCode.OK
        short = missed(plan, self.settings)
        for sentence in short:
            self.terminal.error(sentence)
        return ExitCode.MISSED if short else ExitCode.OK
