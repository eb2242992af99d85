"""Files saved by verbs: refused early if they cannot be written, written whole."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.documents import Value, dump
from hetis.formats.errors import DocumentError, single_problem
from hetis.formats.files import write_atomically
from hetis.solver.plan import Plan

STDOUT = Path("-")  # stands for standard output


def refuse_unwritable(path: Path) -> None:
    """Refuse before a long search a file that could not be written after it; standard output passes.

    Raises:
        DocumentError: the folder is missing or may not be written, or the path is a folder.
    """
    if path == STDOUT:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise single_problem(str(path), "cannot be written: is a folder")
    if not folder.is_dir():
        raise single_problem(str(path), f"cannot be written: no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise single_problem(str(path), f"cannot be written: permission denied in {folder}")


def refuse_missing_library(name: str, *, extra: str, wanted_by: str) -> None:
    """Refuse before the work if a library is missing, and name the extra that installs it.

    Raises:
        BadParameter: the library is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise typer.BadParameter(f"{name} is not installed, which {wanted_by} needs: pip install 'hetis[{extra}]'")


def refuse_unwritable_plans(folder: Path, names: Iterable[str]) -> None:
    """Refuse the same for plans that `save_plans` will write."""
    for name in names:
        refuse_unwritable(_plan_file(folder, name))


def save(value: Value, path: Path) -> None:
    """Write the whole document or nothing; YAML if the name's suffix is that of YAML.

    Raises:
        DocumentError: the file cannot be written.
    """
    form: Literal["yaml", "json"] = "yaml" if path.suffix in (".yaml", ".yml") else "json"
    write_atomically(path, dump(value, form))


def save_or_tell(terminal: Terminal, plan: Plan, path: Path) -> bool:
    """Save before printing, so that a stdout reader that goes away does not cost the plan.

    On standard output nothing else may be printed.

    Returns:
        False after a failure, which was reported.
    """
    if path == STDOUT:
        terminal.write(dump(plan, "json"))
        return True
    try:
        save(plan, path)
    except DocumentError as error:
        terminal.error("the plan was not saved", [str(problem) for problem in error.problems])
        return False
    terminal.say(f"saved {path}")
    return True


def save_plans(terminal: Terminal, folder: Path, plans: Mapping[str, Plan]) -> None:
    """Write plans by name, as ``NAME.json``.

    Raises:
        DocumentError: a file cannot be written.
    """
    for name, plan in plans.items():
        path = _plan_file(folder, name)
        save(plan, path)
        terminal.say(f"saved {path}")


def _plan_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
