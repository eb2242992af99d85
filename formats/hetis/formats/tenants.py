"""Files of tenants that share a fleet, each with a model, its traffic, limits and a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from hetis.formats import units
from hetis.formats.errors import shown
from hetis.formats.fields import Document, DocumentPart, Found, Name, duplicates, entries, present
from hetis.formats.kinds import kind_of

MAX_TENANTS = 64
NO_LIMIT = "none"


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
