"""Verbs about this installation: ``doctor``, ``completion``, ``version``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters.options import verb

if TYPE_CHECKING:
    from rich.console import RenderableType


MIN_PYTHON = (3, 11)
MIN_MEMORY_BYTES = 2 * 2**30
_PROBE_TIMEOUT_S = 60

_SOLVE_WITH_HIGHS = """
import highspy
highs = highspy.Highs()
highs.setOptionValue("output_flag", False)
x = highs.addVariable(lb=0, ub=3)
highs.maximize(x)
assert abs(highs.getObjectiveValue() - 3) < 1e-9
"""


class CheckVerdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@verb()
def doctor(terminal: Terminal) -> ExitCode:
    """Check this installation: Python, libraries, the solver, the compiler's cache, the machine."""
    findings = examine()

    def table() -> RenderableType:
        from rich.text import Text

        from hetis.planner.report.tables import grid

        styles = {CheckVerdict.OK: "green", CheckVerdict.WARNING: "yellow", CheckVerdict.FAILED: "bold red"}
        rows = ((Text(f.verdict, style=styles[f.verdict]), f.subject, Text(f.detail)) for f in findings)
        return grid(True, True, True, rows=rows)

    terminal.emit(
        lambda: [{"subject": f.subject, "verdict": f.verdict.value, "detail": f.detail} for f in findings], table
    )
    return ExitCode.INTERNAL if any(f.verdict is CheckVerdict.FAILED for f in findings) else ExitCode.OK


@verb(prints_data=False)
def completion(
    terminal: Terminal,
    shell: Annotated[
        Literal["bash", "zsh", "fish"],
        typer.Argument(metavar="SHELL", help="Shell to write the script for: bash, zsh or fish."),
    ],
) -> ExitCode:
    """Print a completion script: `source <(hetis-plan completion bash)`; fish: `hetis-plan completion fish | source`.

    zsh needs `autoload -Uz compinit && compinit` before `source <(hetis-plan completion zsh)`.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # imported there, not exported

    sys.stdout.write(
        get_completion_script(prog_name="hetis-plan", complete_var="_HETIS_PLAN_COMPLETE", shell=shell) + "\n"
    )
    return ExitCode.OK


@verb()
def version(terminal: Terminal) -> ExitCode:
    """Print the versions of hetis and of the libraries that affect plans."""
    from hetis.planner.use_cases.record.versions import installed_versions

    versions = installed_versions()
    terminal.emit(lambda: versions, lambda: "\n".join(f"{name} {number}" for name, number in versions.items()))
    return ExitCode.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    subject: str
    verdict: CheckVerdict
    detail: str


def examine() -> tuple[Finding, ...]:
    """Examine everything. Takes a second, because the solver is loaded in a process of its own."""
    return (_python(), *_libraries(), *_solver(), _compiled_code_cache(), _cores(), _memory())


def _finding(subject: str, ok: bool, detail: str, *, otherwise: CheckVerdict = CheckVerdict.FAILED) -> Finding:
    return Finding(subject=subject, verdict=CheckVerdict.OK if ok else otherwise, detail=detail)


def _python() -> Finding:
    needed = ".".join(map(str, MIN_PYTHON))
    return _finding("python", sys.version_info >= MIN_PYTHON, f"{sys.version.split()[0]} (needs {needed} or later)")


def _libraries() -> Iterator[Finding]:
    from hetis.planner.use_cases.record.versions import LIBRARIES, installed_versions

    versions = installed_versions()
    missing = [library for library in LIBRARIES if library not in versions]
    found = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)
    lacking = f"missing {', '.join(missing)}: pip install 'hetis[planner]'"
    yield _finding("libraries", not missing, lacking if missing else found)


def _solver() -> Iterator[Finding]:
    """Yield whether HiGHS solves a program, in a process of its own that may crash."""
    if util.find_spec("highspy") is not None:
        error = _failure_of(_SOLVE_WITH_HIGHS)
        yield _finding("solver", error is None, error or "HiGHS solves a program")


def _failure_of(program: str) -> str | None:
    """Return the last line of a Python program's error output, or None after success."""
    import subprocess

    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]


def _compiled_code_cache() -> Finding:
    """Return where Numba keeps compiled code.

    It is NUMBA_CACHE_DIR or a folder beside the source, or if that is not writable the user's cache folder.
    """
    folder = Path(os.environ["NUMBA_CACHE_DIR"]) if os.environ.get("NUMBA_CACHE_DIR") else _solver_folder()
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # "~" if there is no home
    for candidate in (folder, fallback):
        if _is_writable(candidate):
            return _finding("numba cache", True, str(candidate))
    return _finding(
        "numba cache",
        False,
        f"{folder} is not writable, so that every run compiles again; set NUMBA_CACHE_DIR to a writable folder",
        otherwise=CheckVerdict.WARNING,
    )


def _solver_folder() -> Path:
    spec = util.find_spec("hetis.solver")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path.cwd()


def _is_writable(folder: Path) -> bool:
    import tempfile

    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _finding("cores", True, f"{usable} usable")


def _memory() -> Finding:
    available = _available_bytes()
    if available is None:
        return _finding("memory", False, "unknown", otherwise=CheckVerdict.WARNING)
    detail = f"{available / 2**30:.1f} GiB available"
    enough = available >= MIN_MEMORY_BYTES
    return _finding(
        "memory",
        enough,
        detail if enough else f"{detail}; plans for 10,000 GPUs need 2",
        otherwise=CheckVerdict.WARNING,
    )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
