"""A posed problem: everything a search needs, as one JSON document that refers to no catalogue and no file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hetis.formats.canonical import canonical_json
from hetis.planner.use_cases.place import Settings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.sources import (
    ENGINE_SETTINGS,
    LoadedInputs,
    engine_settings_data,
    engine_settings_from_data,
    inputs_from_documents,
)
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.problem import EngineRules, PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedProblem:
    """A problem to solve and how long the search may take."""

    loaded: LoadedInputs
    objective: Objective
    settings: Settings

    def inputs_for_engine(self) -> LoadedInputs:
        """Return the inputs restricted to the GPUs on which the engine runs the model in its precision.

        Raises:
            InvalidProblemError: there are no such GPUs.
        """
        return for_engine(self.loaded, self.settings.engine)

    def problem(self) -> PlacementProblem:
        """Return the placement problem.

        Raises:
            InvalidProblemError: the inputs contradict each other.
        """
        settings, inputs = self.settings, self.inputs_for_engine().inputs
        return inputs.problem(self.objective, settings.strategy, settings.roles, settings.engine)

    def to_json(self) -> bytes:
        """Return the problem as JSON for `posed_from_json`; equal problems give equal bytes."""
        data = {
            "documents": self.loaded.inputs.documents(),
            "origins": dict(self.loaded.origins),
            "objective": asdict(self.objective),
            "settings": asdict(self.settings),
        }
        if at := self.loaded.inputs.engine_settings:
            data[ENGINE_SETTINGS] = engine_settings_data(at)
        return canonical_json(data)


def posed_from_json(text: bytes) -> PosedProblem:
    """Return the problem that `PosedProblem.to_json` wrote.

    Raises:
        DocumentError: it contains a document in a form that this version does not know.
    """
    data: dict[str, Any] = json.loads(text)
    objective: dict[str, Any] = data["objective"]
    settings: dict[str, Any] = data["settings"]
    return PosedProblem(
        loaded=LoadedInputs(
            inputs=inputs_from_documents(data["documents"], "the posed problem"),
            origins=data["origins"],
        ).at(engine_settings_from_data(data.get(ENGINE_SETTINGS, {}))),
        objective=Objective(**(objective | {"kind": ObjectiveKind(objective["kind"])})),
        settings=Settings(
            **(settings | {"roles": tuple(map(Role, settings.get("roles", ()))), "engine": _engine(settings)})
        ),
    )


def _engine(settings: dict[str, Any]) -> EngineRules | None:
    engine = settings.get("engine")
    return None if engine is None else EngineRules(**engine)
