"""The numbers that a replica claims, compared with their derivation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

from hetis.solver.check.memory import (
    kv_block_tokens,
    kv_room_of_a_copy,
    kv_room_of_shared_card,
    kv_tokens_of_a_copy,
    prompt_tokens_of_a_copy,
    rank_bytes,
    shared_card_bytes,
    usable_bytes,
    worker_bytes,
)
from hetis.solver.check.replica_shapes import PoolShape, ReplicaShape, StageShape
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import (
    busy_seconds,
    chunks_ahead,
    replica_chunk_seconds,
    replica_landing_seconds,
    seconds_between_completions,
    stage_seconds,
    tpot_per_t,
)
from hetis.solver.check.violation import Broken, Rule, Violation, at
from hetis.solver.cluster import Link
from hetis.solver.plan import Objective, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem

RELATIVE = 1e-6  # ratio by which a claim may differ from its derivation
ROUNDING = 1e-9  # ratio by which a memory row may exceed its limit; the sums have a few dozen terms


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The bytes that a device must hold and those it may hold."""

    where: str
    rule: Rule
    num_bytes: float
    usable_bytes: float

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.usable_bytes * (1 + ROUNDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """The numbers that the cost model gives a replica.

    Its TPOT is ``tpot_per_t`` times t; for its TTFT see `ttft_s`. Numbers called slowest use the slowest links of the
    cluster, the others those of its devices.
    """

    t_s: float  # seconds between completions
    tpot_per_t: float
    prefills: bool
    chunks_ahead: float  # chunks that enter the pipeline before the last of the p95 prompt
    iterations_in_flight: int  # those of copies that share experts count as one
    round_trip_per_t: float  # mean round trip
    chunk_s: float  # an iteration with a chunk, summed over all stages
    busiest_chunk_s: float  # the same on the stage that takes longest for it
    slowest_chunk_s: float
    slowest_busiest_chunk_s: float
    kv_tokens: float
    memory: tuple[MemoryUse, ...]
    landing_s: float = 0.0  # landing of a prefill replica's last KV
    slowest_landing_s: float = 0.0
    kv_held: float = 0.0  # KV tokens on the stage copy that holds the most
    kv_prefilling: float = 0.0  # those among them of prompts that are being prefilled
    kv_block_tokens: float = math.inf  # tokens for which that copy's engine has blocks

    @property
    def rate(self) -> float:
        return rate_of(self.t_s)

    def ttft_s(self, t_s: float) -> float:
        """Return p95 TTFT if completions are ``t_s`` apart."""
        return self._ttft_s(t_s, self.chunk_s, self.busiest_chunk_s, self.landing_s)

    def slowest_ttft_s(self, t_s: float) -> float:
        return self._ttft_s(t_s, self.slowest_chunk_s, self.slowest_busiest_chunk_s, self.slowest_landing_s)

    def slot_s(self, t_s: float) -> float:
        """Return the seconds from one iteration with a chunk to the next if completions are ``t_s`` apart."""
        return self._slot_s(t_s, self.chunk_s, self.busiest_chunk_s)

    def _slot_s(self, t_s: float, chunk_s: float, busiest_s: float) -> float:
        if self.iterations_in_flight == 1:  # the next one starts when this one has left the last stage
            return max(self.round_trip_per_t * t_s, chunk_s)
        return max(self.round_trip_per_t * t_s / self.iterations_in_flight, busiest_s)

    def _ttft_s(self, t_s: float, chunk_s: float, busiest_s: float, landing_s: float) -> float:
        if not self.prefills:
            return 0.0
        trip_s = max(self.round_trip_per_t * t_s, chunk_s)
        return trip_s + self.chunks_ahead * self._slot_s(t_s, chunk_s, busiest_s) + landing_s

    @property
    def fits(self) -> bool:
        return self.fits_blocks and all(use.fits for use in self.memory)

    @property
    def fits_blocks(self) -> bool:
        """Return whether the engine's KV blocks, if their number is set, are enough."""
        return self.kv_held <= self.kv_block_tokens * (1 + ROUNDING)


class Rederivation:
    """A derivation of the replicas of one problem, which derives equal shapes once.

    Of a workload with classes, replicas are derived by what they serve (`serving`).
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self._problem = problem
        self._moments = problem.moments()
        self._derived: dict[ReplicaShape, Derived] = {}
        self._serving: dict[tuple[str, ...], Rederivation] = {}

    def serving(self, classes: tuple[str, ...]) -> Rederivation:
        """Return the derivation of replicas that serve these classes of requests; none named: all."""
        if not self._problem.workload.classes:
            return self
        if classes not in self._serving:
            self._serving[classes] = Rederivation(self._problem.of_classes(classes))
        return self._serving[classes]

    def setting(
        self, *, micro_batch: int, in_flight: int, chunk_tokens: int, role: Role = Role.UNIFIED, gpu: str = ""
    ) -> Setting:  # fmt: skip
        """Return the setting of replicas whose stages are on GPUs of this type, which determines the precision."""
        return Setting(
            problem=self._problem.in_precision_of(gpu),
            moments=self._moments,
            micro_batch=micro_batch,
            in_flight=in_flight,
            chunk_tokens=chunk_tokens,
            role=role,
        )

    def of(self, shape: ReplicaShape) -> Derived:
        if shape not in self._derived:
            self._derived[shape] = derive(Setting.of(self._problem, self._moments, shape), shape)
        return self._derived[shape]

    def rate(self, shape: ReplicaShape) -> float:
        """Return the saturated requests/s of a replica alone."""
        return rate_of(completion_seconds(Setting.of(self._problem, self._moments, shape), shape))

    def chunk_s(self, shape: ReplicaShape) -> float:
        """Return the seconds of an iteration with a chunk alone."""
        return replica_chunk_seconds(Setting.of(self._problem, self._moments, shape), shape.stages)[0]


def rate_of(t_s: float) -> float:
    """Return the requests/s of a replica that completes one every ``t_s`` seconds."""
    return 1 / t_s if t_s > 0 else math.inf


def completion_seconds(setting: Setting, shape: ReplicaShape) -> float:
    """Return the seconds between completions of one replica."""
    last = len(shape.stages) - 1
    seconds = cache(partial(stage_seconds, setting))  # equal stages are derived once
    stage_s = [seconds(stage, is_first=i == 0, is_last=i == last) for i, stage in enumerate(shape.stages)]
    card_s = [busy_seconds(setting, shape, positions) for positions in shape.shared_by]
    return seconds_between_completions(setting, shape.stages, stage_s, card_s)


def derive(setting: Setting, shape: ReplicaShape) -> Derived:
    """Apply the cost model to one replica."""
    last = len(shape.stages) - 1
    room, memory = math.inf, list[MemoryUse]()
    slowest = shape.stages if shape.slowest_link is None else [_with_link(s, shape.slowest_link) for s in shape.stages]

    def must_hold(where: str, rule: Rule, usable: float, num_bytes: float) -> None:
        memory.append(MemoryUse(where=where, rule=rule, num_bytes=num_bytes, usable_bytes=usable))

    def of_card(pool: PoolShape) -> float:
        return setting.problem.profile_of(pool.gpu, pool.reserved_bytes).usable_bytes

    for i, stage in enumerate(shape.stages):
        is_first, is_last = i == 0, i == last
        room = min(room, stage.copies * kv_room_of_a_copy(setting, stage, is_first=is_first, is_last=is_last))
        num_bytes = rank_bytes(setting, stage, is_first=is_first, is_last=is_last)
        must_hold(f"stage {i + 1}", Rule.RANK_MEMORY, usable_bytes(setting, stage), num_bytes)
        if (pool := stage.pool) is not None:
            num_bytes = worker_bytes(setting, stage, pool, is_first=is_first)
            must_hold(f"attention workers of stage {i + 1}", Rule.WORKER_MEMORY, of_card(pool), num_bytes)
    for positions in shape.shared_by:
        room = min(room, kv_room_of_shared_card(setting, shape, positions))
        where = f"attention workers of stages {', '.join(str(i + 1) for i in positions)}"
        num_bytes = shared_card_bytes(setting, shape, positions)
        must_hold(where, Rule.WORKER_MEMORY, of_card(shape.pool_of(positions[0])), num_bytes)
    chunk_s, busiest_s = replica_chunk_seconds(setting, shape.stages)
    slowest_chunk_s, slowest_busiest_s = replica_chunk_seconds(setting, slowest)
    return Derived(
        t_s=completion_seconds(setting, shape),
        tpot_per_t=tpot_per_t(setting),
        prefills=setting.role is not Role.DECODE,
        chunks_ahead=chunks_ahead(setting),
        iterations_in_flight=max(1, setting.in_flight // setting.attention_dp),
        round_trip_per_t=setting.in_flight / setting.iterations,
        chunk_s=chunk_s,
        busiest_chunk_s=busiest_s,
        slowest_chunk_s=slowest_chunk_s,
        slowest_busiest_chunk_s=slowest_busiest_s,
        kv_tokens=room,
        memory=tuple(memory),
        landing_s=replica_landing_seconds(setting, shape.stages),
        slowest_landing_s=replica_landing_seconds(setting, slowest),
        kv_held=max(kv_tokens_of_a_copy(setting, stage.copies) for stage in shape.stages),
        kv_prefilling=max(prompt_tokens_of_a_copy(setting, stage.copies) for stage in shape.stages),
        kv_block_tokens=kv_block_tokens(setting),
    )


def _with_link(stage: StageShape, link: Link) -> StageShape:
    """Return the stage with this link wherever it has one."""
    pool = None if stage.pool is None else replace(stage.pool, link=link)
    kv_link = None if stage.kv_link is None else link
    return replace(stage, hop_link=link, kv_link=kv_link, pool=pool)


def check_replica_claims(
    replica: ReplicaPlan, where: str, objective: Objective, derived: Derived, *, may_claim_less: bool
) -> list[Violation]:
    """Check memory, rate, latencies and KV room of a replica of sound structure.

    Args:
        may_claim_less: the search may have charged worse links than these devices have (`Fleet.has_uneven_links`), so a
            lower rate is not an error; a higher one always is.
    """
    violations: list[Violation] = []
    for use in derived.memory:
        if not use.fits:
            message = f"a device must hold {use.num_bytes:.0f} bytes, {use.usable_bytes:.0f} bytes are usable"
            violations += at(f"{where} {use.where}", [(use.rule, message)])
    if not derived.fits_blocks:
        held = f"a stage copy must hold KV of {derived.kv_held:.0f} tokens"
        message = f"{held}, its engine's blocks hold {derived.kv_block_tokens:.0f}"
        violations += at(where, [(Rule.KV_BLOCKS, message)])
    numbers = (
        ("rate", replica.rate, "requests/s"),
        ("ttft_s", replica.ttft_s, "s"),
        ("tpot_s", replica.tpot_s, "s"),
        ("kv_tokens", replica.kv_tokens, "tokens"),
    )
    not_finite = [
        (Rule.FINITE, f"{name} is {value} {unit}, must be finite and >= 0")
        for name, value, unit in numbers
        if not 0 <= value < math.inf
    ]
    if not_finite:
        return violations + at(where, not_finite)
    latency = _check_latency(replica, objective, derived, may_claim_less)
    return violations + at(where, _check_rate_and_room(replica, derived, may_claim_less), latency)


def _check_rate_and_room(replica: ReplicaPlan, derived: Derived, may_claim_less: bool) -> Iterator[Broken]:
    least = 0.0 if may_claim_less else derived.rate * (1 - RELATIVE)
    if not least <= replica.rate <= derived.rate * (1 + RELATIVE):
        yield Rule.RATE, f"claims {replica.rate:.9g} requests/s, the cost model gives {derived.rate:.9g}"
    # Tokens are whole, and rounding decides between two neighbours.
    if abs(replica.kv_tokens - math.floor(derived.kv_tokens)) > max(1.0, RELATIVE * derived.kv_tokens):
        yield Rule.KV_TOKENS, f"claims room for {replica.kv_tokens} KV tokens, has room for {derived.kv_tokens:.0f}"


def _check_latency(
    replica: ReplicaPlan, objective: Objective, derived: Derived, may_claim_less: bool
) -> Iterator[Broken]:
    """Check latencies, which grow with t: a claim must lie between those at the derived t and at the claimed rate's t.

    A plan that claims less than its rate (see `check_replica_claims`) also claims more latency, and may have charged
    worse links for its hops and the landing of its KV.
    """
    t_s, t_max = derived.t_s, max(derived.t_s, 1 / replica.rate if replica.rate > 0 else math.inf)
    slowest_ttft_s, per_t = derived.slowest_ttft_s if may_claim_less else derived.ttft_s, derived.tpot_per_t
    tpot_s, most_tpot_s = (t_s * per_t, t_max * per_t) if per_t else (0.0, 0.0)  # even if no rate is claimed
    tpot = replica.tpot_s, tpot_s, most_tpot_s, objective.tpot_limit_s, Rule.TPOT, Rule.TPOT_LIMIT
    limit_s = objective.ttft_limit_s
    ttft = replica.ttft_s, derived.ttft_s(t_s), slowest_ttft_s(t_max), limit_s, Rule.TTFT, Rule.TTFT_LIMIT
    for claimed, low, high, limit, claim_rule, limit_rule in (tpot, ttft):
        if not low * (1 - RELATIVE) <= claimed <= high * (1 + RELATIVE):
            between = f"{low:.9g} s" if high <= low * (1 + RELATIVE) else f"between {low:.9g} and {high:.9g} s"
            yield claim_rule, f"claims {claim_rule.name} {claimed:.9g} s, the cost model gives {between}"
        worst = max(claimed, low)
        if limit is not None and worst > limit * (1 + RELATIVE):
            yield limit_rule, f"{claim_rule.name} is {worst:.9g} s, the limit is {limit:.9g} s"
