"""Time of a stage for an iteration, from the actual contents of the iteration.

The formulas and letters are those of `docs/cost-model.md`, but with actual tokens instead of averages (the mean
context, chunks that are always full). Terms that depend only on the number of tokens are tabulated on first use;
attention is a maximum of affine functions, whose coefficients are computed once.
"""

from __future__ import annotations

import numpy as np

from hetis.simulator.values import FloatArray
from hetis.solver.check.replica_shapes import StageShape
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost, rank_shape
from hetis.solver.model import ModelSpec
from hetis.solver.plugin_time import NO_PLUGIN
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile

AttentionPiece = tuple[float, float, float]  # seconds; per request or (request, group) pair, per token attended to
ChunkPiece = tuple[float, float, float, float]  # seconds; per token, per (query, key) pair, per token of KV read


def fit_of(profile: Profile, op: Op, model: ModelSpec, tp: int) -> Fit:
    fit = profile.fit(op, model, tp)
    assert fit is not None, f"Profile guarantees a fit for {op}"
    return fit


def pair_pieces(
    profile: Profile, model: ModelSpec, tp: int, queries_per_group: int, context_tokens: float
) -> list[AttentionPiece]:
    """Return the decode attention time of one layer per (request, head group) pair on one card, and per token.

    Where layers attend to other tokens than they read, as with compressed attention, the FLOPs for each token of KV
    depend on the context: those at ``context_tokens`` count for all.
    """
    queries = float(queries_per_group * model.step_tokens)
    attended, read = model.attended_tokens(context_tokens), model.read_tokens(context_tokens)
    scan = model.step_tokens * model.scan_flops(context_tokens)
    flops = (model.decode_attention_flops(attended, queries) + scan) / read
    return [
        (p.fixed_s, p.head_s * queries_per_group, p.flop_s * flops + p.byte_s * model.kv_bytes_per_token_group())
        for p in _decode_pieces(profile, model, tp)
    ]


def _decode_pieces(profile: Profile, model: ModelSpec, tp: int) -> tuple[Piece, ...]:
    return fit_of(profile, Op.DECODE_ATTENTION, model, tp).pieces


class Wire:
    """Messages of one GPU type over a link: `DeviceCost.transfer_s` of one message at a time."""

    __slots__ = ("_bytes_per_s", "_pieces", "latency_s")

    def __init__(self, fit: Fit, link: Link) -> None:
        self._pieces = [(p.fixed_s, p.byte_s, p.wire) for p in fit.pieces]
        self._bytes_per_s, self.latency_s = link.bytes_per_s, link.latency_s

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds of a message without the link's latency; 0 for an empty one."""
        if num_bytes <= 0.0:
            return 0.0
        wire_s = num_bytes / self._bytes_per_s
        return max([fixed_s + byte_s * num_bytes + wire * wire_s for fixed_s, byte_s, wire in self._pieces])


class StageTiming:
    """Seconds of an iteration on one copy of a stage, without the decode attention of stages that have a pool.

    Attributes:
        steps: number of steps into which an iteration is divided (see `seconds`).
        mixed_factor: mu, the time of decode attention beside a chunk as a multiple of its time alone.
        plugin: what attention workers cost the stage's hosts.
    """

    __slots__ = (
        "_beside",
        "_chunk",
        "_decode",
        "_dense",
        "_drafting",
        "_head",
        "_is_first",
        "_is_last",
        "_profile",
        "_step_tokens",
        "_table",
        "cost",
        "layers",
        "mixed_factor",
        "plugin",
        "shape",
        "steps",
    )  # fmt: skip

    def __init__(
        self, problem: PlacementProblem, shape: StageShape, *, is_first: bool, is_last: bool, steps: float = 1.0,
        attention_dp: int = 1,
    ) -> None:  # fmt: skip
        self.steps = steps
        model, profile = problem.model, problem.profiles[shape.gpu]
        self._profile = profile
        rank = rank_shape(model, shape.tp, attention_dp)
        assert rank is not None, "the plan's structure was checked"
        moments = problem.workload.moments(block_tokens=problem.assumptions.block_tokens)
        self.shape, self._is_first, self._is_last = shape, is_first, is_last
        self.plugin = NO_PLUGIN if shape.pool is None else problem.family.plugin
        self.cost = DeviceCost(model, profile, moments, rank, shape.intra_link)
        self.mixed_factor = self.cost.mixed_factor
        drafting = model.draft_layers if is_last else 0
        self.layers = shape.layers + (model.prefix_layers if is_first else 0) + drafting
        self._dense = float(shape.layers + drafting), float(model.prefix_layers if is_first else 0)
        self._step_tokens = model.step_tokens
        self._drafting: dict[int, float] = {0: 0.0}
        self._table: dict[tuple[int, int], float] = {}
        self._beside: dict[tuple[int, int], float] = {}
        self._head: dict[int, float] = {0: 0.0}
        n, groups = self.layers, rank.groups
        self._decode: tuple[AttentionPiece, ...] = ()
        if shape.pool is None:
            pieces = pair_pieces(profile, model, shape.tp, rank.queries_per_group, moments.resident_context)
            traffic = model.state_traffic_bytes(model.step_tokens) / model.state_ranks(shape.tp)
            states = [p.byte_s * traffic for p in _decode_pieces(profile, model, shape.tp)]
            self._decode = tuple(
                (n * c, n * (model.step_tokens * groups * h + state), n * groups * t)
                for (c, h, t), state in zip(pieces, states, strict=True)
            )
        heads, state_flops = model.q_heads / shape.tp, model.state_flops() / shape.tp
        context = moments.prefill_pairs / moments.mean_computed  # as in `pair_pieces`
        pair_flops = model.attention_flops(model.attended_tokens(context), heads) + model.scan_flops(context)
        pair_flops /= model.read_tokens(context)
        self._chunk: tuple[ChunkPiece, ...] = tuple(
            (
                n * p.fixed_s,
                n * (p.token_s + p.head_s * heads + p.flop_s * state_flops),
                n * p.flop_s * pair_flops,
                n * p.byte_s * groups * model.kv_bytes_per_token_group(),
            )
            for p in fit_of(profile, Op.PREFILL_ATTENTION, model, shape.tp).pieces
        )

    def seconds(
        self, decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int,
        others: int = 0,
    ) -> float:  # fmt: skip
        """Return the seconds of one iteration, including the transfer to this stage.

        With drafts, an iteration adds more than one token to a decoding request. It is simulated in as many steps, each
        with one token per request and an equal part of the chunk and of the time.

        Args:
            decoding: requests that decode; together they attend to ``attended`` tokens.
            chunk_tokens, chunk_pairs, chunk_read: tokens of the prefill chunk, (query, key) pairs of its attention, and
                tokens of KV that it reads; 0 without a chunk.
            rows: tokens for which logits are needed.
            others: tokens of the other copies that share experts with this one (see `tokens`).
        """
        steps = self.steps
        if steps != 1.0:
            chunk_tokens, chunk_pairs = round(steps * chunk_tokens), steps * chunk_pairs
        tokens = decoding * self._step_tokens + chunk_tokens
        total = self._table.get((tokens, others))
        if total is None:
            total = self._table[tokens, others] = self._by_tokens(tokens, tokens + others)
        if decoding and self._decode:
            most = 0.0
            for fixed, per_request, per_token in self._decode:
                piece = fixed + per_request * decoding + per_token * attended
                if piece > most:
                    most = piece
            total += most * self.mixed_factor if chunk_tokens else most
        if chunk_tokens:
            most = 0.0
            for fixed, per_token, per_pair, per_read in self._chunk:
                piece = fixed + per_token * chunk_tokens + per_pair * chunk_pairs + per_read * chunk_read
                if piece > most:
                    most = piece
            total += most
        if self._is_last:
            total += self._head_s(rows + decoding * (self._step_tokens - 1)) + self._drafting_s(decoding)
        return total if steps == 1.0 else total / steps

    def decode_seconds(self, decoding: int, attended: FloatArray) -> FloatArray:
        """Return `seconds` of iterations without a chunk whose requests attend to these numbers of tokens."""
        others_s = self.seconds(decoding, 0.0, 0, 0.0, 0.0, decoding)  # tabulates what depends on tokens alone
        if not self._decode:
            return np.full(len(attended), others_s)
        tokens = decoding * self._step_tokens
        most = np.zeros(1)
        for fixed, per_request, per_token in self._decode:
            most = np.maximum(most, fixed + per_request * decoding + per_token * attended)
        total = self._table[tokens, 0] + most
        if self._is_last:
            total = total + (self._head_s(tokens) + self._drafting_s(decoding))
        return total if self.steps == 1.0 else total / self.steps

    def wire(self, link: Link) -> Wire:
        """Return the times of messages from or to this stage over a link."""
        return Wire(fit_of(self._profile, Op.TRANSFER, self.cost.model, self.shape.tp), link)

    def tokens(self, contents: tuple[int, float, int, float, float, int]) -> int:
        """Return the number of tokens in a whole iteration, given the contents of one of its steps."""
        decoding, _, chunk_tokens, _, _, _ = contents
        return decoding * self._step_tokens + round(self.steps * chunk_tokens)

    def _drafting_s(self, decoding: int) -> float:
        found = self._drafting.get(decoding)
        if found is None:
            found = self._drafting[decoding] = float(self.cost.drafting_s(decoding))
        return found

    def beside_layers_s(self, tokens: int, rows: int) -> float:
        """Return the part of `seconds` outside the layers: the transfer, the engine's step and the LM head."""
        seconds = self._beside.get((tokens, rows))
        if seconds is None:
            seconds = self._step_s(tokens) + (self._head_s(rows) if self._is_last else 0.0)
            seconds += 0.0 if self._is_first else float(self.cost.hop_s(tokens, self.shape.hop_link))
            self._beside[tokens, rows] = seconds
        return seconds

    def _head_s(self, rows: int) -> float:
        head = self._head.get(rows)
        if head is None:
            head = self._head[rows] = self.cost.head_s(rows) + rows * self.plugin.sequence_s
        return head

    def _by_tokens(self, tokens: int, all_tokens: int) -> float:
        cost, (repeated, prefix) = self.cost, self._dense
        total = repeated * cost.dense_s(tokens, all_tokens=all_tokens) + (repeated + prefix) * cost.reduces_s(tokens)
        if prefix:
            total += prefix * cost.dense_s(tokens, prefix_layer=True)
        if not self._is_first:
            total += cost.hop_s(tokens, self.shape.hop_link)
        return float(total + (repeated + prefix) * self.plugin.local_s + self._step_s(tokens))

    def _step_s(self, tokens: int) -> float:
        return float(self.cost.step_s(tokens)) + self.plugin.step_s
