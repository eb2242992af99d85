"""Seconds of layers, stages, replicas and their latencies, derived again with the letters of ``docs/cost-model.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from statistics import NormalDist

from hetis.solver.check.replica_shapes import PoolShape, ReplicaShape, StageShape
from hetis.solver.check.setting import Setting, head_groups_per_rank, query_heads_per_group
from hetis.solver.cluster import Link
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.profile import Op

EXPERT_IMBALANCE = 0.3  # the exponent of docs/cost-model.md, "Expert parallelism"


def stage_seconds(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return u, the seconds of one request on one copy of a stage."""
    b, C = setting.decode_tokens, setting.chunk_tokens
    u = stage.layers * layer_seconds(setting, stage)
    u += setting.per_request(_step(setting, stage, b + C), _step(setting, stage, b))
    u += setting.per_request(*(_unhidden(setting, stage, is_last, rows=b + more) for more in (1, 0)))
    if is_first:
        u += setting.model.prefix_layers * layer_seconds(setting, stage, is_prefix=True)
    else:
        u += setting.per_request(_hop(setting, stage, b + C), _hop(setting, stage, b))
    if is_last:
        u += setting.per_request(_lm_head(setting, stage, b + 1), _lm_head(setting, stage, b))
        u += setting.model.draft_layers * layer_seconds(setting, stage)
        u += setting.iterations * _drafting(setting, stage)
    return u


def _drafting(setting: Setting, stage: StageShape) -> float:
    """Return the seconds of drafting in an iteration, apart from one pass of the drafting layer with all tokens."""
    draft, b = setting.model.draft, setting.micro_batch
    if draft is None or b == 0:
        return 0.0
    pairs = b * head_groups_per_rank(setting.model, stage.tp)
    one = _dense(setting, stage, b, is_prefix=False) + _all_reduces(setting, stage, b)
    one += _decode(setting, stage, stage.gpu, stage.tp, pairs=pairs, queries=1)
    return (draft.tokens - 1) * one + draft.tokens * _lm_head(setting, stage, b)


def layer_seconds(setting: Setting, stage: StageShape, *, is_prefix: bool = False) -> float:
    """Return w, or w' for a prefix layer: the seconds of one request in one layer."""
    with_chunk = _chunk_layer_seconds(setting, stage, is_prefix=is_prefix) if setting.chunk_tokens else 0.0
    plain = _plain_layer_seconds(setting, stage, is_prefix=is_prefix)
    return max(setting.per_request(with_chunk, plain), wire_seconds(setting, stage))


def _plain_layer_seconds(setting: Setting, stage: StageShape, *, is_prefix: bool = False) -> float:
    """Return the seconds of a layer in one iteration without a chunk."""
    b = setting.decode_tokens
    return _dense(setting, stage, b, is_prefix) + _all_reduces(setting, stage, b) + _attention(setting, stage)


def _chunk_layer_seconds(setting: Setting, stage: StageShape, *, is_prefix: bool = False) -> float:
    """Return the seconds of a layer in one iteration with a chunk."""
    b, C = setting.decode_tokens, setting.chunk_tokens
    beside_dense_s = _all_reduces(setting, stage, b + C) + _prefill(setting, stage)
    beside_dense_s += _attention(setting, stage, beside_chunk=True)
    if setting.attention_dp > 1 and not is_prefix:
        return _parallel_experts(setting, stage, b + C, setting.all_tokens) + beside_dense_s
    seconds = _dense(setting, stage, b + C, is_prefix) + beside_dense_s
    if stage.pool is None:
        return seconds
    # The KV of a layer leaves while the next one computes, over the same link as the exchange.
    on_link_s = _ship(setting, stage, stage.pool) + _exchange(setting, stage, stage.pool)
    return seconds + max(0.0, on_link_s - _dense(setting, stage, b + C, is_prefix=False) - beside_dense_s)


def chunk_seconds(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the seconds of one iteration with a chunk on one copy of a stage; 0 on a decode replica."""
    if setting.role is Role.DECODE:
        return 0.0
    b, C = setting.decode_tokens, setting.chunk_tokens
    wire_s = wire_seconds(setting, stage) / setting.chunk_iterations
    seconds = stage.layers * max(_chunk_layer_seconds(setting, stage), wire_s) + _step(setting, stage, b + C)
    seconds += _unhidden(setting, stage, is_last, rows=b + 1)
    if is_first:
        seconds += setting.model.prefix_layers * max(_chunk_layer_seconds(setting, stage, is_prefix=True), wire_s)
    else:
        seconds += _hop(setting, stage, b + C)
    if is_last:
        seconds += _lm_head(setting, stage, b + 1) + _drafting(setting, stage)
        seconds += setting.model.draft_layers * max(_chunk_layer_seconds(setting, stage), wire_s)
    return seconds


def wire_seconds(setting: Setting, stage: StageShape) -> float:
    """Return wire: seconds for the KV of one request and layer to leave a prefill stage or reach a decode stage."""
    model, n, P = setting.model, stage.tp, setting.moments.mean_prompt
    per_group = model.kv_bytes_per_token_group()
    d = setting.attention_dp  # their copies send and receive over one link
    if setting.role is Role.PREFILL:
        assert stage.kv_link is not None, "replica_shape gives stages of prefill replicas a link for their KV"
        chunk_bytes = setting.chunk_tokens * (model.head_groups * per_group + model.state_bytes() / P)
        # Including KV from the prefix cache: the decode replica receives that of the whole prompt.
        return d * P / setting.chunk_tokens * _transfer(setting, stage.gpu, n, chunk_bytes, stage.kv_link)
    if setting.role is Role.DECODE:
        given = stage.pool.head_groups * n if stage.pool is not None else 0
        kept_bytes = P * (model.head_groups - given) * per_group + model.state_bytes()
        kept_s = _transfer(setting, stage.gpu, n, kept_bytes, stage.arrival_link or stage.hop_link)
        if stage.pool is None:
            return d * kept_s
        pool, card_bytes = stage.pool, P * given * per_group / stage.pool.cards
        return max(kept_s, _transfer(setting, pool.gpu, 1, card_bytes, pool.link))
    return 0.0


def landing_seconds(setting: Setting, stage: StageShape, kv_link: Link) -> float:
    """Return the seconds from the end of the last chunk in the last layer until its KV has left over this link."""
    model = setting.model
    per_token = model.head_groups * model.kv_bytes_per_token_group() + model.state_bytes() / setting.moments.mean_prompt
    chunk_bytes = setting.chunk_tokens * per_token
    return _transfer(setting, stage.gpu, stage.tp, chunk_bytes, kv_link) + kv_link.latency_s


def replica_chunk_seconds(setting: Setting, stages: Sequence[StageShape]) -> tuple[float, float]:
    """Return the seconds of one iteration with a chunk: of all stages in turn, and of the busiest one per copy."""
    last, seconds = len(stages) - 1, cache(partial(chunk_seconds, setting))  # equal stages are derived once
    each = [seconds(stage, is_first=i == 0, is_last=i == last) for i, stage in enumerate(stages)]
    return sum(each), max(s / stage.copies for s, stage in zip(each, stages, strict=True))


def replica_landing_seconds(setting: Setting, stages: Sequence[StageShape]) -> float:
    """Return the seconds that the last KV of a prompt adds to a prefill replica's TTFT; 0 for other roles."""
    return max((landing_seconds(setting, s, s.kv_link) for s in stages if s.kv_link is not None), default=0.0)


def seconds_between_completions(
    setting: Setting, stages: Sequence[StageShape], stage_s: Sequence[float], card_s: Sequence[float] = ()
) -> float:
    """Return t, given u of every stage: the busiest stage or shared card, or the round trip of too few micro-batches.

    Args:
        card_s: seconds for which a request of the replica occupies the cards that several stages share.
    """
    num_copies = sum(stage.copies for stage in stages)
    stretched_s = [(1 + slack(setting, stage, num_copies)) * u for stage, u in zip(stages, stage_s, strict=True)]
    busiest_s = max(u / stage.copies for stage, u in zip(stages, stretched_s, strict=True))
    least, _ = least_slack(setting, num_copies)
    return max(busiest_s, sum(stretched_s) / setting.in_flight, *((1 + least) * seconds for seconds in card_s))


def worker_seconds(setting: Setting, stage: StageShape, pool: PoolShape) -> float:
    """Return worker: the seconds of the busiest card of a pool in one layer and iteration."""
    return _decode(setting, stage, pool.gpu, 1, pairs=busiest_card_pairs(setting, stage, pool))


def busy_seconds(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the seconds that one request of the replica occupies a card that serves the stages at ``positions``.

    One of c copies serves every c-th request (``docs/cost-model.md``, "Prefill and decode replicas").
    """
    total = 0.0
    for i in positions:
        stage = shape.stages[i]
        layers = stage.layers + (setting.model.prefix_layers if i == 0 else 0)
        total += layers * worker_seconds(setting, stage, shape.pool_of(i)) / stage.copies
    return setting.iterations * total


def least_slack(setting: Setting, num_copies: int) -> tuple[float, float]:
    """Return the least slack of any stage at M micro-batches for K stage copies, and the factor of its unevenness.

    Copies that share their experts all wait for the longest iteration among them.
    """
    if setting.attention_dp > 1:
        longest = _longest_of(setting.attention_dp) * _chunk_spread(setting) if setting.role is Role.PREFILL else 0.0
        return longest, 1.0 if setting.role is Role.UNIFIED else 0.0
    if setting.in_flight == 1:
        return 0.0, 0.0
    assumed, is_full = setting.problem.assumptions, setting.in_flight >= 2 * num_copies
    if setting.role is Role.UNIFIED and is_full:
        return assumed.full_slack, assumed.full_unevenness
    if setting.role is Role.UNIFIED:
        return assumed.tight_slack, assumed.tight_unevenness
    if setting.role is Role.PREFILL and not is_full:
        return max(assumed.full_slack, assumed.tight_unevenness * _chunk_spread(setting)), 0.0
    return assumed.full_slack, 0.0


@cache
def _longest_of(copies: int) -> float:
    """Return the expected maximum of so many standard normal variables, integrated by the midpoint rule."""
    normal, step = NormalDist(), 1e-3
    midpoints = (-8.0 + (i + 0.5) * step for i in range(round(16.0 / step)))
    return sum(x * copies * normal.cdf(x) ** (copies - 1) * normal.pdf(x) * step for x in midpoints)


def _chunk_spread(setting: Setting) -> float:
    """Return delta, the spread of chunks in FLOPs of a layer as a ratio to their mean."""
    model, moments = setting.model, setting.moments
    a = moments.prefill_pairs / moments.mean_computed
    per_token = 2 * model.active_layer_params() + model.state_flops() + model.scan_flops(a)
    per_token += model.attention_flops(model.attended_tokens(a), model.q_heads)
    later = a + moments.prefill_context_sd
    more = model.attended_tokens(later) - model.attended_tokens(a)
    return (model.attention_flops(more, model.q_heads) + model.scan_flops(later) - model.scan_flops(a)) / per_token


def slack(setting: Setting, stage: StageShape, num_copies: int) -> float:
    """Return sigma, the share added to the time of a stage whose iterations with and without a chunk differ."""
    least, factor = least_slack(setting, num_copies)
    if setting.role is not Role.UNIFIED:
        return least
    R = _chunk_layer_seconds(setting, stage) / _plain_layer_seconds(setting, stage)
    phi, M = setting.chunk_share, setting.in_flight
    mean, longest = 1 + (R - 1) * phi, R - (R - 1) * (1 - phi) ** M
    return max(least, factor * (longest / mean - 1))


def tpot_per_t(setting: Setting) -> float:
    """Return TPOT as a multiple of t, which is 0 if nothing is decoded (b is 0).

    Seats are all taken, which gives b M / O, unless prompts need more iterations than outputs do.
    """
    seats = setting.micro_batch * setting.in_flight / setting.moments.mean_output
    if not setting.micro_batch or not setting.chunk_iterations:
        return seats
    return min(seats, setting.in_flight / setting.chunk_iterations / setting.model.emitted_tokens)


def chunks_ahead(setting: Setting) -> float:
    """Return the chunks that a replica starts before the last one of the p95 prompt: its own and those of others."""
    if setting.role is Role.DECODE:
        return 0.0
    C, moments = setting.chunk_tokens, setting.moments
    servers = setting.attention_dp * setting.problem.assumptions.lanes.of(setting.role)
    q = setting.problem.assumptions.planned_utilisation * setting.chunk_share
    if setting.role is Role.PREFILL:
        q *= setting.problem.assumptions.lanes.prefill_load
    if q >= 1:
        return math.inf
    p_wait = q ** (math.sqrt(2 * (servers + 1)) - 1)
    tail = max(0.0, math.log(20 * p_wait)) if p_wait > 0 else 0.0
    others = moments.mean_computed / C / servers / (1 - q) * (1 + moments.computed_cv2) / 2 * tail
    return math.ceil(moments.p95_computed / C) - 1 + others


def _dense(setting: Setting, stage: StageShape, T: int, is_prefix: bool) -> float:
    model, n = setting.model, stage.tp
    if setting.attention_dp > 1 and not is_prefix:
        return _parallel_experts(setting, stage, T, setting.attention_dp * T)
    active: float = model.dense_layer_params() if is_prefix else model.active_layer_params()
    touched: float = model.dense_layer_params() if is_prefix else model.touched_layer_params(T)
    routed_s = 0.0
    if model.experts is not None and not is_prefix and setting.has_fit(stage.gpu, Op.EXPERTS, n):
        one = model.expert_params()
        chosen, read, share = model.experts.active, model.touched_experts(T), model.expert_share
        active, touched = active - chosen * one * share, touched - read * one * share
        F, B = 2 * T * chosen * one / n, read * one * model.weight_bytes / n + _moved_bytes(model, T, n)
        routed_s = setting.seconds(stage.gpu, Op.EXPERTS, n, flops=F, num_bytes=B, tokens=T)
        routed_s = (routed_s - _missing_start(setting, stage)) * share
    num_bytes = touched * model.weight_bytes / n + _layer_rows(model) * model.activation_bytes * T
    return routed_s + setting.seconds(stage.gpu, Op.DENSE, n, flops=2 * T * active / n, num_bytes=num_bytes, tokens=T)


def _parallel_experts(setting: Setting, stage: StageShape, T: int, all_T: float) -> float:
    """Return dense(T) on a rank of d copies with ``all_T`` tokens together, whose experts are on all d n ranks."""
    model, n, r = setting.model, stage.tp, stage.tp * setting.attention_dp
    assert model.experts is not None, "the structure was checked"
    one, share = model.expert_params(), model.expert_share
    chosen, read = model.experts.active * one, model.touched_experts(all_T) * one
    fixed = model.active_layer_params() - chosen * share
    busiest = all_T / r * r**EXPERT_IMBALANCE
    F, B = 2 * busiest * chosen, read * model.weight_bytes / r
    own_F, own_B = 2 * T * fixed / n, fixed * model.weight_bytes / n + _layer_rows(model) * model.activation_bytes * T
    # An all-gather and a reduce-scatter, each taken as an all-reduce of half as many tokens.
    exchange_s = 2 * share * _reduce_among(setting, stage, all_T / 2, r)
    if setting.has_fit(stage.gpu, Op.EXPERTS, n):
        moved = B + _moved_bytes(model, busiest, 1)
        routed_s = setting.seconds(stage.gpu, Op.EXPERTS, n, flops=F, num_bytes=moved, tokens=all_T)
        routed_s = (routed_s - _missing_start(setting, stage)) * share
        own_s = setting.seconds(stage.gpu, Op.DENSE, n, flops=own_F, num_bytes=own_B, tokens=T)
        return exchange_s + routed_s + own_s
    own_F, own_B = own_F + F * share, own_B + B * share
    return exchange_s + setting.seconds(stage.gpu, Op.DENSE, n, flops=own_F, num_bytes=own_B, tokens=T)


def _missing_start(setting: Setting, stage: StageShape) -> float:
    """Return half of the dense fit's fixed time, that of two of its four products, unless shared experts need them."""
    assert setting.model.experts is not None, "the structure was checked"
    dense = setting.problem.profiles[stage.gpu].fit(Op.DENSE, setting.model, stage.tp)
    if dense is None or setting.model.experts.shared_width:
        return 0.0
    return min(piece.fixed_s for piece in dense.pieces) / 2


def _moved_bytes(model: ModelSpec, T: float, slices: int) -> float:
    """Return the bytes of T tokens' rows that each of their experts reads and writes, besides its weights."""
    assert model.experts is not None, "the structure was checked"
    elements = (model.experts.latent or model.hidden) + model.experts.width / slices
    return 2 * 2 * T * model.experts.active * elements * model.activation_bytes


def _layer_rows(model: ModelSpec) -> int:
    """Return the numbers of a token that a layer moves: 4 H, and 4 H for each stream of the residual."""
    return 4 * model.hidden * (1 + model.residual_streams)


def _all_reduces(setting: Setting, stage: StageShape, T: float) -> float:
    """Return the seconds of a layer's two sums over the ranks, and of the two float32 sums of norms over all heads."""
    if stage.tp == 1:
        return 0.0
    norms_s = _reduce_among(setting, stage, T, stage.tp, token_bytes=8) if setting.model.norms_span_heads else 0.0
    return 2 * _reduce_among(setting, stage, T, stage.tp) + norms_s


def _reduce_among(setting: Setting, stage: StageShape, T: float, ranks: int, token_bytes: float | None = None) -> float:
    num_bytes = T * (setting.model.hidden * setting.model.activation_bytes if token_bytes is None else token_bytes)
    wire_s = 2 * (ranks - 1) / ranks * num_bytes / stage.intra_link.bytes_per_s
    reduce_s = setting.seconds(stage.gpu, Op.ALL_REDUCE, ranks, num_bytes=num_bytes, wire_s=wire_s, tokens=T)
    return reduce_s + stage.intra_link.latency_s


def _prefill(setting: Setting, stage: StageShape) -> float:
    model, n, C, moments = setting.model, stage.tp, setting.chunk_tokens, setting.moments
    x = moments.prefill_pairs / moments.mean_computed
    flops = model.attention_flops(C * model.attended_tokens(x), model.q_heads / n) + C * model.state_flops() / n
    flops += C * model.scan_flops(x)
    num_bytes = (model.read_tokens(x) + C / 2) * head_groups_per_rank(model, n) * model.kv_bytes_per_token_group()
    heads = C * model.q_heads / n
    return setting.seconds(stage.gpu, Op.PREFILL_ATTENTION, n, flops=flops, num_bytes=num_bytes, tokens=C, heads=heads)


def _attention(setting: Setting, stage: StageShape, *, beside_chunk: bool = False) -> float:
    """Return the seconds of decode attention of a micro-batch, with own groups and the pool's in parallel.

    Beside a chunk the stage's own take mu times as long (``docs/cost-model.md``, "mixed").
    """
    groups, pool = head_groups_per_rank(setting.model, stage.tp), stage.pool
    kept = groups if pool is None else groups - pool.head_groups
    own = _decode(setting, stage, stage.gpu, stage.tp, pairs=setting.micro_batch * kept)
    if beside_chunk:
        fit = setting.problem.profiles[stage.gpu].fit(Op.DECODE_ATTENTION, setting.model, stage.tp)
        own *= 1.0 if fit is None or fit.mixed is None else fit.mixed.factor
    if pool is None:
        return own
    both = max(own, worker_seconds(setting, stage, pool) + _exchange(setting, stage, pool))
    return both + setting.problem.family.plugin.local_s


def busiest_card_pairs(setting: Setting, stage: StageShape, pool: PoolShape) -> int:
    """Return load: the (request, group) pairs of a micro-batch on the busiest card of a pool."""
    return -(-setting.micro_batch * pool.head_groups * stage.tp // pool.cards)


def _decode(
    setting: Setting, stage: StageShape, gpu: str, tp: int, *, pairs: int, queries: int | None = None
) -> float:  # fmt: skip
    """Return the seconds of decode attention of ``pairs`` (request, group) pairs on one card.

    The ``queries`` of a request, by default those of an iteration, read its KV once.
    """
    if pairs == 0:
        return 0.0
    model, moments = setting.model, setting.moments
    x = moments.resident_context
    y, read, scan = model.attended_tokens(x), model.read_tokens(x), model.scan_flops(x)
    if setting.attention_dp > 1:  # the others wait for the copy whose requests have the longest context
        requests = pairs / head_groups_per_rank(model, stage.tp)
        spread = moments.resident_context_sd / moments.resident_context / math.sqrt(requests)
        y, read, scan = (each * (1 + _longest_of(setting.attention_dp) * spread) for each in (y, read, scan))
    queries = queries or model.step_tokens
    heads = pairs * query_heads_per_group(model, stage.tp) * queries
    return setting.seconds(
        gpu,
        Op.DECODE_ATTENTION,
        tp,
        heads=heads,
        num_bytes=pairs * read * model.kv_bytes_per_token_group() + _state_traffic(setting, stage, pairs, queries),
        flops=model.decode_attention_flops(y, heads) + pairs / head_groups_per_rank(model, stage.tp) * queries * scan,
    )


def _state_traffic(setting: Setting, stage: StageShape, pairs: int, queries: int) -> float:
    """Return the bytes of states that a rank reads for the requests of these pairs and writes after every query."""
    requests = pairs / head_groups_per_rank(setting.model, stage.tp)
    if not setting.model.divides_states:  # a compressor serves all heads, so every rank has it
        return requests * setting.model.state_traffic_bytes(queries)
    return (1 + queries) * requests * setting.model.state_bytes() / stage.tp


def _transfer(setting: Setting, gpu: str, tp: int, num_bytes: float, link: Link) -> float:
    """Return the seconds of a message without its latency, 0 for an empty one."""
    if num_bytes == 0:
        return 0.0
    return setting.seconds(gpu, Op.TRANSFER, tp, num_bytes=num_bytes, wire_s=num_bytes / link.bytes_per_s)


def _exchange(setting: Setting, stage: StageShape, pool: PoolShape) -> float:
    """Return the seconds of q, k, v to the pool and head outputs back, for one micro-batch and layer."""
    per_pair = query_heads_per_group(setting.model, stage.tp) * setting.model.exchange_bytes_per_head()
    out_bytes = setting.micro_batch * pool.head_groups * stage.tp * per_pair
    in_bytes = busiest_card_pairs(setting, stage, pool) * per_pair
    sending = _transfer(setting, stage.gpu, stage.tp, out_bytes, pool.link)
    receiving = _transfer(setting, pool.gpu, 1, in_bytes, pool.link)
    return max(sending, receiving) + 2 * pool.link.latency_s + setting.problem.family.plugin.exchange_s


def _ship(setting: Setting, stage: StageShape, pool: PoolShape) -> float:
    """Return the seconds of a prefill chunk's KV on its way to the pool."""
    kv_bytes = setting.chunk_tokens * pool.head_groups * stage.tp * setting.model.kv_bytes_per_token_group()
    sending = _transfer(setting, stage.gpu, stage.tp, kv_bytes, pool.link)
    return max(sending, _transfer(setting, pool.gpu, 1, kv_bytes / pool.cards, pool.link))


def _hop(setting: Setting, stage: StageShape, T: int) -> float:
    model = setting.model
    num_bytes = T * model.residual_streams * model.hidden * model.activation_bytes
    return _transfer(setting, stage.gpu, stage.tp, num_bytes, stage.hop_link) + stage.hop_link.latency_s


def _unhidden(setting: Setting, stage: StageShape, is_last: bool, *, rows: int) -> float:
    """Return the host's seconds that no asynchronous scheduling hides, in one iteration of a stage with a pool."""
    if stage.pool is None:
        return 0.0
    plugin = setting.problem.family.plugin
    return plugin.step_s + (rows * plugin.sequence_s if is_last else 0.0)


def _step(setting: Setting, stage: StageShape, T: int) -> float:
    return setting.seconds(stage.gpu, Op.STEP, stage.tp, tokens=T)


def _lm_head(setting: Setting, stage: StageShape, T: int) -> float:
    model, n = setting.model, stage.tp
    flops = 2 * T * model.embedding_params / n
    num_bytes = model.embedding_params * model.embedding_bytes / n + T * model.hidden * model.activation_bytes
    sampling = setting.seconds(stage.gpu, Op.SAMPLE, n, tokens=T)
    return setting.seconds(stage.gpu, Op.DENSE, n, flops=flops, num_bytes=num_bytes, tokens=T) + sampling
