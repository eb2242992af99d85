"""Problems of a document, reported all at once.

HetisError (hetis.solver.errors)
+-- DocumentError    a file or name given to hetis is not usable; holds every `Problem` found
    +-- NotYamlError    (hetis.formats.positions) its syntax is invalid
"""

from __future__ import annotations

import difflib
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from hetis.solver.errors import HetisError

T = TypeVar("T")

REPORT_IT = "This is a bug in hetis. HETIS_DEBUG=1 shows the traceback; please report it with the input files."
MAX_SHOWN = 100  # problems per document that are collected and printed
_MOST_COMPARED = 1000  # names that a wrong one is compared with: 0.1 s
_MOST_NAMED = 3  # names shown if several are equally near
_LEAST_BEGINNING = 3  # letters: too many names begin with fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem of a document."""

    file: str  # the file as the caller named it, or a description of the text (``stdin``, ``model``)
    message: str  # names the value and the limit, and suggests the nearest valid name
    path: str = ""  # place in the document, such as ``nodes[1].gpus[0].type``; empty for the document as a whole
    # line, column: from 1. None: there is no text (a missing file, an unknown catalogue name).
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class DocumentError(HetisError):
    """A document cannot be used. ``has_more``: there are more than these problems, as another such error says."""

    def __init__(self, problems: Iterable[Problem], *, has_more: bool = False) -> None:
        found = tuple(islice(problems, MAX_SHOWN + 1))
        self.problems = found[:MAX_SHOWN]  # the first 100 problems found, in the order of the file
        self.has_more = has_more or len(found) > MAX_SHOWN  # whether there are more, which were not counted
        lines = [str(problem) for problem in self.problems]
        if self.has_more:
            lines.append(f"... and more problems; only the first {MAX_SHOWN} are reported")
        super().__init__("\n".join(lines))

    @property
    def headline(self) -> str:
        """Return how many problems there are: ``more than 100 problems in the input``."""
        count = len(self.problems)
        return f"{'more than ' if self.has_more else ''}{count} problem{'' if count == 1 else 's'} in the input"


def attempt(read: Callable[[], T], problems: list[Problem]) -> T | None:
    """Return the result of ``read``, or None after adding its problems to those of all inputs, ``problems``."""
    try:
        return read()
    except DocumentError as error:
        problems += error.problems
        return None


def single_problem(file: str, message: str, *, line: int | None = None, column: int | None = None) -> DocumentError:
    """Return the error of a document with one problem that has no path."""
    return DocumentError([Problem(file=file, message=message, line=line, column=column)])


def all_nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names most similar to ``name``, ignoring case: several if they share the nearest beginning.

    Names that are similar as a whole come first, then those with a similar beginning: ``H10O`` is near H100-SXM-80GB.
    A letter O is as good as a zero.
    """
    by_lower: dict[str, str] = {}
    for candidate in islice(known, _MOST_COMPARED):
        by_lower.setdefault(_read_alike(candidate), candidate)
    wanted = _read_alike(name[:200])
    found = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.6)
    if found:
        return [by_lower[found[0]]]
    if len(wanted) < _LEAST_BEGINNING:
        return []
    beginnings: dict[str, list[str]] = {}
    for lower, candidate in by_lower.items():
        beginnings.setdefault(lower[: len(wanted)], []).append(candidate)
    found = difflib.get_close_matches(wanted, beginnings, n=1, cutoff=0.7)
    return beginnings[found[0]][:_MOST_NAMED] if found else []


def _read_alike(name: str) -> str:
    return name.lower().replace("o", "0")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean X?``, ``, did you mean X, Y or Z?`` if they are equally near, or an empty string."""
    return did_you_mean_one_of(all_nearest(name, known))


def did_you_mean_one_of(names: Sequence[str]) -> str:
    """Return ``, did you mean X, Y or Z?``, or an empty string if there are no names."""
    if not names:
        return ""
    return f", did you mean {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}?"


def shown(value: object) -> str:
    """Return a value for a message, as YAML writes it, shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def internal_error(error: Exception) -> tuple[str, list[str]]:
    """Return the headline, with the line of code that raised the error, and the lines below it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"internal error: {type(error).__name__}: {error}{where}", [REPORT_IT]
