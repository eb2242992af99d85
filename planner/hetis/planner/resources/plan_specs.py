"""Poses the problem of a requested plan: reports all invalid fields first, then contradictions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, did_you_mean
from hetis.formats.models.document import drafts
from hetis.formats.models.dtypes import KV_PRECISIONS, PRECISIONS, chosen_precision
from hetis.formats.workload import named_workload
from hetis.planner.convert import documents, names
from hetis.planner.convert.plan_specs import SAME
from hetis.planner.convert.plans import FROM_PROTO, objective_from_proto
from hetis.planner.failures import invalid_field
from hetis.planner.jobs.messages import PosedProblem
from hetis.planner.resources.checks import Checks
from hetis.planner.store import ClusterRecord, ProfileRecord, etag_of
from hetis.planner.use_cases.placement_settings import PlacementSettings, settings_of
from hetis.planner.use_cases.precision import gpu_types_of, in_precision
from hetis.planner.use_cases.request import (
    EngineName,
    Loss,
    PlacementRequest,
    RungName,
    StatisticName,
    StrategyName,
    Target,
)
from hetis.planner.use_cases.sources import Inputs, LoadedInputs, family_of, impossible_profiles
from hetis.profiler.defaults import default_profile
from hetis.solver.advice import without_nodes
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import MOST_CHUNKS, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload
from hetis.v1 import plan_pb2, replica_pb2

V = TypeVar("V", ModelSpec, Workload)
SPEC = "plan.spec"
LEAST_TIME_S = 0.01
LONGEST_TIME_S = 24 * 3600.0
MOST_PROFILES = 64
MOST_LABELS = 64
MOST_STAGES = 16
_SEEDS = 2**31  # the range of the solvers' own seeds
_ENGINE_SETTINGS = ("max_num_seqs", "chunk_tokens", "kv_blocks")  # fields of specs, requests and `EngineSettings`
_CHOICES: Mapping[str, Any] = {
    "strategy": StrategyName, "engine": EngineName, "survive": Loss, "rung": RungName, "target": Target,
    "ttft_statistic": StatisticName, "tpot_statistic": StatisticName,
}  # fmt: skip
_LABEL = re.compile(r"[a-z0-9._/-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """The limits of a search: ``time_s`` is the longest time limit that callers may request."""

    time_s: float = LONGEST_TIME_S


def check_labels(checks: Checks, labels: Mapping[str, str], field: str) -> None:
    """Check the limits on labels that ``plan.proto`` documents."""
    checks.require(len(labels) <= MOST_LABELS, field, f"has {len(labels)} entries, at most {MOST_LABELS} are allowed")
    for key, value in sorted(labels.items())[:MOST_LABELS]:
        right = 1 <= len(key) <= 63 and len(value) <= 255 and _LABEL.fullmatch(key) and _LABEL.fullmatch(value)
        message = "must consist of a-z 0-9 - _ . /, with 1 to 63 characters in the key and 0 to 255 in the value"
        checks.require(bool(right), f'{field}["{key[:63]}"]', message)


def choose_profiles(
    named: Sequence[ProfileRecord], stored: Sequence[ProfileRecord], gpus: Sequence[str]
) -> dict[str, ProfileRecord]:
    """Return each GPU type's profile: the named one, or else the newest in the store. Raises INVALID_FIELD."""
    checks, chosen = Checks(), dict[str, ProfileRecord]()
    for position, record in enumerate(named):
        path = f"{SPEC}.profiles[{position}]"
        checks.require(
            record.gpu_type not in chosen, path, f"is a second profile of {record.gpu_type}, only one is allowed"
        )
        hint = did_you_mean(record.gpu_type, gpus)
        checks.require(record.gpu_type in gpus, path, f"is of {record.gpu_type}, which the cluster does not have{hint}")
        chosen[record.gpu_type] = record
    checks.raise_if_wrong()
    newest = {record.gpu_type: record for record in sorted(stored, key=lambda one: one.update_time_s)}
    return newest | chosen


def pose(
    spec: plan_pb2.PlanSpec,
    request: PlacementRequest,
    record: ClusterRecord,
    declared: Cluster,
    left_out: frozenset[str],
    profiles: Mapping[str, ProfileRecord],
) -> PosedProblem:
    """Return the problem of a spec, whose request `read_spec` returned, on a fleet without the nodes ``left_out``.

    Slow for large fleets, so not for an event loop.

    Raises InvalidProblemError if the inputs contradict each other.
    """
    cluster = without_nodes(declared, left_out)
    if not cluster.node_groups:
        raise InvalidProblemError(f"all {len(left_out)} nodes of {record.name} drain or are lost")
    by_gpu = {
        gpu: (profiles[gpu].name, documents.read_document(profiles[gpu].body.document, Profile))
        if gpu in profiles
        else default_profile(gpu_type)
        for gpu, gpu_type in gpu_types_of(cluster).items()
    }
    stored = {gpu: one for gpu, one in by_gpu.items() if gpu in profiles}
    if problems := impossible_profiles(stored, cluster.gpu_types):
        raise InvalidProblemError("; ".join(map(str, problems)))
    origin = f"{record.name} {etag_of(record)}"
    if left_out:
        origin += f" without {', '.join(sorted(left_out))}"
    assert isinstance(request.model, ModelSpec)
    assert isinstance(request.workload, Workload)
    loaded = LoadedInputs(
        inputs=Inputs(
            cluster=cluster,
            model=request.model,
            workload=request.workload,
            profiles={gpu: profile for gpu, (_, profile) in by_gpu.items()},
            engine_settings=_engine_settings(request),
        ),
        origins={
            "model": spec.model_name or spec.model_document.source_name or "document",
            "workload": spec.workload_name or spec.workload_document.source_name or "document",
            "cluster": origin,
            "profiles": {gpu: where for gpu, (where, _) in by_gpu.items()},
        },
    )
    # Each by itself first, so that the error names it.
    for field, requested in (("weights", request.weights), ("kv", request.kv)):
        try:
            in_precision(loaded, **{"weights": None, "kv": None, field: requested})
        except InvalidProblemError as error:
            raise invalid_field(f"{SPEC}.{field}", str(error).removeprefix("precision: ")) from None
    posed = PosedProblem(
        loaded=in_precision(loaded, weights=request.weights, kv=request.kv, mtp=request.mtp),
        objective=request.goal,
        settings=settings_of(request),
        verify=request.verify,
        service_level=request.service_level,
    )
    posed.problem()
    return posed


def _engine_settings(request: PlacementRequest) -> EngineSettings:
    return EngineSettings(**{name: getattr(request, name) for name in _ENGINE_SETTINGS})


async def read_spec(checks: Checks, spec: plan_pb2.PlanSpec, limits: SearchLimits) -> PlacementRequest | None:
    """Return the request of a spec, without its cluster and profiles, or None if ``checks`` has found an error."""
    return await _SpecReader(checks, spec, limits).read()


@dataclass(frozen=True, slots=True)
class _SpecReader:
    """Reads one spec; errors are added to ``checks``."""

    checks: Checks
    spec: plan_pb2.PlanSpec
    limits: SearchLimits

    def require(self, is_right: bool, field: str, description: str) -> bool:
        return self.checks.require(is_right, f"{SPEC}.{field}", description)

    def attempt(self, field: str, read: Callable[[], object]) -> bool:
        """Return whether ``read`` finds nothing wrong with the field."""
        try:
            read()
        except (InvalidProblemError, ValueError) as error:
            return self.require(False, field, str(error))
        return True

    async def read(self) -> PlacementRequest | None:
        checks, spec, defaults = self.checks, self.spec, PlacementSettings()
        model = await self._given("model", lambda name: catalogue.find_model(name).model, ModelSpec)
        workload = await self._given("workload", named_workload, Workload)
        goal = objective_from_proto(
            spec.objective, f"{SPEC}.objective", lambda path, text: checks.require(False, path, text)
        )
        texts: tuple[tuple[str, Callable[[str], object]], ...] = (
            ("weights", lambda text: chosen_precision(text, PRECISIONS)),
            ("kv", lambda text: chosen_precision(text, KV_PRECISIONS)),
            ("mtp", drafts),
        )
        for name, parse in texts:
            if text := getattr(spec, name):
                self.attempt(name, partial(parse, text))
        num = len(spec.profiles)
        self.require(num <= MOST_PROFILES, "profiles", f"has {num} entries, at most {MOST_PROFILES} are allowed")
        for position, profile in enumerate(spec.profiles[:MOST_PROFILES]):
            checks.name(f"{SPEC}.profiles[{position}]", profile, names.PROFILE)
        worth = spec.worth if spec.HasField("worth") else defaults.worth
        self.require(0 <= worth < 1, "worth", f"is {worth:g}, must be from 0 to below 1")
        self.require(0 <= spec.keep <= 1, "keep", f"is {spec.keep:g}, must be from 0 to 1")
        message = "is set, but there is no rate to maximise that survives a loss"
        self.require(not spec.keep or (bool(spec.survive) and goal.maximises), "keep", message)
        gap = spec.gap_target if spec.HasField("gap_target") else defaults.gap_target
        self.require(0 <= gap <= 1, "gap_target", f"is {gap:g}, must be from 0 to 1")
        time_limit_s = min(defaults.time_limit_s, self.limits.time_s)
        if spec.HasField("time_limit"):
            time_limit_s = names.seconds_of(spec.time_limit)
            message = f"is {time_limit_s:g} s, must be {LEAST_TIME_S:g} s to {self.limits.time_s:g} s"
            self.require(LEAST_TIME_S <= time_limit_s <= self.limits.time_s, "time_limit", message)
        others = self._choices() | {
            "roles": self._roles(), "objective": goal.kind.value, "rate": goal.demand_rps, "ttft": goal.ttft_limit_s,
            "tpot": goal.tpot_limit_s, "attainment": spec.attainment or None, "keep": spec.keep or None,
            "chunk_tokens": tuple(spec.chunk_tokens[: MOST_CHUNKS + 1]), "verify": not spec.skip_verification,
            "worth": worth, "gap": gap, "time_limit": time_limit_s, "seed": spec.seed % _SEEDS,
        }  # fmt: skip
        request = PlacementRequest("", model or "", workload or "", **others)
        self._check_together(request)
        return None if model is None or workload is None else request

    async def _given(self, what: Literal["model", "workload"], find: Callable[[str], V], kind: type[V]) -> V | None:
        """Return the model or the workload, which the spec names or contains."""
        field = self.spec.WhichOneof(what)
        if field is None:
            self.require(False, f"{what}_name", f"is missing: name a {what}, or send {what}_document")
            return None
        given = getattr(self.spec, field)
        if field == f"{what}_document":
            return await self.checks.document(f"{SPEC}.{field}", given, partial(documents.read_document, kind=kind))
        try:
            return await asyncio.to_thread(find, given)
        except (catalogue.UnknownNameError, DocumentError) as error:
            problem = error.problems[0].message if isinstance(error, DocumentError) else str(error)
            self.require(False, field, problem)
            return None

    def _choices(self) -> dict[str, Any]:
        """Return the fields that a spec has as a request has them, without wrong ones."""
        given = {name: value for name in SAME if (value := getattr(self.spec, name))}
        for name, known in ((name, get_args(known)) for name, known in _CHOICES.items() if name in given):
            value = given[name]
            hint = did_you_mean(value[:80], known)
            wrong = f"is {value[:80]!r}, must be one of {', '.join(known)}{hint}"
            if not self.require(value in known, name, wrong):
                del given[name]
        most = f"is {self.spec.max_stages}, must be {MOST_STAGES} at most"
        if not self.require(self.spec.max_stages <= MOST_STAGES, "max_stages", most):
            del given["max_stages"]
        return given

    def _roles(self) -> tuple[str, ...]:
        """Return the valid roles."""
        given, known = self.spec.roles, ", ".join(role.name for role in Role)
        for position, value in enumerate(given[: len(Role) + 1]):
            named = names.word_of(replica_pb2.ReplicaRole, value)
            self.require(value in FROM_PROTO, f"roles[{position}]", f"is {named}, must be one of {known}")
        num_different = len(set(given))
        message = f"has {len(given)} entries of {num_different} roles, each may appear once"
        self.require(num_different == len(given), "roles", message)
        return tuple(FROM_PROTO[value].value for value in given if value in FROM_PROTO)

    def _check_together(self, request: PlacementRequest) -> None:
        """Find fields that contradict others."""
        if self.spec.strategy in ("", strategy := request.strategy):
            self.attempt("roles", partial(family_of, strategy, request.all_roles))
            if self.spec.engine == (request.engine or ""):
                self.attempt("engine", lambda: family_of(strategy, engine=settings_of(request).engine))
        # Each statistic by itself first, so that the error names the wrong one.
        for field, without in (
            ("ttft_statistic", ("tpot_statistic", "attainment")),
            ("tpot_statistic", ("ttft_statistic", "attainment")),
            ("attainment", ()),
        ):
            unset: dict[str, Any] = dict.fromkeys(without)
            if not self.attempt(field, replace(request, **unset).check):
                break
        for name in _ENGINE_SETTINGS:
            self.attempt(name, partial(EngineSettings, **{name: getattr(request, name)}))
