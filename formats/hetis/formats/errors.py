"""What can be wrong with a document, all of it at once.

HetisError (hetis.solver.errors)
+-- DocumentError     a file or name that hetis was given is not usable; holds every `Problem` found
    +-- NotYamlError  (hetis.formats.positions) its syntax is broken
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from hetis.solver.errors import HetisError

MAX_SHOWN = 100  # problems printed of one document; the rest is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: the file as the caller named it, or what the text is (``stdin``, ``model``).
        message: names the value and the limit, and suggests the nearest valid name.
        path: where in the document, such as ``nodes[1].gpus[0].type``; empty for the document as a whole.
        line, column: from 1; None where there is no text (a missing file, an unknown catalogue name).
    """

    file: str
    message: str
    path: str = ""
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class DocumentError(HetisError):
    """A document cannot be used.

    Attributes:
        problems: every problem found, in the order of the file.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"... and {len(self.problems) - MAX_SHOWN} more problems")
        super().__init__("\n".join(lines))


def single_problem(file: str, message: str, *, line: int | None = None, column: int | None = None) -> DocumentError:
    """The error of a document with one problem that has no path."""
    return DocumentError([Problem(file=file, message=message, line=line, column=column)])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, ignoring case; None when nothing is close."""
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(name.lower()[:200], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` or nothing."""
    found = nearest(name, known)
    return f", did you mean {found}?" if found else ""


def shown(value: object) -> str:
    """A value in a message: as YAML has it, and short."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        return "a mapping"
    elif isinstance(value, list):
        return "a list"
    else:
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
