"""ShareProblem files: GPU types and the tenants that share them, with speed-ups given or to be derived from a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats.errors import did_you_mean, shown
from hetis.formats.fields import API_VERSION, DocumentPart, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text

MAX_GPUS = 1_000_000
MAX_CLAIMANTS = 400  # jobs of all tenants: the number of envy constraints grows with their square


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedJob:
    """A tenant's job: throughput per GPU by type name, or the model and workload to derive it from."""

    name: str
    speedups: Mapping[str, float] | None
    model: str | None
    workload: str | None
    min_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingTenant:
    name: str
    weight: float
    jobs: tuple[SharedJob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareInputs:
    """The content of a ShareProblem file: GPUs by type name, GPUs per node, and the tenants."""

    gpus: Mapping[str, int]
    gpus_per_node: int
    tenants: tuple[SharingTenant, ...]


Speedup = Annotated[float, Field(ge=0, le=1e8)]  # beyond this, linear programs for shares lose precision
Weight = Annotated[float, Field(ge=1e-4, le=1e4)]
MinGpus = Annotated[int, Field(ge=1, le=MAX_GPUS)]


class SharedJobPart(DocumentPart):
    """A kind of work: ``speedups`` per GPU type, in any unit, or ``model`` and ``workload`` to derive them."""

    name: Title
    speedups: dict[str, Speedup] | None = None
    model: str | None = None
    workload: str | None = None
    min_gpus: MinGpus = 1


class SharingTenantPart(DocumentPart):
    """A tenant with a claim to ``weight`` parts. One kind of work may stand here directly, several in ``jobs``."""

    name: Title
    weight: Weight = 1.0
    speedups: dict[str, Speedup] | None = None
    model: str | None = None
    workload: str | None = None
    min_gpus: MinGpus = 1
    jobs: Annotated[list[SharedJobPart], Field(min_length=1)] | None = None


class ShareProblemDocument(DocumentPart):
    """GPUs by type, and the tenants that share them. ``gpus_per_node`` matters where speed-ups are derived."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["ShareProblem"]
    gpus: Annotated[dict[Title, Annotated[int, Field(ge=1, le=MAX_GPUS)]], Field(min_length=1)]
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    tenants: Annotated[list[SharingTenantPart], Field(min_length=1)]


def load_share_problem(path: str | os.PathLike[str]) -> ShareInputs:
    """Return the GPUs and tenants in a YAML or JSON file (``-``: standard input).

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_share_problem(*read_data(path))


def parse_share_problem(data: Any, source: Text) -> ShareInputs:
    """Return the GPUs and tenants in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(ShareProblemDocument, data, source, to_value=_to_inputs, check=_check)


def share_problem_to_data(inputs: ShareInputs) -> dict[str, Any]:
    """Return the document as plain data. Reading it again gives equal inputs."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ShareProblem",
        "gpus": dict(inputs.gpus),
        "gpus_per_node": inputs.gpus_per_node,
        "tenants": [
            {"name": tenant.name, "weight": tenant.weight, "jobs": [_job_data(job) for job in tenant.jobs]}
            for tenant in inputs.tenants
        ],
    }


def _job_data(job: SharedJob) -> dict[str, Any]:
    data: dict[str, Any] = {"name": job.name, "min_gpus": job.min_gpus}
    if job.speedups is not None:
        data["speedups"] = dict(job.speedups)
    if job.model is not None:
        data |= {"model": job.model, "workload": job.workload}
    return data


def _to_inputs(document: ShareProblemDocument) -> ShareInputs:
    return ShareInputs(
        gpus=document.gpus,
        gpus_per_node=document.gpus_per_node,
        tenants=tuple(
            SharingTenant(name=part.name, weight=part.weight, jobs=tuple(_jobs(part))) for part in document.tenants
        ),
    )


def _jobs(tenant: SharingTenantPart) -> Iterator[SharedJob]:
    for part in tenant.jobs if tenant.jobs is not None else [tenant]:
        yield SharedJob(
            name=part.name,
            speedups=part.speedups,
            model=part.model,
            workload=part.workload,
            min_gpus=part.min_gpus,
        )


def _check(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield problems with duplicate names and with speed-ups that are missing, given twice, or for unknown GPUs."""
    gpus = data.get("gpus") if isinstance(data.get("gpus"), dict) else {}
    tenants = data.get("tenants") if isinstance(data.get("tenants"), list) else []
    seen: set[str] = set()
    claimants = 0
    for i, tenant in enumerate(tenants or []):
        if not isinstance(tenant, dict):
            continue
        where: tuple[str | int, ...] = ("tenants", i)
        name = tenant.get("name")
        if isinstance(name, str):
            if name in seen:
                yield (*where, "name"), f"tenant {shown(name)} appears twice"
            seen.add(name)
        jobs = tenant.get("jobs")
        if not isinstance(jobs, list):
            claimants += 1
            yield from _check_work(tenant, where, gpus or {})
            continue
        for field in ("speedups", "model", "workload", "min_gpus"):
            if field in tenant:
                yield (*where, field), "stands beside jobs: say it of each job"
        names: set[str] = set()
        for j, job in enumerate(jobs):
            claimants += 1
            if isinstance(job, dict):
                if isinstance(job.get("name"), str):
                    if job["name"] in names:
                        yield (*where, "jobs", j, "name"), f"job {shown(job['name'])} appears twice"
                    names.add(job["name"])
                yield from _check_work(job, (*where, "jobs", j), gpus or {})
    if claimants > MAX_CLAIMANTS:
        yield ("tenants",), f"have {claimants} jobs in all, at most {MAX_CLAIMANTS} can be shared among"


def _check_work(
    work: Mapping[str, Any], where: tuple[str | int, ...], gpus: Mapping[str, Any]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    speedups, model = work.get("speedups"), work.get("model")
    if speedups is None and model is None:
        yield where, "has neither speedups nor a model to derive them from"
    if speedups is not None and model is not None:
        yield (*where, "model"), "stands beside speedups: give one of them"
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
            yield (*where, "speedups"), "are all 0: it runs on no GPU type"
