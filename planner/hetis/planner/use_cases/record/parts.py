"""What a plan records of its making, in parts: what it was made from, what was requested, found, simulated and lost.

Each part is a value that the step which knows it writes once (`Part.on`), and that reports and later steps read
(`Part.of`). Plan files and stores have them in `Plan.inputs`, one entry for each field; this module alone knows their
names and forms. Entries of other versions stay there unread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar, dataclass_transform

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem
from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.record.forms import (
    PLACES,
    ClassLatency,
    Errors,
    KeptWithClasses,
    RungFound,
    Searched,
    UnreadableError,
    Verification,
    engine_settings_data,
    engine_settings_from_data,
    errors_data,
    one_of,
    read_as,
    read_constraints,
    read_engine,
    read_errors,
    read_losses,
    read_requested,
    read_roles,
    read_searched,
    service_level_from_data,
    types_of,
)
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel
from hetis.solver.advice import Loss
from hetis.solver.engine_rules import NOTHING_SET, EngineRules, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import Objective, Plan, Role

P = TypeVar("P", bound="Part")
T = TypeVar("T")
OLD_NAMES = {"constraints": "will"}  # earlier names of entries, which are still read


class Part:
    """A part of a plan's record: a dataclass whose fields are entries of `Plan.inputs` (`entry`)."""

    @classmethod
    def of(cls: type[P], plan: Plan) -> P:
        """Return this part of a plan's record; entries that are missing or unreadable have their defaults."""
        return cls(**_read(cls, plan.inputs)[0])

    @classmethod
    def checked(cls: type[P], plan: Plan, path: str = "the plan") -> P:
        """Return this part of a plan's record.

        Raises:
            DocumentError: an entry against which the plan is checked is unreadable; ``path`` is the plan's name in
                messages.
        """
        values, wrong = _read(cls, plan.inputs)
        if wrong:
            raise DocumentError(Problem(file=path, message=f"inputs.{one}") for one in wrong)
        return cls(**values)

    def on(self, plan: Plan) -> Plan:
        """Return the plan with this part in its record, in place of an earlier one."""
        names = {name for one in _entries(type(self)) for name in (_name(one), OLD_NAMES.get(_name(one)))}
        others = {name: value for name, value in plan.inputs.items() if name not in names}
        own = {
            _name(one): one.metadata["write"](value)
            for one in _entries(type(self))
            if (value := getattr(self, one.name)) != _default(one)
        }
        return replace(plan, inputs={**others, **own})


@dataclass_transform(kw_only_default=True, frozen_default=True)
def part(kind: type[T]) -> type[T]:
    """Make a class a part of records."""
    return dataclass(frozen=True, slots=True, kw_only=True)(kind)


def entry(
    default: Any, read: Callable[[Any], Any] | None = None, *, name: str = "", write: Callable[[Any], Any] = json_value
) -> Any:
    """Declare a field of a part as an entry: how it is read (or raises `UnreadableError`) and written.

    By default it is read as its type says. An entry with its default is not written. ``name`` is that of the entry, if
    it is not the field's.
    """
    how = {"name": name, "read": read, "write": write}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=how)
    return field(default=default, metadata=how)


def _entries(kind: Any) -> tuple[Field[Any], ...]:
    found: tuple[Field[Any], ...] = fields(kind)
    return found


def _name(one: Field[Any]) -> str:
    return str(one.metadata["name"] or one.name)


def _default(one: Field[Any]) -> Any:
    return {} if one.default is MISSING else one.default


def _read(kind: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the readable fields, and for the others the entry's name with what is wrong."""
    values, wrong, types = dict[str, Any](), list[str](), types_of(kind)
    for one in _entries(kind):
        name = _name(one)
        if (found := name if name in inputs else OLD_NAMES.get(name, name)) not in inputs:
            continue
        read = one.metadata["read"] or partial(read_as, types[one.name])
        try:
            values[one.name] = read(inputs[found])
        except UnreadableError as error:
            wrong += [f"{name}{rest}" for rest in error.rests]
    return values, wrong


@part
class MadeFrom(Part):
    """The inputs of a plan: versions, origins and digests, and the documents, against which it is checked."""

    versions: Mapping[str, str] = entry({})
    origins: Mapping[str, Any] = entry({})  # file or name of each input; of profiles by GPU type
    digests: Mapping[str, Any] = entry({})
    documents: Mapping[str, Any] = entry({})  # cluster, model, workload; profiles by GPU type

    @property
    def model(self) -> str:
        """The file or name of the model, as requested; empty: unknown."""
        return str(self.origins.get("model", ""))

    def checkpoint_of(self, shape: str) -> str:
        """Return the checkpoint that engines load: the requested one if the catalogue has it by the name of its
        ``shape``, or else that name.
        """
        known = catalogue.known_model(self.model)
        named = catalogue.checkpoint_of(self.model) if known is not None and known.name == shape else None
        return named or shape

    def document(self, kind: str) -> Mapping[str, Any]:
        """Return the document of a kind; empty if there is none."""
        found = self.documents.get(kind)
        return found if isinstance(found, Mapping) else {}

    def has_tpot(self) -> bool:
        """Return whether any request has a second output token; otherwise there is no time between tokens."""
        lengths = self.document("workload").get("histogram", ())
        return not lengths or any(one["output_tokens"] > 1.0 for one in lengths)


@part
class Requested(Part):
    """What was requested of a plan, and of the search for it."""

    roles: tuple[Role, ...] = entry((), read_roles)  # empty: made before there were roles, so that all are unified
    engine: EngineRules | None = entry(None, read_engine)  # None: any engine
    engine_settings: EngineSettings = entry(NOTHING_SET, engine_settings_from_data, write=engine_settings_data)
    constraints: tuple[str, ...] = entry((), read_constraints)  # texts of ``--pin`` and ``--forbid``
    seed: float | None = entry(None)
    gap_target: float | None = entry(None)
    time_limit_s: float | None = entry(None)
    simplest_within: float = entry(0.0)
    survive: str = entry("", one_of(PLACES))  # one of `PLACES`
    rung: str = entry("", one_of(RUNGS))  # the rung of the plan; empty: made before there were rungs, or by a heuristic
    service_level: ServiceLevel = entry(DEFAULT, service_level_from_data)
    # What was requested of the objective and is not in it: a limit on TPOT where requests have one output token, and
    # the demand where a larger one was planned for, so that it survives a loss.
    of_objective: Mapping[str, float] = entry({}, read_requested, name="asked")

    def objective(self, planned: Objective, path: str = "the plan") -> Objective:
        """Return the objective that was requested, of which ``planned`` is the plan's.

        Raises:
            DocumentError: both contradict each other; ``path`` is the plan's name in messages.
        """
        try:
            return replace(planned, **self.of_objective)  # type: ignore[arg-type]
        except InvalidProblemError as error:
            raise DocumentError([Problem(file=path, message=f"inputs.asked: {error}")]) from None


@part
class EqualStages(Part):
    """The values of replicas of equal stages, which engines run without a planner, by the model."""

    best: Searched | None = entry(None, read_searched, name="equal_stages_value", write=lambda found: found.value)
    by_size: Mapping[str, float | None] = entry({}, name="simple_setups")


@part
class Rungs(Part):
    """What the best plan of each rung reaches."""

    found: tuple[RungFound, ...] = entry((), name="rungs")


@part
class Classes(Part):
    """What pools of classes of requests were found to keep beside a plan without; ``cut`` is empty: none were tried."""

    cut: str = entry("", name="classes_cut")
    worth: float = entry(0.0, name="classes_worth")
    value: float | None = entry(None, name="classes_value")  # of the plan with classes, by the model
    bound: float | None = entry(None, name="classes_bound")
    kept: tuple[KeptWithClasses, ...] = entry((), name="classes_kept")
    ttft: tuple[ClassLatency, ...] = entry((), name="classes_ttft")
    why_not: str = entry("", name="classes_why_not")  # why the plan has none; empty: it has them


@part
class Verified(Part):
    """What simulation showed of a plan."""

    verification: Verification | None = entry(None)
    model_value: float | None = entry(None)  # the plan's value by the model, if simulation keeps another


@part
class Losses(Part):
    """What the worst loss of any one ``node``, and of any one ``zone``, leaves."""

    by_place: Mapping[str, Loss] = entry({}, read_losses, name="losses")


@part
class Surviving(Part):
    """What a plan that had to survive a loss leaves after it, and the bound on what any plan leaves."""

    left_rps: float | None = entry(None, name="survives_rps")
    bound_rps: float | None = entry(None, name="survives_bound_rps")  # None: it was not maximised
    keep: float | None = entry(None)  # the share of its rate that had to be left


@part
class ProfileErrors(Part):
    """What the errors of the plan's profiles mean."""

    errors: Errors = entry(Errors(), read_errors, name="profile_errors", write=errors_data)
