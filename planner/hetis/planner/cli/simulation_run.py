"""One simulation from the command line: run with progress and Ctrl-C, save, print, decide the exit code."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.errors import DocumentError
from hetis.formats.files import write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.html_pages import save_page
from hetis.planner.cli.native_output import no_native_output
from hetis.planner.cli.searching import run_interruptibly
from hetis.planner.cli.simulation_progress import requests_on_stderr
from hetis.planner.report.simulation import render_simulation, simulation_document
from hetis.planner.use_cases.simulate import NothingSimulatedError, Question, Simulated, answer
from hetis.simulator.records import perfetto_json, requests_csv
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRun:
    """A requested simulation, inputs read; ``processes`` 0: one per core."""

    terminal: Terminal
    plan: Plan
    problem: PlacementProblem
    question: Question
    processes: int
    perfetto: Path | None
    requests_csv: Path | None
    plot: Path | None
    html: Path | None

    def finish(self) -> ExitCode:
        """Simulate, and report the outcome, whatever it is."""
        cancelled = threading.Event()
        try:
            simulated = self._simulate(cancelled)
        except NothingSimulatedError:
            self.terminal.error("stopped before anything was simulated")
            return ExitCode.INTERRUPTED
        saved = self._save(simulated)
        self.terminal.emit(
            lambda: simulation_document(simulated, self.plan), lambda: render_simulation(simulated, self.plan)
        )
        if not saved:
            return ExitCode.INTERNAL
        return ExitCode.OK if simulated.complete else ExitCode.INTERRUPTED

    def _simulate(self, cancelled: threading.Event) -> Simulated:
        with no_native_output(), requests_on_stderr(self.terminal) as report:
            return run_interruptibly(
                lambda: answer(
                    self.plan,
                    self.problem,
                    self.question,
                    processes=self.processes,
                    cancelled=cancelled,
                    report=report,
                    begins=report.begins,
                ),
                cancelled=cancelled,
                on_cancel=lambda: self.terminal.say("stopping with what was simulated; Ctrl-C again leaves at once"),
            )

    def _save(self, simulated: Simulated) -> bool:
        """Save before printing, so that a stdout reader that goes away does not cost the files."""
        run = simulated.run
        try:
            if self.perfetto is not None and run is not None:
                self._write(self.perfetto, perfetto_json(run))
            if self.requests_csv is not None and run is not None:
                self._write(self.requests_csv, requests_csv(run))
            if self.plot is not None:
                from hetis.planner.report.simulation_pictures import picture

                self._write(self.plot, picture(simulated, self.plan, form=self.plot.suffix))
            if self.html is not None:
                from hetis.planner.report.page.pages import simulation_page

                save_page(self.terminal, simulation_page(simulated, self.plan, self.problem), self.html)
        except DocumentError as error:
            self.terminal.error("not all was saved", [str(problem) for problem in error.problems])
            return False
        return True

    def _write(self, path: Path, content: str | bytes) -> None:
        write_atomically(path, content)
        self.terminal.say(f"saved {path}")
