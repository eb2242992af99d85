"""The values that all stages of a replica share: the problem's averages, (b, M, C), and the resulting iterations."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, log1p

from hetis.solver.check.replica_shapes import ReplicaShape
from hetis.solver.model import Compressed, Mixer, ModelSpec, Recurrent
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op
from hetis.solver.workload import WorkloadMoments


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A problem at one role and (b, M, C); see ``docs/cost-model.md``, "Letters", "Iterations" and "Prefill and decode
    replicas". b is 0 if nothing is decoded, C is 0 if nothing is prefilled."""

    problem: PlacementProblem
    moments: WorkloadMoments
    micro_batch: int  # b
    in_flight: int  # M
    chunk_tokens: int  # C
    role: Role = Role.UNIFIED
    attention_dp: int = 1  # d, the copies that share their experts; b, C and iterations are per copy

    @staticmethod
    def of(problem: PlacementProblem, moments: WorkloadMoments, shape: ReplicaShape) -> Setting:
        """Return the setting of a replica, whose GPUs determine the precision."""
        return Setting(
            problem=problem.in_precision_of(shape.stages[0].gpu),
            moments=moments,
            micro_batch=shape.micro_batch,
            in_flight=shape.in_flight,
            chunk_tokens=shape.chunk_tokens,
            role=shape.role,
            attention_dp=shape.attention_dp,
        )

    @property
    def model(self) -> ModelSpec:
        return self.problem.model

    @property
    def chunk_iterations(self) -> float:
        """Return nc, the iterations of a request that carry a chunk."""
        if self.role is Role.DECODE:
            return 0.0
        return self.moments.mean_computed / self.chunk_tokens

    @property
    def plain_iterations(self) -> float:
        """Return nd, the iterations of a request without a chunk."""
        if self.role is Role.PREFILL:
            return 0.0
        decoding = self.moments.mean_output / self.model.emitted_tokens / self.micro_batch
        return max(0.0, decoding - self.chunk_iterations)

    @property
    def decode_tokens(self) -> int:
        """Return b q, the tokens of decoding requests in an iteration, drafts included."""
        return self.micro_batch * self.model.step_tokens

    @property
    def iterations(self) -> float:
        """Return n_it."""
        return self.chunk_iterations + self.plain_iterations

    @property
    def chunk_share(self) -> float:
        """Return phi, the share of iterations that carry a chunk."""
        return self.chunk_iterations / self.iterations

    @property
    def all_tokens(self) -> float:
        """Return the tokens of all copies that share their experts, in an iteration in which at least one has a chunk.

        Each copy has a chunk with probability phi, so d phi of them have one on average, all of them in those
        iterations.
        """
        if not self.chunk_tokens:
            return self.attention_dp * self.decode_tokens
        some = -expm1(self.attention_dp * log1p(-self.chunk_share)) if self.chunk_share < 1 else 1.0
        chunks = self.attention_dp * self.chunk_share / some
        return self.attention_dp * self.decode_tokens + chunks * self.chunk_tokens

    def has_fit(self, gpu: str, op: Op, tp: int) -> bool:
        """Return whether the profile of a GPU type has an optional operator."""
        return self.problem.profiles[gpu].fit(op, self.model, tp) is not None

    def per_request(self, with_chunk_s: float, plain_s: float) -> float:
        """Return seconds per request, given the seconds in an iteration with and without a chunk."""
        return self.chunk_iterations * with_chunk_s + self.plain_iterations * plain_s

    def seconds(
        self, gpu: str, op: Op, tp: int, *, flops: float = 0.0, num_bytes: float = 0.0, tokens: float = 0.0,
        heads: float = 0.0, wire_s: float = 0.0,
    ) -> float:  # fmt: skip
        """Return fit(op; features) of a GPU type; 0 for an operator that the profile does not have."""
        fit = self.problem.profiles[gpu].fit(op, self.model, tp)
        if fit is None:
            return 0.0
        return fit.seconds(flops=flops, num_bytes=num_bytes, tokens=tokens, heads=heads, wire_s=wire_s)


def head_groups_per_rank(model: ModelSpec, tp: int) -> int:
    """Return Gr, the KV head groups that a TP rank holds; if ranks outnumber groups, several hold the same one."""
    return max(1, model.head_groups // tp)


def query_heads_per_group(model: ModelSpec, tp: int) -> float:
    """Return rr, the query heads of one head group on one rank."""
    return model.q_heads / tp / head_groups_per_rank(model, tp)


def divides(model: ModelSpec, tp: int) -> bool:
    """Return whether a TP size is possible: it divides the query heads, and it divides or is divided by the groups.

    With compressed attention it also divides the groups of heads in the output projection, and the heads of states.
    """

    def divided(mixer: Mixer) -> bool:
        match mixer:
            case Recurrent():
                return mixer.heads is None or mixer.heads % tp == 0
            case Compressed():
                return mixer.o_groups % tp == 0 and mixer.query_heads % tp == 0
            case _:
                return mixer.q_heads % tp == 0 and (mixer.groups % tp == 0 or tp % mixer.groups == 0)

    return tp >= 1 and all(divided(mixer) for mixer, _ in model.mixers)
