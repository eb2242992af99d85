"""The requirements on a plan, each of which can be lifted: a problem without some of them is a relaxation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.constraints import Constraint, described
from hetis.solver.engine_rules import MICRO_BATCHES, NOTHING_SET, Family
from hetis.solver.placement.families import STRATEGIES, run_by
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.problem import PlacementProblem

WIDEST = "hetis"  # the strategy whose family contains those of all searched ones
FAST = Link(bytes_per_s=1e18, latency_s=0.0)
_WITHIN_A_NODE = "links of the network (also charged between stages of one node)"
PLENTY = 1000  # memory to add as a multiple of the weights, more than the KV of any batch needs


class Subject(StrEnum):
    """The subject of a requirement. Conflicts leave out earlier ones first, so these are the last to be blamed."""

    DEMAND = "demand"  # goodput in requests/s
    TPOT = "mean TPOT limit"  # in seconds
    TTFT = "p95 TTFT limit"  # in seconds
    CONSTRAINT = "constraint"
    ROLES = "roles"
    STRATEGY = "strategy"
    SETTINGS = "engine settings"
    CUTS = "forbidden cuts"
    LINKS = "links between nodes"
    MEMORY = "GPU memory"

    @property
    def is_of_fleet(self) -> bool:
        """Return whether it is a fact of fleet and model rather than a request."""
        return self in (Subject.CUTS, Subject.LINKS, Subject.MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One requirement, with the ``value`` of a demand or limit, the ``constraint`` of a constraint, or a ``text``."""

    subject: Subject
    value: float = 0.0
    constraint: Constraint | None = None
    text: str = ""

    def __str__(self) -> str:
        match self.subject:
            case Subject.DEMAND:
                return f"{self.subject} {self.value:g} requests/s"
            case Subject.TTFT if self.value >= 1:
                return f"{self.subject} {self.value:.4g} s"
            case Subject.TPOT | Subject.TTFT:
                return f"{self.subject} {self.value * 1e3:.4g} ms"
            case Subject.CONSTRAINT:
                return described(self.constraint) if self.constraint is not None else ""
            case Subject.SETTINGS:
                return f"the setting of engines ({self.text})"
            case Subject.ROLES | Subject.STRATEGY:
                return f"{self.subject} {self.text}"
            case Subject.LINKS if self.text:
                return self.text
        return str(self.subject)

    def at(self, value: float) -> Requirement:
        """Return the same limit or demand with another value."""
        return replace(self, value=value)


Requirements = frozenset[Requirement]


def demand_of(kept: Iterable[Requirement]) -> float:
    """Return the demanded goodput among the requirements, or 0 without one."""
    return next((r.value for r in kept if r.subject is Subject.DEMAND), 0.0)


def requirements_of(problem: PlacementProblem) -> tuple[Requirement, ...]:
    """Return all requirements of a problem, in the order in which a conflict leaves them out."""
    return tuple(_requirements(problem))


def _requirements(problem: PlacementProblem) -> Iterator[Requirement]:
    objective, family = problem.objective, problem.family
    values: Mapping[Subject, float | None] = {
        Subject.DEMAND: None if objective.maximises else objective.demand_rps,
        Subject.TPOT: objective.tpot_limit_s,
        Subject.TTFT: objective.ttft_limit_s,
    }
    for subject, value in values.items():
        if value is not None:
            yield Requirement(subject=subject, value=value)
    for constraint in problem.constraints:
        yield Requirement(subject=Subject.CONSTRAINT, constraint=constraint)
    if _roles_of(family.name) != set(family.roles):
        yield Requirement(subject=Subject.ROLES, text=",".join(family.roles))
    if family.name != WIDEST:
        yield Requirement(subject=Subject.STRATEGY, text=family.name)
    if family.engine_settings:
        yield Requirement(subject=Subject.SETTINGS, text=family.engine_settings.describe())
    if problem.model.forbidden_cuts:
        yield Requirement(subject=Subject.CUTS)
    if problem.cluster.num_gpus() > 1:  # even within one node: the cost model charges a hop between any two stages
        has_one_node = sum(group.count for group in problem.cluster.node_groups) == 1
        yield Requirement(subject=Subject.LINKS, text=_WITHIN_A_NODE if has_one_node else "")
    yield Requirement(subject=Subject.MEMORY)


def _roles_of(strategy: str) -> set[Role]:
    return set(STRATEGIES[strategy].restrict(Family()).roles)


def keeping(problem: PlacementProblem, kept: Collection[Requirement]) -> PlacementProblem:
    """Return the problem with only these requirements, maximising the rate, which callers compare to the demand.

    Every plan of ``problem`` is a plan of it: without the links requirement, links are too fast to matter, and without
    the memory requirement, there is far more memory.
    """
    by_subject = {requirement.subject: requirement for requirement in kept}
    limits = {s: r.value for s, r in by_subject.items()}
    objective = Objective(
        kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=limits.get(Subject.TTFT), tpot_limit_s=limits.get(Subject.TPOT)
    )
    found = replace(
        problem,
        objective=objective,
        family=_family(problem.family, by_subject),
        constraints=tuple(
            each for each in problem.constraints if Requirement(subject=Subject.CONSTRAINT, constraint=each) in kept
        ),
    )
    if Subject.CUTS not in by_subject and problem.model.forbidden_cuts:
        found = replace(found, model=replace(problem.model, forbidden_cuts=frozenset()))
    if Subject.MEMORY not in by_subject:
        found = _with_plenty_of_memory(found)
    if Subject.LINKS not in by_subject:
        groups = tuple(replace(group, nic=None) for group in found.cluster.node_groups)
        found = replace(found, cluster=replace(found.cluster, node_groups=groups, network=Network(default=FAST)))
    return found


def _family(family: Family, kept: Mapping[Subject, Requirement]) -> Family:
    requested = Requirement(subject=Subject.ROLES, text=",".join(family.roles))
    roles = family.roles if kept.get(Subject.ROLES) == requested else None
    strategy = kept[Subject.STRATEGY].text if Subject.STRATEGY in kept else WIDEST
    if family.engine_settings and Subject.SETTINGS not in kept:
        family = _at_any_settings(family)
    if strategy == family.name:
        widest = tuple(role for role in Role if role in _roles_of(strategy))
        return replace(family, roles=roles or widest)
    sizes = Family(
        tp_sizes=family.tp_sizes,
        micro_batches=family.micro_batches,
        chunk_tokens=family.chunk_tokens,
        engine_settings=family.engine_settings,
    )
    assert family.engine is not None, "only searches give reasons"
    wide = STRATEGIES[strategy].restrict(run_by(sizes, family.engine))
    return replace(wide, roles=roles or wide.roles)


def _at_any_settings(family: Family) -> Family:
    """Return the family with the plans of any engine settings, including its own."""
    return replace(
        family,
        micro_batches=tuple(sorted({*family.micro_batches, *MICRO_BATCHES})),
        chunk_tokens=tuple(sorted({*family.chunk_tokens, *Family().chunk_tokens})),
        engine_settings=NOTHING_SET,
    )


def _with_plenty_of_memory(problem: PlacementProblem) -> PlacementProblem:
    weights = max(model.params() * model.weight_bytes for model in problem.models())
    profiles = {
        gpu: replace(profile, usable_bytes=int(profile.usable_bytes + PLENTY * weights))
        for gpu, profile in problem.profiles.items()
    }
    memories = {
        kind: replace(
            memory, usable_bytes=memory.usable_bytes + PLENTY * weights, free_bytes=memory.free_bytes + PLENTY * weights
        )
        for kind, memory in problem.memories.items()
    }
    return replace(problem, profiles=profiles, memories=memories)


def with_faster_links(cluster: Cluster, factor: float) -> Cluster:
    """Return a cluster whose links between nodes and zones have ``factor`` times the bandwidth and 1/factor latency."""
    network = cluster.network
    groups = tuple(replace(group, nic=group.nic and _faster(group.nic, factor)) for group in cluster.node_groups)
    faster = Network(
        default=_faster(network.default, factor),
        zone_default=network.zone_default and _faster(network.zone_default, factor),
        between_zones={pair: _faster(link, factor) for pair, link in network.between_zones.items()},
        between_nodes={pair: _faster(link, factor) for pair, link in network.between_nodes.items()},
    )
    return replace(cluster, node_groups=groups, network=faster)


def _faster(link: Link, factor: float) -> Link:
    return Link(bytes_per_s=link.bytes_per_s * factor, latency_s=link.latency_s / factor)
