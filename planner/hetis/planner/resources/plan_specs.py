"""Poses the problem of a requested plan: every wrong field is reported first, then contradictions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hetis.formats import catalogue
from hetis.formats.dtypes import KV_PRECISIONS, PRECISIONS, chosen_precision
from hetis.formats.errors import DocumentError, did_you_mean
from hetis.formats.model import drafts
from hetis.formats.workload import named_workload
from hetis.planner.convert import documents, names
from hetis.planner.convert.plans import FROM_PROTO, objective_from_proto
from hetis.planner.jobs.messages import PosedProblem
from hetis.planner.resources.requests import Checks
from hetis.planner.store import ClusterRecord, ProfileRecord, etag_of
from hetis.planner.use_cases.place import PLACES, Settings
from hetis.planner.use_cases.precision import in_precision
from hetis.planner.use_cases.sources import Inputs, LoadedInputs, ReplicaLimits, engine_rules, family_of, ordered
from hetis.profiler.defaults import default_profile
from hetis.solver.cluster import Cluster, Network, NodeGroup
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Objective, Role
from hetis.solver.problem import MOST_CHUNKS, NOTHING_SET, EngineRules, EngineSettings
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload
from hetis.v1 import plan_pb2, replica_pb2

DEFAULT_STRATEGY = "hetis"
LEAST_TIME_S = 0.01
LONGEST_TIME_S = 24 * 3600.0
MOST_PROFILES = 64
MOST_LABELS = 64
MOST_STAGES = 16
_SEEDS = 2**31  # the range of the solvers' own seeds
_LABEL = re.compile(r"[a-z0-9._/-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """The limits of a search: its ``threads``, and ``time_s``, the longest time limit that callers may request."""

    threads: int = 1
    time_s: float = LONGEST_TIME_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpec:
    """A spec whose fields are valid; profiles and cluster are still names."""

    model: ModelSpec
    workload: Workload
    weights: str | None = None  # precision, as `chosen_precision` reads it; None: the model's
    kv: str | None = None
    mtp: str | None = None  # drafts, as `drafts` reads them; None: the model's
    origins: Mapping[str, str]  # of model and workload
    profiles: Sequence[str]
    objective: Objective
    settings: Settings
    engine_settings: EngineSettings = NOTHING_SET


def check_labels(checks: Checks, labels: Mapping[str, str], field: str) -> None:
    """Check the limits that ``plan.proto`` states."""
    checks.require(len(labels) <= MOST_LABELS, field, f"has {len(labels)} entries, at most {MOST_LABELS} are allowed")
    for key, value in sorted(labels.items())[:MOST_LABELS]:
        right = 1 <= len(key) <= 63 and len(value) <= 255 and _LABEL.fullmatch(key) and _LABEL.fullmatch(value)
        checks.require(
            bool(right), f'{field}["{key[:63]}"]', "must be of a-z 0-9 - _ . /, the key 1 to 63 and the value 0 to 255"
        )


async def read_spec(checks: Checks, spec: plan_pb2.PlanSpec, field: str, limits: SearchLimits) -> ReadSpec | None:
    """Return the spec, or None if ``checks`` has found an error."""
    model = await _model(checks, spec, field)
    workload = await _workload(checks, spec, field)
    objective = objective_from_proto(
        spec.objective, f"{field}.objective", lambda path, text: checks.require(False, path, text)
    )
    settings = _settings(checks, spec, field, limits)
    engine_settings = _engine_settings(checks, spec, field)
    texts: tuple[tuple[str, str, Callable[[str], object]], ...] = (
        ("weights", spec.weights, lambda text: chosen_precision(text, PRECISIONS)),
        ("kv", spec.kv, lambda text: chosen_precision(text, KV_PRECISIONS)),
        ("mtp", spec.mtp, drafts),
    )
    for name, asked, read in texts:
        try:
            if asked:
                read(asked)
        except ValueError as error:
            checks.require(False, f"{field}.{name}", str(error))
    checks.require(
        len(spec.profiles) <= MOST_PROFILES,
        f"{field}.profiles",
        f"has {len(spec.profiles)} entries, at most {MOST_PROFILES} are allowed",
    )
    for position, profile in enumerate(spec.profiles[:MOST_PROFILES]):
        checks.name(f"{field}.profiles[{position}]", profile, names.PROFILE)
    if model is None or workload is None:
        return None
    return ReadSpec(
        model=model,
        workload=workload,
        weights=spec.weights or None,
        kv=spec.kv or None,
        mtp=spec.mtp or None,
        origins={
            "model": spec.model_name or spec.model_document.source_name or "document",
            "workload": spec.workload_name or spec.workload_document.source_name or "document",
        },
        profiles=tuple(spec.profiles),
        objective=objective,
        settings=settings,
        engine_settings=engine_settings,
    )


def choose_profiles(
    spec: ReadSpec, named: Sequence[ProfileRecord], stored: Sequence[ProfileRecord], gpus: Sequence[str], field: str
) -> dict[str, ProfileRecord]:
    """Return the profile of every GPU type that has one: the named one, else the newest of those stored.

    Raises:
        ServiceError: INVALID_FIELD.
    """
    checks, chosen = Checks(), dict[str, ProfileRecord]()
    for position, record in enumerate(named):
        path = f"{field}.profiles[{position}]"
        checks.require(record.gpu_type not in chosen, path, f"is a second profile of {record.gpu_type}, one is allowed")
        hint = did_you_mean(record.gpu_type, gpus)
        checks.require(record.gpu_type in gpus, path, f"is of {record.gpu_type}, which the cluster has not{hint}")
        chosen[record.gpu_type] = record
    checks.raise_if_wrong()
    for record in sorted(stored, key=lambda one: one.update_time_s):
        if record.gpu_type not in {one.gpu_type for one in named}:
            chosen[record.gpu_type] = record
    return chosen


def gpu_types_of(cluster: Cluster) -> list[str]:
    return list(dict.fromkeys(slots.gpu for group in cluster.node_groups for slots in group.gpus))


def pose(
    spec: ReadSpec,
    record: ClusterRecord,
    declared: Cluster,
    left_out: frozenset[str],
    profiles: Mapping[str, ProfileRecord],
) -> PosedProblem:
    """Return the problem of a fleet without the nodes ``left_out``. Slow for large fleets: not for an event loop.

    Raises:
        InvalidProblemError: the inputs contradict each other.
    """
    cluster = without_nodes(declared, left_out)
    if not cluster.node_groups:
        raise InvalidProblemError(f"all {len(left_out)} nodes of {record.name} drain or are lost")
    by_gpu = {
        gpu: (profiles[gpu].name, documents.read_document(profiles[gpu].body.document, Profile))
        if gpu in profiles
        else default_profile(cluster.gpu_types[gpu])
        for gpu in gpu_types_of(cluster)
    }
    origin = f"{record.name} {etag_of(record)}"
    if left_out:
        origin += f" without {', '.join(sorted(left_out))}"
    loaded = LoadedInputs(
        inputs=Inputs(
            cluster=cluster,
            model=spec.model,
            workload=spec.workload,
            profiles={gpu: profile for gpu, (_, profile) in by_gpu.items()},
            engine_settings=spec.engine_settings,
        ),
        origins={
            **spec.origins,
            "cluster": origin,
            "profiles": {gpu: where for gpu, (where, _) in by_gpu.items()},
        },
    )
    posed = PosedProblem(
        loaded=in_precision(loaded, weights=spec.weights, kv=spec.kv, mtp=spec.mtp),
        objective=spec.objective,
        settings=spec.settings,
    )
    posed.problem()
    return posed


async def _model(checks: Checks, spec: plan_pb2.PlanSpec, field: str) -> ModelSpec | None:
    match spec.WhichOneof("model"):
        case "model_name":
            try:
                return catalogue.find_model(spec.model_name).model
            except catalogue.UnknownNameError as error:
                checks.require(False, f"{field}.model_name", str(error))
        case "model_document":
            return await checks.document(
                f"{field}.model_document", spec.model_document, partial(documents.read_document, kind=ModelSpec)
            )
        case None:
            checks.require(False, f"{field}.model_name", "is missing: name a model, or send model_document")
    return None


async def _workload(checks: Checks, spec: plan_pb2.PlanSpec, field: str) -> Workload | None:
    match spec.WhichOneof("workload"):
        case "workload_name":
            try:
                return await asyncio.to_thread(named_workload, spec.workload_name)
            except DocumentError as error:
                checks.require(False, f"{field}.workload_name", error.problems[0].message)
        case "workload_document":
            return await checks.document(
                f"{field}.workload_document", spec.workload_document, partial(documents.read_document, kind=Workload)
            )
        case None:
            checks.require(False, f"{field}.workload_name", "is missing: name a workload, or send workload_document")
    return None


def _settings(checks: Checks, spec: plan_pb2.PlanSpec, field: str, limits: SearchLimits) -> Settings:
    from hetis.solver.placement.strategies import STRATEGIES

    defaults = Settings()
    strategy = spec.strategy or DEFAULT_STRATEGY
    checks.require(
        strategy in STRATEGIES,
        f"{field}.strategy",
        f"is {strategy[:80]!r}, must be one of {', '.join(STRATEGIES)}{did_you_mean(strategy, STRATEGIES)}",
    )
    roles = _roles(checks, spec, field)
    if strategy in STRATEGIES and roles:
        try:
            family_of(strategy, roles)
        except InvalidProblemError as error:
            checks.require(False, f"{field}.roles", str(error))
    engine = _engine(checks, spec, field) if strategy in STRATEGIES else None
    checks.require(
        spec.survive in ("", *PLACES),
        f"{field}.survive",
        f"is {spec.survive[:80]!r}, must be one of {', '.join(PLACES)}{did_you_mean(spec.survive[:80], PLACES)}",
    )
    needs = plan_pb2.OBJECTIVE_KIND_COST, plan_pb2.OBJECTIVE_KIND_GPUS
    checks.require(
        not spec.survive or spec.objective.kind in needs,
        f"{field}.survive",
        "is set, and the objective has no demand that could be kept: it must be COST or GPUS",
    )
    gap = spec.gap_target if spec.HasField("gap_target") else defaults.gap_target
    checks.require(0 <= gap <= 1, f"{field}.gap_target", f"is {gap:g}, must be from 0 to 1")
    time_limit_s = min(defaults.time_limit_s, limits.time_s)
    if spec.HasField("time_limit"):
        time_limit_s = spec.time_limit.seconds + spec.time_limit.nanos / 1e9
        checks.require(
            LEAST_TIME_S <= time_limit_s <= limits.time_s,
            f"{field}.time_limit",
            f"is {time_limit_s:g} s, must be {LEAST_TIME_S:g} s to {limits.time_s:g} s",
        )
    return Settings(
        strategy=strategy,
        roles=roles,
        engine=engine,
        time_limit_s=time_limit_s,
        gap_target=gap,
        seed=spec.seed % _SEEDS,
        threads=min(spec.num_threads or limits.threads, limits.threads),
        survive=spec.survive,
    )


def _roles(checks: Checks, spec: plan_pb2.PlanSpec, field: str) -> tuple[Role, ...]:
    """Return the valid roles; errors go to ``checks``."""
    known = ", ".join(role.name for role in Role)
    for position, value in enumerate(spec.roles[: len(Role) + 1]):
        named = names.name_of(replica_pb2.ReplicaRole, value).removeprefix("REPLICA_ROLE_")
        checks.require(value in FROM_PROTO, f"{field}.roles[{position}]", f"is {named}, must be one of {known}")
    num_different = len(set(spec.roles))
    checks.require(
        num_different == len(spec.roles),
        f"{field}.roles",
        f"has {len(spec.roles)} entries of {num_different} roles, each may be there once",
    )
    return ordered(FROM_PROTO[value] for value in spec.roles if value in FROM_PROTO)


def _engine(checks: Checks, spec: plan_pb2.PlanSpec, field: str) -> EngineRules | None:
    """Return the rules that plans keep to, or None if there are none or ``checks`` has found an error."""
    from hetis.solver.placement.engines import ANY_ENGINE, ENGINES

    strategy, known = spec.strategy or DEFAULT_STRATEGY, [*ENGINES, ANY_ENGINE]
    if spec.engine and spec.engine not in known:
        hint = did_you_mean(spec.engine, known)
        checks.require(
            False, f"{field}.engine", f"is {spec.engine[:80]!r}, must be one of {', '.join(known)}{hint}"
        )  # fmt: skip
        return None
    if not checks.require(
        spec.max_stages <= MOST_STAGES, f"{field}.max_stages", f"is {spec.max_stages}, must be {MOST_STAGES} at most"
    ):
        return None
    limits = ReplicaLimits(
        max_stages=spec.max_stages or None,
        max_gpus=spec.max_gpus or None,
        min_layers=spec.min_layers or None,
        max_nodes=spec.max_nodes or None,
    )
    try:
        rules = engine_rules(spec.engine or None, strategy, limits)
        family_of(strategy, engine=rules)
    except InvalidProblemError as error:
        checks.require(False, f"{field}.engine", str(error))
        return None
    return rules


def _engine_settings(checks: Checks, spec: plan_pb2.PlanSpec, field: str) -> EngineSettings:
    """Return the settings that engines are started with; none after an error, which goes to ``checks``."""
    given: dict[str, Any] = {
        "max_num_seqs": spec.max_num_seqs or None,
        "chunk_tokens": tuple(spec.chunk_tokens[: MOST_CHUNKS + 1]),
        "kv_blocks": spec.kv_blocks or None,
    }
    found = NOTHING_SET
    for name, value in given.items():
        try:
            found = replace(found, **{name: value})
        except InvalidProblemError as error:
            checks.require(False, f"{field}.{name}", str(error))
    return found


def without_nodes(cluster: Cluster, nodes: Collection[str]) -> Cluster:
    """Return the cluster without these nodes; the others keep their names and their links."""
    if not nodes:
        return cluster
    groups = tuple(part for group in cluster.node_groups for part in _rest(group, nodes))
    network: Network = replace(
        cluster.network,
        between_nodes={
            pair: link for pair, link in cluster.network.between_nodes.items() if not set(pair) & set(nodes)
        },
        between_zones={
            pair: link
            for pair, link in cluster.network.between_zones.items()
            if set(pair) <= {group.zone for group in groups}
        },
    )
    return replace(cluster, node_groups=groups, network=network)


def _rest(group: NodeGroup, nodes: Collection[str]) -> Iterator[NodeGroup]:
    """Yield what is left of a group.

    Groups count from 0 without gaps, so nodes after the first gap become their own groups.
    """
    names = [group.node_name(index) for index in range(group.count)]
    gaps = [index for index, name in enumerate(names) if name in nodes]
    if not gaps:
        yield group
        return
    if gaps[0]:
        yield replace(group, count=gaps[0])
    for name in names[gaps[0] :]:
        if name not in nodes:
            yield replace(group, name=name, count=1, numbered=False)
