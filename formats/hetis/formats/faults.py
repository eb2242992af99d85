"""Fault files: CSV with the columns ``at_s,device,event``, where an event is ``fail`` or ``join``."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass

from hetis.formats.errors import DocumentError, Problem, did_you_mean, single_problem
from hetis.formats.files import file_label, read_text

COLUMNS = ("at_s", "device", "event")
EVENTS = ("fail", "join")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """A device (``node/index``) fails or joins at ``at_s``, seconds from the start of a run."""

    at_s: float
    device: str
    joins: bool


def load_faults(path: str | os.PathLike[str]) -> tuple[DeviceEvent, ...]:
    """Return the events of a file (``-``: standard input), ordered by time. Devices are not looked up here.

    Raises:
        DocumentError: with every problem of the file.
    """
    label = file_label(path)
    reader = csv.reader(io.StringIO(read_text(path)))
    header = [column.strip() for column in next(reader, [])]
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        message = f"column {', '.join(missing)} is missing, the header must have {','.join(COLUMNS)}"
        raise single_problem(label, message, line=1)
    places = [header.index(column) for column in COLUMNS]
    events: list[DeviceEvent] = []
    problems: list[Problem] = []
    try:
        for row in reader:
            if row:
                found = _event([row[place].strip() if place < len(row) else "" for place in places])
                if isinstance(found, DeviceEvent):
                    events.append(found)
                else:
                    problems += [Problem(file=label, line=reader.line_num, path=at, message=text) for at, text in found]
    except csv.Error as error:
        problems.append(Problem(file=label, line=reader.line_num, message=f"is not CSV: {error}"))
    if problems:
        raise DocumentError(problems)
    return tuple(sorted(events, key=lambda event: event.at_s))


def _event(row: list[str]) -> DeviceEvent | list[tuple[str, str]]:
    """Return the event of a row, or its problems as (column, message)."""
    at, device, event = row
    wrong: list[tuple[str, str]] = []
    at_s = math.nan
    try:
        at_s = float(at)
        if not 0 <= at_s < math.inf:
            wrong.append((COLUMNS[0], f"is {at}, must be finite and >= 0"))
    except ValueError:
        wrong.append((COLUMNS[0], f"{at[:80]!r} is not a number of seconds"))
    if not device:
        wrong.append((COLUMNS[1], "is empty, expected node/index"))
    if event not in EVENTS:
        wrong.append((COLUMNS[2], f"{event[:80]!r} is not one of {', '.join(EVENTS)}{did_you_mean(event, EVENTS)}"))
    return wrong or DeviceEvent(at_s=at_s, device=device, joins=event == "join")
