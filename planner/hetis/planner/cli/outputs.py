"""Outputs of verbs: plans and pages, rejected early if they cannot be written; and the answer to ``--dry-run``.

Files that cannot be written raise DocumentError, options that cannot be met raise BadParameter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from hetis.commands.terminal import Terminal
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.figures import seconds
from hetis.solver.plan import Objective, Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.formats.documents import Value
    from hetis.planner.use_cases.sources import Inputs
    from hetis.solver.engine_rules import EngineRules

STDOUT = Path("-")  # stands for standard output
_MANY_CUT = 0.1  # share of requests that the context cuts, below which only the notes of a plan mention it


def refuse_unwritable(path: Path | None) -> None:
    """Reject, before a long search, a file that could not be written after it; accepts standard output and None."""
    if path is None or path == STDOUT:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise single_problem(str(path), "cannot be written: it is a folder")
    if not folder.is_dir():
        raise single_problem(str(path), f"cannot be written: no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise single_problem(str(path), f"cannot be written: permission denied in {folder}")


def refuse_stdout(name: str, path: Path | None, *, needed: str = "a file") -> None:
    """Reject ``-`` for an option whose output cannot go to standard output, such as ``--requests-csv``."""
    if path == STDOUT:
        raise typer.BadParameter(f"{name} needs {needed}: it cannot write to standard output (-)")


def refuse_overwriting(*paths: Path, force: bool) -> None:
    """Reject files that exist and are meant to be edited, such as a cluster file, unless ``force`` overwrites them."""
    there = [path for path in paths if path.exists() and not force]
    if there:
        raise DocumentError(Problem(file=str(path), message="already exists; --force overwrites it") for path in there)


def refuse_missing_library(name: str, *, extra: str, wanted_by: str) -> None:
    """Raise an error before the work if a library is missing, and name the extra that installs it."""
    if importlib.util.find_spec(name) is None:
        raise typer.BadParameter(f"{name} is not installed, which {wanted_by} needs: pip install 'hetis[{extra}]'")


def refuse_page(path: Path | None, *, beside: Path | None = None) -> None:
    """Reject, before the work, a page that could not be saved or has the path of another output (``beside``)."""
    if path is None:
        return
    if path == STDOUT:
        raise typer.BadParameter("--html needs a file; `hetis-plan report PLAN --out -` prints the page")
    if path == beside:
        raise typer.BadParameter(f"--html and --out cannot both write to {path}")
    refuse_unwritable_page(path)


def refuse_unwritable_page(path: Path) -> None:
    """Reject, before the work, a page that could not be saved, for a verb without other outputs."""
    refuse_unwritable(path)
    refuse_missing_library("jinja2", extra="planner", wanted_by="a page")


def refuse_unwritable_plans(folder: Path | None, names: Iterable[str]) -> None:
    """Reject, before the work, a folder in which `save_plans` could not write plans of these names; accepts None.

    A missing folder is accepted if it can be created.
    """
    if folder is None:
        return
    refuse_stdout("--out", folder, needed="a folder")
    if not folder.exists():
        refuse_unwritable(folder)
        return
    for name in names:
        refuse_unwritable(folder / f"{name}.json")


def write_out(terminal: Terminal, out: str, content: str | bytes, *, said: str = "") -> None:
    """Write to standard output if ``out`` is ``-``, else to this file, of which ``said`` is then told."""
    if out == "-":
        terminal.write(content if isinstance(content, str) else content.decode("ascii"))
        return
    write_atomically(out, content)
    if said:
        terminal.say(said)


def save(terminal: Terminal, value: Value, path: Path) -> None:
    """Write the whole document or nothing, as YAML if the file name has a YAML suffix, else as JSON.

    ``-`` stands for standard output.
    """
    from hetis.formats.documents import dump

    if path == STDOUT:
        terminal.write(dump(value, "json"))
        return
    form: Literal["yaml", "json"] = "yaml" if path.suffix in (".yaml", ".yml") else "json"
    write_atomically(path, dump(value, form))
    terminal.say(f"saved {path}")


def save_plans(terminal: Terminal, folder: Path, plans: Mapping[str, Plan]) -> None:
    """Write every plan to ``NAME.json`` in the folder, which is created if it is missing."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise single_problem(str(folder), f"cannot be created: {error.strerror}") from None
    for name, plan in plans.items():
        save(terminal, plan, folder / f"{name}.json")


def save_page(terminal: Terminal, page: Callable[[], str], path: Path | None) -> None:
    """Write the page to the file, or to standard output if the path is ``-``; without a path there is no page."""
    if path == STDOUT:
        terminal.write(page())
    elif path is not None:
        text = page()
        write_atomically(path, text)
        terminal.say(f"saved {path} ({len(text.encode()) / 1000:,.0f} kB)")


def save_or_tell(
    terminal: Terminal, plan: Plan, path: Path | None, *, html: Path | None, page: Callable[[], str]
) -> bool:
    """Save a plan and its page before printing, so that they are saved even if the reader of stdout goes away.

    If the plan goes to standard output, nothing else may be printed there. Without ``path`` the plan is not saved,
    without ``html`` the page is not. Return False after a failure, which is reported here.
    """
    saved = True
    if path is not None:
        saved = saves(terminal, "plan", lambda: save(terminal, plan, path))
    return saves(terminal, "page", lambda: save_page(terminal, page, html)) and saved


def saves(terminal: Terminal, what: str, write: Callable[[], None]) -> bool:
    """Return whether ``write`` succeeded; a failure is reported, and the verb continues."""
    try:
        write()
    except DocumentError as error:
        terminal.error(f"the {what} was not saved", [str(problem) for problem in error.problems])
        return False
    return True


def warn_of_cut_requests(terminal: Terminal, inputs: Inputs) -> None:
    """Warn if the model's context cuts many of the requests, since figures are then of other traffic than asked for."""
    most = inputs.model.max_position
    if (share := inputs.workload.clipped_to(most).clipped_ratio) >= _MANY_CUT:
        terminal.warn(
            f"{share:.0%} of the requests of {inputs.workload.name} are longer than the context of {inputs.model.name} "
            f"and are cut to its {most:,} tokens"
        )


def say_what_would_be_solved(
    terminal: Terminal,
    problems: Sequence[tuple[Inputs, Objective]],
    *,
    strategies: Sequence[str],
    time_limit_s: float,
    solves: int = 1,
    engine: EngineRules | None = None,
) -> ExitCode:
    """Print what would be solved: ``solves`` searches, one after another, each of at most ``time_limit_s``."""
    from rich.text import Text

    from hetis.planner.report.goals import problem_line
    from hetis.planner.report.tables import grid
    from hetis.planner.use_cases.json_values import fields_of

    def table() -> RenderableType:
        solved_by = f"{', '.join(strategies)}{f' for {engine.name}' if engine else ''}"
        rows = [(Text("ok", style="green"), problem_line(inputs, objective)) for inputs, objective in problems]
        times = "1 search" if solves == 1 else f"{solves:,} searches"
        words = f"{times} by {solved_by}, up to {seconds(time_limit_s)} each"
        return grid(False, True, rows=[*rows, (Text(), f"dry run, nothing was solved: {words}")])

    document = {
        "kind": "DryRun",
        "problems": [
            {
                "model": inputs.model.name,
                "cluster": inputs.cluster.name,
                "gpus": inputs.cluster.num_gpus(),
                "workload": inputs.workload.name,
                "objective": objective.kind.value,
                **fields_of(objective, "ttft_limit_s", "tpot_limit_s", "demand_rps"),
            }
            for inputs, objective in problems
        ],
        "strategies": list(strategies),
        "engine": engine and engine.name,
        "solves": solves,
        "time_limit_s": time_limit_s,
    }
    terminal.emit(lambda: document, table)
    return ExitCode.OK
