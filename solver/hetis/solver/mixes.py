"""Iterations of a replica, by the letters of `docs/cost-model.md`: what they contain, hold and wait for, and TTFT."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.problem import Assumptions
from hetis.solver.rank_memory import requests_at_once
from hetis.solver.workload import WorkloadMoments

Scalars = Any  # a float or an array of floats
P95_TAIL = 20.0  # 1 / (1 - 0.95)


@dataclass(frozen=True, slots=True)
class Mix:
    """The contents of an iteration, b decode tokens and at most one chunk of C tokens, and iterations per request.

    A prefill replica decodes nothing, b = 0; a decode replica prefills nothing, C = 0.
    """

    micro_batch: int  # b
    chunk_tokens: int  # C
    chunk_iterations: float  # nc
    plain_iterations: float  # nd
    sends_afar: bool = False  # a prefill replica's KV may go to all zones, not only to its own
    step_tokens: int = 1  # q, tokens of each decoding request, drafts included
    attention_dp: int = 1  # d, copies that share their experts and iterate together, each with b and C of its own

    @property
    def decode_tokens(self) -> int:
        """Return b q, the tokens of the requests that decode."""
        return self.micro_batch * self.step_tokens

    @property
    def role(self) -> Role:
        if self.micro_batch and self.chunk_tokens:
            return Role.UNIFIED
        return Role.DECODE if self.micro_batch else Role.PREFILL

    @property
    def iterations(self) -> float:
        """Return n_it, the iterations of a request."""
        return self.chunk_iterations + self.plain_iterations

    @property
    def chunk_share(self) -> float:
        """Return phi, the share of a copy's iterations with a chunk."""
        return self.chunk_iterations / self.iterations

    @property
    def all_tokens(self) -> float:
        """Return the mean tokens of all copies that iterate together, in an iteration in which one has a chunk.

        d phi of the copies have a chunk on average, all of them in the 1 - (1 - phi)^d of iterations with one. Their
        ratio is written as d over a sum of powers, which holds where phi is 0 or next to it.
        """
        d, without = self.attention_dp, 1.0 - self.chunk_share
        chunks = d / sum(without**k for k in range(d))
        return d * self.decode_tokens + chunks * self.chunk_tokens

    def of_a_copy(self) -> Mix:
        """Return the mix with the iterations of each request on its own copy."""
        d = self.attention_dp
        if d == 1:
            return self
        return replace(self, chunk_iterations=d * self.chunk_iterations, plain_iterations=d * self.plain_iterations)


class LargestBatch(NamedTuple):
    """The largest iteration of a stage, in scalars or arrays: T and its tokens with logits, R, and M of the replica."""

    tokens: Scalars
    with_logits: Scalars
    requests: Scalars
    in_flight: Scalars

    @staticmethod
    def of(mix: Mix, in_flight: int) -> LargestBatch:
        requests = requests_at_once(mix.micro_batch, mix.chunk_tokens, in_flight)
        return LargestBatch(mix.decode_tokens + mix.chunk_tokens, mix.decode_tokens, requests, in_flight)


def mix_of(
    model: ModelSpec, moments: WorkloadMoments, *, micro_batch: int, chunk_tokens: int, sends_afar: bool = False,
    attention_dp: int = 1,
) -> Mix:  # fmt: skip
    """Return the mix in which b requests decode together and prompts come in chunks of C.

    b = 0 gives a prefill replica's mix, C = 0 a decode replica's. If d copies iterate together, an iteration is shared
    by all of them, and a request has 1/d as many.
    """
    with_chunk = moments.mean_computed / chunk_tokens / attention_dp if chunk_tokens else 0.0
    decoding = moments.mean_output / (micro_batch * model.emitted_tokens) / attention_dp if micro_batch else 0.0
    plain = max(0.0, decoding - with_chunk)
    return Mix(micro_batch, chunk_tokens, with_chunk, plain, sends_afar, model.step_tokens, attention_dp)


# E[max of d standard normal variables]: how far the busiest of d copies is above the mean, in standard deviations.
BUSIEST = {1: 0.0, 2: 0.5641895835, 4: 1.029375373, 8: 1.423600306, 16: 1.765991393, 32: 2.069668828, 64: 2.343733465}


def kv_tokens_per_copy(
    model: ModelSpec, moments: WorkloadMoments, assumptions: Assumptions, mix: Mix, micro_batches: int
) -> float:
    """Return Tkv, the KV tokens that a copy holding D ``micro_batches`` must have room for."""
    requests = micro_batches * mix.micro_batch
    context = moments.resident_context
    context_sd = moments.resident_context_sd * model.cached_growth(context)
    spread = assumptions.kv_headroom_z * math.sqrt(requests) * context_sd
    decoding = requests * model.cached_tokens(context) + spread
    own = decoding + prompt_tokens_per_copy(model, moments, mix, micro_batches)
    handed_over = handed_over_per_copy(mix, micro_batches)
    return own + handed_over * model.cached_tokens(moments.mean_prompt) if handed_over else own


def handed_over_per_copy(mix: Mix, micro_batches: int) -> float:
    """Return N, the whole prompts that a copy holds between prefill and decode; 0 for a unified replica.

    On a decode replica they have their blocks and do not decode yet; on a prefill replica they have not landed yet. How
    many arrive at a decode replica at once depends on the replicas that send them, but its memory must not: ``sqrt(D
    b)`` is what simulated plans held (`docs/cost-model.md`, "Prompts between two replicas").
    """
    if mix.role is Role.UNIFIED:
        return 0.0
    return math.sqrt(micro_batches * mix.micro_batch) if mix.role is Role.DECODE else 1.0


def prompt_tokens_per_copy(model: ModelSpec, moments: WorkloadMoments, mix: Mix, micro_batches: int) -> float:
    """Return Tpre, the KV tokens of prompts that are being prefilled.

    All their head groups, including a pool's, stay on the stage until the last chunk, because later chunks attend to
    them there.
    """
    held = model.cached_tokens(moments.prefilling_context) + mix.chunk_tokens
    return micro_batches * mix.chunk_share * held


def state_bytes_per_copy(model: ModelSpec, mix: Mix, micro_batches: int) -> float:
    """Return the bytes per layer of the states of all requests that a copy holds, on the `ModelSpec.state_ranks` that
    divide them together.

    These are the D b requests that decode, those that are being prefilled, and the N that are handed over. Tokens of
    the chunks are added if they have states of their own.
    """
    requests = micro_batches * (mix.micro_batch + mix.chunk_share) + handed_over_per_copy(mix, micro_batches)
    in_chunks = micro_batches * mix.chunk_share * mix.chunk_tokens
    return requests * model.kept_states * model.state_bytes() + in_chunks * model.chunk_state_bytes()


class Regime(NamedTuple):
    """Slack sigma of a stage if M micro-batches serve K copies: ``max(least, unevenness (E / m - 1))``."""

    least: float
    unevenness: float


def chunk_spread(model: ModelSpec, moments: WorkloadMoments) -> float:
    """Return delta, the standard deviation of a chunk's FLOPs in a layer as a ratio to their mean.

    Chunks have equally many tokens, which attend to more tokens the further a prompt has come. This depends on model
    and workload alone, since the proportion of a layer's work is much the same on every GPU.
    """
    mean = moments.prefill_pairs / moments.mean_computed
    late = mean + moments.prefill_context_sd
    attended, further = model.attended_tokens(mean), model.attended_tokens(late)
    token = 2.0 * model.active_layer_params() + model.state_flops() + model.attention_flops(attended, model.q_heads)
    more = model.attention_flops(further - attended, model.q_heads) + (model.scan_flops(late) - model.scan_flops(mean))
    return more / (token + model.scan_flops(mean))


def regimes(assumptions: Assumptions, role: Role, spread: float) -> tuple[Regime, Regime]:
    """Return the regimes of a role's pipelines with at least two micro-batches per stage copy, and with at least one.

    Only on unified replicas do iterations with and without a chunk alternate. Iterations of a prefill replica differ as
    their chunks do (``spread``, see `chunk_spread`), which two micro-batches per stage copy even out.
    """
    a = assumptions
    if role is Role.UNIFIED:
        return Regime(a.full_slack, a.full_unevenness), Regime(a.tight_slack, a.tight_unevenness)
    even = Regime(a.full_slack, 0.0)
    uneven = a.tight_unevenness * spread if role is Role.PREFILL else 0.0
    return even, even._replace(least=max(even.least, uneven))


def regime_of(of_role: tuple[Regime, Regime], *, in_flight: int, num_copies: int) -> Regime:
    """Return the regime of M micro-batches over K stage copies, one of the two of `regimes`."""
    if in_flight == 1:
        return Regime(0.0, 0.0)
    full, tight = of_role
    return full if in_flight >= 2 * num_copies else tight


def regime_together(role: Role, spread: float, copies: int) -> Regime:
    """Return the regime of d ``copies`` that iterate together (1: a single micro-batch, which waits for no other).

    Every iteration takes as long as the longest among the copies: that of one with a chunk if any has one, or on a
    prefill replica that of the longest of d chunks, whose FLOPs have a relative standard deviation ``spread``
    (`chunk_spread`).
    """
    if copies == 1:
        return Regime(0.0, 0.0)
    return Regime(BUSIEST[copies] * spread if role is Role.PREFILL else 0.0, 1.0 if role is Role.UNIFIED else 0.0)


def tpot_per_interval(model: ModelSpec, mix: Mix, in_flight: int) -> float:
    """Return mean TPOT divided by t: a round trip per iteration's tokens of a request; 0 for a prefill replica.

    This is ``b M / O`` as long as outputs need no fewer iterations than prompts. ``in_flight`` counts iterations here
    and in `chunks_ahead`, each of which has d micro-batches (`Mix`).
    """
    return in_flight / (mix.iterations * model.emitted_tokens) if mix.micro_batch else 0.0


def chunks_ahead(moments: WorkloadMoments, assumptions: Assumptions, mix: Mix) -> float:
    """Return the chunks that enter the pipeline before the last of the p95 prompt: its own and those of other prompts.

    Chunks follow each other through the pipeline, so a replica computes prompts one by one: others ahead are the 95th
    percentile of a queue with a server for every replica, or for each of its copies that share experts (Sakasegawa's
    approximation with an exponential tail). This is 0 for a decode replica.
    """
    if mix.role is Role.DECODE:
        return 0.0
    own = math.ceil(moments.p95_computed / mix.chunk_tokens) - 1
    utilisation = assumptions.planned_utilisation * assumptions.lanes.load(mix.role) * mix.chunk_share
    lanes = assumptions.lanes.of(mix.role)
    must_wait = utilisation ** (math.sqrt(2.0 * (mix.attention_dp * lanes + 1)) - 1.0)
    if P95_TAIL * must_wait <= 1.0:
        return own
    service = mix.chunk_iterations / lanes / (1.0 - utilisation)
    return own + service * (1.0 + moments.computed_cv2) / 2.0 * math.log(P95_TAIL * must_wait)


def ttft_s(chunks: float, round_trip_s: float, slot_s: float) -> float:
    """Return p95 TTFT, without the landing of a prefill replica's KV.

    Args:
        chunks: those that enter the pipeline before the last of the prompt (`chunks_ahead`).
        round_trip_s: seconds of an iteration with a chunk in all stages.
        slot_s: seconds from one iteration with a chunk to the next.
    """
    return round_trip_s + chunks * slot_s


def ttft_round_trips(moments: WorkloadMoments, assumptions: Assumptions, mix: Mix, in_flight: int) -> float:
    """Return p95 TTFT in round trips that carry a chunk, if each of the M iterations in flight takes its share of them.

    This is 0 for a decode replica.
    """
    chunks = chunks_ahead(moments, assumptions, mix)
    return 0.0 if mix.role is Role.DECODE else ttft_s(chunks, 1.0, 1.0 / in_flight)
