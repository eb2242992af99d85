"""The files of an export: what a target makes of a plan, and how it is written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hetis.formats.errors import single_problem
from hetis.formats.files import write_atomically
from hetis.planner.export.replicas import Launchable


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of a target."""

    files: Mapping[str, str]  # text by path; a path that ends in ``.sh`` is a program
    shown: tuple[str, ...]  # the essential files, for standard output
    endpoints: Mapping[int, str]  # of each replica, by its position in the plan
    start: str  # instructions in Markdown
    carried: Launchable  # the replicas that it can have
    not_carried: tuple[str, ...] = ()  # features of the plan that the target lacks


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write every file atomically, and make scripts executable. Raises DocumentError: one cannot be written."""
    for path, text in files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise single_problem(str(target.parent), f"cannot be made: {error.strerror}") from None
        write_atomically(target, text)
        if path.endswith(".sh"):
            target.chmod(target.stat().st_mode | 0o111)


def folder_refusals(folder: Path, *, force: bool) -> list[str]:
    """Return why files cannot be written to the folder; empty if they can."""
    try:
        if folder.exists() and not folder.is_dir():
            return [f"{folder} is no folder"]
        if not force and folder.is_dir() and any(folder.iterdir()):
            return [f"{folder} is not empty: name another, or force it"]
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    return []
