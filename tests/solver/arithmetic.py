"""The cost model a third time, from `docs/cost-model.md` alone: the oracle for search, checker and simulator.

It takes only plain values from the solver (problems, models, profiles, moments): neither `cost.py` nor `check/` nor
`placement/`, so that it cannot share their errors. Letters are those of the document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from scipy.integrate import quad

from hetis.solver.cluster import Link
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """p ``cards`` of a stage copy that take k ``head_groups`` of every rank."""

    gpu: str
    cards: int
    head_groups: int
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """n ``tp``, c ``copies``, l ``layers``; ``kv_link`` of a prefill or decode stage only."""

    gpu: str
    tp: int
    copies: int
    layers: int
    intra_link: Link
    hop_link: Link
    pool: Pool | None = None
    kv_link: Link | None = None


def slowest(links: list[Link]) -> Link:
    return Link(bytes_per_s=min(one.bytes_per_s for one in links), latency_s=max(one.latency_s for one in links))


def divides(model: ModelSpec, n: int) -> bool:
    """Return whether n ranks can share the heads."""
    G, z = model.head_groups, model.compressed
    return model.q_heads % n == 0 and (G % n == 0 or n % G == 0) and (z is None or z.o_groups % n == 0)


@cache
def greatest_of(d: int) -> float:
    """The mean maximum of d standard normal numbers: the integral of 1 - P(all <= x) over x > 0, less P over x < 0."""

    def all_below(x: float) -> float:
        return (0.5 * math.erfc(-x / math.sqrt(2))) ** d

    value, error = quad(lambda x: 1 - all_below(x) - all_below(-x), 0, 12, epsabs=1e-13, epsrel=1e-13)
    assert error < 1e-10
    return float(value)


def groups_of_rank(model: ModelSpec, n: int) -> int:
    """Gr"""
    return max(1, model.head_groups // n)


class Numbers:
    """All quantities of the document for a replica with one role, b, M and C; d copies share their experts."""

    def __init__(self, problem: PlacementProblem, *, role: Role, b: int, M: int, C: int, d: int = 1) -> None:
        workload = problem.workload.clipped_to(problem.model.max_position)
        self.problem, self.model, self.role = problem, problem.model, role
        self.moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
        self.b, self.M, self.C, self.d = b, M, C, d
        Q, O = self.moments.mean_computed, self.moments.mean_output
        self.nc = Q / C if role is not Role.DECODE else 0.0
        draft = problem.model.draft
        self.q = 1 + draft.tokens if draft else 1  # tokens of a decoding request
        self.emitted = sum(draft.acceptance**i for i in range(self.q)) if draft else 1.0
        self.nd = 0.0 if role is Role.PREFILL else max(0.0, O / b / self.emitted - self.nc)
        self.n_it = self.nc + self.nd
        self.phi = self.nc / self.n_it
        # The oracle needs the same layer in stages of every length, and layers need the same fits.
        self.fit_of, self.layer = cache(self.fit_of), cache(self.layer)
        self.plain, self.chunk = cache(self.plain), cache(self.chunk)

    # --- one layer, one iteration

    def fit_of(self, gpu: str, op: Op, n: int) -> Fit | None:
        return self.problem.profiles[gpu].fit(op, self.model, n)

    def fit(
        self, gpu: str, op: Op, n: int, *, F: float = 0, B: float = 0, T: float = 0, H: float = 0, W: float = 0
    ) -> float:
        found = self.fit_of(gpu, op, n)
        if found is None:
            return 0.0
        return max(
            p.fixed_s + p.flop_s * F + p.byte_s * B + p.token_s * T + p.head_s * H + p.wire * W for p in found.pieces
        )

    def dense(self, s: Stage, T: int, is_prefix: bool, all_T: float | None = None) -> float:
        m = self.model
        if self.d > 1 and not is_prefix:
            return self.shared_dense(s, T, self.d * T if all_T is None else all_T)
        active = m.dense_layer_params() if is_prefix else m.active_layer_params()
        touched = m.dense_layer_params() if is_prefix else m.touched_layer_params(T)
        apart = 0.0
        if m.moe and not is_prefix and self.fit_of(s.gpu, Op.EXPERTS, s.tp):
            E, k = m.moe.num_experts, m.moe.active_experts
            matrices = 3 if m.gated_mlp else 2
            expert = matrices * m.hidden * m.moe.expert_intermediate
            read = E * (1 - (1 - k / E) ** T)
            rows = T * k * (m.hidden + m.moe.expert_intermediate / s.tp) * m.activation_bytes
            F, B = 2 * T * k * expert / s.tp, read * expert * m.weight_bytes / s.tp + 4 * rows
            apart = (self.fit(s.gpu, Op.EXPERTS, s.tp, F=F, B=B, T=T) - self.two_products(s)) / m.moe.every
            active, touched = active - k * expert / m.moe.every, touched - read * expert / m.moe.every
        num_bytes = touched * m.weight_bytes / s.tp + self.rows() * m.activation_bytes * T
        return apart + self.fit(s.gpu, Op.DENSE, s.tp, F=2 * T * active / s.tp, B=num_bytes, T=T)

    def rows(self) -> int:
        """Numbers of a token that a layer moves: 8 H, of which half are those of a single residual stream"""
        return 4 * self.model.hidden + 4 * self.model.hidden * self.model.residual_streams

    def two_products(self, s: Stage) -> float:
        """The launches in the dense fit of an MLP that layers with neither experts nor shared experts do not have."""
        assert self.model.moe is not None
        found = self.fit_of(s.gpu, Op.DENSE, s.tp)
        assert found is not None
        return 0 if self.model.moe.shared_experts else 0.5 * min(piece.fixed_s for piece in found.pieces)

    def shared_dense(self, s: Stage, T: int, all_T: float) -> float:
        """dense(T) of a layer whose routed experts are on the r = d n ranks of all copies, with T' tokens in all"""
        m, n, r = self.model, s.tp, s.tp * self.d
        assert m.moe is not None
        E, k, j = m.moe.num_experts, m.moe.active_experts, m.moe.every
        expert = (3 if m.gated_mlp else 2) * m.hidden * m.moe.expert_intermediate
        F = 2 * all_T * k * expert / r**0.7
        B = E * (1 - (1 - k / E) ** all_T) * expert * m.weight_bytes / r
        rest = m.active_layer_params() - k * expert / j
        own_F, own_B = 2 * T * rest / n, rest * m.weight_bytes / n + self.rows() * m.activation_bytes * T
        half = all_T / 2 * m.hidden * m.activation_bytes
        each = self.fit(
            s.gpu, Op.ALL_REDUCE, r, B=half, W=2 * (r - 1) / r * half / s.intra_link.bytes_per_s, T=all_T / 2
        )
        exchange = 2 * (each + s.intra_link.latency_s) / j
        if self.fit_of(s.gpu, Op.EXPERTS, n) is None:
            return exchange + self.fit(s.gpu, Op.DENSE, n, F=own_F + F / j, B=own_B + B / j, T=T)
        rows = all_T / r**0.7 * k * (m.hidden + m.moe.expert_intermediate) * m.activation_bytes
        routed = (self.fit(s.gpu, Op.EXPERTS, n, F=F, B=B + 4 * rows, T=all_T) - self.two_products(s)) / j
        return exchange + routed + self.fit(s.gpu, Op.DENSE, n, F=own_F, B=own_B, T=T)

    def all_tokens(self) -> float:
        """T' where at least one copy has a chunk"""
        some = 1 - (1 - self.phi) ** self.d if self.phi > 1e-6 else self.d * self.phi
        return self.d * (self.b * self.q + (self.phi * self.C / some if self.C else 0))

    def reduce(self, s: Stage, T: int) -> float:
        if s.tp == 1:
            return 0.0
        B = T * self.model.hidden * self.model.activation_bytes
        W = 2 * (s.tp - 1) / s.tp * B / s.intra_link.bytes_per_s
        return self.fit(s.gpu, Op.ALL_REDUCE, s.tp, B=B, W=W, T=T) + s.intra_link.latency_s

    def prefill(self, s: Stage) -> float:
        m, C, heads = self.model, self.C, self.model.q_heads / s.tp
        x = self.moments.prefill_pairs / self.moments.mean_computed
        B = groups_of_rank(m, s.tp) * (self.read(x) + C / 2 * m.kv_bytes_per_token_group())
        F = self.query_flops(C, x, heads)
        if m.linear:
            F += C * m.linear.token_flops * m.linear.layers / m.num_layers / s.tp
        return self.fit(s.gpu, Op.PREFILL_ATTENTION, s.tp, F=F, B=B, T=C, H=C * heads)

    def decode(self, gpu: str, n: int, pairs: int, s: Stage, queries: int = 0) -> float:
        """Attention of this many (request, group) pairs, with groups as the stage's ranks see them."""
        if pairs == 0:
            return 0.0
        m, x, requests = self.model, self.moments.resident_context, pairs / groups_of_rank(self.model, s.tp)
        rr, busiest = m.q_heads / s.tp / groups_of_rank(m, s.tp), 1.0
        if self.d > 1:
            cv = self.moments.resident_context_sd / self.moments.resident_context
            busiest = 1 + greatest_of(self.d) * cv / math.sqrt(requests)
        q = queries or self.q
        rr *= q
        if m.compressed is None:
            F, states = m.decode_attention_flops(busiest * m.attended_tokens(x), pairs * rr), (1 + q) * self.state(s)
        else:
            F, states = busiest * self.query_flops(requests * q, x, m.q_heads / s.tp), q * self.inputs_moved()
        B = pairs * busiest * self.read(x) + requests * states
        return self.fit(gpu, Op.DECODE_ATTENTION, n, F=F, B=B, H=pairs * rr)

    def query_flops(self, queries: float, x: float, heads: float) -> float:
        """FLOPs of so many tokens with a context of x each, on a rank with so many heads"""
        m, z = self.model, self.model.compressed
        if z is None:
            return m.attention_flops(queries * m.attended_tokens(x), heads)
        # Scores and values have 2 head_dim FLOPs each; a key is scored by all the indexer's heads on every rank.
        return queries * (
            4 * m.head_dim * heads * self.entries(x) + 2 * z.index_head_dim * z.index_heads * self.keys(x)
        )

    def entries(self, x: float) -> float:
        """Vectors and compressed entries that a query attends to in the mean layer"""
        L, z = self.model.num_layers, self.model.compressed
        assert z is not None
        chosen, all_of_them = min(z.top_entries, x / z.sparse_ratio), x / z.heavy_ratio
        return min(z.window, x) + (z.sparse_layers * chosen + z.heavy_layers * all_of_them) / L

    def keys(self, x: float) -> float:
        z = self.model.compressed
        assert z is not None
        return z.sparse_layers / self.model.num_layers * x / z.sparse_ratio

    def read(self, x: float) -> float:
        """Bytes of KV that a query reads in one head group of the mean layer"""
        m, z = self.model, self.model.compressed
        if z is None:
            return m.attended_tokens(x) * m.kv_bytes_per_token_group()
        return self.entries(x) * self.entry() + self.keys(x) * z.index_key_bytes

    def entry(self) -> float:
        m, z = self.model, self.model.compressed
        assert z is not None
        if m.kv_bytes >= 2:
            return m.kv_bytes * m.head_dim
        return m.kv_bytes * (m.head_dim - z.rope_head_dim) + 2 * z.rope_head_dim + m.head_dim / 64

    def inputs(self) -> tuple[float, float]:
        """Bytes that compressors keep of a token, its numbers and as many weights in 32 bits: in a sparse layer (where
        two runs overlap, and the indexer has a compressor), and in a heavy one"""
        m, z = self.model, self.model.compressed
        assert z is not None
        return 2 * 2 * 4 * (m.head_dim + z.index_head_dim), 2 * 4 * m.head_dim

    def inputs_moved(self) -> float:
        """Bytes that a token writes for compressors in the mean layer, and its part of what they read per run"""
        z, (sparse, heavy) = self.model.compressed, self.inputs()
        assert z is not None
        of_sparse = sparse + 2 * z.sparse_ratio * sparse / z.sparse_ratio
        of_heavy = heavy + z.heavy_ratio * heavy / z.heavy_ratio
        return (z.sparse_layers * of_sparse + z.heavy_layers * of_heavy) / self.model.num_layers

    def state(self, s: Stage) -> float:
        """Bytes of one request's state in the mean layer, on one rank."""
        return self.whole_state() / (1 if self.model.compressed else s.tp)

    def whole_state(self) -> float:
        linear, z, L = self.model.linear, self.model.compressed, self.model.num_layers
        if z is not None:
            sparse, heavy = self.inputs()
            runs = z.sparse_layers * 2 * z.sparse_ratio * sparse + z.heavy_layers * z.heavy_ratio * heavy
            return z.window * self.entry() + runs / L
        return linear.state_bytes * linear.layers / L if linear else 0.0

    def message(self, gpu: str, n: int, B: float, link: Link) -> float:
        return self.fit(gpu, Op.TRANSFER, n, B=B, W=B / link.bytes_per_s) if B else 0.0

    def load(self, s: Stage, pool: Pool) -> int:
        return math.ceil(self.b * pool.head_groups * s.tp / pool.cards - 1e-9)

    def exchange(self, s: Stage, pool: Pool) -> float:
        m = self.model
        e = m.q_heads / s.tp / groups_of_rank(m, s.tp) * m.exchange_bytes_per_head()
        out = self.message(s.gpu, s.tp, self.b * pool.head_groups * s.tp * e, pool.link)
        return max(out, self.message(pool.gpu, 1, self.load(s, pool) * e, pool.link)) + 2 * pool.link.latency_s

    def attention(self, s: Stage, beside_chunk: bool = False) -> float:
        kept = groups_of_rank(self.model, s.tp) - (s.pool.head_groups if s.pool else 0)
        own = self.decode(s.gpu, s.tp, self.b * kept, s)
        found = self.fit_of(s.gpu, Op.DECODE_ATTENTION, s.tp)
        if beside_chunk and found is not None and found.mixed is not None:
            own *= found.mixed.factor
        if s.pool is None:
            return own
        return max(own, self.decode(s.pool.gpu, 1, self.load(s, s.pool), s) + self.exchange(s, s.pool))

    def ship(self, s: Stage, pool: Pool) -> float:
        B = self.C * pool.head_groups * s.tp * self.model.kv_bytes_per_token_group()
        return max(self.message(s.gpu, s.tp, B, pool.link), self.message(pool.gpu, 1, B / pool.cards, pool.link))

    def plain(self, s: Stage, is_prefix: bool = False) -> float:
        tokens = self.b * self.q
        return self.dense(s, tokens, is_prefix) + 2 * self.reduce(s, tokens) + self.attention(s)

    def chunk(self, s: Stage, is_prefix: bool = False) -> float:
        both = self.b * self.q + self.C
        rest = 2 * self.reduce(s, both) + self.prefill(s) + self.attention(s, beside_chunk=True)
        late = 0.0
        if s.pool is not None:
            late = max(0.0, self.ship(s, s.pool) + self.exchange(s, s.pool) - self.dense(s, both, False) - rest)
        all_T = self.all_tokens() if self.d > 1 else None
        return self.dense(s, both, is_prefix, all_T) + rest + late

    def wire(self, s: Stage) -> float:
        m, P = self.model, self.moments.mean_prompt
        kvb = m.kv_bytes_per_token_group()
        if self.role is Role.PREFILL:
            assert s.kv_link is not None
            B = self.C * m.head_groups * kvb + self.C / P * self.whole_state()
            return self.d * P / self.C * self.message(s.gpu, s.tp, B, s.kv_link)
        if self.role is Role.UNIFIED:
            return 0.0
        given = s.pool.head_groups * s.tp if s.pool else 0
        B = P * (m.head_groups - given) * kvb + self.whole_state()
        kept_s = self.d * self.message(s.gpu, s.tp, B, s.kv_link or s.hop_link)
        return (
            max(kept_s, self.message(s.pool.gpu, 1, P * given * kvb / s.pool.cards, s.pool.link)) if s.pool else kept_s
        )

    def layer(self, s: Stage, is_prefix: bool = False) -> float:
        """w, or w'"""
        with_chunk = self.nc * self.chunk(s, is_prefix) if self.nc else 0.0
        without = self.nd * self.plain(s, is_prefix) if self.nd else 0.0
        return max(with_chunk + without, self.wire(s))

    # --- a stage, a replica

    def stage_seconds(self, s: Stage, *, is_first: bool, is_last: bool) -> float:
        """u"""
        with_chunk, without = (
            self.ends(s, self.b * self.q + self.C, 1, is_first, is_last),
            self.ends(s, self.b * self.q, 0, is_first, is_last),
        )
        one = replace(s, layers=1)
        u = (s.layers + self.drafting(is_last)) * self.layer(one) + self.nc * with_chunk + self.nd * without
        return u + (self.model.prefix_layers * self.layer(one, is_prefix=True) if is_first else 0.0)

    def chunk_seconds(self, s: Stage, *, is_first: bool, is_last: bool) -> float:
        """chunk_s: 0 of a decode stage."""
        if self.role is Role.DECODE:
            return 0.0
        one = replace(s, layers=1)
        wire = self.wire(one) / self.nc
        layers, tokens = s.layers + self.drafting(is_last), self.b * self.q + self.C
        total = layers * max(self.chunk(one), wire) + self.ends(s, tokens, 1, is_first, is_last)
        return total + (self.model.prefix_layers * max(self.chunk(one, is_prefix=True), wire) if is_first else 0.0)

    def drafting(self, is_last: bool) -> int:
        """The stage's layers that draft."""
        return 1 if self.model.draft and is_last else 0

    def ends(self, s: Stage, T: int, rows: int, is_first: bool, is_last: bool) -> float:
        """Hop, step and LM head of one iteration with T tokens, of which b and ``rows`` more need logits."""
        m = self.model
        total = self.fit(s.gpu, Op.STEP, s.tp, T=T)
        if not is_first:
            B = T * m.hidden * m.residual_streams * m.activation_bytes
            total += self.message(s.gpu, s.tp, B, s.hop_link) + s.hop_link.latency_s
        if is_last:
            total += self.head(s, self.b * self.q + rows)
        if is_last and m.draft and self.b:  # the first pass is a layer like any other
            pairs, one = self.b * groups_of_rank(m, s.tp), replace(s, layers=1, pool=None)
            again = self.dense(one, self.b, False) + 2 * self.reduce(one, self.b)
            again += self.decode(s.gpu, s.tp, pairs, s, queries=1)
            total += (m.draft.tokens - 1) * again + m.draft.tokens * self.head(s, self.b)
        return total

    def head(self, s: Stage, outputs: int) -> float:
        m = self.model
        table = m.vocab * m.hidden
        B = table * m.embedding_bytes / s.tp + outputs * m.hidden * m.activation_bytes
        product = self.fit(s.gpu, Op.DENSE, s.tp, F=2 * outputs * table / s.tp, B=B, T=outputs)
        return product + self.fit(s.gpu, Op.SAMPLE, s.tp, T=outputs)

    def slack(self, s: Stage, K: int) -> float:
        """sigma"""
        a = self.problem.assumptions
        if self.M == 1 or (self.d > 1 and self.role is Role.DECODE):
            return 0.0
        if self.d > 1 and self.role is Role.PREFILL:
            return greatest_of(self.d) * self.delta()
        full = self.M >= 2 * K
        if self.role is Role.DECODE or (self.role is Role.PREFILL and full):
            return a.full_slack
        if self.role is Role.PREFILL:
            return max(a.full_slack, a.tight_unevenness * self.delta())
        one = replace(s, layers=1)
        R = self.chunk(one) / self.plain(one)
        m = 1 + (R - 1) * self.phi
        E = R - (R - 1) * (1 - self.phi) ** self.M
        if self.d > 1:
            return max(0.0, E / m - 1)  # a chunk may shorten an iteration if mixed batches are quick
        least, factor = (a.full_slack, a.full_unevenness) if full else (a.tight_slack, a.tight_unevenness)
        return max(least, factor * (E / m - 1))

    def delta(self) -> float:
        m = self.model
        a = self.moments.prefill_pairs / self.moments.mean_computed

        def f(x: float) -> float:
            return self.query_flops(1, x, m.q_heads)

        token = 2 * m.active_layer_params() + f(a)
        if m.linear:
            token += m.linear.token_flops * m.linear.layers / m.num_layers
        return (f(a + self.moments.prefill_context_sd) - f(a)) / token

    def interval(self, stages: list[Stage]) -> float:
        """t"""
        K, last = sum(s.copies for s in stages), len(stages) - 1
        busy = [
            (1 + self.slack(s, K)) * self.stage_seconds(s, is_first=i == 0, is_last=i == last)
            for i, s in enumerate(stages)
        ]
        return max(max(u / s.copies for u, s in zip(busy, stages, strict=True)), sum(busy) / self.M)

    # --- latency

    def tpot_per_t(self) -> float:
        return self.M / self.n_it / self.emitted if self.b else 0.0

    def ttft_round_trips(self) -> float:
        """trips"""
        if self.role is Role.DECODE:
            return 0.0
        q = self.problem.assumptions.planned_utilisation * self.phi
        pw = q ** (math.sqrt(2 * (self.M + 1)) - 1)
        wait = self.nc / (self.M * (1 - q)) * (1 + self.moments.computed_cv2) / 2 * max(0.0, math.log(20 * pw))
        return math.ceil(self.moments.p95_computed / self.C) + wait

    def landing_seconds(self, s: Stage, link: Link) -> float:
        B = self.C * self.model.head_groups * self.model.kv_bytes_per_token_group()
        B += self.C / self.moments.mean_prompt * self.whole_state()
        return self.message(s.gpu, s.tp, B, link) + link.latency_s

    # --- memory

    def held(self, copies: int) -> int:
        """D"""
        return math.ceil(self.M / copies)

    def prompt_tokens(self, copies: int) -> float:
        """Tpre"""
        return self.held(copies) * self.phi * (self.held_of(self.moments.prefilling_context) + self.C)

    def held_of(self, context: float) -> float:
        """Tokens of such a context whose KV is kept, in the mean layer."""
        m = self.model
        if m.sliding_window is None:
            return context
        with_kv = m.num_layers - (m.linear.layers if m.linear else 0)
        sliding = with_kv if m.sliding_layers is None else m.sliding_layers
        if not m.windows_free_kv and sliding < with_kv:
            return context
        return context - max(0.0, context - m.sliding_window) * sliding / with_kv

    def kv_tokens(self, copies: int) -> float:
        """Tkv"""
        requests = self.held(copies) * self.b
        y = self.moments.resident_context
        spread = self.problem.assumptions.kv_headroom_z * math.sqrt(requests) * self.moments.resident_context_sd
        window = self.model.sliding_window
        spread *= 1.0 if window is None or y < window else self.held_of(y + 1) - self.held_of(y)
        decoding = requests * self.held_of(y) + spread
        staged = self.staged_prompts(copies)
        return decoding + self.prompt_tokens(copies) + staged * self.held_of(self.moments.mean_prompt)

    def staged_prompts(self, copies: int) -> float:
        """N"""
        if self.role is Role.UNIFIED:
            return 0.0
        return 1.0 if self.role is Role.PREFILL else math.sqrt(self.held(copies) * self.b)

    def fixed_bytes(self, s: Stage, *, is_first: bool, is_last: bool) -> float:
        """Return the bytes of a rank without KV."""
        m, n = self.model, s.tp
        inner = (
            m.intermediate
            if m.moe is None
            else (m.moe.active_experts + m.moe.shared_experts) * m.moe.expert_intermediate
        )
        if m.moe and m.moe.every > 1:  # some repeated layers are dense
            inner = max(inner, m.intermediate)
        table = m.vocab * m.hidden * m.embedding_bytes / n
        total = float(self.problem.profiles[s.gpu].reserve_bytes)
        gathered = 2 * self.d * m.hidden if self.d > 1 else 0
        total += (self.b * self.q + self.C) * m.activation_bytes * (self.rows() / 2 + 2 * inner / n + gathered)
        total += s.layers * self.layer_params() * m.weight_bytes / n
        if is_first:
            total += table + m.prefix_layers * m.dense_layer_params() * m.weight_bytes / n
            total += m.vision_params * m.embedding_bytes / n
        if is_last:
            total += 4 * max(self.b * self.q, 1) * m.vocab / n + (0.0 if is_first and m.tie_embeddings else table)
            if m.draft:
                total += (self.layer_params() + 2 * m.hidden**2) * m.weight_bytes / n
        return total

    def layer_params(self) -> float:
        """Parameters of a layer on the ranks of one copy."""
        m = self.model
        if m.moe is None:
            return m.layer_params()
        routed = m.moe.num_experts * (3 if m.gated_mlp else 2) * m.hidden * m.moe.expert_intermediate / m.moe.every
        return m.layer_params() - routed + routed / self.d

    def rank_bytes(self, s: Stage, *, is_first: bool, is_last: bool) -> float:
        kept, given = self.kept_and_given(s)
        held = kept * self.kv_tokens(s.copies) + given * (self.prompt_tokens(s.copies) if given else 0.0)
        layers = self.layers_of(s, is_first) + self.drafting(is_last)
        kv = layers * held * self.model.kv_bytes_per_token_group()
        kv += self.state_bytes(s, is_first, is_last)
        return self.fixed_bytes(s, is_first=is_first, is_last=is_last) + kv

    def state_bytes(self, s: Stage, is_first: bool, is_last: bool) -> float:
        """States of all requests that a rank holds."""
        requests = self.held(s.copies) * (self.b + self.phi) + self.staged_prompts(s.copies)
        layers, z = self.layers_of(s, is_first) + self.drafting(is_last), self.model.compressed
        if z is None:
            return layers * requests * self.q * self.state(s)
        sparse, heavy = self.inputs()  # kept of all tokens of a chunk, as their vectors are
        token = self.entry() + (z.sparse_layers * sparse + z.heavy_layers * heavy) / self.model.num_layers
        return layers * (requests * self.state(s) + self.held(s.copies) * self.phi * self.C * token)

    def worker_bytes(self, s: Stage, pool: Pool, *, is_first: bool) -> float:
        reserve = self.problem.profiles[pool.gpu].reserve_bytes
        return reserve + self.card_bytes_per_token(s, pool, is_first) * self.kv_tokens(s.copies)

    def kv_room(self, s: Stage, *, is_first: bool, is_last: bool) -> float:
        """Tokens whose KV fits on all copies of the stage."""
        kept, given = self.kept_and_given(s)
        kvb, layers = self.model.kv_bytes_per_token_group(), self.layers_of(s, is_first) + self.drafting(is_last)
        free = self.problem.profiles[s.gpu].usable_bytes - self.fixed_bytes(s, is_first=is_first, is_last=is_last)
        free -= layers * given * self.prompt_tokens(s.copies) * kvb if given else 0.0
        free -= self.state_bytes(s, is_first, is_last)
        room = free / (layers * kept * kvb) if kept else math.copysign(math.inf, free)
        if s.pool is not None:
            profile = self.problem.profiles[s.pool.gpu]
            per_token = self.card_bytes_per_token(s, s.pool, is_first)
            room = min(room, (profile.usable_bytes - profile.reserve_bytes) / per_token)
        return s.copies * room

    def fits(self, s: Stage, *, is_first: bool, is_last: bool) -> bool:
        profiles = self.problem.profiles
        if self.rank_bytes(s, is_first=is_first, is_last=is_last) > profiles[s.gpu].usable_bytes:
            return False
        blocks = self.problem.family.engine_settings.kv_blocks
        if blocks is not None and self.kv_tokens(s.copies) > blocks * self.problem.assumptions.block_tokens:
            return False
        pool = s.pool
        return pool is None or self.worker_bytes(s, pool, is_first=is_first) <= profiles[pool.gpu].usable_bytes

    def kept_and_given(self, s: Stage) -> tuple[int, int]:
        """Gr - k and k"""
        given = s.pool.head_groups if s.pool else 0
        return groups_of_rank(self.model, s.tp) - given, given

    def card_bytes_per_token(self, s: Stage, pool: Pool, is_first: bool) -> float:
        requests = self.held(s.copies) * self.b
        pairs = math.ceil(requests * pool.head_groups * s.tp / pool.cards - 1e-9)
        return self.layers_of(s, is_first) * pairs / requests * self.model.kv_bytes_per_token_group()

    def layers_of(self, s: Stage, is_first: bool) -> int:
        return s.layers + (self.model.prefix_layers if is_first else 0)
