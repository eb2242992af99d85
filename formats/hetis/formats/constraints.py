"""Constraints as the command line and plan files write them: ``--forbid type=L4:as=primary``, ``--pin replicas=2..4``.

forbid  SELECTION            these GPUs are not used
        SELECTION:as=DUTY    they do not have this duty
        tp=N | workers       no stage has this TP size; none has attention workers
pin     SELECTION[:use=N]    at least N of them are in use, 1 unless given
        SELECTION:as=DUTY    of the duties of its kind they have this one alone; `:use=N` may follow
        replicas=N | N..M    this number of replicas; either end may be left out
        usd=..N | gpus=..N   all GPUs of the plan together cost at most N USD/h, are at most N

SELECTION  gpu=NODE/INDEX (forbid only), node=NODE, type=GPU, zone=ZONE
DUTY       primary, worker (what the GPU does in a replica); unified, prefill, decode (what the replica does)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import (
    AtMost,
    Constraint,
    Constraints,
    Duty,
    Exclude,
    Replicas,
    RestrictRole,
    Selection,
    Sum,
    Unit,
    Use,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
    misfits,
)
from hetis.solver.engine_rules import Family

PIN, FORBID = "--pin", "--forbid"
_RANGE = re.compile(r"(\d*)\.\.(\d*)|(\d+)")


def read_constraints(pins: Sequence[str], forbids: Sequence[str], cluster: Cluster) -> Constraints:
    """Return the constraints given to ``--pin`` and ``--forbid``, forbidden things first, each constraint once. Raises
    DocumentError with every problem of all of them: their syntax, and names that the cluster does not have.
    """
    found, problems = dict[Constraint, str](), list[Problem]()  # each constraint with the option that gives it
    for option, texts, parse in ((FORBID, forbids, parse_forbid), (PIN, pins, parse_pin)):
        for text in texts:
            try:
                for constraint in parse(text):
                    found.setdefault(_with_node_of(cluster, constraint), f"{option} {text}")
            except ValueError as error:
                problems.append(Problem(file=f"{option} {text}", message=str(error)))
    constraints = tuple(found)
    for misfit in misfits(constraints, cluster, Family().tp_sizes):
        message = misfit.message + did_you_mean(misfit.name, misfit.known)
        problems.append(Problem(file=found[misfit.constraint], message=message))
    if problems:
        raise DocumentError(problems)
    return constraints


def constraints_from_texts(texts: Iterable[str], cluster: Cluster) -> Constraints:
    """Return the constraints that a plan file states, written as options. Raises as `read_constraints`."""
    by_option: dict[str, list[str]] = {PIN: [], FORBID: []}
    problems = []
    for text in texts:
        option, _, rest = text.partition(" ")
        if option in by_option:
            by_option[option].append(rest)
        else:
            problems.append(Problem(file=text, message=f"is not a constraint, must begin with {PIN} or {FORBID}"))
    if problems:
        raise DocumentError(problems)
    return read_constraints(by_option[PIN], by_option[FORBID], cluster)


def _with_node_of(cluster: Cluster, constraint: Constraint) -> Constraint:
    """Return the same constraint with the cluster's own name for its node."""
    if not isinstance(constraint, Exclude | RestrictRole | Use):
        return constraint
    called = {Unit.NODE: cluster.node_named, Unit.GPU: cluster.device_named}.get(constraint.gpus.unit, str)
    return replace(constraint, gpus=replace(constraint.gpus, name=called(constraint.gpus.name)))


def parse_forbid(text: str) -> tuple[Constraint, ...]:
    """Return the constraint of one ``--forbid``. Raises ValueError, naming what is expected, if it is malformed."""
    if text == "workers":
        return (WithoutWorkers(),)
    if text == "shared-experts":
        return (WithoutSharedExperts(),)
    key, value, extras = _parts(text, ("as",))
    if key == "tp":
        if extras or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"tp is {value!r}, must be a whole number without other parts")
        return (WithoutTp(tp=int(value)),)
    gpus = _selection(key, value, (*(unit.value for unit in Unit), "tp", "workers", "shared-experts"))
    if "as" in extras:
        return (RestrictRole(gpus=gpus, duty=_duty(extras["as"]), only=False),)
    return (Exclude(gpus=gpus),)


def parse_pin(text: str) -> tuple[Constraint, ...]:
    """Return the constraints of one ``--pin``. Raises ValueError, naming what is expected, if it is malformed."""
    key, value, extras = _parts(text, ("as", "use"))
    if key == "replicas":
        if extras:
            raise ValueError("replicas is a count: nothing may follow")
        return (_replicas(value),)
    if key in (Sum.USD, Sum.GPUS):
        if extras:
            raise ValueError(f"{key} is a sum: nothing may follow")
        return (_at_most(Sum(key), value),)
    gpus = _selection(key, value, ("node", "type", "zone", "replicas", "usd", "gpus"))
    constraints: list[Constraint] = []
    if "as" in extras:
        constraints.append(RestrictRole(gpus=gpus, duty=_duty(extras["as"]), only=True))
    if "use" in extras or not constraints:
        least = extras.get("use", "1")
        if not least.isdecimal() or int(least) < 1:
            raise ValueError(f"use is {least!r}, must be a whole number above 0")
        constraints.append(Use(gpus=gpus, least=int(least)))
    return tuple(constraints)


def _parts(text: str, extras: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    """Split ``key=value:extra=value`` into its parts."""
    first, *rest = text.split(":")
    key, equals, value = first.partition("=")
    if not equals or not value:
        raise ValueError("must be written NAME=VALUE, such as node=a100-0, type=L4")
    found: dict[str, str] = {}
    for part in rest:
        name, equals, given = part.partition("=")
        if name not in extras or not given or name in found:
            expected = " or ".join(f"{extra}=..." for extra in extras)
            raise ValueError(f"{part!r} after {first} is not {expected}, each once")
        found[name] = given
    return key, value, found


def _selection(key: str, value: str, known: Sequence[str]) -> Selection:
    units = [unit.value for unit in Unit if unit.value in known]
    if key not in units:
        raise ValueError(f"{key!r} is not one of {', '.join(known)}{did_you_mean(key, known)}")
    return Selection(unit=Unit(key), name=value)


def _duty(text: str) -> Duty:
    known = [duty.value for duty in Duty]
    if text not in known:
        raise ValueError(f"as is {text!r}, must be one of {', '.join(known)}{did_you_mean(text, known)}")
    return Duty(text)


def _at_most(of: Sum, text: str) -> AtMost:
    number = text.removeprefix("..")
    pattern = r"\d+" if of is Sum.GPUS else r"\d+(\.\d+)?|\.\d+"
    if number == text or not re.fullmatch(pattern, number) or float(number) <= 0.0:
        raise ValueError(f"{of} is {text!r}, must be ..N with N above 0")
    return AtMost(of=of, most=float(number))


def _replicas(text: str) -> Replicas:
    match = _RANGE.fullmatch(text)
    if match is None or text == "..":
        raise ValueError(f"replicas is {text!r}, must be N, N..M, N.. or ..M")
    least, most, exactly = match.groups()
    if exactly is not None:
        return Replicas(least=int(exactly), most=int(exactly))
    return Replicas(least=int(least or 0), most=int(most) if most else None)
