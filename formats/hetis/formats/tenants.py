"""Tenants files: the tenants that share a fleet, each with a model, its traffic, limits and a claim."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from hetis.formats import units
from hetis.formats.errors import shown
from hetis.formats.fields import API_VERSION, DocumentPart, Name
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text

MAX_TENANTS = 64
NO_LIMIT = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTenant:
    """One tenant: names or paths of its model and workload, its claim, and the objective of its plan.

    Limits are in seconds; None: the objective's default, infinity: lifted. ``worth`` is that of a request/s.
    """

    name: str
    model: str
    workload: str
    weight: float
    worth: float | None
    objective: str
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTenants:
    """The content of a Tenants file."""

    tenants: tuple[FleetTenant, ...]


LIFTED_S = 1e300  # stands for a lifted limit while fields are checked, because they may not be infinite


def _seconds(value: object) -> object:
    if value == NO_LIMIT:
        return LIFTED_S
    if isinstance(value, str):
        return units.parse_duration(value, bare=False)
    raise ValueError(f"{shown(value)} is not a time like 500ms, or none")


Limit = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_seconds),
    WithJsonSchema({"type": "string", "examples": ["500ms", NO_LIMIT]}),
]


class FleetTenantPart(DocumentPart):
    """A tenant: ``model`` and ``workload`` as `hetis-plan place` takes them, ``weight`` parts of the fleet to claim.

    ``worth`` is what a request/s is worth, in any unit that all tenants share; without it 1 over what the tenant
    reaches alone. ``ttft`` and ``tpot`` are limits (2s and 100ms unless said; ``none`` lifts one).
    """

    name: Name
    model: str
    workload: str
    weight: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    worth: Annotated[float, Field(gt=0, le=1e12)] | None = None
    objective: Literal["goodput", "throughput"] = "goodput"
    ttft: Limit | None = None
    tpot: Limit | None = None


class TenantsDocument(DocumentPart):
    """Tenants that share one fleet; which fleet is said beside it (``hetis-plan share FILE --cluster FILE``)."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["Tenants"]
    tenants: Annotated[list[FleetTenantPart], Field(min_length=1, max_length=MAX_TENANTS)]


def load_tenants(path: str | os.PathLike[str]) -> FleetTenants:
    """Return the tenants in a YAML or JSON file (``-``: standard input).

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_tenants(*read_data(path))


def parse_tenants(data: Any, source: Text) -> FleetTenants:
    """Return the tenants in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(TenantsDocument, data, source, to_value=_to_tenants, check=_check)


def tenants_to_data(value: FleetTenants) -> dict[str, Any]:
    """Return the document as plain data. Reading it again gives equal tenants."""
    return {
        "apiVersion": API_VERSION,
        "kind": "Tenants",
        "tenants": [_tenant_data(tenant) for tenant in value.tenants],
    }


def _tenant_data(tenant: FleetTenant) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": tenant.name,
        "model": tenant.model,
        "workload": tenant.workload,
        "weight": tenant.weight,
        "objective": tenant.objective,
    }
    if tenant.worth is not None:
        data["worth"] = tenant.worth
    for field, limit_s in (("ttft", tenant.ttft_s), ("tpot", tenant.tpot_s)):
        if limit_s is not None:
            data[field] = NO_LIMIT if limit_s == float("inf") else f"{limit_s!r}s"
    return data


def _to_tenants(document: TenantsDocument) -> FleetTenants:
    return FleetTenants(
        tenants=tuple(
            FleetTenant(
                name=part.name,
                model=part.model,
                workload=part.workload,
                weight=part.weight,
                worth=part.worth,
                objective=part.objective,
                ttft_s=_limit(part.ttft),
                tpot_s=_limit(part.tpot),
            )
            for part in document.tenants
        )
    )


def _limit(given: float | None) -> float | None:
    return float("inf") if given == LIFTED_S else given


def _check(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield problems with duplicate names, and with a worth that only some tenants have."""
    tenants = data.get("tenants") if isinstance(data.get("tenants"), list) else []
    parts = [(i, part) for i, part in enumerate(tenants or []) if isinstance(part, dict)]
    seen: set[str] = set()
    for i, part in parts:
        name = part.get("name")
        if isinstance(name, str):
            if name in seen:
                yield ("tenants", i, "name"), f"tenant {shown(name)} appears twice"
            seen.add(name)
    priced = [i for i, part in parts if part.get("worth") is not None]
    for i, _ in parts:
        if priced and i not in priced:
            yield ("tenants", i), f"has no worth, tenant {priced[0] + 1} has: say it of all or of none"
