"""Files of tenants: Tenants share a fleet, each with a model, its traffic, limits and a claim; a ShareProblem has GPU
types and the tenants' speed-ups on them, given or to be derived from a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from hetis.formats import units
from hetis.formats.errors import did_you_mean, shown
from hetis.formats.fields import (
    Document,
    DocumentPart,
    Found,
    Name,
    Title,
    duplicates,
    entries,
    kind_of,
    mapping,
    plain,
    present,
    value_of,
)

MAX_TENANTS = 64
NO_LIMIT = "none"
MAX_GPUS = 1_000_000
MAX_CLAIMANTS = 400  # jobs of all tenants: the number of envy constraints grows with their square


def _seconds(value: object) -> object:
    if value == NO_LIMIT:
        return math.inf
    if isinstance(value, str):
        return units.parse_duration(value, bare=False)
    raise ValueError(f"{shown(value)} is not a time like 500ms, or none")


Limit = Annotated[
    float,
    Field(gt=0, allow_inf_nan=True),
    BeforeValidator(_seconds),
    WithJsonSchema({"type": "string", "examples": ["500ms", NO_LIMIT]}),
]


class FleetTenantPart(DocumentPart):
    """A tenant: ``model`` and ``workload`` as for ``hetis-plan place``, and a claim to ``weight`` parts of the fleet.

    ``worth`` is the value of a request/s, in any unit that all tenants share; default: 1 over the rate that the tenant
    reaches alone. ``ttft`` and ``tpot`` are limits (default 2s and 100ms; ``none`` lifts one).
    """

    name: Name
    model: str
    workload: str
    weight: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    worth: Annotated[float, Field(gt=0, le=1e12)] | None = None
    objective: Literal["goodput", "throughput"] = "goodput"
    # Seconds. None: the objective's default; infinity: lifted.
    ttft: Limit | None = None
    tpot: Limit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTenants:
    """The content of a Tenants file."""

    tenants: tuple[FleetTenantPart, ...]


class TenantsDocument(Document):
    """Tenants that share one fleet; the fleet is given separately (``hetis-plan share FILE --cluster FILE``)."""

    kind: Literal["Tenants"]
    tenants: Annotated[list[FleetTenantPart], Field(min_length=1, max_length=MAX_TENANTS)]


def _to_tenants(document: TenantsDocument) -> FleetTenants:
    return FleetTenants(tenants=tuple(document.tenants))


def _tenants_data(value: FleetTenants) -> dict[str, Any]:
    def limit(limit_s: float | None) -> str | None:
        return None if limit_s is None else NO_LIMIT if limit_s == math.inf else f"{limit_s!r}s"

    def data(one: FleetTenantPart) -> dict[str, Any]:
        order = ("name", "model", "workload", "weight", "objective", "worth")
        limits = {"ttft": limit(one.ttft), "tpot": limit(one.tpot)}
        return present({name: getattr(one, name) for name in order} | limits)

    return {"tenants": [data(one) for one in value.tenants]}


def _check_tenants(data: Mapping[str, Any]) -> Found:
    """Yield problems with duplicate names, and with a worth that only some tenants have."""
    parts = entries(data.get("tenants"))
    yield from duplicates(("tenants",), parts, "name", "tenant")
    priced = [i for i, part in parts if part.get("worth") is not None]
    for i, _ in parts:
        if priced and i not in priced:
            yield ("tenants", i), f"has no worth, tenant {priced[0] + 1} has: give it for all tenants or for none"


TENANTS = kind_of(TenantsDocument, FleetTenants, to_value=_to_tenants, to_data=_tenants_data, check=_check_tenants)
load_tenants, parse_tenants = TENANTS.load, TENANTS.parse


# --- ShareProblem


Speedup = Annotated[float, Field(ge=0, le=1e8)]  # beyond this, linear programs for shares lose precision
Weight = Annotated[float, Field(ge=1e-4, le=1e4)]
MinGpus = Annotated[int, Field(ge=1, le=MAX_GPUS)]


class SharedJobPart(DocumentPart):
    """A kind of work: ``speedups`` per GPU type in any unit, or ``model`` and ``workload`` to derive them."""

    name: Title
    speedups: dict[str, Speedup] | None = None
    model: str | None = None
    workload: str | None = None
    min_gpus: MinGpus = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingTenant:
    name: str
    weight: float
    jobs: tuple[SharedJobPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareInputs:
    """The content of a ShareProblem file: GPUs by type name, GPUs per node, and the tenants."""

    gpus: Mapping[str, int]
    gpus_per_node: int
    tenants: tuple[SharingTenant, ...]


class SharingTenantPart(DocumentPart):
    """A tenant with a claim to ``weight`` parts. A single kind of work is given here, several in ``jobs``."""

    name: Title
    weight: Weight = 1.0
    speedups: dict[str, Speedup] | None = None
    model: str | None = None
    workload: str | None = None
    min_gpus: MinGpus = 1
    jobs: Annotated[list[SharedJobPart], Field(min_length=1)] | None = None


class ShareProblemDocument(Document):
    """GPUs by type, and the tenants that share them. ``gpus_per_node`` is used when speed-ups are derived."""

    kind: Literal["ShareProblem"]
    gpus: Annotated[dict[Title, Annotated[int, Field(ge=1, le=MAX_GPUS)]], Field(min_length=1)]
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    tenants: Annotated[list[SharingTenantPart], Field(min_length=1)]


def _to_inputs(document: ShareProblemDocument) -> ShareInputs:
    def tenant(part: SharingTenantPart) -> SharingTenant:
        jobs = part.jobs or [SharedJobPart(**part.model_dump(include=set(SharedJobPart.model_fields)))]
        return SharingTenant(name=part.name, weight=part.weight, jobs=tuple(jobs))

    return value_of(ShareInputs, document, tenants=tuple(map(tenant, document.tenants)))


def _inputs_data(inputs: ShareInputs) -> dict[str, Any]:
    def job(one: SharedJobPart) -> dict[str, Any]:
        return {
            "name": one.name,
            "min_gpus": one.min_gpus,
            **one.model_dump(exclude={"name", "min_gpus"}, exclude_none=True),
        }

    tenants = [plain(tenant) | {"jobs": [job(one) for one in tenant.jobs]} for tenant in inputs.tenants]
    return {**plain(inputs), "tenants": tenants}


def _check_shares(data: Mapping[str, Any]) -> Found:
    """Yield problems with duplicate names and with speed-ups that are missing, given twice, or for unknown GPUs."""
    gpus, tenants = mapping(data.get("gpus")), entries(data.get("tenants"))
    yield from duplicates(("tenants",), tenants, "name", "tenant")
    claimants = 0
    for i, tenant in tenants:
        where = ("tenants", i)
        jobs = tenant.get("jobs")
        if not isinstance(jobs, list):
            claimants += 1
            yield from _check_work(tenant, where, gpus)
            continue
        claimants += len(jobs)
        for field in ("speedups", "model", "workload", "min_gpus"):
            if field in tenant:
                yield (*where, field), "cannot be combined with jobs: give it in each job"
        yield from duplicates((*where, "jobs"), entries(jobs), "name", "job")
        for j, job in entries(jobs):
            yield from _check_work(job, (*where, "jobs", j), gpus)
    if claimants > MAX_CLAIMANTS:
        yield ("tenants",), f"have {claimants} jobs in all, at most {MAX_CLAIMANTS} can be shared among"


def _check_work(work: Mapping[str, Any], where: tuple[str | int, ...], gpus: Mapping[str, Any]) -> Found:
    speedups, model = work.get("speedups"), work.get("model")
    if speedups is None and model is None:
        yield where, "has neither speedups nor a model to derive them"
    if speedups is not None and model is not None:
        yield (*where, "model"), "cannot be combined with speedups: give one of them"
    if model is not None and work.get("workload") is None:
        yield where, "workload is missing: speed-ups of a model depend on its traffic"
    if isinstance(speedups, dict):
        for gpu in speedups:
            if gpu not in gpus:
                hint = did_you_mean(str(gpu), [str(known) for known in gpus])
                yield (*where, "speedups", gpu), f"GPU type {shown(gpu)} is not in gpus{hint}"
        for gpu in gpus:
            if gpu not in speedups:
                yield (*where, "speedups"), f"has none for {gpu}; 0 where it cannot run"
        if speedups and all(value == 0 for value in speedups.values()):
            yield (*where, "speedups"), "are all 0, so it cannot run on any GPU type"


SHARE_PROBLEM = kind_of(
    ShareProblemDocument, ShareInputs, to_value=_to_inputs, to_data=_inputs_data, check=_check_shares
)
load_share_problem = SHARE_PROBLEM.load
