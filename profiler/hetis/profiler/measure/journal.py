"""Measurements on disk next to the output, so that an interrupted run loses at most the point in flight."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import MAX_BYTES, decoded, read_bytes, write_atomically
from hetis.profiler.measure.points import Measured

_VERSION = 1
_POINT = TypeAdapter(Measured)


def journal_of(out: str | os.PathLike[str]) -> Path:
    """Return the path of the journal of a run that writes ``out``."""
    return Path(f"{os.fspath(out)}.journal")


def points_in(path: Path) -> int | None:
    """Return the number of points in a journal, or None if the file is not a journal. Raises DocumentError if it cannot
    be read.
    """
    raw = read_bytes(path, most=MAX_BYTES)
    try:
        _header(raw.split(b"\n")[0].decode("utf-8", errors="replace"), path)
    except DocumentError:
        return None
    return max(0, raw.count(b"\n") - 1)


def read_journal(path: Path, settings: Mapping[str, str]) -> list[Measured]:
    """Return the points of an interrupted run, without one that was still being written. Raises DocumentError if the
    file is not a journal, or belongs to a run with other settings.
    """
    lines = decoded(read_bytes(path, most=MAX_BYTES), str(path)).split("\n")
    header = _header(lines[0], path)
    differing = [
        Problem(file=str(path), path=name, message=f"is {header.get(name)!r} in the interrupted run, now {value!r}")
        for name, value in settings.items()
        if header.get(name) != value
    ]
    if differing:
        raise DocumentError(differing)
    found = []
    for number, line in enumerate(lines[1:], start=2):
        if line and number < len(lines):  # the last part has no line end: it was cut off, or is empty
            found.append(_measured(line, path, number))
    return found


@contextmanager
def journal_in(path: Path, settings: Mapping[str, str], known: list[Measured]) -> Iterator[Callable[[Measured], None]]:
    """Yield a function that appends a point: the system has it when it returns. First the file is rewritten with the
    ``known`` points, which drops a cut-off line. Raises DocumentError if it cannot be written.
    """
    lines = [_line({"hetis_journal": _VERSION, "settings": dict(settings)}), *map(_line_of, known)]
    write_atomically(path, "".join(lines))  # known points survive whenever this process dies
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a", encoding="utf-8", newline="\n"))
        except OSError as error:
            raise single_problem(str(path), f"cannot be written: {error.strerror or error}") from None

        def add(found: Measured) -> None:
            file.write(_line_of(found))
            file.flush()

        yield add


def _line_of(found: Measured) -> str:
    return _line({"point": asdict(found.point), "sample": asdict(found.sample)})


def _line(data: dict[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def _header(line: str, path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(line)
        if data["hetis_journal"] == _VERSION and isinstance(data["settings"], dict):
            settings: Mapping[str, Any] = data["settings"]
            return settings
    except (ValueError, KeyError, TypeError):
        pass
    raise single_problem(str(path), "is not the journal of an interrupted `hetis-profile run`", line=1)


def _measured(line: str, path: Path, number: int) -> Measured:
    try:
        return _POINT.validate_json(line, strict=True)
    except ValueError:  # a file may hold anything
        raise single_problem(str(path), "is damaged: not a measured point", line=number) from None
