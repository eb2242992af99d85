"""The placement problem: a cluster, a model, a workload, profiles, an objective, and the family of allowed plans."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hetis.solver.cluster import Cluster, NodeGroup
from hetis.solver.constraints import (
    ConstraintIndex,
    Constraints,
    Duty,
    Exclude,
    RestrictRole,
    Selected,
    Unit,
    described,
)
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.node_links import NodeLinks, node_links_of
from hetis.solver.plan import ALONE, PLANNED_UTILISATION, ClassShare, Lanes, Objective, ReplicaPlan
from hetis.solver.profile import Profile
from hetis.solver.rank_memory import RankKind, RankMemories, RankMemory
from hetis.solver.workload import Workload, WorkloadMoments


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Constants of the cost model, each with its reason.

    Attributes:
        block_tokens: tokens of a KV block.
        kv_headroom_z: KV room is planned for mean + z standard deviations of what the requests of a copy hold
            (1.645: 95%). Filled to the mean, an engine would preempt all the time.
        full_slack: share added to the interval between completions if at least two micro-batches are in flight per
            stage copy. Iterations with and without a chunk alternate, so the bottleneck's queue sometimes runs dry. On
            prefill and decode replicas, where nothing alternates, it is also the least slack with fewer micro-batches.
        tight_slack: the same with fewer than two. A single micro-batch never waits and has no slack.
        full_unevenness, tight_unevenness: lower bounds on these shares as multiples of ``E / m - 1``, with E the
            longest of M iterations and m the mean one of a stage, because an iteration with a chunk delays the others.
            Fitted to 600 simulated pipelines (`docs/benchmarks.md`, "simulation"). On prefill replicas
            ``tight_unevenness`` multiplies the spread of chunks (`mixes.chunk_spread`), and with two micro-batches per
            copy there is none.
        planned_utilisation: goodput as a share of the saturated rate.
        chooses_utilisation: whether a search for what plans keep chooses another.
        lanes: replicas of each role that compute prompts together.
    """

    block_tokens: int = 16
    kv_headroom_z: float = 1.645
    full_slack: float = 0.02
    tight_slack: float = 0.12
    full_unevenness: float = 0.28
    tight_unevenness: float = 0.8
    planned_utilisation: float = PLANNED_UTILISATION
    chooses_utilisation: bool = True
    lanes: Lanes = ALONE


APART = "replicas, and the KV that they exchange inside a zone, with GPUs of one vendor and one precision"
"""Description of families whose GPUs have several builds."""
ACROSS = "replicas with GPUs of one vendor and one precision"
"""Description of families whose GPUs have several builds, where all KV may go from one vendor to another."""
_HOPS = (
    "with each hop charged at most the slowest explicit link between nodes of its replica, and KV that is handed over "
)
OWN_LINKS = (
    f"{_HOPS}inside a zone at most the slowest between nodes of all replicas that exchange it, and to other zones the "
    "slowest of its node to any other"
)
LINKS_TO_ANY = f"{_HOPS}the slowest of its node to any other"
QUICK_LINKS = "the quickest explicit links count as the slowest of these, because too many differ"
EXPLICIT_LINKS = "computed with the slowest explicit link of any node of a group, whichever of them are used"
"""Descriptions of families of fleets with explicit links between nodes (`node_links_of`); old plans have `LINKS_TO_ANY`
or `EXPLICIT_LINKS`."""


def kernel_of_any_vendor(model: ModelSpec) -> Kernel | None:
    """Return the kernels that a model runs if GPUs of any vendor keep their KV alike; None: they do not.

    They are those of grouped-query and of latent attention in 16 bits, Triton's in vLLM, without states. FP8 of CDNA3
    is another format than NVIDIA's.
    """
    if model.kv_bytes != 2 or model.state_bytes() > 0.0:
        return None
    return next((kernel for kernel in (Kernel.GROUPED, Kernel.LATENT) if model.kernels == {kernel}), None)


class Build(NamedTuple):
    """The common properties of the GPUs that compute a replica's layers; for exchanges of KV see `kv_of`."""

    model: ModelSpec  # the model in a single precision
    vendor: str  # vendor of the GPUs; empty: any


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """Everything that a placement depends on; profiles are keyed by GPU type name.

    ``constraints`` are further conditions on the plan; the search moves them into cluster, family and
    ``constraint_index`` (`placement/constrained_problem.py`), and explicit links between nodes into ``node_links``.
    ``memories`` are what the engine takes of GPUs, by kind of rank.
    """

    cluster: Cluster
    model: ModelSpec
    workload: Workload
    profiles: Mapping[str, Profile]
    objective: Objective = field(default_factory=Objective)
    assumptions: Assumptions = Assumptions()
    family: Family = field(default_factory=Family)
    constraints: Constraints = ()
    constraint_index: ConstraintIndex | None = None
    node_links: NodeLinks | None = None
    memories: RankMemories = field(default_factory=dict)

    def memory_of(self, gpu: str, tp: int, attention_dp: int = 1, reserved_bytes: int = 0) -> RankMemory | None:
        """Return what the engine takes of a GPU as one of ``tp`` ranks, where others hold some of it.

        None: what the profile says of any engine.
        """
        memory = self.memories.get(RankKind(gpu, tp, attention_dp))
        return None if memory is None else memory.beside(reserved_bytes)

    def profile_of(self, gpu: str, reserved_bytes: int) -> Profile:
        """Return the profile of a GPU of which others hold so much."""
        return self.profiles[gpu].beside(reserved_bytes)

    def describe_family(self) -> str:
        """Return the plans that are searched in one sentence: those of the family that meet the constraints."""
        num_builds, num_kinds = len(self.builds()), len({self.kv_of(build) for build in self.builds()})
        apart = [] if num_builds < 2 else [ACROSS if num_kinds < 2 else APART]
        if num_kinds < num_builds and (engine := self.family.engine):
            apart.append(f"KV also from one to another of {', '.join(engine.kv_vendors)}")
        parts = [self.family.describe(self.model), *apart]
        if self.workload.classes:
            parts.append(f"for all requests, or those of one of the classes {', '.join(self.workload.shares)}")
        if self.cluster.network.between_nodes:
            links = node_links_of(self.cluster, self.nodes_left_out())
            parts += [OWN_LINKS] if links.between else []
            parts += [QUICK_LINKS] if links.quick is not None else []
        return "; ".join([*parts, *map(described, self.constraints)])

    def at(self, utilisation: float, lanes: Lanes = ALONE) -> PlacementProblem:
        """Return the problem of plans that serve this share of their saturated rate, with so many replicas together."""
        return replace(self, assumptions=replace(self.assumptions, planned_utilisation=utilisation, lanes=lanes))

    @property
    def planned_share(self) -> float:
        """The share of a saturated rate that is planned with: all of it if throughput is the objective."""
        return self.assumptions.planned_utilisation if self.objective.kind.goal.is_planned else 1.0

    @property
    def most_kv_tokens(self) -> float:
        """The tokens for which a stage copy's engine has KV blocks; infinity unless their number is set."""
        blocks = self.family.engine_settings.kv_blocks
        return math.inf if blocks is None else float(blocks * self.assumptions.block_tokens)

    @property
    def least_kv_tokens(self) -> float:
        """The tokens for whose KV a stage copy must have room, whatever it runs: those of the longest request."""
        least = self.family.engine_settings.min_context
        return 0.0 if least is None else self.model.cached_tokens(float(least))

    def moments(self) -> WorkloadMoments:
        """Return the moments of the workload, whose prompts are clipped to the model's context."""
        return self.workload.clipped_to(self.model.max_position).moments(block_tokens=self.assumptions.block_tokens)

    def models(self) -> tuple[ModelSpec, ...]:
        """Return the model in each precision of the fleet."""
        return tuple(dict.fromkeys(map(self.model.on, self.cluster.types_used())))

    def build_of(self, gpu: str) -> Build:
        """Return the build on GPUs of this type: the model as an engine loads it there, and the vendor.

        If no GPU that may compute layers has a type's own build, the first build of those GPUs is returned.
        """
        own, builds = self._build_of(gpu), self.builds()
        return own if own in builds or not builds else builds[0]

    def kv_of(self, build: Build) -> Build:
        """Return what builds that may exchange KV have in common: the model in one precision, and the vendors.

        KV goes between vendors only where a kernel of both keeps it alike (`kernel_of_any_vendor`).
        """
        engine = self.family.engine
        if engine is None or build.vendor not in engine.kv_vendors or kernel_of_any_vendor(build.model) is None:
            return build
        return build._replace(vendor=" ".join(engine.kv_vendors))

    def builds(self) -> tuple[Build, ...]:
        """Return the builds of the GPUs that may compute layers."""
        slots = ((group, each.gpu) for group in self.cluster.node_groups for each in group.gpus)
        gpus = dict.fromkeys(gpu for group, gpu in slots if self._may_compute(group, gpu))
        return tuple(dict.fromkeys(map(self._build_of, gpus)))

    def _build_of(self, gpu: str) -> Build:
        vendor = "" if self.family.engine is None else self.cluster.gpu_types[gpu].vendor
        return Build(self.model.on(gpu), vendor)

    def _may_compute(self, group: NodeGroup, gpu: str) -> bool:
        """Return whether constraints allow any GPU of a type in a node group to be a primary."""
        if self.constraint_index is not None:
            return Duty.PRIMARY not in self.constraint_index.of(group.name, gpu).barred
        barring = [each.gpus for each in self.constraints if isinstance(each, Exclude)]
        barring += [c.gpus for c in self.constraints if isinstance(c, RestrictRole) and Duty.PRIMARY in c.barred]
        if not barring:
            return True
        nodes_differ = any(each.unit in (Unit.NODE, Unit.GPU) for each in barring)
        nodes, out = map(group.node_name, range(group.count if nodes_differ else 1)), Selected(barring)
        return any(slots.gpu == gpu for node in nodes for slots in without_selected(out, group, node).gpus)

    def nodes_left_out(self) -> frozenset[str]:
        """Return the nodes of which constraints exclude all GPUs."""
        selections = [each.gpus for each in self.constraints if isinstance(each, Exclude)]
        nodes, out = self.cluster.nodes() if selections else (), Selected(selections)
        return frozenset(node for node, group in nodes if not without_selected(out, group, node).gpus)

    def in_precision_of(self, gpu: str) -> PlacementProblem:
        """Return the problem of replicas whose stages are on this GPU type: the model in that type's precision."""
        return replace(self, model=self.model.on(gpu)) if self.model.precisions else self

    def of_replica(self, replica: ReplicaPlan) -> PlacementProblem:
        """Return the problem of this replica: with the model in its precision, and the requests of its classes."""
        return self.of_classes(replica.classes).in_precision_of(replica.stages[0].gpu)

    def of_classes(self, names: Collection[str] = ()) -> PlacementProblem:
        """Return the problem of replicas for the requests of some classes of the workload (none named: of all).

        They keep the strictest limits of these classes.
        """
        workload = self.workload
        if not workload.classes:
            return self
        own = [one for one in workload.classes if not names or one.name in names]
        ttft, tpot = self.objective.ttft_limit_s, self.objective.tpot_limit_s
        objective = replace(
            self.objective,
            ttft_limit_s=strictest(ttft if one.ttft_limit_s is None else one.ttft_limit_s for one in own),
            tpot_limit_s=strictest(tpot if one.tpot_limit_s is None else one.tpot_limit_s for one in own),
        )
        assumptions = replace(self.assumptions, lanes=self.assumptions.lanes.of_pool(tuple(names)))
        return replace(self, workload=workload.of_classes(names), objective=objective, assumptions=assumptions)

    def limits_of_classes(self) -> dict[str, float | None]:
        """Return the limit on TTFT of the requests of each class, or of all together where no class has its own."""
        if all((one.ttft_limit_s, one.tpot_limit_s) == (None, None) for one in self.workload.classes):
            return {"": self.objective.ttft_limit_s}
        return {one.name: self.of_classes((one.name,)).objective.ttft_limit_s for one in self.workload.classes}

    def class_shares(self) -> tuple[ClassShare, ...]:
        """Return the classes of the workload with their shares of the requests."""
        shares = self.workload.shares
        return tuple(
            ClassShare(name=one.name, share=shares[one.name], max_prompt_tokens=one.max_prompt_tokens)
            for one in self.workload.classes
        )

    def ranges(self) -> tuple[tuple[str, ...], ...]:
        """Return the classes that a pool may serve: all of them, written as none, or a single one."""
        return ((), *((one.name,) for one in self.workload.classes))

    def moments_of_ranges(self) -> dict[tuple[str, ...], WorkloadMoments]:
        """Return the moments of the requests of each of `ranges`."""
        return {names: self.of_classes(names).moments() for names in self.ranges()}

    def in_shared_precision(self) -> PlacementProblem:
        """Return the problem in a single precision if all GPUs that may compute layers hold the model in the same."""
        models = {build.model for build in self.builds()} if self.model.precisions else set()
        return replace(self, model=models.pop()) if len(models) == 1 else self

    def __post_init__(self) -> None:
        goal = self.objective.kind.goal
        if goal.needs_demand and self.objective.demand_rps is None:
            raise InvalidProblemError(f"objective {self.objective.kind} needs a demanded rate")
        if self.model.precisions and self.family.engine is None:
            raise InvalidProblemError(
                f"{self.model.name} has several precisions, which published heuristics do not know: they plan for one"
            )
        for name, share in self.workload.shares.items():
            if not share:
                raise InvalidProblemError(f"class {name} of workload {self.workload.name} has no requests")
        for group in self.cluster.node_groups:
            for slots in group.gpus:
                if slots.gpu not in self.profiles:
                    raise InvalidProblemError(f"node {group.name}: GPU type {slots.gpu} has no profile")
        if unknown := goal.without_cost(self.cluster):
            types = ", ".join(f"{gpu} (node {node})" for gpu, node in unknown.items())
            raise InvalidProblemError(f"objective {self.objective.kind} needs {goal.unknown} for {types}")


def strictest(limits: Iterable[float | None]) -> float | None:
    """Return the least of some limits, of which None is no limit."""
    return min((one for one in limits if one is not None), default=None)


def without_selected(out: Selected, group: NodeGroup, node: str) -> NodeGroup:
    """Return a group of nodes like ``node`` without the GPUs that are selected."""
    return group.keeping(
        lambda index, gpu: not out.takes(device=f"{node}/{index}", node=node, gpu=gpu, zone=group.zone)
    )
