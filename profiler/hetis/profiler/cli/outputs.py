"""Checks of output files, made before the work is done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hetis.formats.errors import DocumentError, Problem


def require_outputs(paths: Iterable[Path | None]) -> None:
    """Refuse paths that cannot be written. Paths that are None are skipped.

    Raises:
        DocumentError: with a problem for each.
    """
    problems = [
        Problem(file=str(path), message=f"cannot be written: {reason}")
        for path in paths
        if path is not None and (reason := _reason(path))
    ]
    if problems:
        raise DocumentError(problems)


def _reason(path: Path) -> str:
    if path.is_dir():
        return "is a folder, expected the name of a file"
    if not path.parent.is_dir():
        return f"no folder {path.parent}"
    return ""
