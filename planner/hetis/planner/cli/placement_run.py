"""One placement from the command line: solve with progress and Ctrl-C, save, print, decide the exit code."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.documents import to_data
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_failure, say_failure
from hetis.planner.cli.html_pages import save_page_or_tell
from hetis.planner.cli.plan_files import STDOUT, save_or_tell
from hetis.planner.cli.searching import search_interruptibly
from hetis.planner.jobs.kernels import compile_kernels
from hetis.planner.use_cases.place import PlacedPlan, PlacementRequest, missed, place
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Report
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Plan, Status
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRun:
    """A requested placement, with its inputs read and its problem posed; ``out``: where to save its plan."""

    terminal: Terminal
    request: PlacementRequest
    loaded: LoadedInputs
    problem: PlacementProblem
    out: Path | None
    html: Path | None
    strict: bool

    def finish(self) -> ExitCode:
        """Solve, and report the outcome, whatever it is."""
        cancelled = threading.Event()
        try:
            answer = search_interruptibly(
                self.terminal,
                lambda report: self._place(cancelled, report),
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

    def _place(self, cancelled: threading.Event, report: Report) -> PlacedPlan:
        settings = self.request.settings
        compile_kernels(
            self.problem.cluster.num_gpus(), (settings.strategy,), for_engine=settings.engine is not None, report=report
        )  # fmt: skip
        return place(self.request, self.loaded, self.problem, cancelled=cancelled, report=report)

    def _save_page(self, plan: Plan) -> bool:
        if self.html is None:
            return True
        from hetis.planner.report.page.pages import ShownPlan, plans_page

        page = plans_page([ShownPlan(name="The plan", plan=plan, problem=self.problem)])
        return save_page_or_tell(self.terminal, page, self.html)

    def _print(self, answer: PlacedPlan) -> None:
        from rich.console import Group, RenderableType

        from hetis.planner.report.plan import render_constraint_prices, render_plan
        from hetis.planner.report.robustness import render_robustness

        def tables() -> RenderableType:
            parts = [render_plan(answer.plan, wide=self.terminal.output is OutputFormat.WIDE)]
            if answer.prices:
                parts.append(render_constraint_prices(answer.prices, answer.plan.result.unit))
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
            "strategy": self.request.settings.strategy,
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
        short = missed(plan, self.request.settings)
        for sentence in short:
            self.terminal.error(sentence)
        return ExitCode.MISSED if short else ExitCode.OK
