"""The progress and the outcomes of a search, and their frames.

All outcomes are answers; only `Crashed` says something about the process that searched.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass

from hetis.planner.jobs.frames import JobFrame
from hetis.solver.budget import Progress

PROGRESS_INTERVAL_S = 0.2  # between two reports of one phase


@dataclass(frozen=True, slots=True)
class FoundPlan:
    """A plan that passed the independent checker, possibly after an interruption, as its status says.

    Attributes:
        document: the plan in canonical JSON; it was read back and compared.
        result: the plan in the view BASIC, a serialised ``hetis.v1.PlanResult``, so that the service need not read the
            document, which would block it for some twenty seconds for a plan of a million GPUs.
    """

    document: bytes
    result: bytes


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A proof that the family holds no plan. One sentence per cause, the most telling first."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NothingFound:
    """Time ran out, or the caller cancelled, before a plan was found."""

    message: str


@dataclass(frozen=True, slots=True)
class Unsound:
    """The solver's plan violates its own problem: a bug. One sentence per violation."""

    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Invalid:
    """The inputs contradict each other in a way that only the search noticed."""

    message: str


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process ended or had to be killed. ``exit_code`` is negative for a signal, as in POSIX."""

    exit_code: int
    message: str


@dataclass(frozen=True, slots=True)
class CalledOff:
    """Nobody searched: the search was cancelled in the queue, or its process did not react and had to be killed."""


Answer = FoundPlan | Infeasible | NothingFound | Unsound | Invalid
Outcome = Answer | Crashed | CalledOff


def answer_to_frame(answer: Answer) -> JobFrame:
    match answer:
        case FoundPlan(document, result):
            return JobFrame(kind="found", fields={"result": base64.b64encode(result).decode()}, payload=document)
        case Infeasible(reasons):
            return JobFrame(kind="infeasible", fields={"reasons": list(reasons)})
        case NothingFound(message):
            return JobFrame(kind="nothing_found", fields={"message": message})
        case Unsound(violations):
            return JobFrame(kind="unsound", fields={"violations": list(violations)})
        case Invalid(message):
            return JobFrame(kind="invalid", fields={"message": message})


def answer_from_frame(frame: JobFrame) -> Answer | None:
    """Return the answer in the frame, or None if the frame is no answer."""
    match frame.kind:
        case "found":
            return FoundPlan(frame.payload, base64.b64decode(frame.fields["result"]))
        case "infeasible":
            return Infeasible(tuple(frame.fields["reasons"]))
        case "nothing_found":
            return NothingFound(frame.fields["message"])
        case "unsound":
            return Unsound(tuple(frame.fields["violations"]))
        case "invalid":
            return Invalid(frame.fields["message"])
        case _:
            return None


class ProgressReporter:
    """Sends every new phase, and at most one report per `PROGRESS_INTERVAL_S` within a phase."""

    def __init__(self, send: Callable[[JobFrame], None]) -> None:
        self._send = send
        self._phase = ""
        self._last_s = -math.inf

    def __call__(self, progress: Progress) -> None:
        if progress.phase == self._phase and progress.elapsed_s < self._last_s + PROGRESS_INTERVAL_S:
            return
        self._phase, self._last_s = progress.phase, progress.elapsed_s
        self._send(progress_to_frame(progress))


def progress_to_frame(progress: Progress) -> JobFrame:
    """Return a frame with the finite numbers; others are unknown and left out."""
    numbers = {"incumbent": progress.incumbent, "bound": progress.bound, "gap": progress.gap}
    known = {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}
    return JobFrame(kind="progress", fields={"phase": progress.phase, "elapsed_s": progress.elapsed_s, **known})


def progress_from_frame(frame: JobFrame) -> Progress:
    return Progress(**frame.fields)
