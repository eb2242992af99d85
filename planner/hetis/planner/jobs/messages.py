"""Messages between the service and a solver process: problems to solve, progress, and outcomes of searches."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hetis.formats.files import canonical_json
from hetis.planner.jobs.frames import JobFrame
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.record.forms import (
    engine_from_data,
    engine_settings_data,
    engine_settings_from_data,
    service_level_from_data,
)
from hetis.planner.use_cases.saved_plans import inputs_from_documents
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Progress
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.problem import PlacementProblem

PROGRESS_INTERVAL_S = 0.2  # between two reports within one phase


@dataclass(frozen=True, slots=True)
class FoundPlan:
    """A plan that passed the independent checker, possibly after an interruption, as its status says."""

    document: bytes  # the plan in canonical JSON, which was read back and compared
    # The plan in the view BASIC, a serialised ``hetis.v1.PlanResult``, so that the service need not read the document:
    # a plan of a million GPUs would block it for some twenty seconds
    result: bytes


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process ended or had to be killed. ``exit_code`` is negative for a signal, as in POSIX."""

    exit_code: int
    message: str


@dataclass(frozen=True, slots=True)
class CalledOff:
    """There was no search: it was cancelled in the queue, or its process did not react and had to be killed."""


# The answer of a process is a plan, or the error that ended the search; others are outcomes of the process itself.
SearchError = InfeasibleError | NoPlanFoundError | UncheckedPlanError | InvalidProblemError
Answer = FoundPlan | SearchError
Outcome = Answer | Crashed | CalledOff


_KINDS: Mapping[str, Callable[..., SearchError]] = {
    "infeasible": InfeasibleError,
    "nothing_found": NoPlanFoundError,
    "unsound": UncheckedPlanError,
    "invalid": InvalidProblemError,
}


def answer_to_frame(answer: Answer) -> JobFrame:
    match answer:
        case FoundPlan(document, result):
            return JobFrame(kind="found", fields={"result": base64.b64encode(result).decode()}, payload=document)
        case InfeasibleError(reasons=reasons):
            return JobFrame(kind="infeasible", fields={"reasons": reasons})
        case UncheckedPlanError(violations=violations):
            return JobFrame(kind="unsound", fields={"violations": violations})
    kind = "nothing_found" if isinstance(answer, NoPlanFoundError) else "invalid"
    return JobFrame(kind=kind, fields={"message": str(answer)})


def answer_from_frame(frame: JobFrame) -> Answer | None:
    """Return the answer in the frame, or None if the frame is not an answer."""
    if frame.kind == "found":
        return FoundPlan(frame.payload, base64.b64decode(frame.fields["result"]))
    if frame.kind not in _KINDS:
        return None
    return _KINDS[frame.kind](*(tuple(v) if isinstance(v, list) else v for v in frame.fields.values()))


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
    """Return a frame with the numbers that are finite; the others are unknown and omitted."""
    numbers = {"incumbent": progress.incumbent, "bound": progress.bound, "gap": progress.gap}
    known = {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}
    return JobFrame(kind="progress", fields={"phase": progress.phase, "elapsed_s": progress.elapsed_s, **known})


def progress_from_frame(frame: JobFrame) -> Progress:
    return Progress(**frame.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedProblem:
    """A problem to solve, the limits of the search, and the level that its plan must keep in simulated traffic."""

    loaded: LoadedInputs
    objective: Objective
    settings: PlacementSettings
    verify: bool = True  # whether to simulate the plan
    service_level: ServiceLevel = DEFAULT

    def inputs_for_engine(self) -> LoadedInputs:
        """Return the inputs on GPUs that run the model in its precision. Raises InvalidProblemError if none does."""
        return for_engine(self.loaded, self.settings.engine)

    def problem(self) -> PlacementProblem:
        """Return the placement problem. Raises InvalidProblemError if the inputs contradict each other."""
        return self.settings.problem(self.inputs_for_engine().inputs, self.objective)

    def to_json(self) -> bytes:
        """Return the problem as JSON for `posed_from_json`; equal problems give equal bytes."""
        data = {
            "documents": self.loaded.inputs.documents(),
            "origins": dict(self.loaded.origins),
            "objective": asdict(self.objective),
            "settings": asdict(self.settings),
            "verify": self.verify,
            "service_level": asdict(self.service_level),
        }
        if at := self.loaded.inputs.engine_settings:
            data["engine_settings"] = engine_settings_data(at)
        return canonical_json(data)


def posed_from_json(text: bytes) -> PosedProblem:
    """Return the problem written by `PosedProblem.to_json`.

    Raises DocumentError if it contains a document in a form that this version does not support.
    """
    data: dict[str, Any] = json.loads(text)
    objective: dict[str, Any] = data["objective"]
    settings: dict[str, Any] = data["settings"]
    engine, roles = settings.get("engine"), tuple(map(Role, settings.get("roles", ())))
    return PosedProblem(
        loaded=LoadedInputs(
            inputs=inputs_from_documents(data["documents"], "the posed problem"), origins=data["origins"]
        ).at(engine_settings_from_data(data.get("engine_settings", {}))),
        objective=Objective(**(objective | {"kind": ObjectiveKind(objective["kind"])})),
        settings=PlacementSettings(**(settings | {"roles": roles, "engine": engine and engine_from_data(engine)})),
        verify=data.get("verify", True),
        service_level=service_level_from_data(data["service_level"]) if "service_level" in data else DEFAULT,
    )
