"""Plans: named GPUs in stages and attention workers, how good the plan is, what it was made from, its explanation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from hetis.solver.errors import InvalidProblemError
from hetis.solver.goals import ObjectiveKind as ObjectiveKind


class Status(StrEnum):
    OPTIMAL = "optimal"  # gap within 1e-6: nothing in the stated family is better
    FEASIBLE = "feasible"  # a plan with a proven gap
    INFEASIBLE = "infeasible"  # proven: the family holds no plan
    INTERRUPTED = "interrupted"  # the best plan at the time of Ctrl-C; its bound still holds


class Role(StrEnum):
    """The part of a request that a replica serves: all of it, its prompt, or its output."""

    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


class Lanes(NamedTuple):
    """How many replicas of each role compute prompts together: a router chooses one that is free.

    ``prefill_load`` is the utilisation of prefill replicas as a share of the plan's, at most 1: prompts that wait for
    them make p95 TTFT long, while decode replicas keep TPOT at any utilisation.

    ``pools`` are those of replicas for the same classes of requests, by these, among which routers choose. Of others
    there may be as many as of all together.
    """

    unified: int = 1
    prefill: int = 1
    prefill_load: float = 1.0
    pools: tuple[tuple[tuple[str, ...], Lanes], ...] = ()

    def of_pool(self, classes: tuple[str, ...]) -> Lanes:
        """Return the replicas for some classes of requests."""
        return dict(self.pools).get(classes, self)._replace(prefill_load=self.prefill_load, pools=())

    def of(self, role: Role) -> int:
        return self.prefill if role is Role.PREFILL else self.unified

    def load(self, role: Role) -> float:
        """Return the utilisation of the replicas of a role as a share of the plan's."""
        return self.prefill_load if role is Role.PREFILL else 1.0


ALONE = Lanes()


def lanes_of_pools(counts: Mapping[tuple[tuple[str, ...], Role], int]) -> tuple[tuple[tuple[str, ...], Lanes], ...]:
    """Return the lanes of pools, given their replicas of each role."""
    found = {
        names: Lanes(max(1, counts.get((names, Role.UNIFIED), 0)), max(1, counts.get((names, Role.PREFILL), 0)))
        for names, _ in counts
    }
    return tuple(sorted(found.items()))


OPTIMAL_GAP = 1e-6  # up to which a plan is called optimal
PLANNED_UTILISATION = 0.9  # of plans whose utilisation is not chosen
# The defaults of a search: its strategy (`hetis.solver.placement.families`), and its seconds.
DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S = "hetis", 60.0
LEAST_DEMAND_RPS = 1e-3
"""The least demand for which a plan can be made. HiGHS treats numbers within 1e-6 of an integer as whole. Of a replica
that serves a thousand requests per second, a much smaller demand takes so small a part that none would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The goal of a plan.

    ``goodput`` is the share of the saturated rate at which mean TPOT and p95 TTFT meet their limits;
    ``throughput`` is the saturated rate (limits apply only if given); ``cost`` and ``gpus`` are the least USD per hour
    and the fewest GPUs whose goodput reaches ``demand_rps``, at least `LEAST_DEMAND_RPS`. A limit of None does not
    apply.
    """

    kind: ObjectiveKind = ObjectiveKind.GOODPUT
    ttft_limit_s: float | None = 2.0
    tpot_limit_s: float | None = 0.1
    demand_rps: float | None = None

    def __post_init__(self) -> None:
        # HiGHS crashes the interpreter if a bound of a row is not a number.
        given = {"TTFT limit": self.ttft_limit_s, "TPOT limit": self.tpot_limit_s, "demanded rate": self.demand_rps}
        for name, value in given.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidProblemError(f"the {name} is {value:g}, must be above 0 and finite")
        if self.demand_rps is not None and self.demand_rps < LEAST_DEMAND_RPS:
            raise InvalidProblemError(
                f"the demanded rate is {self.demand_rps:g} requests/s, must be at least {LEAST_DEMAND_RPS:g}"
            )

    @property
    def unit(self) -> str:
        return self.kind.goal.unit

    @property
    def maximises(self) -> bool:
        return self.kind.goal.maximises


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One pipeline stage: ``copies`` TP groups of ``tp`` GPUs each, all holding the same layers.

    ``devices`` are ``node/index``, with the ranks of each copy in sequence. ``kv_head_groups_kept`` counts head groups
    per TP rank that stay on the stage; the others are on its attention workers.
    """

    gpu: str
    tp: int
    copies: int
    first_layer: int
    num_layers: int
    devices: tuple[str, ...]
    kv_head_groups_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWorkerPool:
    """Cards that only hold KV and compute attention, for one stage.

    ``devices`` holds the cards of each copy in sequence (equally many each). ``kv_head_groups`` counts the head groups
    per TP rank of the stage that are on these cards. Cards of a ``shared`` pool serve every stage of the replica in
    turn and are listed in the pool of each (`hetis-paper`); all others belong to their stage alone.
    """

    stage: int
    gpu: str
    devices: tuple[str, ...]
    kv_head_groups: int
    shared: bool = False


def parallel_sizes(tp: int, copies: int, *, shares_experts: bool) -> str:
    """Return ``TP2``, ``TP2 ×3`` for three copies, or ``TP2 ×4 EP8`` for copies that share their experts."""
    times = f" ×{copies}" if copies > 1 else ""
    return f"TP{tp}{times}" + (f" EP{tp * copies}" if shares_experts else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One replica; ``rate`` is its saturated rate in requests/s, ``ttft_s`` is p95, ``tpot_s`` is the mean.

    ``micro_batch`` requests decode in each of ``in_flight`` micro-batches; an iteration carries at most one prefill
    chunk of ``chunk_tokens``. ``kv_tokens`` is the KV room of the scarcest layer in tokens.

    With ``expert_parallel`` the copies of its one stage share their routed experts and iterate together: each computes
    attention for its own ``micro_batch`` requests (attention data parallelism) and has its own chunks; there are as
    many micro-batches in flight as copies.

    An engine may run ``max_num_seqs`` requests at once (0: as many as decode when it is saturated). More of them do not
    wait for a seat at lower rates than the saturated one, at which TPOT would be longer than ``tpot_s``.

    A prefill replica decodes nothing: its ``micro_batch`` and ``tpot_s`` are 0, and it may send KV to decode replicas
    in ``kv_zones``. A decode replica prefills nothing: its ``chunk_tokens`` and ``ttft_s`` are 0.

    It serves the requests of its ``classes`` only, with their mix, of which its rate and latencies are; empty: all.
    """

    rate: float
    ttft_s: float
    tpot_s: float
    micro_batch: int
    in_flight: int
    chunk_tokens: int
    kv_tokens: int
    stages: tuple[StagePlan, ...]
    attention_workers: tuple[AttentionWorkerPool, ...] = ()
    role: Role = Role.UNIFIED
    expert_parallel: bool = False
    kv_zones: tuple[str, ...] = ()
    max_num_seqs: int = 0
    classes: tuple[str, ...] = ()

    @property
    def planned_seats(self) -> int:
        """Return how many requests it holds at once when it is saturated; a prefill replica has a prompt in each."""
        return max(self.micro_batch, 1) * self.in_flight

    @property
    def seats(self) -> int:
        """Return how many requests its engine may run at once."""
        return max(self.max_num_seqs, self.planned_seats)

    @property
    def most_held(self) -> int:
        """Return how many requests a router gives it while others hold fewer: a micro-batch has one more than seats."""
        return self.seats + self.in_flight

    @property
    def attention_dp(self) -> int:
        """Return the copies that share their experts and iterate together; 1 without expert parallelism."""
        return self.stages[0].copies if self.expert_parallel and self.stages else 1

    @property
    def sends_afar(self) -> bool:
        """Return whether it may send KV to other zones than its own."""
        return len(self.kv_zones) > 1

    def groups(self, stage: StagePlan) -> tuple[tuple[str, ...], ...]:
        """Return the GPUs of a stage that have to be on one node: of each copy, or of all that share their experts."""
        size = stage.tp * self.attention_dp
        return tuple(stage.devices[i : i + size] for i in range(0, len(stage.devices), size))

    def parallel_sizes(self, stage: StagePlan) -> str:
        """Return ``TP2``, ``TP2 ×3`` of a stage with copies, or ``TP2 ×4 EP8`` if they share their experts."""
        return parallel_sizes(stage.tp, stage.copies, shares_experts=self.expert_parallel)

    def parts(self) -> tuple[StagePlan | AttentionWorkerPool, ...]:
        """Return its stages, and then its attention workers."""
        return (*self.stages, *self.attention_workers)

    def devices(self) -> tuple[str, ...]:
        """Return every GPU of the replica, stages first; shared attention workers once."""
        primaries = tuple(d for stage in self.stages for d in stage.devices)
        return primaries + self.worker_devices()

    def worker_devices(self) -> tuple[str, ...]:
        """Return the attention workers of all stages; shared ones once."""
        own = [d for pool in self.attention_workers if not pool.shared for d in pool.devices]
        return (*own, *dict.fromkeys(d for pool in self.attention_workers if pool.shared for d in pool.devices))


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRoute:
    """Requests whose KV goes from one replica to another: indices into ``Plan.replicas``, saturated requests/s."""

    prefill: int
    decode: int
    rate: float


def joined_by(routes: Iterable[KvRoute]) -> list[list[int]]:
    """Return the numbers of replicas that exchange KV, directly or indirectly, in groups."""
    group_of = dict[int, list[int]]()
    for route in routes:
        one, other = (group_of.setdefault(end, [end]) for end in (route.prefill, route.decode))
        if one is not other:
            larger, smaller = (one, other) if len(one) >= len(other) else (other, one)
            larger += smaller
            group_of |= dict.fromkeys(smaller, larger)
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassShare:
    """A class of requests by prompt length, the share of all requests that it has, and its longest prompt.

    ``max_prompt_tokens`` of the last class is None.
    """

    name: str
    share: float
    max_prompt_tokens: int | None = None


def served_with_classes(shares: Mapping[str, float], rates: Mapping[tuple[str, ...], float]) -> float:
    """Return the requests/s of all classes that pools serve together, each class in its share.

    A pool whose ``rates`` are those of its classes' mix can give them in that mix only, so that every class has the sum
    of (rate over share of the pool's classes) over the pools that serve it, and the least of these is served of all. A
    pool named by no class serves all.
    """
    if not shares:
        return sum(rates.values())
    return min(sum(of_pools.values()) for of_pools in _able(shares, rates).values())


def parts_of_classes(
    shares: Mapping[str, float], rates: Mapping[tuple[str, ...], float]
) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the part of each class's requests that each pool gets: in proportion to what it can give the class."""
    return {
        name: {names: rate / sum(of_pools.values()) for names, rate in of_pools.items() if rate}
        for name, of_pools in _able(shares, rates).items()
    }


def _able(
    shares: Mapping[str, float], rates: Mapping[tuple[str, ...], float]
) -> dict[str, dict[tuple[str, ...], float]]:
    """Return what each pool can give each class that it serves, as requests/s of all classes in their shares."""
    of_all = {names: rate / (sum(shares[name] for name in names) or 1.0) for names, rate in rates.items()}
    return {name: {names: rate for names, rate in of_all.items() if not names or name in names} for name in shares}


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """The quality of a plan; ``gap`` is ``|bound - value| / |value|``.

    ``utilisation`` is the share of its saturated rate that a plan serves within its limits: of the highest goodput its
    value, and otherwise what may be demanded of it. Routes send a prefill replica no more than the share
    ``prefill_load`` of its rate. ``lanes`` are that and the replicas of each role that p95 TTFT assumes to share their
    prompts, at most as many as there are. ``queued_ttft_s`` is p95 TTFT of all requests together, with the wait for a
    seat; None if that was not considered.
    """

    status: Status
    objective: ObjectiveKind
    value: float
    bound: float
    gap: float
    unit: str
    solve_s: float
    utilisation: float = PLANNED_UTILISATION
    unified_lanes: int = 1
    prefill_lanes: int = 1
    prefill_load: float = 1.0
    queued_ttft_s: float | None = None

    @property
    def lanes(self) -> Lanes:
        return Lanes(self.unified_lanes, self.prefill_lanes, self.prefill_load)

    def bounded_by(self, bound: float) -> SolveResult:
        """Return the result with the bound of a more general problem, and the gap and status that follow from it."""
        gap = abs(self.value - bound) / abs(self.value) if self.value else math.inf
        gap = 0.0 if self.value == bound else gap  # GPUs may cost nothing
        return replace(self, bound=bound, gap=gap, status=Status.OPTIMAL if gap <= OPTIMAL_GAP else Status.FEASIBLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPrice:
    """A device class and its marginal price: the worth of one of its GPUs in this plan's relaxation.

    The relaxation mixes fractions of replicas, none larger than the present fleet holds. ``dual`` (in the objective's
    unit, >= 0) compares classes. It does not bound the effect of one more GPU: replicas are whole, so one more may add
    nothing, or far more than its price if it makes room for a larger replica.
    """

    gpu: str
    zone: str
    gpus_per_node: int
    available: int
    used: int
    as_attention_workers: int
    dual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A replica shape that was considered and not chosen: its rate, and the reason with its cost at the duals."""

    shape: str
    rate: float
    reason: str


OTHER_TENANTS = "other_tenants"  # entry of `Plan.inputs`: the GPUs held by every other tenant, if the fleet is shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Replicas on named GPUs with a proof of how good they are.

    ``inputs`` makes the plan reproducible: digests and versions, and under ``documents`` the cluster, model, workload
    and profile documents themselves, so ``check`` and ``explain`` need nothing else.
    """

    strategy: str
    family: str  # the family for which the bound holds, in one sentence
    result: SolveResult
    objective: Objective
    replicas: tuple[ReplicaPlan, ...]
    kv_routes: tuple[KvRoute, ...] = ()  # all traffic between prefill and decode replicas, each pair once
    prices: tuple[ClassPrice, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[ClassShare, ...] = ()  # empty: every replica serves all requests

    def devices(self) -> tuple[str, ...]:
        """Return every GPU that the plan uses."""
        return tuple(dict.fromkeys(device for replica in self.replicas for device in replica.devices()))

    def lanes(self) -> Lanes:
        """Return the replicas of each role that p95 TTFT assumes to share prompts: in pools, at most those of each."""
        most = self.result.lanes
        counts = Counter((one.classes, one.role) for one in self.replicas if self.classes)
        return most._replace(pools=lanes_of_pools({each: min(n, most.of(each[1])) for each, n in counts.items()}))

    def served_rate(self) -> float:
        """Return saturated requests/s of the whole plan: those of its unified replicas, and those of its routes."""
        return served_with_classes(self.class_shares(), self.rates_by_classes())

    def class_shares(self) -> dict[str, float]:
        """Return the share of the requests in each class, by name; empty without classes."""
        return {one.name: one.share for one in self.classes}

    def pool_share(self, classes: tuple[str, ...]) -> float:
        """Return the share of all requests that the classes of a pool have; 1 if it serves all."""
        shares = self.class_shares()
        return sum(shares[name] for name in classes) if classes else 1.0

    def rates_by_classes(self) -> dict[tuple[str, ...], float]:
        """Return the saturated requests/s of the replicas that serve the same classes, by these."""
        rates = dict[tuple[str, ...], float]()
        for replica in self.replicas:
            if replica.role is Role.UNIFIED:
                rates[replica.classes] = rates.get(replica.classes, 0.0) + replica.rate
        for route in self.kv_routes:
            classes = self.replicas[route.prefill].classes
            rates[classes] = rates.get(classes, 0.0) + route.rate
        return rates

    @property
    def planned_share(self) -> float:
        """The share of saturated rates that is planned with: all of them if throughput is the objective."""
        return self.result.utilisation if self.objective.kind.goal.is_planned else 1.0

    def planned_rate(self) -> float:
        """Return the requests/s that are planned."""
        return self.served_rate() * self.planned_share

    def other_tenants(self) -> dict[str, tuple[str, ...]]:
        """Return the GPUs of the fleet that every other tenant holds, by name; empty if the plan has it to itself.

        The bound of a tenant's plan is that of the whole fleet to itself. Shares may be found without prices, in which
        case the dual of every class is 0.
        """
        held = self.inputs.get(OTHER_TENANTS)
        if not isinstance(held, Mapping):
            return {}
        return {str(name): tuple(map(str, own)) for name, own in held.items() if isinstance(own, list | tuple)}

    def held_by_others(self) -> frozenset[str]:
        """Return the GPUs that other tenants hold, which are neither used by this plan nor idle."""
        return frozenset(device for own in self.other_tenants().values() for device in own)

    def has_prices(self) -> bool:
        """Return whether the duals of ``prices`` are known."""
        return not self.other_tenants() or any(price.dual > 0 for price in self.prices)

    def joined_by_routes(self) -> list[list[int]]:
        """Return the numbers of replicas that exchange KV, directly or indirectly, in groups."""
        return joined_by(self.kv_routes)
