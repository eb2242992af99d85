"""The cost model of `docs/cost-model.md`, with its letters: a stage's times and its memory; `mixes` has iterations.

Functions take scalars or arrays, so the search tabulates thousands of shapes with the same code that prices a single
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.solver.cluster import GpuType, Link
from hetis.solver.mixes import BUSIEST, LargestBatch
from hetis.solver.model import ModelSpec
from hetis.solver.plugin_time import PluginTime
from hetis.solver.profile import Fit, Op, Profile
from hetis.solver.rank_memory import RankMemory
from hetis.solver.workload import WorkloadMoments

FloatArray = npt.NDArray[np.float64]
Scalars = Any  # a float or an array of floats; the result has the broadcast shape

NORM_BYTES = 8.0  # of a token, which ranks sum for norms over all heads: the squares of queries and of keys, in float32
EXPERT_IMBALANCE = 0.3  # the busiest of r ranks computes r^0.3 times its share


@dataclass(frozen=True, slots=True)
class RankShape:
    """The share of a layer's heads on one tensor-parallel rank of n."""

    tp: int  # n
    groups: int  # Gr: head groups that a rank holds
    queries_per_group: int  # rr: query heads of one group that this rank computes
    splits_groups: bool  # every group is on one rank (n <= G), and a pool can take it over
    attention_dp: int = 1  # d: copies of the stage that share its routed experts, of which a rank holds 1/(n d)


def rank_shape(model: ModelSpec, tp: int, attention_dp: int = 1) -> RankShape | None:
    """Return the rank's share of heads, or None if the model cannot be split n ways.

    With an ``attention_dp`` over 1 the ranks of all d copies share the routed experts; only models with experts can.
    """
    groups = model.head_groups
    if not model.divides(tp):
        return None
    on_rank, is_alone = max(1, groups // tp), attention_dp == 1
    if not is_alone and (model.experts is None or model.experts.count % (tp * attention_dp)):
        return None
    splits = is_alone and tp <= groups and model.heads_can_move
    return RankShape(tp, on_rank, model.q_heads // tp // on_rank, splits, attention_dp)


def intra_link(gpu: GpuType, explicit: Link | None) -> Link:
    """Return the GPU-to-GPU link inside a node: the explicit one, otherwise NVLink, otherwise PCIe."""
    if explicit is not None:
        return explicit
    return Link(bytes_per_s=gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s, latency_s=0.0)


def _seconds(
    fit: Fit, *, flops: Scalars = 0.0, num_bytes: Scalars = 0.0, tokens: Scalars = 0.0, heads: Scalars = 0.0,
    wire_s: Scalars = 0.0,
) -> Scalars:  # fmt: skip
    """Compute ``Fit.seconds`` for scalars or arrays."""
    times = [
        p.fixed_s + p.flop_s * flops + p.byte_s * num_bytes + p.token_s * tokens + p.head_s * heads + p.wire * wire_s
        for p in fit.pieces
    ]
    return max(times) if isinstance(times[0], float) else reduce(np.maximum, times)


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """Times and memory of one GPU type as one of n TP ranks, or (n = 1) as an attention worker.

    Tokens are those of one copy. With expert parallelism the d copies of the stage compute routed experts together:
    ``all_tokens`` are those of all copies, d times as many unless they are given.
    """

    model: ModelSpec
    profile: Profile
    moments: WorkloadMoments
    shape: RankShape
    intra: Link
    memory: RankMemory | None = None  # None: what the profile says of any engine
    _fits: Mapping[Op, Fit] = field(init=False, repr=False, compare=False)
    _taken: RankMemory = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_taken", self.memory or plain_memory(self.profile, self.model, self.shape))
        # Looked up once, because a placement needs them a hundred thousand times.
        found = {op: self.profile.fit(op, self.model, self.shape.tp) for op in Op}
        object.__setattr__(self, "_fits", {op: fit for op, fit in found.items() if fit is not None})

    def dense_s(self, tokens: Scalars, *, prefix_layer: bool = False, all_tokens: Scalars | None = None) -> Scalars:
        """Return dense(T) of a repeated layer, or of one of the leading layers without experts."""
        m, n = self.model, self.shape.tp
        if self.shape.attention_dp > 1 and not prefix_layer:
            every = self.shape.attention_dp * tokens if all_tokens is None else all_tokens
            return self._parallel_experts_s(tokens, every)
        active = float(m.dense_layer_params() if prefix_layer else m.active_layer_params())
        touched = m.dense_layer_params() if prefix_layer else m.touched_layer_params(tokens)
        activations = 4 * (m.hidden + m.residual_width) * m.activation_bytes * tokens
        experts = self._fits.get(Op.EXPERTS)
        experts_s: Scalars = 0.0
        if experts is not None and m.experts is not None and not prefix_layer:
            routed, read = m.experts.active * m.expert_params(), m.touched_experts(tokens) * m.expert_params()
            share = m.expert_share
            active, touched = active - share * routed, touched - share * read
            num_bytes = read * m.weight_bytes / n + m.expert_activation_bytes(tokens, n)
            routed_s = _seconds(experts, flops=2.0 * tokens * routed / n, num_bytes=num_bytes, tokens=tokens)
            experts_s = share * (routed_s - self._unstarted_s())
        num_bytes = touched * m.weight_bytes / n + activations
        return experts_s + _seconds(
            self._fits[Op.DENSE], flops=2.0 * tokens * active / n, num_bytes=num_bytes, tokens=tokens
        )

    def _parallel_experts_s(self, tokens: Scalars, all_tokens: Scalars) -> Scalars:
        """Return dense(T) with routed experts spread over n d ranks, and the exchange of tokens for them.

        Whatever is not a routed expert is on the n ranks of each copy, as without expert parallelism.
        """
        m, n = self.model, self.shape.tp
        ranks, share = n * self.shape.attention_dp, m.expert_share
        assert m.experts is not None, "rank_shape lets only models with experts share them"
        routed = share * m.experts.active * m.expert_params()
        read = share * m.touched_experts(all_tokens) * m.expert_params()
        fixed = float(m.active_layer_params()) - routed
        busiest = all_tokens / ranks * ranks**EXPERT_IMBALANCE  # tokens of the rank that has the most
        own, flops, weights = 2.0 * tokens * fixed / n, 2.0 * busiest * routed, read * m.weight_bytes / ranks
        num_bytes = fixed * m.weight_bytes / n + 4 * (m.hidden + m.residual_width) * m.activation_bytes * tokens
        experts, dense = self._fits.get(Op.EXPERTS), self._fits[Op.DENSE]
        seconds = self.exchange_s(all_tokens)
        if experts is None:
            return seconds + _seconds(dense, flops=own + flops, num_bytes=num_bytes + weights, tokens=tokens)
        each = weights / share + m.expert_activation_bytes(busiest)  # bytes of a layer that has experts
        routed_s = _seconds(experts, flops=flops / share, num_bytes=each, tokens=all_tokens)
        seconds += share * (routed_s - self._unstarted_s())
        return seconds + _seconds(dense, flops=own, num_bytes=num_bytes, tokens=tokens)

    def _unstarted_s(self) -> float:
        """Return seconds for starting products that the dense fit includes, but a layer with separate experts lacks.

        The fit covers the start of four products and the work between them. Two of the products are those of an MLP,
        which shared experts are as well.
        """
        assert self.model.experts is not None, "only layers with experts lack it"
        return 0.0 if self.model.experts.shared_width else self._fits[Op.DENSE].start_s / 2.0

    def exchange_s(self, all_tokens: Scalars) -> Scalars:
        """Return seconds for all ranks to gather the tokens of all copies, and to sum the outputs of the experts.

        These are an all-gather and a reduce-scatter, each modelled as an all-reduce of half the message over the n d
        ranks (`docs/cost-model.md`, "Expert parallelism").
        """
        m, ranks = self.model, self.shape.tp * self.shape.attention_dp
        fit = self.profile.fit(Op.ALL_REDUCE, m, ranks)
        assert fit is not None, "Profile guarantees a fit"
        num_bytes = all_tokens * m.hidden * m.activation_bytes / 2.0
        wire_s = 2.0 * (ranks - 1) / ranks * num_bytes / self.intra.bytes_per_s
        each = _seconds(fit, num_bytes=num_bytes, wire_s=wire_s, tokens=all_tokens / 2.0) + self.intra.latency_s
        return 2.0 * m.expert_share * each

    def reduces_s(self, tokens: Scalars) -> Scalars:
        """Return seconds of a layer's all-reduces over the TP group: two reduce(T), and one of norms over all heads."""
        n, m = self.shape.tp, self.model
        if n == 1:
            return 0.0
        seconds = 2 * self._reduce_s(tokens, m.hidden * m.activation_bytes)
        return seconds + self._reduce_s(tokens, NORM_BYTES) if m.norms_span_heads else seconds

    def _reduce_s(self, tokens: Scalars, token_bytes: float) -> Scalars:
        n, num_bytes = self.shape.tp, tokens * token_bytes
        wire_s = 2.0 * (n - 1) / n * num_bytes / self.intra.bytes_per_s
        fit = self._fits[Op.ALL_REDUCE]
        return _seconds(fit, num_bytes=num_bytes, wire_s=wire_s, tokens=tokens) + self.intra.latency_s

    def prefill_s(self, chunk_tokens: Scalars) -> Scalars:
        """Return seconds of attention for one prefill chunk of C tokens with the mean past of a prompt."""
        m = self.model
        context = self.moments.prefill_pairs / self.moments.mean_computed
        return _seconds(
            self._fits[Op.PREFILL_ATTENTION],
            flops=m.attention_flops(chunk_tokens * m.attended_tokens(context), m.q_heads / self.shape.tp)
            + chunk_tokens * m.state_flops() / self.shape.tp
            + chunk_tokens * m.scan_flops(context),
            num_bytes=(m.read_tokens(context) + chunk_tokens / 2) * self.shape.groups * m.kv_bytes_per_token_group(),
            tokens=chunk_tokens,
            heads=chunk_tokens * m.q_heads / self.shape.tp,
        )

    def decode_attention_s(self, pairs: Scalars, queries_per_group: int, step_tokens: int | None = None) -> Scalars:
        """Return seconds of decode attention over (request, head group) ``pairs`` at the mean context; 0 for none.

        Each request has ``step_tokens`` queries per head, by default those of an iteration, which read its KV once.
        """
        m, context, busiest = self.model, self.moments.resident_context, self._busiest(pairs)
        attended, read = m.attended_tokens(context) * busiest, m.read_tokens(context) * busiest
        queries = m.step_tokens if step_tokens is None else step_tokens
        heads = pairs * queries_per_group * queries
        state = m.state_traffic_bytes(queries) / (m.state_ranks(self.shape.tp) * self.shape.groups)  # of a pair
        seconds = _seconds(
            self._fits[Op.DECODE_ATTENTION],
            flops=m.decode_attention_flops(attended, 1.0) * heads
            + m.scan_flops(context) * busiest * queries * pairs / self.shape.groups,
            num_bytes=pairs * read * m.kv_bytes_per_token_group() + pairs * state,
            heads=heads,
        )
        return np.where(np.asarray(pairs) > 0, seconds, 0.0)

    @property
    def mixed_factor(self) -> float:
        """Return mu: beside a chunk, decode attention of these ranks takes mu times as long as alone."""
        return self._fits[Op.DECODE_ATTENTION].mixed_factor

    def _busiest(self, pairs: Scalars) -> Scalars:
        """Return the context on the busiest of d copies that wait for each other, as a ratio to the mean one."""
        moments, copies = self.moments, self.shape.attention_dp
        if copies == 1:
            return 1.0
        requests = np.maximum(1.0, pairs / self.shape.groups)
        return 1.0 + BUSIEST[copies] * moments.resident_context_sd / moments.resident_context / np.sqrt(requests)

    def transfer_s(self, num_bytes: Scalars, link: Link) -> Scalars:
        """Return seconds of a message over ``link`` without the link's latency; 0 for an empty one."""
        seconds = _seconds(self._fits[Op.TRANSFER], num_bytes=num_bytes, wire_s=num_bytes / link.bytes_per_s)
        if isinstance(seconds, float):
            return seconds if num_bytes > 0 else 0.0
        return np.where(np.asarray(num_bytes) > 0, seconds, 0.0)

    def hop_s(self, tokens: Scalars, link: Link) -> Scalars:
        """Return hop(T), seconds for activations of T tokens to arrive from the previous stage."""
        num_bytes = tokens * self.model.residual_width * self.model.activation_bytes
        return self.transfer_s(num_bytes, link) + link.latency_s

    def kv_transfer_s(self, tokens: float, groups: Scalars, link: Link) -> Scalars:
        """Return seconds for KV of ``tokens`` in one layer and ``groups`` of every rank, without the link's latency.

        If n > G several ranks hold the same group, which is sent once. A prompt's tokens also carry their part of a
        state.
        """
        sent = np.minimum(groups * self.shape.tp, self.model.head_groups)
        state = tokens / self.moments.mean_prompt * self.model.state_bytes()
        return self.transfer_s(tokens * sent * self.model.kv_bytes_per_token_group() + state, link)

    def landing_s(self, chunk_tokens: float, link: Link) -> float:
        """Return seconds for a prompt's last KV, of the last chunk and layer, to reach its decode replica."""
        return float(self.kv_transfer_s(chunk_tokens, float(self.shape.groups), link)) + link.latency_s

    def drafting_s(self, micro_batch: Scalars) -> Scalars:
        """Return seconds of b requests to draft in an iteration: passes after the first, and an LM head in each pass.

        The first pass of the drafting layer, with all tokens of the iteration, is a layer like any other.
        """
        draft = self.model.draft
        if draft is None:
            return 0.0 * micro_batch
        pairs = micro_batch * self.shape.groups
        pass_s = self.dense_s(micro_batch) + self.reduces_s(micro_batch)
        pass_s += self.decode_attention_s(pairs, self.shape.queries_per_group, step_tokens=1)
        seconds = (draft.tokens - 1) * pass_s + draft.tokens * self.head_s(micro_batch)
        return np.where(np.asarray(micro_batch) > 0, seconds, 0.0)

    def step_s(self, tokens: Scalars) -> Scalars:
        fit = self._fits.get(Op.STEP)
        return 0.0 * tokens if fit is None else _seconds(fit, tokens=tokens)

    def head_s(self, tokens: Scalars) -> Scalars:
        """Return seconds of the LM head for T tokens, including what the engine does with each of them."""
        m, n = self.model, self.shape.tp
        num_bytes = m.embedding_params * m.embedding_bytes / n + tokens * m.hidden * m.activation_bytes
        product_s = _seconds(
            self._fits[Op.DENSE], flops=2.0 * tokens * m.embedding_params / n, num_bytes=num_bytes, tokens=tokens
        )
        sample = self._fits.get(Op.SAMPLE)
        return product_s if sample is None else product_s + _seconds(sample, tokens=tokens)

    # Memory of one rank, in bytes.

    def layer_bytes(self) -> float:
        m, copies = self.model, self.shape.attention_dp
        if copies == 1 or m.experts is None:
            return m.layer_params() * m.weight_bytes / self.shape.tp + self._taken.layer_bytes
        routed = m.expert_share * m.experts.count * m.expert_params()
        params = m.layer_params() - routed + routed / copies
        return params * m.weight_bytes / self.shape.tp + self._taken.layer_bytes

    def prefix_bytes(self) -> float:
        """Return the weights of the leading layers, which stay on the first stage."""
        m = self.model
        return m.prefix_layers * m.dense_layer_params() * m.weight_bytes / self.shape.tp

    def embedding_bytes(self) -> float:
        """Return the bytes of the embedding table; the LM head has as many."""
        return self.model.embedding_params * self.model.embedding_bytes / self.shape.tp

    def vision_bytes(self) -> float:
        """Return the bytes of vision towers, which stay on the first stage."""
        return self.model.vision_params * self.model.embedding_bytes / self.shape.tp

    def draft_bytes(self) -> float:
        """Return the weights of the drafting layer, which is on the last stage."""
        m = self.model
        if m.draft is None or self.shape.attention_dp == 1:
            return m.draft_params() * m.weight_bytes / self.shape.tp
        beside = (m.draft_params() - m.layer_params()) * m.weight_bytes / self.shape.tp
        return self.layer_bytes() - self._taken.layer_bytes + beside

    def logit_bytes(self, batch: LargestBatch) -> Scalars:
        """Return by how much the last stage exceeds `activation_bytes` while it samples."""
        return self._taken.sampling_bytes(self._tokens(batch), batch.with_logits, batch.requests)

    def activation_bytes(self, batch: LargestBatch) -> Scalars:
        """Return what the largest batch, and captured graphs, take."""
        return self._taken.pass_bytes(self._tokens(batch), batch.requests, batch.in_flight)

    def _tokens(self, batch: LargestBatch) -> Scalars:
        """Return T; an engine has room for all of its requests in an iteration."""
        return batch.tokens if self.memory is None else np.maximum(batch.tokens, batch.requests)

    def room_bytes(self) -> float:
        """Return usable memory minus the engine's own."""
        return float(self._taken.usable_bytes - self._taken.fixed_bytes)


def plain_memory(profile: Profile, model: ModelSpec, shape: RankShape) -> RankMemory:
    """Return what any engine takes: the profile's reserve, the activations of a layer, and the logits of a batch."""
    gathered = 2 * shape.attention_dp * model.hidden if shape.attention_dp > 1 else 0
    streams = 2 * (model.hidden + model.residual_width)
    token_bytes = model.activation_bytes * (streams + 2 * model.inner / shape.tp + gathered)
    return RankMemory(
        usable_bytes=profile.usable_bytes,
        fixed_bytes=profile.reserve_bytes,
        token_bytes=token_bytes,
        held_bytes=token_bytes,
        logit_bytes=4.0 * model.vocab / shape.tp,
    )


@dataclass(frozen=True, slots=True)
class PoolCost:
    """Times of an exchange between a stage (TP ranks of ``primary``) and its attention workers over ``link``."""

    primary: DeviceCost
    worker: DeviceCost
    link: Link
    plugin: PluginTime

    def load(self, micro_batch: Scalars, groups: Scalars, cards: Scalars) -> Scalars:
        """Return the (request, head group) pairs of one micro-batch on the busiest of p cards."""
        return np.ceil(micro_batch * groups * self.primary.shape.tp / cards - 1e-9)

    def attention_s(self, micro_batch: Scalars, groups: Scalars, cards: Scalars) -> Scalars:
        """Return worker + exchange of one iteration for k ``groups`` per rank on p ``cards``."""
        load = self.load(micro_batch, groups, cards)
        worker_s = self.worker.decode_attention_s(load, self.primary.shape.queries_per_group)
        return worker_s + self.exchange_s(micro_batch, groups, cards)

    def exchange_s(self, micro_batch: Scalars, groups: Scalars, cards: Scalars) -> Scalars:
        """Return seconds of queries to the cards and outputs back, per iteration and layer."""
        shape = self.primary.shape
        per_pair = shape.queries_per_group * self.primary.model.exchange_bytes_per_head()
        sent = np.maximum(
            self.primary.transfer_s(micro_batch * groups * shape.tp * per_pair, self.link),
            self.worker.transfer_s(self.load(micro_batch, groups, cards) * per_pair, self.link),
        )
        return sent + 2.0 * self.link.latency_s + self.plugin.exchange_s

    def late_s(
        self, micro_batch: Scalars, chunk_tokens: Scalars, groups: Scalars, cards: Scalars, layer_s: Scalars
    ) -> Scalars:
        """Return the seconds that shipping a chunk's KV adds to a layer that computes for ``layer_s``.

        KV is sent while the next layer computes, over the link that the exchange also uses.
        """
        on_link = self.ship_s(chunk_tokens, groups, cards) + self.exchange_s(micro_batch, groups, cards)
        return np.maximum(0.0, on_link - layer_s)

    def ship_s(self, chunk_tokens: Scalars, groups: Scalars, cards: Scalars) -> Scalars:
        """Return seconds on the wire for the KV of one prefill chunk to the pool."""
        model = self.primary.model
        num_bytes = chunk_tokens * groups * self.primary.shape.tp * model.kv_bytes_per_token_group()
        return np.maximum(
            self.primary.transfer_s(num_bytes, self.link), self.worker.transfer_s(num_bytes / cards, self.link)
        )

    def receive_s(self, groups: Scalars, cards: Scalars) -> Scalars:
        """Return seconds for the KV of a prompt's k ``groups`` per rank to reach the pool of a decode replica."""
        model, prompt = self.primary.model, self.primary.moments.mean_prompt
        num_bytes = prompt * groups * self.primary.shape.tp * model.kv_bytes_per_token_group()
        return self.worker.transfer_s(num_bytes / cards, self.link)
