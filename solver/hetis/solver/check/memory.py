"""Bytes, derived again from ``docs/cost-model.md``, "Memory of a rank", with the same letters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hetis.solver.check.replica_shapes import PoolShape, ReplicaShape, StageShape
from hetis.solver.check.setting import Setting, head_groups_per_rank
from hetis.solver.model import Experts, Mlp
from hetis.solver.plan import Role
from hetis.solver.rank_memory import PROMPT_TOKENS


def rank_bytes(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the bytes that one primary rank of a stage must hold, including the reserve."""
    per_token = rank_kv_bytes_per_token(setting, stage, is_first=is_first, is_last=is_last)
    kv_bytes = per_token * kv_tokens_of_a_copy(setting, stage.copies)
    return _rank_bytes_but_kv(setting, stage, is_first=is_first, is_last=is_last) + kv_bytes


def _rank_bytes_but_kv(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the bytes that a rank must hold apart from the KV that `kv_tokens_of_a_copy` counts."""
    fixed = rank_fixed_bytes(setting, stage, is_first=is_first, is_last=is_last)
    fixed += rank_prompt_bytes(setting, stage, is_first=is_first)
    return fixed + rank_state_bytes(setting, stage, is_first=is_first, is_last=is_last)


def worker_bytes(setting: Setting, stage: StageShape, pool: PoolShape, *, is_first: bool) -> float:
    """Return the bytes that the fullest card of a pool must hold, including the reserve."""
    per_token = worker_kv_bytes_per_token(setting, stage, pool, is_first=is_first)
    kv_tokens = kv_tokens_of_a_copy(setting, stage.copies)
    return setting.problem.profiles[pool.gpu].reserve_bytes + per_token * kv_tokens


def kv_room_of_a_copy(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the tokens whose KV fits on one copy of a stage next to everything else, and within its blocks."""
    free = usable_bytes(setting, stage) - _rank_bytes_but_kv(setting, stage, is_first=is_first, is_last=is_last)
    per_token = rank_kv_bytes_per_token(setting, stage, is_first=is_first, is_last=is_last)
    room = min(_quotient(free, per_token), kv_block_tokens(setting))
    if stage.pool is None:
        return room
    worker = setting.problem.profile_of(stage.pool.gpu, stage.pool.reserved_bytes)
    per_token = worker_kv_bytes_per_token(setting, stage, stage.pool, is_first=is_first)
    return min(room, _quotient(worker.usable_bytes - worker.reserve_bytes, per_token))


def kv_block_tokens(setting: Setting) -> float:
    """Return the tokens that the KV blocks of a copy's engine hold; infinity if their number is not set."""
    blocks = setting.problem.family.engine_settings.kv_blocks
    return math.inf if blocks is None else blocks * setting.problem.assumptions.block_tokens


def kv_tokens_of_a_copy(setting: Setting, copies: int) -> float:
    """Return Tkv, the KV tokens that a copy must have room for, including prefilling requests and headroom."""
    model, moments, b = setting.model, setting.moments, setting.micro_batch
    D = micro_batches_of_a_copy(setting, copies)
    decoding = D * b * model.cached_tokens(moments.resident_context)
    headroom = setting.problem.assumptions.kv_headroom_z * math.sqrt(D * b) * moments.resident_context_sd
    headroom *= model.cached_growth(moments.resident_context)
    whole_prompts = staged_prompts_of_a_copy(setting, copies) * model.cached_tokens(moments.mean_prompt)
    held = decoding + headroom + prompt_tokens_of_a_copy(setting, copies) + whole_prompts
    longest = setting.problem.family.engine_settings.min_context
    return held if longest is None else max(held, model.cached_tokens(longest))


def staged_prompts_of_a_copy(setting: Setting, copies: int) -> float:
    """Return N, the prompts on their way from a prefill to a decode replica that a copy holds as a whole."""
    match setting.role:
        case Role.UNIFIED:
            return 0.0
        case Role.PREFILL:
            return 1.0
        case Role.DECODE:
            return float((micro_batches_of_a_copy(setting, copies) * setting.micro_batch) ** 0.5)


def prompt_tokens_of_a_copy(setting: Setting, copies: int) -> float:
    """Return Tpre, the KV tokens of the prompts that a copy is prefilling."""
    held = setting.model.cached_tokens(setting.moments.prefilling_context) + setting.chunk_tokens
    return micro_batches_of_a_copy(setting, copies) * setting.chunk_share * held


def rank_prompt_bytes(setting: Setting, stage: StageShape, *, is_first: bool) -> float:
    """Return the bytes that a rank keeps of its pool's head groups: prompts that later chunks still attend to."""
    given = stage.pool.head_groups if stage.pool else 0
    tokens = prompt_tokens_of_a_copy(setting, stage.copies)
    return _all_layers(setting, stage, is_first) * given * tokens * setting.model.kv_bytes_per_token_group()


def rank_state_bytes(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return a rank's bytes of what layers keep for each request: its heads' part of the states of linear attention, or
    windows and compressors' inputs, which serve all heads and are on every rank.
    """
    D = micro_batches_of_a_copy(setting, stage.copies)
    requests = D * setting.micro_batch + D * setting.chunk_share + staged_prompts_of_a_copy(setting, stage.copies)
    layers = _all_layers(setting, stage, is_first, is_last)
    if not setting.model.divides_states:
        chunks = D * setting.chunk_share * setting.chunk_tokens * setting.model.chunk_state_bytes()
        return layers * (requests * setting.model.state_bytes() + chunks)
    states = requests * setting.model.step_tokens  # engines keep one for each token that may be rejected
    return layers * states * setting.model.state_bytes() / stage.tp


def micro_batches_of_a_copy(setting: Setting, copies: int) -> int:
    """Return D, the micro-batches whose KV one copy holds."""
    return -(-setting.in_flight // copies)


def rank_kv_bytes_per_token(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    model = setting.model
    kept = head_groups_per_rank(model, stage.tp) - (stage.pool.head_groups if stage.pool else 0)
    return _all_layers(setting, stage, is_first, is_last) * kept * model.kv_bytes_per_token_group()


def worker_kv_bytes_per_token(setting: Setting, stage: StageShape, pool: PoolShape, *, is_first: bool) -> float:
    """Return bytes per copy token on the fullest card, which holds ``ceil(D b k n / p)`` groups of D b requests."""
    requests = micro_batches_of_a_copy(setting, stage.copies) * setting.micro_batch
    pairs = -(-requests * pool.head_groups * stage.tp // pool.cards)
    return _all_layers(setting, stage, is_first) * pairs / requests * setting.model.kv_bytes_per_token_group()


def shared_card_bytes(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the bytes that a card of the stages at ``positions`` must hold: its reserve, and the KV of every stage."""
    kv_bytes = sum(
        per_token * kv_tokens_of_a_copy(setting, shape.stages[i].copies)
        for i, per_token in _shared_bytes_per_token(setting, shape, positions)
    )
    return setting.problem.profiles[shape.pool_of(positions[0]).gpu].reserve_bytes + kv_bytes


def kv_room_of_shared_card(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the replica's tokens whose KV the card has room for; of x tokens, one of c copies holds x / c."""
    pool = shape.pool_of(positions[0])
    profile = setting.problem.profile_of(pool.gpu, pool.reserved_bytes)
    found = _shared_bytes_per_token(setting, shape, positions)
    return max(0.0, profile.usable_bytes - profile.reserve_bytes) / sum(b / shape.stages[i].copies for i, b in found)


def _shared_bytes_per_token(
    setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]
) -> Iterator[tuple[int, float]]:
    for i in positions:
        yield i, worker_kv_bytes_per_token(setting, shape.stages[i], shape.pool_of(i), is_first=i == 0)


def rank_fixed_bytes(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the bytes of a rank that are not KV: reserve, activations, weights, and logits on the last stage."""
    model, n = setting.model, stage.tp
    fixed = _engine_bytes(setting, stage, is_last=is_last)
    fixed += stage.layers * _layer_bytes(setting, n)
    if is_first:
        fixed += model.prefix_layers * model.dense_layer_params() * model.weight_bytes / n
        fixed += model.vision_params * model.embedding_bytes / n
    tables = int(is_first) + int(is_last)
    if tables == 2 and model.tie_embeddings:
        tables = 1
    fixed += tables * model.embedding_params * model.embedding_bytes / n
    if not is_last:
        return fixed
    if model.draft is not None:
        fixed += _layer_bytes(setting, n) + 2 * model.hidden**2 * model.weight_bytes / n
    return fixed


def usable_bytes(setting: Setting, stage: StageShape) -> float:
    """Return what a rank may use: the engine's share of the GPU, or the profile's."""
    memory = setting.problem.memory_of(stage.gpu, stage.tp, setting.attention_dp, stage.reserved_bytes)
    profile = setting.problem.profile_of(stage.gpu, stage.reserved_bytes)
    return profile.usable_bytes if memory is None else memory.usable_bytes


def _engine_bytes(setting: Setting, stage: StageShape, *, is_last: bool) -> float:
    """Return a rank's reserve, activations and logits, by the profile or by the engine's own numbers."""
    b, n = setting.decode_tokens, stage.tp
    memory = setting.problem.memory_of(stage.gpu, n, setting.attention_dp)
    if memory is None:
        logits = 4 * max(b, 1) * setting.model.vocab / n if is_last else 0.0
        return setting.problem.profiles[stage.gpu].reserve_bytes + _activation_bytes(setting, n) + logits
    D = micro_batches_of_a_copy(setting, stage.copies)
    prompts = max(1, setting.chunk_tokens // PROMPT_TOKENS)
    R = D * (setting.micro_batch if setting.micro_batch else prompts)
    T = max(b + setting.chunk_tokens, R)
    peak = memory.token_bytes * T
    if is_last:
        peak = max(peak, memory.held_bytes * T + memory.logit_bytes * max(b, 1) + memory.request_bytes * R)
    graphs = _graphs(2 * R) + _graphs(R)
    return memory.fixed_bytes + memory.graph_bytes * graphs / D + peak + stage.layers * memory.layer_bytes


def _graphs(largest: int) -> float:
    """Return how many sizes up to this one have a graph: three, then one for 8 tokens up to 256, for 16 up to 512."""
    return 3 + min(largest, 256) / 8 + min(max(largest - 256, 0), 256) / 16


def _layer_bytes(setting: Setting, tp: int) -> float:
    """Return the weights of a repeated layer on one rank, which has 1/d of its copy's routed experts."""
    model, d = setting.model, setting.attention_dp
    params = model.layer_params()
    if model.experts is not None and d > 1:
        routed = model.experts.count * model.expert_params() * model.expert_share
        params += routed / d - routed
    return params * model.weight_bytes / tp


def _activation_bytes(setting: Setting, tp: int) -> float:
    model = setting.model
    repeated = set(model.layers[model.prefix_layers :])
    intermediate = max(sum(map(_width, layer.mlps)) for layer in repeated)
    tokens = setting.decode_tokens + setting.chunk_tokens
    d = setting.attention_dp
    gathered = 2 * d * model.hidden if d > 1 else 0  # tokens of all copies, before and after the experts
    # The streams of the residual, before and after they are mixed, and as much for what layers compute from them.
    streams = 2 * model.hidden + 2 * model.hidden * model.residual_streams
    return tokens * model.activation_bytes * (streams + 2 * intermediate / tp + gathered)


def _width(mlp: Mlp) -> int:
    """Return the numbers of a token between the products of an MLP."""
    return mlp.active * mlp.width + mlp.shared_width if isinstance(mlp, Experts) else mlp.inner


def _all_layers(setting: Setting, stage: StageShape, is_first: bool, is_last: bool = False) -> int:
    """Return the layers whose KV a stage holds; the drafting layer is on the last stage, which then has no pool."""
    drafting = setting.model.draft_layers if is_last else 0
    return stage.layers + (setting.model.prefix_layers if is_first else 0) + drafting


def _quotient(free_bytes: float, bytes_per_token: float) -> float:
    """Return the tokens that fit, or infinity if a token takes no bytes."""
    if bytes_per_token > 0:
        return max(0.0, free_bytes) / bytes_per_token
    return math.inf if free_bytes >= 0 else 0.0
