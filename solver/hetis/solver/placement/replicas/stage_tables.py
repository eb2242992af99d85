"""Fills the tables of stages from the cost model; equal devices are computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from hetis.solver import cost, mixes
from hetis.solver.cluster import Link
from hetis.solver.constraints import Duty
from hetis.solver.cost import DeviceCost, PoolCost, RankShape
from hetis.solver.mixes import LargestBatch, Mix
from hetis.solver.model import ModelSpec
from hetis.solver.placement.fleet import (
    DeviceClass,
    IntArray,
    Part,
)
from hetis.solver.placement.replicas.tables import (
    NO_ROOM,
    BoolArray,
    ChunkTables,
    FloatArray,
    Tables,
    latency_caps,
    trips_of,
)
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.rank_memory import requests_at_once
from hetis.solver.workload import WorkloadMoments


class BuildClasses(NamedTuple):
    """The model in the precision of a build, and the classes that compute in it (None: all).

    ``kv`` numbers what builds that may exchange KV have in common (`PlacementProblem.kv_of`), from 0.
    """

    model: ModelSpec
    primaries: frozenset[int] | None
    kv: int = 0


class _MixNumbers(NamedTuple):
    """Contents and frequencies of mixes, in their order, [X] each; ``tokens`` are per iteration with a chunk.

    ``all_tokens`` are those of all copies of an expert-parallel stage.
    """

    micro_batch: FloatArray
    decode_tokens: FloatArray
    chunk_tokens: FloatArray
    tokens: FloatArray
    all_tokens: FloatArray
    chunk_iterations: FloatArray
    plain_iterations: FloatArray
    unified: BoolArray

    @property
    def iterations(self) -> FloatArray:
        """Return the iterations of a request, with and without a chunk."""
        return self.chunk_iterations + self.plain_iterations


def _numbers_of(mixes: Sequence[Mix]) -> _MixNumbers:
    rows = [(m.micro_batch, m.decode_tokens, m.chunk_tokens, m.chunk_iterations, m.plain_iterations) for m in mixes]
    b, bq, c, nc, nd = np.array(rows, dtype=float).reshape(-1, 5).T
    together = np.array([m.all_tokens for m in mixes], dtype=float)
    unified = np.array([m.role is Role.UNIFIED for m in mixes], dtype=bool)
    return _MixNumbers(b, bq, c, bq + c, together, nc, nd, unified)


class _PoolTables(NamedTuple):
    """The tables of stages with attention workers, as in `Tables`."""

    start: IntArray
    whole_s: FloatArray
    chunk_s: FloatArray
    least_start: IntArray
    least_s: FloatArray


class StageTables:
    """Fills `Tables`; whatever does not depend on a replica's zones is computed once."""

    def __init__(
        self, problem: PlacementProblem, moments: WorkloadMoments, classes: tuple[DeviceClass, ...],
        mixes: tuple[Mix, ...], ranks: tuple[tuple[int, int], ...], rank_dp: tuple[int, ...],
        pool_sizes: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.problem, self.moments, self.classes, self.mixes = problem, moments, classes, mixes
        self.ranks, self.rank_dp, self.pool_sizes = ranks, rank_dp, pool_sizes
        self._may_have = np.equal.outer([m.attention_dp for m in mixes], rank_dp).reshape(len(mixes), len(ranks))
        self._numbers = _numbers_of(mixes)
        self._poolable = _numbers_of([mix for mix in mixes if mix.attention_dp == 1])
        self._costs: dict[tuple[str, int, Link, int, int, ModelSpec, bool], DeviceCost] = {}
        self._rows: dict[tuple[str, Link, RankShape], dict[str, FloatArray]] = {}
        self._hops_over: dict[tuple[str, Link, RankShape, Link], FloatArray] = {}
        models = [problem.model.on(c.gpu) for c in classes]
        self.devices = [
            self._device(classes[i], size // dp, models[i], dp) for (i, size), dp in zip(ranks, rank_dp, strict=True)
        ]
        # Attention workers are no engines.
        self.workers = [self._device(c, 1, model, is_engine=False) for c, model in zip(classes, models, strict=True)]
        self.own_s, self.chunk_own_s = self._own_tables()

    def _device(
        self, c: DeviceClass, tp: int, model: ModelSpec, attention_dp: int = 1, *, is_engine: bool = True
    ) -> DeviceCost:  # fmt: skip
        """Return the costs of a device; an attention worker's are with the model as its primary holds it."""
        key = (c.gpu, c.reserved_bytes, c.intra, tp, attention_dp, model, is_engine)
        if key not in self._costs:
            shape = cost.rank_shape(model, tp, attention_dp)
            assert shape is not None, "rank types are valid shapes"
            memory = self.problem.memory_of(c.gpu, tp, attention_dp, c.reserved_bytes) if is_engine else None
            profile = self.problem.profile_of(c.gpu, c.reserved_bytes)
            self._costs[key] = DeviceCost(model, profile, self.moments, shape, c.intra, memory)
        return self._costs[key]

    def tables(self, build: BuildClasses, part: Part, place: Part | None = None) -> Tables:
        """Return the tables of replicas of one build in this part of the fleet, with KV exchanged in ``place``."""
        family, (model, primaries, _), zones = self.problem.family, build, part.zones
        rows = [self._rank_rows(self.devices[s], self.classes[i]) for s, (i, _) in enumerate(self.ranks)]
        stack = {name: np.array([row[name] for row in rows]).T.copy() for name in (rows[0] if rows else {})}
        hops = np.array(
            [self._hops(self.devices[s], self.classes[i], part) for s, (i, _) in enumerate(self.ranks)]
        ).reshape(len(self.ranks), len(self.mixes), 2)  # fmt: skip
        place = place or Part(zones)
        wire_s, landing_s = self._kv_tables(place)
        slowest_s = self._slowest_landing_s(place, primaries, landing_s)
        pools, (whole_step_s, whole_last_s, chunk_step_s, chunk_last_s) = self._pools, self._plugin_tables()
        drafting_s, chunk_drafting_s = self._drafting(model, stack, wire_s)
        start = pools.start.copy()
        for s, (i, _) in enumerate(self.ranks):
            own = self.classes[i].zone if self.classes[i].zone in zones else None
            may = [q.zone == own and part.has(q) and Duty.WORKER not in q.constraints.barred for q in self.classes]
            start[s] = np.where(may, start[s], -1)
        kv_tokens, trips = self._allowed_kv_tokens(), trips_of(self.problem, self.moments, self.mixes)
        caps = latency_caps(self.problem, self.mixes, trips, slowest_s)
        return Tables(
            num_layers=model.num_layers - model.prefix_layers,
            prefix_layers=model.prefix_layers,
            draft_layers=model.draft_layers,
            kv_group_bytes=model.kv_bytes_per_token_group(),
            cut_floor=_cut_floor(self.problem),
            micro_batch=np.array([m.micro_batch for m in self.mixes], dtype=np.int64),
            in_flight=np.array(family.in_flight, dtype=np.int64),
            iterations=np.array([m.iterations for m in self.mixes]),
            chunk_iterations=np.array([m.chunk_iterations for m in self.mixes]),
            without_chunk=np.array(
                [[max(0.0, 1.0 - x.chunk_share) ** (m * x.attention_dp) for m in family.in_flight] for x in self.mixes]
            ),
            t_cap=np.where(kv_tokens < NO_ROOM, caps.interval_s, 0.0),
            trip_cap=caps.round_trip_s,
            slowest_landing_s=slowest_s,
            kv_tokens=kv_tokens,
            prompt_tokens=self._per_rank(partial(mixes.prompt_tokens_per_copy, self.problem.model, self.moments)),
            state_bytes=self._per_rank(
                lambda mix, held: mix.attention_dp * mixes.state_bytes_per_copy(self.problem.model, mix, held)
            ),
            rank_class=np.array([i for i, _ in self.ranks], dtype=np.int64),
            rank_tp=np.array([tp for _, tp in self.ranks], dtype=np.int64),
            state_ranks=np.array(
                [d.shape.attention_dp * model.state_ranks(d.shape.tp) for d in self.devices], dtype=np.int64
            ),
            rank_dp=np.array(self.rank_dp, dtype=np.int64),
            rank_groups=np.array([d.shape.groups for d in self.devices], dtype=np.int64),
            room_bytes=np.array([d.room_bytes() for d in self.devices]),
            layer_bytes=np.array([d.layer_bytes() for d in self.devices]),
            first_bytes=np.array([d.embedding_bytes() + d.vision_bytes() + d.prefix_bytes() for d in self.devices]),
            last_bytes=np.array([d.embedding_bytes() + d.draft_bytes() for d in self.devices]),
            tied_bytes=np.array([d.embedding_bytes() if model.tie_embeddings else 0.0 for d in self.devices]),
            act_bytes=np.where(self._may_have[:, None, :], self._by_in_flight(DeviceCost.activation_bytes), np.inf),
            logit_bytes=self._by_in_flight(DeviceCost.logit_bytes),
            layer_s=np.where(self._may_have, stack["layer_s"], np.inf),
            own_s=self.own_s,
            hop_s=hops[:, :, 0].T.copy(),
            step_s=stack["step_s"],
            plugin_step_s=whole_step_s,
            plugin_last_s=whole_last_s,
            last_s=stack["last_s"] + drafting_s,
            prefix_delta_s=stack["prefix_delta_s"],
            chunk=ChunkTables(
                layer_s=stack["chunk_layer_s"],
                hop_s=hops[:, :, 1].T.copy(),
                step_s=stack["chunk_step_s"],
                plugin_step_s=chunk_step_s,
                plugin_last_s=chunk_last_s,
                last_s=stack["chunk_last_s"] + chunk_drafting_s,
                prefix_delta_s=stack["chunk_prefix_delta_s"],
                own_s=self.chunk_own_s,
                pool_s=pools.chunk_s,
            ),
            wire_s=wire_s,
            landing_s=landing_s,
            available=np.array([c.available if part.has(c) else 0 for c in self.classes], dtype=np.int64),
            worker_room_bytes=np.array([w.room_bytes() for w in self.workers]),
            pool_sizes=np.array(self.pool_sizes, dtype=np.int64),
            pool_start=start,
            pool_s=pools.whole_s,
            least_pool_start=pools.least_start,
            least_pool_s=pools.least_s,
        )  # fmt: skip

    def _plugin_tables(self) -> tuple[FloatArray, ...]:
        """Return seconds for iterations of a stage with workers, and for sequences; of a request, of a chunk; [X]."""
        m, plugin = self._numbers, self.problem.family.plugin
        plain_s, chunk_s = plugin.sequence_s * m.decode_tokens, plugin.sequence_s * (m.decode_tokens + 1)
        last_s = m.chunk_iterations * chunk_s + m.plain_iterations * plain_s
        return plugin.step_s * m.iterations, last_s, np.where(m.unified, plugin.step_s, 0.0), m.unified * chunk_s

    def _drafting(
        self, model: ModelSpec, stack: Mapping[str, FloatArray], wire_s: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return seconds of the drafting layer per request, and in one iteration with a chunk; [X, S]."""
        if not model.draft_layers:
            return np.zeros_like(wire_s), np.zeros_like(wire_s)
        own_s, chunk_own_s = (
            np.stack([table[:, s, d.shape.groups] for s, d in enumerate(self.devices)], axis=1)
            for table in (self.own_s, self.chunk_own_s)
        )
        chunk_s = stack["chunk_layer_s"] + self._numbers.unified[:, None] * chunk_own_s
        return model.draft_layers * np.maximum(stack["layer_s"] + own_s, wire_s), model.draft_layers * chunk_s

    def _own_tables(self) -> tuple[FloatArray, FloatArray]:
        """Return seconds of decode attention over kept groups, per request and in an iteration with a chunk.

        Both are [X, S, max groups + 1]. In a mix without chunks the second is that of any iteration.
        """
        groups = max((d.shape.groups for d in self.devices), default=0)
        own, chunk_own = np.zeros((2, len(self.mixes), len(self.ranks), groups + 1))
        m = self._numbers
        batches, nc, nd = m.micro_batch[:, None], m.chunk_iterations[:, None], m.plain_iterations[:, None]
        done: dict[int, tuple[FloatArray, FloatArray]] = {}
        for s, device in enumerate(self.devices):
            if id(device) not in done:  # equal devices are computed once
                kept = np.arange(device.shape.groups + 1.0)[None, :]
                plain_s = device.decode_attention_s(batches * kept, device.shape.queries_per_group)
                mixed_s = np.where(m.unified[:, None], device.mixed_factor, 1.0) * plain_s
                done[id(device)] = nc * mixed_s + nd * plain_s, mixed_s
            own[:, s, : device.shape.groups + 1], chunk_own[:, s, : device.shape.groups + 1] = done[id(device)]
        return own, chunk_own

    def _rank_rows(self, d: DeviceCost, c: DeviceClass) -> dict[str, FloatArray]:
        """Return the numbers of a rank type that depend on neither pool nor zone, per mix."""
        key = (c.gpu, c.intra, d.shape)
        if key in self._rows:
            return self._rows[key]
        m = self._numbers
        b, both, nc, nd = m.decode_tokens, m.tokens, m.chunk_iterations, m.plain_iterations
        drafting = d.drafting_s(m.micro_batch)
        chunk_dense, dense = d.dense_s(both, all_tokens=m.all_tokens), d.dense_s(b)
        chunk_step, chunk_head = d.step_s(both), d.head_s(b + 1)
        chunk_prefix, prefix = d.dense_s(both, prefix_layer=True), d.dense_s(b, prefix_layer=True)
        with_chunk = chunk_dense + d.reduces_s(both) + d.prefill_s(m.chunk_tokens)
        self._rows[key] = {
            "layer_s": nc * with_chunk + nd * (dense + d.reduces_s(b)),
            "step_s": nc * chunk_step + nd * d.step_s(b),
            "last_s": nc * chunk_head + nd * d.head_s(b) + m.iterations * drafting,
            "chunk_layer_s": m.unified * with_chunk,
            "chunk_step_s": m.unified * chunk_step,
            "chunk_last_s": m.unified * (chunk_head + drafting),
            "chunk_prefix_delta_s": m.unified * (chunk_prefix - chunk_dense),
            "prefix_delta_s": nc * chunk_prefix + nd * prefix - nc * chunk_dense - nd * dense,
        }
        return self._rows[key]

    def _hops(self, d: DeviceCost, c: DeviceClass, part: Part) -> FloatArray:
        """Return seconds on the link to the next stage, of a request and of one iteration with a chunk; [X, 2]."""
        link = c.link_in(self.problem.cluster, part)
        key = (c.gpu, c.intra, d.shape, link)
        if key not in self._hops_over:
            m = self._numbers
            with_chunk = d.hop_s(m.tokens, link)
            hop_s = m.chunk_iterations * with_chunk + m.plain_iterations * d.hop_s(m.decode_tokens, link)
            self._hops_over[key] = np.stack([hop_s, m.unified * with_chunk], axis=1)
        return self._hops_over[key]

    def _kv_tables(self, place: Part) -> tuple[FloatArray, FloatArray]:
        """Return (wire, landing) of a layer without a pool: KV leaving a prefill or reaching a decode replica; [X, S].

        Such replicas lie in one zone. Those that send to other zones use the slowest link to any of them, and all the
        slowest explicit link to any node of their place.
        """
        zones = place.zones
        wire_s, landing_s = np.zeros((2, len(self.mixes), len(self.ranks)))
        cluster = self.problem.cluster
        done: dict[tuple[int, Link], tuple[FloatArray, FloatArray]] = {}
        for s, (i, _) in enumerate(self.ranks):
            d, link = self.devices[s], self.classes[i].link_in(cluster, place)
            if (id(d), link) not in done:
                afar = link
                for zone in cluster.zones():
                    afar = afar.slower_of(cluster.network.zone_link(zones[0], zone))
                wires, landings = np.zeros((2, len(self.mixes)))
                for x, mix in enumerate(self.mixes):
                    if mix.role is Role.PREFILL:
                        kv_link = afar if mix.sends_afar else link
                        chunk_s = d.kv_transfer_s(mix.chunk_tokens, float(d.shape.groups), kv_link)
                        # Including KV from the prefix cache: the decode replica receives that of the whole prompt.
                        wires[x] = self.moments.mean_prompt / mix.chunk_tokens * chunk_s
                        landings[x] = d.landing_s(mix.chunk_tokens, kv_link)
                    elif mix.role is Role.DECODE:
                        wires[x] = d.kv_transfer_s(self.moments.mean_prompt, float(d.shape.groups), link)
                done[id(d), link] = wires, landings
            wire_s[:, s], landing_s[:, s] = done[id(d), link]
        return wire_s, landing_s

    def _slowest_landing_s(
        self, place: Part, primaries: frozenset[int] | None, landing_s: FloatArray
    ) -> FloatArray:  # fmt: skip
        """Return the landing time that a TTFT limit sets aside: that of the place's slowest rank, used or not; [X].

        If a fleet represents several zones, return the fastest rank's instead, which no rank of any zone undercuts.
        """
        inside = [s for s, (i, _) in enumerate(self.ranks) if place.has(self.classes[i])]
        here = [s for s in inside if primaries is None or self.ranks[s][0] in primaries]
        if not here:
            return np.zeros(len(self.mixes))
        chosen = landing_s[:, here]
        return np.asarray(chosen.max(axis=1))

    def _allowed_kv_tokens(self) -> FloatArray:
        """Return the KV tokens of a stage copy, or more than fits anywhere if engine settings exclude it.

        The settings limit pairs of a mix and M, which searches combine freely; memory is the limit that all of them
        respect.
        """
        problem = self.problem
        tokens = self._per_rank(partial(mixes.kv_tokens_per_copy, problem.model, self.moments, problem.assumptions))
        tokens = np.maximum(tokens, problem.least_kv_tokens)
        settings = problem.family.engine_settings
        if not settings:
            return tokens
        in_flight = problem.family.in_flight
        runs = np.array(
            [[settings.allows(micro_batch=x.micro_batch, in_flight=m) for m in in_flight] for x in self.mixes]
        )
        return np.where(runs & (tokens <= problem.most_kv_tokens), tokens, NO_ROOM)

    def _by_in_flight(self, amount_of: Callable[[DeviceCost, LargestBatch], FloatArray]) -> FloatArray:
        """Return bytes of a rank that depend on its mix and the micro-batches in flight; [X, F, S]."""
        m, in_flight = self._numbers, np.array(self.problem.family.in_flight)
        requests = [[requests_at_once(x.micro_batch, x.chunk_tokens, int(f)) for f in in_flight] for x in self.mixes]
        shape = len(self.mixes), len(in_flight)
        batch = LargestBatch(
            m.tokens[:, None], m.decode_tokens[:, None], np.array(requests, float).reshape(shape), in_flight
        )
        known = {id(d): np.broadcast_to(amount_of(d, batch), shape) for d in self.devices}  # equal ones only once
        return np.stack([known[id(d)] for d in self.devices], axis=2) if known else np.empty((*shape, 0))

    def _per_rank(self, amount_of: Callable[[Mix, int], float]) -> FloatArray:
        """Return tokens or bytes of a stage, which holds those of all micro-batches in flight; [X, F]."""
        return np.array([[amount_of(mix, m) for m in self.problem.family.in_flight] for mix in self.mixes])

    @cached_property
    def _pools(self) -> _PoolTables:
        """Return the tables of stages with attention workers, over (rank type, pool class, k, p)."""
        start = np.full((len(self.ranks), len(self.classes)), -1, dtype=np.int64)
        parts: list[tuple[FloatArray, FloatArray]] = []
        offsets: dict[tuple[int, int, Link], int] = {}  # by identity of equal devices, which are slow to hash
        total = 0
        for s, (i, _) in enumerate(self.ranks):
            primary, own_class = self.devices[s], self.classes[i]
            is_refused = self.problem.family.engine is not None and primary.model.kv_bytes != 2  # engines keep 16 bits
            if not self.pool_sizes or not primary.shape.splits_groups or is_refused:
                continue
            for q, worker_class in enumerate(self.classes):
                cluster, zone = self.problem.cluster, (worker_class.zone,)
                if worker_class.zone != own_class.zone:
                    continue
                link = own_class.link_in(cluster, Part(zone, frozenset({worker_class.block})))
                link = link.slower_of(worker_class.link_in(cluster, Part(zone, frozenset({own_class.block}))))
                worker = self.workers[q]
                if worker.model != primary.model:
                    worker = self._device(worker_class, 1, primary.model)
                key = id(primary), id(worker), link
                if key not in offsets:
                    pool = PoolCost(primary, worker, link, self.problem.family.plugin)
                    part = self._pool_entries(pool, self._rank_rows(primary, own_class)["chunk_layer_s"])
                    offsets[key], total = total, total + part[0].shape[1]
                    parts.append(part)
                start[s, q] = offsets[key]
        if not parts:
            nothing = np.zeros((len(self.mixes), 1))
            return _PoolTables(start, nothing, nothing, start, nothing)
        whole_s, chunk_s = (np.concatenate(tables, axis=1) for tables in zip(*parts, strict=True))
        return _PoolTables(start, whole_s, chunk_s, *self._least_of_splits(start, whole_s))

    def _least_of_splits(self, starts: IntArray, pool_s: FloatArray) -> tuple[IntArray, FloatArray]:
        """Return the starts of the least attention over k, and that."""
        least_start, count, parts = np.full_like(starts, -1), len(self.pool_sizes), list[FloatArray]()
        done: dict[int, int] = {}
        for s, device in enumerate(self.devices):
            for q, start in enumerate(starts[s].tolist()):
                if start < 0:
                    continue
                if start not in done:
                    done[start] = count * len(parts)
                    here = pool_s[:, start : start + device.shape.groups * count]
                    parts.append(here.reshape(len(pool_s), device.shape.groups, count).min(axis=1))
                least_start[s, q] = done[start]
        return least_start, np.concatenate(parts, axis=1)

    def _pool_entries(self, pool: PoolCost, chunk_layer_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return seconds of attention with a pool per request, and the same for one iteration with a chunk.

        These are ``nc (max(mu own, worker + exchange) + local + late) + nd (max(own, worker + exchange) + local)``, and
        what is in its first brackets. Both are [X, Gr * sizes], for k = 1..Gr (outer), then p. ``chunk_layer_s`` [X] is
        the rest of a layer with a chunk.
        """
        groups = pool.primary.shape.groups
        k = np.arange(1.0, groups + 1)[:, None]
        p = np.array(self.pool_sizes, dtype=float)[None, :]
        m = self._poolable
        num, unified = len(m.unified), m.unified
        chunk_layer_s, chunk_entries = chunk_layer_s[:num], np.zeros((num, groups, len(self.pool_sizes)))
        # All mixes at once, because a call costs more than its arithmetic; those of expert parallelism have no pools.
        b, c, nc, nd = (
            each[:, None, None] for each in (m.micro_batch, m.chunk_tokens, m.chunk_iterations, m.plain_iterations)
        )
        own = pool.primary.decode_attention_s(b * (groups - k), pool.primary.shape.queries_per_group)
        remote = pool.attention_s(b, k, p)
        local_s = pool.plugin.local_s
        plain = np.maximum(own, remote) + local_s
        entries = np.where(b == 0.0, np.inf, nd * plain)  # prefill replicas have no pools
        mixed = np.maximum(pool.primary.mixed_factor * own[unified], remote[unified]) + local_s
        late = pool.late_s(b[unified], c[unified], k, p, chunk_layer_s[unified, None, None] + mixed)
        chunk_entries[unified] = mixed + late
        entries[unified] += nc[unified] * chunk_entries[unified]
        return self._padded(entries), self._padded(chunk_entries)

    def _padded(self, entries: FloatArray) -> FloatArray:
        """Return entries [.., Gr, sizes] of the mixes that may have pools as those of all mixes, [X, Gr * sizes]."""
        rest = np.full((len(self.mixes) - len(entries), entries[0].size), np.inf)
        return np.concatenate([entries.reshape(len(entries), -1), rest])


def _cut_floor(problem: PlacementProblem) -> IntArray:
    """Return, for every position after the prefix, the last position at or before it where a stage may start."""
    model = problem.model
    layers = range(model.num_layers - model.prefix_layers + 1)
    cuts = [layer if model.allowed_cut(layer + model.prefix_layers) else 0 for layer in layers]
    return np.maximum.accumulate(np.array(cuts, dtype=np.int64))
