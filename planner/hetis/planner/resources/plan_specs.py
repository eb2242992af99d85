"""Poses the problem of a requested plan: reports all invalid fields first, then contradictions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, did_you_mean
from hetis.formats.models.document import drafts
from hetis.formats.models.dtypes import KV_PRECISIONS, PRECISIONS, chosen_precision
from hetis.formats.workload import named_workload
from hetis.planner.convert import documents, names
from hetis.planner.convert.plans import FROM_PROTO, objective_from_proto
from hetis.planner.export import ExportTarget
from hetis.planner.failures import invalid_field
from hetis.planner.jobs.messages import PosedProblem
from hetis.planner.resources.checks import Checks
from hetis.planner.store import ClusterRecord, ProfileRecord, etag_of
from hetis.planner.use_cases import service_level
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import gpu_types_of, in_precision
from hetis.planner.use_cases.record.forms import PLACES
from hetis.planner.use_cases.request import LIMITS
from hetis.planner.use_cases.service_level import ServiceLevel, Statistic
from hetis.planner.use_cases.sources import (
    Inputs,
    LoadedInputs,
    engine_rules,
    family_of,
    impossible_profiles,
    ordered,
)
from hetis.profiler.defaults import default_profile
from hetis.solver.advice import without_nodes
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import MOST_CHUNKS, NOTHING_SET, EngineRules, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import DEFAULT_STRATEGY, Objective, Role
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload
from hetis.v1 import plan_pb2, replica_pb2

T = TypeVar("T")
V = TypeVar("V", ModelSpec, Workload)
SPEC = "plan.spec"
LEAST_TIME_S = 0.01
LONGEST_TIME_S = 24 * 3600.0
MOST_PROFILES = 64
MOST_LABELS = 64
MOST_STAGES = 16
_SEEDS = 2**31  # the range of the solvers' own seeds
_LABEL = re.compile(r"[a-z0-9._/-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """The limits of a search: ``time_s`` is the longest time limit that callers may request."""

    time_s: float = LONGEST_TIME_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpec:
    """A spec with valid fields, in which profiles and cluster are still names."""

    spec: plan_pb2.PlanSpec
    model: ModelSpec
    workload: Workload
    objective: Objective
    settings: PlacementSettings
    engine_settings: EngineSettings
    verify: bool
    service_level: ServiceLevel

    def origins(self) -> dict[str, str]:
        """Return where the model and the workload come from."""
        spec = self.spec
        return {
            "model": spec.model_name or spec.model_document.source_name or "document",
            "workload": spec.workload_name or spec.workload_document.source_name or "document",
        }


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
    read: ReadSpec,
    record: ClusterRecord,
    declared: Cluster,
    left_out: frozenset[str],
    profiles: Mapping[str, ProfileRecord],
) -> PosedProblem:
    """Return the problem of a fleet without the nodes ``left_out``.

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
    loaded = LoadedInputs(
        inputs=Inputs(
            cluster=cluster,
            model=read.model,
            workload=read.workload,
            profiles={gpu: profile for gpu, (_, profile) in by_gpu.items()},
            engine_settings=read.engine_settings,
        ),
        origins={**read.origins(), "cluster": origin, "profiles": {gpu: where for gpu, (where, _) in by_gpu.items()}},
    )
    spec = read.spec
    for field, requested in (("weights", spec.weights), ("kv", spec.kv)):  # each by itself, so that the error names it
        try:
            in_precision(loaded, **{"weights": None, "kv": None, field: requested or None})
        except InvalidProblemError as error:
            raise invalid_field(f"{SPEC}.{field}", str(error).removeprefix("precision: ")) from None
    posed = PosedProblem(
        loaded=in_precision(loaded, weights=spec.weights or None, kv=spec.kv or None, mtp=spec.mtp or None),
        objective=read.objective,
        settings=read.settings,
        verify=read.verify,
        service_level=read.service_level,
    )
    posed.problem()
    return posed


async def read_spec(checks: Checks, spec: plan_pb2.PlanSpec, limits: SearchLimits) -> ReadSpec | None:
    """Return the spec, or None if ``checks`` has found an error."""
    return await _SpecReader(checks, spec, limits).read()


@dataclass(frozen=True, slots=True)
class _SpecReader:
    """Reads one spec; errors are added to ``checks``."""

    checks: Checks
    spec: plan_pb2.PlanSpec
    limits: SearchLimits

    def require(self, is_right: bool, field: str, description: str) -> bool:
        return self.checks.require(is_right, f"{SPEC}.{field}", description)

    def attempt(self, field: str, read: Callable[[], T]) -> T | None:
        """Return what ``read`` returns, or None if it finds the field wrong."""
        try:
            return read()
        except (InvalidProblemError, ValueError) as error:
            self.require(False, field, str(error))
            return None

    def choice(self, field: str, value: str, known: Collection[str]) -> bool:
        hint = did_you_mean(value[:80], known)
        return self.require(value in known, field, f"is {value[:80]!r}, must be one of {', '.join(known)}{hint}")

    async def read(self) -> ReadSpec | None:
        checks, spec = self.checks, self.spec
        model = await self._given("model", lambda name: catalogue.find_model(name).model, ModelSpec)
        workload = await self._given("workload", named_workload, Workload)
        objective = objective_from_proto(
            spec.objective, f"{SPEC}.objective", lambda path, text: checks.require(False, path, text)
        )
        settings, engine_settings = self._settings(objective), self._engine_settings()
        level = self._service_level(objective)
        texts: tuple[tuple[str, str, Callable[[str], object]], ...] = (
            ("weights", spec.weights, lambda text: chosen_precision(text, PRECISIONS)),
            ("kv", spec.kv, lambda text: chosen_precision(text, KV_PRECISIONS)),
            ("mtp", spec.mtp, drafts),
        )
        for name, requested, parse in texts:
            if requested:
                self.attempt(name, partial(parse, requested))
        num = len(spec.profiles)
        self.require(num <= MOST_PROFILES, "profiles", f"has {num} entries, at most {MOST_PROFILES} are allowed")
        for position, profile in enumerate(spec.profiles[:MOST_PROFILES]):
            checks.name(f"{SPEC}.profiles[{position}]", profile, names.PROFILE)
        if model is None or workload is None:
            return None
        return ReadSpec(
            spec=spec,
            model=model,
            workload=workload,
            objective=objective,
            settings=settings,
            engine_settings=engine_settings,
            verify=not spec.skip_verification,
            service_level=level,
        )

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

    def _settings(self, objective: Objective) -> PlacementSettings:
        from hetis.solver.placement.families import STRATEGIES
        from hetis.solver.placement.rungs import RUNGS

        spec, limits, defaults = self.spec, self.limits, PlacementSettings()
        strategy = spec.strategy or DEFAULT_STRATEGY
        is_known = self.choice("strategy", strategy, STRATEGIES)
        roles = self._roles()
        if is_known and roles:
            self.attempt("roles", partial(family_of, strategy, roles))
        engine = self._engine() if is_known else None
        if spec.survive:
            self.choice("survive", spec.survive, PLACES)
        if spec.rung:
            self.choice("rung", spec.rung, RUNGS)
        if spec.target:
            self.choice("target", spec.target, [target.value for target in ExportTarget])
        worth = spec.worth if spec.HasField("worth") else defaults.worth
        self.require(0 <= worth < 1, "worth", f"is {worth:g}, must be from 0 to below 1")
        self.require(0 <= spec.keep <= 1, "keep", f"is {spec.keep:g}, must be from 0 to 1")
        message = "is set, but there is no rate to maximise that survives a loss"
        is_kept = bool(spec.survive) and objective.maximises
        self.require(not spec.keep or is_kept, "keep", message)
        gap = spec.gap_target if spec.HasField("gap_target") else defaults.gap_target
        self.require(0 <= gap <= 1, "gap_target", f"is {gap:g}, must be from 0 to 1")
        time_limit_s = min(defaults.time_limit_s, limits.time_s)
        if spec.HasField("time_limit"):
            time_limit_s = names.seconds_of(spec.time_limit)
            message = f"is {time_limit_s:g} s, must be {LEAST_TIME_S:g} s to {limits.time_s:g} s"
            self.require(LEAST_TIME_S <= time_limit_s <= limits.time_s, "time_limit", message)
        return PlacementSettings(
            strategy=strategy,
            roles=roles,
            engine=engine,
            keep_stages=spec.max_stages > 0,
            time_limit_s=time_limit_s,
            gap_target=gap,
            seed=spec.seed % _SEEDS,
            survive=spec.survive,
            keep=spec.keep or None,
            rung=spec.rung,
            worth=worth,
            target=spec.target,
            least_layers=1 if spec.min_layers else defaults.least_layers,
        )

    def _roles(self) -> tuple[Role, ...]:
        """Return the valid roles."""
        given, known = self.spec.roles, ", ".join(role.name for role in Role)
        for position, value in enumerate(given[: len(Role) + 1]):
            named = names.word_of(replica_pb2.ReplicaRole, value)
            self.require(value in FROM_PROTO, f"roles[{position}]", f"is {named}, must be one of {known}")
        num_different = len(set(given))
        message = f"has {len(given)} entries of {num_different} roles, each may appear once"
        self.require(num_different == len(given), "roles", message)
        return ordered(FROM_PROTO[value] for value in given if value in FROM_PROTO)

    def _engine(self) -> EngineRules | None:
        """Return the engine's rules that plans must obey; None if there are none, or after an error."""
        from hetis.solver.placement.families import ENGINE_GONE, ENGINES, NO_ENGINE

        spec, strategy = self.spec, self.spec.strategy or DEFAULT_STRATEGY
        if not self.require(spec.engine != NO_ENGINE, "engine", ENGINE_GONE):
            return None
        if spec.engine and not self.choice("engine", spec.engine, list(ENGINES)):
            return None
        message = f"is {spec.max_stages}, must be {MOST_STAGES} at most"
        if not self.require(spec.max_stages <= MOST_STAGES, "max_stages", message):
            return None
        limits = {name: getattr(spec, name) or None for name in LIMITS}
        across = spec.kv_between_vendors
        made = partial(engine_rules, spec.engine or None, strategy, kv_between_vendors=across, **limits)
        rules = self.attempt("engine", made)
        family = self.attempt("engine", partial(family_of, strategy, engine=rules)) if rules is not None else None
        return None if family is None else rules

    def _service_level(self, objective: Objective) -> ServiceLevel:
        """Return the level that simulated traffic must keep; the default after an error."""
        spec = self.spec
        given = {"ttft": spec.ttft_statistic, "tpot": spec.tpot_statistic}
        known = [one.value for one in Statistic]
        known_ones = [not text or self.choice(f"{name}_statistic", text, known) for name, text in given.items()]
        if not all(known_ones):
            return service_level.DEFAULT
        ttft, tpot = (Statistic(text) if text else None for text in given.values())
        level, verify = service_level.DEFAULT, not spec.skip_verification
        for field, own_ttft, own_tpot, attainment in (  # each by itself first, so that the error names the wrong one
            ("ttft_statistic", ttft, None, None),
            ("tpot_statistic", None, tpot, None),
            ("attainment", ttft, tpot, spec.attainment or None),
        ):
            requested = partial(service_level.requested_level, ttft=own_ttft, tpot=own_tpot, attainment=attainment)
            read = partial(requested, objective=objective, verify=verify)
            if (found := self.attempt(field, read)) is None:
                return service_level.DEFAULT
            level = found
        return level

    def _engine_settings(self) -> EngineSettings:
        """Return the settings with which engines are started, without invalid ones."""
        given: dict[str, Any] = {
            "max_num_seqs": self.spec.max_num_seqs or None,
            "chunk_tokens": tuple(self.spec.chunk_tokens[: MOST_CHUNKS + 1]),
            "kv_blocks": self.spec.kv_blocks or None,
        }
        found = NOTHING_SET
        for name, value in given.items():
            found = self.attempt(name, partial(replace, found, **{name: value})) or found
        return found
