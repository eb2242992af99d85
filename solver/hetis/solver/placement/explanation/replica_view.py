"""A planned replica in detail: how the time of every stage and the memory of every card are spent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hetis.solver.check.rederive import derive
from hetis.solver.check.replica_shapes import (
    Fleet,
    PoolShape,
    ReplicaShape,
    StageShape,
    kv_partners,
    left_out_by,
    replica_shape,
)
from hetis.solver.check.setting import Setting
from hetis.solver.check.structure import check_replica_structure
from hetis.solver.check.timing import (
    busy_seconds,
    least_slack,
    seconds_between_completions,
    tpot_per_t,
)
from hetis.solver.cluster import Link, node_of
from hetis.solver.cost import DeviceCost, PoolCost, intra_link, rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.mixes import (
    LargestBatch,
    Mix,
    kv_tokens_per_copy,
    mix_of,
    prompt_tokens_per_copy,
    state_bytes_per_copy,
)
from hetis.solver.model import ModelSpec
from hetis.solver.placement.explanation.facts import MemoryBar, StageTime
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.rank_memory import RankMemory
from hetis.solver.workload import WorkloadMoments


def layer_wire_s(cost: DeviceCost, pool: PoolCost | None, stage: StageShape, mix: Mix) -> float:
    """Return wire: seconds for the KV of one request and layer to leave a prefill stage or reach a decode stage."""
    if stage.kv_link is not None:  # the stage of a prefill replica
        chunk_s = float(cost.kv_transfer_s(mix.chunk_tokens, cost.shape.groups, stage.kv_link))
        return cost.moments.mean_prompt / mix.chunk_tokens * chunk_s
    moved = 0 if stage.pool is None else stage.pool.head_groups
    link = stage.arrival_link or stage.hop_link
    kept_s = float(cost.kv_transfer_s(cost.moments.mean_prompt, cost.shape.groups - moved, link))
    if stage.pool is None or pool is None:
        return kept_s
    return max(kept_s, float(pool.receive_s(moved, stage.pool.cards)))


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica of the plan with the values from which its numbers follow; letters are those of `docs/cost-model.md`.

    The problem's model is in the replica's precision.
    """

    problem: PlacementProblem
    moments: WorkloadMoments
    fleet: Fleet  # the devices of all explained replicas
    number: int
    count: int  # number of replicas like this one
    replica: ReplicaPlan
    shape: ReplicaShape
    mix: Mix

    @property
    def role(self) -> Role:
        return self.shape.role

    def with_sizes(self, *, micro_batch: int, chunk_tokens: int) -> ReplicaView:
        """Return the same stages with other sizes of micro-batches or chunks."""
        mix = _mix_of_a_copy(
            self.problem.model, self.moments, micro_batch, chunk_tokens, self.shape.attention_dp
        )  # fmt: skip
        return replace(self, mix=mix, shape=replace(self.shape, micro_batch=micro_batch, chunk_tokens=chunk_tokens))

    def cost(self, gpu: str, tp: int, intra: Link, attention_dp: int = 1, reserved_bytes: int = 0) -> DeviceCost:
        shape = rank_shape(self.problem.model, tp, attention_dp)
        assert shape is not None, f"the structure check has let TP {tp} pass"
        memory = self.problem.memory_of(gpu, tp, attention_dp, reserved_bytes)
        profile = self.problem.profile_of(gpu, reserved_bytes)
        return DeviceCost(self.problem.model, profile, self.moments, shape, intra, memory)

    def stage_cost(self, stage: StageShape) -> DeviceCost:
        return self.cost(stage.gpu, stage.tp, stage.intra_link, self.shape.attention_dp, stage.reserved_bytes)

    def pool_cost(self, stage: StageShape, gpu: str, link: Link) -> PoolCost:
        worker = replace(self.cost(gpu, 1, intra_link(self.problem.cluster.gpu_types[gpu], None)), memory=None)
        return PoolCost(self.stage_cost(stage), worker, link, self.problem.family.plugin)

    def per_request(self, with_chunk_s: float, plain_s: float) -> float:
        return self.mix.chunk_iterations * with_chunk_s + self.mix.plain_iterations * plain_s

    def layers(self, position: int) -> int:
        """Return the layers of a stage, including prefix layers and any drafting layer."""
        return self.shape.stages[position].layers + self._prefix(position) + self._drafting(position)

    def _drafting(self, position: int) -> int:
        return self.problem.model.draft_layers if position == len(self.shape.stages) - 1 else 0

    def _prefix(self, position: int) -> int:
        return self.problem.model.prefix_layers if position == 0 else 0

    # --- time

    def times(self) -> tuple[StageTime, ...]:
        parts = [self._stage_time(i) for i in range(len(self.shape.stages))]
        slowest_s = max(part.total_s / part.copies for part in parts)
        return tuple(replace(part, is_bottleneck=part.total_s / part.copies == slowest_s) for part in parts)

    def busiest(self) -> StageTime:
        """Return the stage that is busy for the largest share of the time."""
        return next(part for part in self.times() if part.is_bottleneck)

    def _stage_time(self, i: int) -> StageTime:
        stage, prefix, mix = self.shape.stages[i], self._prefix(i), self.mix
        cost, b, C = self.stage_cost(stage), mix.decode_tokens, mix.chunk_tokens
        repeated = stage.layers + self._drafting(i)
        pool = None if stage.pool is None else self.pool_cost(stage, stage.pool.gpu, stage.pool.link)
        dense_s = self.per_request(cost.dense_s(b + C, all_tokens=mix.all_tokens), cost.dense_s(b))
        prefix_dense_s = 0.0
        if prefix:
            prefix_dense_s = self.per_request(
                cost.dense_s(b + C, prefix_layer=True), cost.dense_s(b, prefix_layer=True)
            )
        reduce_s = self.per_request(cost.reduces_s(b + C), cost.reduces_s(b))
        exchange_s = 0.0  # part of the dense work of a layer with experts
        if mix.attention_dp > 1:
            exchange_s = self.per_request(cost.exchange_s(mix.all_tokens), cost.exchange_s(mix.attention_dp * b))
        prefill_s = mix.chunk_iterations * cost.prefill_s(C) if C else 0.0
        decode_s = self.per_request(max(self.attention_s(stage, beside_chunk=True)), max(self.attention_s(stage)))
        late_s = mix.chunk_iterations * self.late_s(stage)
        beside_dense_s = reduce_s + prefill_s + decode_s + late_s
        # Copies that share their experts also share the link.
        wire_s = 0.0 if self.role is Role.UNIFIED else mix.attention_dp * layer_wire_s(cost, pool, stage, mix)
        wait_s = repeated * max(0.0, wire_s - dense_s - beside_dense_s)
        wait_s += prefix * max(0.0, wire_s - prefix_dense_s - beside_dense_s)
        transfer_s = self.layers(i) * late_s
        if i > 0:
            transfer_s += self.per_request(cost.hop_s(b + C, stage.hop_link), cost.hop_s(b, stage.hop_link))
        is_last = i == len(self.shape.stages) - 1
        head_s = self.per_request(cost.head_s(b + 1), cost.head_s(b)) if is_last else 0.0
        head_s += float(mix.iterations * cost.drafting_s(mix.micro_batch)) if is_last else 0.0
        parts = {
            "dense_s": repeated * (dense_s - exchange_s) + prefix * prefix_dense_s,
            "all_reduce_s": self.layers(i) * reduce_s + repeated * exchange_s,
            "prefill_attention_s": self.layers(i) * prefill_s,
            "decode_attention_s": self.layers(i) * decode_s,
            "transfer_s": transfer_s,
            "head_s": head_s,
            "other_s": self.per_request(cost.step_s(b + C), cost.step_s(b)) + self.plugin_s(i),
            "kv_wait_s": wait_s,
        }
        return StageTime(
            replica=self.number,
            stage=i,
            gpu=stage.gpu,
            tp=stage.tp,
            copies=stage.copies,
            total_s=sum(parts.values()),
            kv_wire_s=self.layers(i) * wire_s,
            is_bottleneck=False,
            **parts,
        )

    def plugin_s(self, i: int) -> float:
        """Return what attention workers of a stage cost its hosts per request, besides the exchange."""
        plugin, b = self.problem.family.plugin, self.mix.decode_tokens
        if self.shape.stages[i].pool is None:
            return 0.0
        seconds = self.mix.iterations * (self.layers(i) * plugin.local_s + plugin.step_s)
        is_last = i == len(self.shape.stages) - 1
        return seconds + (self.per_request(b + 1, b) * plugin.sequence_s if is_last else 0.0)

    def attention_s(self, stage: StageShape, *, beside_chunk: bool = False) -> tuple[float, float]:
        """Return seconds of decode attention per layer and iteration on own ranks, and on the pool with exchange."""
        cost, pool, b = self.stage_cost(stage), stage.pool, self.mix.micro_batch
        moved = 0 if pool is None else pool.head_groups
        own_s = float(cost.decode_attention_s(b * (cost.shape.groups - moved), cost.shape.queries_per_group))
        own_s *= cost.mixed_factor if beside_chunk else 1.0
        if pool is None:
            return own_s, 0.0
        return own_s, float(self.pool_cost(stage, pool.gpu, pool.link).attention_s(b, moved, pool.cards))

    def late_s(self, stage: StageShape) -> float:
        """Return the seconds that shipping a chunk's KV to the stage's pool adds to one layer and iteration."""
        cost, pool, b, C = self.stage_cost(stage), stage.pool, self.mix.decode_tokens, self.mix.chunk_tokens
        if pool is None or C == 0:
            return 0.0
        layer_s = cost.dense_s(b + C) + cost.reduces_s(b + C) + cost.prefill_s(C)
        layer_s += max(self.attention_s(stage, beside_chunk=True)) + self.problem.family.plugin.local_s
        return float(self.pool_cost(stage, pool.gpu, pool.link).late_s(b, C, pool.head_groups, pool.cards, layer_s))

    def interval_s(self, times: tuple[StageTime, ...]) -> float:
        """Return t, the seconds between completions."""
        stage_s = [part.total_s for part in times]
        return seconds_between_completions(self._setting(), self.shape.stages, stage_s, self.shared_card_s())

    def shared_card_s(self) -> list[float]:
        """Return the seconds of one request on cards shared by several stages, one number per group of stages."""
        return [busy_seconds(self._setting(), self.shape, positions) for positions in self.shape.shared_by]

    def _setting(self) -> Setting:
        return Setting.of(self.problem, self.moments, self.shape)

    def round_s(self, times: tuple[StageTime, ...]) -> float:
        """Return the seconds between completions if only the round trip limited micro-batches."""
        return sum(part.total_s for part in times) / self.shape.in_flight

    def least_slack(self) -> float:
        """Return the least slack of any stage."""
        return least_slack(self._setting(), sum(stage.copies for stage in self.shape.stages))[0]

    def tpot_s(self, interval_s: float) -> float:
        return interval_s * tpot_per_t(self._setting())

    def ttft_s(self, interval_s: float) -> float:
        """Return p95 TTFT at this interval between completions."""
        return derive(self._setting(), self.shape).ttft_s(interval_s)

    # --- memory

    def requests(self, copies: int) -> int:
        """Return D b, the requests whose KV a copy holds."""
        return -(-self.shape.in_flight // copies) * self.mix.micro_batch

    def kv_tokens(self, copies: int) -> float:
        """Return Tkv, the tokens whose KV a copy holds."""
        micro_batches = -(-self.shape.in_flight // copies)
        return kv_tokens_per_copy(self.problem.model, self.moments, self.problem.assumptions, self.mix, micro_batches)

    def prompt_tokens(self, copies: int) -> float:
        """Return Tpre, the prompt tokens that a copy keeps for head groups of its pool."""
        micro_batches = -(-self.shape.in_flight // copies)
        return prompt_tokens_per_copy(self.problem.model, self.moments, self.mix, micro_batches)

    def memory(self) -> Iterator[MemoryBar]:
        for i, stage in enumerate(self.shape.stages):
            yield self._rank_memory(i, stage)
            if stage.pool is not None:
                yield self._worker_memory(i, stage, stage.pool)

    def kv_fill(self) -> tuple[float, str]:
        """Return the ratio of planned KV to its room where that is scarcest, and the place."""
        fills = []
        for bar in self.memory():
            room = bar.kv_bytes + bar.free_bytes
            whose = f"stage {bar.stage + 1}" if bar.role == "primary" else f"attention workers of stage {bar.stage + 1}"
            fills.append((bar.kv_bytes / room if room > 0 else 0.0, whose))
        return max(fills)

    def _rank_memory(self, i: int, stage: StageShape) -> MemoryBar:
        cost, is_last = self.stage_cost(stage), i == len(self.shape.stages) - 1
        weights = stage.layers * cost.layer_bytes()
        weights += cost.prefix_bytes() + cost.vision_bytes() if i == 0 else 0.0
        tables = int(i == 0) + int(is_last)
        weights += cost.embedding_bytes() * (min(tables, 1) if self.problem.model.tie_embeddings else tables)
        batch = LargestBatch.of(self.mix, -(-self.shape.in_flight // stage.copies))
        activations = float(cost.activation_bytes(batch) + (cost.logit_bytes(batch) if is_last else 0.0))
        weights += cost.draft_bytes() if is_last else 0.0
        given = stage.pool.head_groups if stage.pool is not None else 0
        held = (cost.shape.groups - given) * self.kv_tokens(stage.copies) + given * self.prompt_tokens(stage.copies)
        states = state_bytes_per_copy(self.problem.model, self.mix, -(-self.shape.in_flight // stage.copies))
        states /= self.problem.model.state_ranks(stage.tp)
        kv = self.layers(i) * (held * self.problem.model.kv_bytes_per_token_group() + states)
        bar = self._bar(i, "primary", stage, stage.tp * stage.copies, kv, cost.memory)
        return replace(
            bar,
            weight_bytes=round(weights),
            activation_bytes=round(activations),
            free_bytes=bar.free_bytes - round(weights) - round(activations),
        )

    def _worker_memory(self, i: int, stage: StageShape, pool: PoolShape) -> MemoryBar:
        """Return the memory of the fullest card; of a shared card, other stages' part by KV is unusable here."""
        kv = self._worker_kv(i, stage, pool)
        bar = self._bar(i, "attention worker", pool, pool.cards * stage.copies, kv)
        shared_by = next((positions for positions in self.shape.shared_by if i in positions), (i,))
        others = sum(self._worker_kv(j, self.shape.stages[j], self.shape.pool_of(j)) for j in shared_by if j != i)
        if not others:
            return bar
        elsewhere = round((bar.kv_bytes + bar.free_bytes) * others / (others + kv))
        return replace(bar, unusable_bytes=bar.unusable_bytes + elsewhere, free_bytes=bar.free_bytes - elsewhere)

    def _worker_kv(self, i: int, stage: StageShape, pool: PoolShape) -> float:
        requests, group_bytes = self.requests(stage.copies), self.problem.model.kv_bytes_per_token_group()
        pairs = -(-requests * pool.head_groups * stage.tp // pool.cards)
        return self.layers(i) * pairs / requests * self.kv_tokens(stage.copies) * group_bytes

    def _bar(
        self, i: int, role: str, part: StageShape | PoolShape, num_devices: int, kv: float,
        memory: RankMemory | None = None,
    ) -> MemoryBar:  # fmt: skip
        """Return the memory of a device with no more than KV."""
        profile = self.problem.profile_of(part.gpu, part.reserved_bytes)
        usable = profile.usable_bytes if memory is None else round(memory.usable_bytes)
        reserve = profile.reserve_bytes if memory is None else round(memory.fixed_bytes)
        # The profile may have measured more memory than the catalogue's rounded number.
        nominal = max(self.problem.cluster.gpu_types[part.gpu].memory_bytes, usable)
        return MemoryBar(
            replica=self.number,
            stage=i,
            role=role,
            gpu=part.gpu,
            num_devices=num_devices,
            nominal_bytes=nominal,
            unusable_bytes=nominal - usable,
            reserve_bytes=reserve,
            weight_bytes=0,
            kv_bytes=round(kv),
            activation_bytes=0,
            free_bytes=usable - reserve - round(kv),
        )


def replica_views(plan: Plan, problem: PlacementProblem) -> tuple[ReplicaView, ...]:
    """Return the first replica of every shape."""
    first: dict[ReplicaPlan, int] = {}
    count: dict[ReplicaPlan, int] = {}
    for number, one in enumerate(plan.replicas):
        key = _nameless(one)
        first.setdefault(key, number)
        count[key] = count.get(key, 0) + 1
    # Explicit links to the replicas at the other end of routes count, too.
    shown = range(len(plan.replicas)) if problem.cluster.network.between_nodes else first.values()
    fleet = _fleet_of(problem, {name for n in shown for name in plan.replicas[n].devices()})
    partners = kv_partners(plan, fleet)
    moments_of, views = problem.moments_of_ranges(), list[ReplicaView]()
    for key, number in first.items():
        one = plan.replicas[number]
        for violation in check_replica_structure(one, f"replica {number}", problem, fleet):
            raise InvalidProblemError(f"plan cannot be explained: {violation}")
        moments = moments_of[one.classes]
        mix = _mix_of_a_copy(problem.model, moments, one.micro_batch, one.chunk_tokens, one.attention_dp)
        own, shape = problem.of_replica(one), replica_shape(one, problem, fleet, partners.get(number, ()))
        views.append(ReplicaView(own, moments, fleet, number, count[key], one, shape, mix))
    return tuple(views)


def _mix_of_a_copy(
    model: ModelSpec, moments: WorkloadMoments, micro_batch: int, chunk_tokens: int, attention_dp: int
) -> Mix:
    """Return the mix of a replica, with the iterations of a request on its own copy."""
    mix = mix_of(model, moments, micro_batch=micro_batch, chunk_tokens=chunk_tokens, attention_dp=attention_dp)
    return mix.of_a_copy()


def main_view(views: tuple[ReplicaView, ...]) -> ReplicaView:
    """Return the shape on which most of the traffic is decoded, to represent the plan."""
    decoding = [view for view in views if view.role is not Role.PREFILL]
    return max(decoding or views, key=lambda view: view.count * view.replica.rate)


def _nameless(one: ReplicaPlan) -> ReplicaPlan:
    """Return the replica with numbers of devices instead of their names."""
    return replace(
        one,
        stages=tuple(replace(stage, devices=(str(len(stage.devices)),)) for stage in one.stages),
        attention_workers=tuple(replace(p, devices=(str(len(p.devices)),)) for p in one.attention_workers),
    )


def _fleet_of(problem: PlacementProblem, names: set[str]) -> Fleet:
    """Return the devices of these names and one of every zone, so that all zones are known, without the rest."""
    is_out, groups = left_out_by(problem.constraints), problem.cluster.node_groups
    nodes = sorted(set(map(node_of, names)))
    found = [(group, index) for group in groups for node in nodes if (index := group.index_of(node)) is not None]
    used = [device for group, index in found for device in group.devices(index) if device.name in names]
    zones = {device.group.zone for device in used}
    for group in groups if names else ():
        if group.zone not in zones:
            every = (device for index in range(group.count) for device in group.devices(index))
            if (first := next((device for device in every if not is_out(device)), None)) is not None:
                used.append(first)
                zones.add(group.zone)
    return Fleet(cluster=problem.cluster, devices={device.name: device for device in used})
