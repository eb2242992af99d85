"""The inputs of a placement: from files and names to a problem, and from a saved plan back to its problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from hetis.engines.attention import KV_VENDORS
from hetis.engines.memory import memory_of, rank_memories
from hetis.engines.versions import Engine
from hetis.formats.catalogue import gpu_types, other_vendor
from hetis.formats.constraints import read_constraints
from hetis.formats.documents import (
    Value,
    digest,
    load_cluster,
    load_model,
    load_profile,
    load_workload,
    to_data,
)
from hetis.formats.errors import DocumentError, Problem, attempt, did_you_mean
from hetis.formats.files import read_text
from hetis.formats.positions import parse_text
from hetis.formats.traces import PrefixHitRate
from hetis.formats.workload import with_prefix_hits
from hetis.profiler.defaults import default_profile
from hetis.profiler.engines import PLUGINS
from hetis.profiler.possible import impossible
from hetis.profiler.roofline import shipped_efficiencies
from hetis.solver.cluster import Cluster, GpuType
from hetis.solver.constraints import Constraints
from hetis.solver.engine_rules import NOTHING_SET, EngineRules, EngineSettings, Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Objective, Role
from hetis.solver.plugin_time import NO_PLUGIN
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Profile, Source
from hetis.solver.rank_memory import RankMemories
from hetis.solver.workload import Workload

T = TypeVar("T")

# Origins of profiles and inputs that do not come from a file.
VALUE = "value"  # an input that was passed by a program


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The input values of a placement. The workload is not clipped; ``constraints`` are those that plans must obey.

    ``engine_settings``: the settings with which engines are started, whatever is planned.
    """

    cluster: Cluster
    model: ModelSpec
    workload: Workload
    profiles: Mapping[str, Profile]
    constraints: Constraints = ()
    engine_settings: EngineSettings = NOTHING_SET

    def problem(
        self, objective: Objective, strategy: str, roles: Sequence[Role] = (), engine: EngineRules | None = None,
        *, with_classes: bool = False,
    ) -> PlacementProblem:  # fmt: skip
        """Return the problem that the inputs define. Prompts are clipped to the model's context.

        All replicas serve all requests and keep the strictest limits of their classes; or, ``with_classes``, there may
        be pools for each.

        If no request has a second output token, there is no time between tokens, and a limit on TPOT is left out.

        Without ``roles``, replicas may have all roles of the strategy; without ``engine``, they obey no engine's rules.

        Raises:
            InvalidProblemError: the inputs contradict each other, or the strategy lacks one of these roles or supports
                no engine.
        """
        family = family_of(strategy, roles, engine, self.engine_settings)
        found = PlacementProblem(
            cluster=self.cluster,
            model=self.model,
            workload=self.workload.clipped_to(self.model.max_position),
            profiles=self.profiles,
            objective=self.applicable_limits(objective),
            family=family,
            constraints=self.constraints,
            memories=memories_for(family, self.cluster, self.model, self.profiles),
        )
        return found if with_classes else found.of_classes()

    def applicable_limits(self, objective: Objective) -> Objective:
        """Return the objective with only the limits that apply to the workload's requests."""
        return objective if self.has_tpot else replace(objective, tpot_limit_s=None)

    @property
    def has_tpot(self) -> bool:
        """Whether any request has a second output token; otherwise there is no time between tokens."""
        return any(one.output_tokens > 1.0 for one in self.workload.bins)

    def documents(self) -> dict[str, Any]:
        """Return all inputs as plain data that can be read without the catalogue."""
        return self._each(lambda value: to_data(value, self_contained=True))

    def digests(self) -> dict[str, Any]:
        """Return the SHA-256 of every document."""
        return self._each(digest)

    def _each(self, function: Callable[[Value], Any]) -> dict[str, Any]:
        return {
            "cluster": function(self.cluster),
            "model": function(self.model),
            "workload": function(self.workload),
            "profiles": {gpu: function(profile) for gpu, profile in self.profiles.items()},
        }


def memories_for(family: Family, cluster: Cluster, model: ModelSpec, profiles: Mapping[str, Profile]) -> RankMemories:
    """Return what the family's engine takes of each kind of rank; vLLM, where it has none, so that all compare.

    It has the catalogue's GPU types, too: where no plan exists, some are tried. A profile of less usable memory than is
    modelled for its GPU type was measured, and limits the engine.
    """
    of_engine = memory_of(Engine.VLLM if family.engine is None else Engine(family.engine.name))
    own = {gpu: cluster.gpu_types[gpu] for gpu in cluster.types_used()}
    modelled = shipped_efficiencies().memory.usable_ratio
    measured = {
        gpu: profiles[gpu].usable_bytes
        for gpu, kind in own.items()
        if profiles[gpu].usable_bytes < int(kind.memory_bytes * modelled)
    }
    found = rank_memories(
        of_engine, model, gpu_types() | own, family.tp_sizes, family.attention_dp_of(model),
        utilisation=family.engine_settings.gpu_memory_utilization,
    )  # fmt: skip
    limits = {kind: measured.get(kind.gpu, math.inf) for kind in found}
    return {
        kind: replace(
            memory,
            usable_bytes=min(memory.usable_bytes, limits[kind]),
            free_bytes=min(memory.free_bytes, limits[kind]),
        )
        for kind, memory in found.items()
    }


def family_of(
    strategy: str,
    roles: Sequence[Role] = (),
    engine: EngineRules | None = None,
    engine_settings: EngineSettings = NOTHING_SET,
) -> Family:
    """Return the family of a strategy, restricted to ``roles`` if there are any, and to the engine's rules.

    Its replicas obey the settings with which engines are started.

    Raises:
        InvalidProblemError: the strategy lacks one of these roles, or they need others; or it is a published heuristic,
            which knows no engine's rules, and there are some.
    """
    from hetis.solver.placement.families import STRATEGIES, run_by

    family = STRATEGIES[strategy].restrict(Family())
    extra = [role for role in roles if role not in family.roles]
    if extra:
        has = ", ".join(family.roles)
        raise InvalidProblemError(f"strategy {strategy} has {has} replicas only, {', '.join(extra)} are asked for")
    if engine is not None and STRATEGIES[strategy].is_published:
        raise InvalidProblemError(f"strategy {strategy} is a published heuristic, which does not support {engine.name}")
    family = replace(family, roles=ordered(roles)) if roles else family
    return (family if engine is None else run_by(family, engine)).at(engine_settings)


def engine_rules(
    name: str | None, strategy: str, *, kv_between_vendors: bool = False, **limits: int | None
) -> EngineRules | None:
    """Return the rules of the requested engine, by default of vLLM with the plugin; None for published heuristics.

    ``limits`` on every replica are in addition to the engine's rules, by its fields' names; None: the engine's own.

    Raises:
        InvalidProblemError: there is no such engine, it cannot send KV between vendors, or limits are specified for a
            published heuristic.
    """
    from hetis.solver.placement.families import DEFAULT_ENGINE, STRATEGIES

    if name is not None or not STRATEGIES[strategy].is_published:
        rules = rules_of_engine(name or DEFAULT_ENGINE, **limits)
        if not kv_between_vendors:
            return rules
        if rules.name not in KV_VENDORS:
            raise InvalidProblemError(f"KV between vendors is not known to work in {rules.name}")
        return replace(rules, kv_vendors=KV_VENDORS[rules.name])
    if kv_between_vendors or any(limit is not None for limit in limits.values()):
        raise InvalidProblemError(f"limits on replicas apply to an engine's plans, not to strategy {strategy}")
    return None


def rules_of_engine(name: str, **limits: int | None) -> EngineRules:
    """Return the rules of a named engine with limits. Raises InvalidProblemError: there is no such engine."""
    from hetis.solver.placement.families import run_by

    given: dict[str, Any] = {limit: value for limit, value in limits.items() if value is not None}
    rules = named(EngineRules(name="", **given), name)
    run_by(Family(), rules)
    return rules


def named(rules: EngineRules, name: str) -> EngineRules:
    """Return the same limits for another engine, with what attention workers cost its hosts."""
    kv_vendors = KV_VENDORS.get(name, ()) if rules.kv_vendors else ()
    return replace(rules, name=name, plugin=PLUGINS.get(name, NO_PLUGIN), kv_vendors=kv_vendors)


def ordered(roles: Iterable[Role]) -> tuple[Role, ...]:
    """Return the roles in the order in which families list them, without duplicates."""
    wanted = set(roles)
    return tuple(role for role in Role if role in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedInputs:
    """Inputs, and the file or name from which each of them came; profiles are by GPU type.

    ``notes``: sentences about changes made to the inputs.
    """

    inputs: Inputs
    origins: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def with_constraints(self, *, pins: Sequence[str], forbids: Sequence[str]) -> LoadedInputs:
        """Return the inputs with the constraints of ``--pin`` and ``--forbid`` options.

        Raises:
            DocumentError: contains the problems of all options.
        """
        return replace(
            self, inputs=replace(self.inputs, constraints=read_constraints(pins, forbids, self.inputs.cluster))
        )

    def at(self, settings: EngineSettings) -> LoadedInputs:
        """Return the inputs for engines that are started with these settings."""
        return replace(self, inputs=replace(self.inputs, engine_settings=settings))


def load_inputs(
    *, cluster: str | Cluster, model: str | ModelSpec, workload: str | Workload, profiles: Sequence[str] = (),
    prefix_hit_rate: PrefixHitRate | None = None, burstiness: float | None = None,
) -> LoadedInputs:  # fmt: skip
    """Read those inputs of a placement that are not values; GPU types without a file get `default_profile`.

    ``prefix_hit_rate`` and ``burstiness`` replace the workload's own.

    Raises:
        DocumentError: contains the problems of all inputs; or those of GPU types in a cluster file that have no profile
            and cannot be modelled.
        InvalidProblemError: a GPU type of a cluster without a file has no profile and none can be modelled.
    """
    problems: list[Problem] = []
    fleet = attempt(lambda: load_cluster(cluster) if isinstance(cluster, str) else cluster, problems)
    notes: list[str] = []
    spec = attempt(lambda: load_model(model, notes=notes) if isinstance(model, str) else model, problems)
    traffic = attempt(lambda: _traffic(workload, prefix_hit_rate, notes), problems)
    measured = load_profiles(profiles, problems)
    if fleet is not None:
        problems += unused_profiles(measured, fleet)
        problems += impossible_profiles(measured, fleet.gpu_types)
    if problems or fleet is None or spec is None or traffic is None:
        raise DocumentError(problems)
    traffic = traffic if burstiness is None else replace(traffic, burstiness=burstiness)
    by_gpu = _profiles_of(fleet, measured, cluster)
    hostless = [gpu for gpu in by_gpu if gpu in measured and not _has_measured_host(measured[gpu][1])]
    mixes = bool(hostless) and len(by_gpu) > len(measured)
    return LoadedInputs(
        notes=(
            *([f"profiles from files are used unchanged: {', '.join(hostless)} has no host time of an engine"] * mixes),
            *notes_on_vendors(fleet),
            *notes,
        ),
        inputs=Inputs(
            cluster=fleet, model=spec, workload=traffic, profiles={gpu: profile for gpu, (_, profile) in by_gpu.items()}
        ),
        origins={
            **{
                kind: given if isinstance(given, str) else VALUE
                for kind, given in (("cluster", cluster), ("model", model), ("workload", workload))
            },
            "profiles": {gpu: origin for gpu, (origin, _) in by_gpu.items()},
        },
    )


def profile_without_file(gpu: GpuType) -> tuple[str, Profile]:
    """Return the `default_profile`. Raises InvalidProblemError that says what helps if there is none."""
    try:
        return default_profile(gpu)
    except InvalidProblemError as error:
        near = did_you_mean(gpu.architecture, shipped_efficiencies().architectures)
        helps = "name the most similar of them as its architecture in the cluster file, or measure it (--profile FILE)"
        raise InvalidProblemError(f"{error}{near}; {helps}") from None


def _profiles_of(
    fleet: Cluster, measured: Mapping[str, tuple[str, Profile]], source: str | Cluster
) -> dict[str, tuple[str, Profile]]:
    """Return origin and profile by GPU type. Errors name the line of types in a cluster file."""
    found, problems, text = dict[str, tuple[str, Profile]](), list[Problem](), None
    for gpu in fleet.types_used():
        try:
            found[gpu] = measured.get(gpu) or profile_without_file(fleet.gpu_types[gpu])
        except InvalidProblemError as error:
            if not isinstance(source, str) or source == "-":
                raise
            text = text or parse_text(read_text(source), source)[1]
            problems.append(text.problem(("gpu_types", gpu, "architecture"), str(error)))
    if problems:
        raise DocumentError(problems)
    return found


def notes_on_vendors(fleet: Cluster) -> list[str]:
    """Return a note for each GPU type of a vendor that makes no GPUs of its architecture."""
    types = (fleet.gpu_types[gpu] for gpu in fleet.types_used())
    return [
        f"{gpu.name} is said to be of {gpu.vendor}, its architecture {gpu.architecture} is {other}'s: its times are of "
        "the architecture, its engines of the vendor"
        for gpu in types
        if (other := other_vendor(gpu)) is not None
    ]


def _traffic(given: str | Workload, prefix_hit_rate: PrefixHitRate | None, notes: list[str]) -> Workload:
    if isinstance(given, str):
        return load_workload(given, prefix_hit_rate=prefix_hit_rate, notes=notes)
    return with_prefix_hits(given, prefix_hit_rate)


def _has_measured_host(profile: Profile) -> bool:
    """Return whether the host's time of an iteration is an engine's, rather than assumed to be as short as possible.

    Only profiles with the times of an engine have one per sequence.
    """
    return any(
        fit.op is Op.SAMPLE or (fit.op is Op.STEP and fit.provenance.source is not Source.MODELLED)
        for fit in profile.fits
    )


def engine_settings(
    *, max_num_seqs: int | None, chunk_tokens: Iterable[int | None], kv_blocks: int | None,
    min_context: int | None = None, gpu_memory_utilization: float | None = None,
) -> EngineSettings:  # fmt: skip
    """Return the settings in options; chunk sizes may be in any order, and None stands for none."""
    chunks = sorted({size for size in chunk_tokens if size is not None})
    return EngineSettings(
        max_num_seqs=max_num_seqs, chunk_tokens=tuple(chunks), kv_blocks=kv_blocks, min_context=min_context,
        gpu_memory_utilization=gpu_memory_utilization,
    )  # fmt: skip


def load_profiles(paths: Iterable[str], problems: list[Problem]) -> dict[str, tuple[str, Profile]]:
    """Return path and profile by GPU type, and add the problems of the files; a type's second profile is one."""
    found = dict[str, tuple[str, Profile]]()
    for path in paths:
        profile = attempt(partial(load_profile, path), problems)
        if profile is None:
            continue
        if profile.gpu in found:
            message = f"is a second profile of {profile.gpu}, the first is {found[profile.gpu][0]}: give only one"
            problems.append(Problem(file=path, path="gpu", message=message))
        else:
            found[profile.gpu] = path, profile
    return found


def unused_profiles(given: Mapping[str, tuple[str, Profile]], cluster: Cluster) -> list[Problem]:
    """Return a problem for every profile of a GPU type that the cluster lacks."""
    used = cluster.types_used()
    return [
        Problem(file=path, path="gpu", message=f"{gpu} is not in cluster {cluster.name}{did_you_mean(gpu, used)}")
        for gpu, (path, _) in given.items()
        if gpu not in used
    ]


def impossible_profiles(given: Mapping[str, tuple[str, Profile]], gpu_types: Mapping[str, GpuType]) -> list[Problem]:
    """Return a problem for every number in a file that no GPU of its type can reach, as `hetis-profile check` would.

    ``gpu_types`` are those of the cluster, whose peaks may differ from the catalogue's.
    """
    return [
        Problem(file=path, message=sentence)
        for gpu, (path, profile) in given.items()
        if gpu in gpu_types
        for sentence in impossible(profile, gpu_types[gpu])
    ]
