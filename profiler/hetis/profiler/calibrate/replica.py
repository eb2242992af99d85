"""Iteration times of one replica as a profile predicts them: one stage on one tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hetis.profiler.calibrate.observed import Observation, ObservedWork
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost, RankShape, rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, Op, Profile
from hetis.solver.workload import LengthBin, Workload

_HOST = (Op.STEP, Op.SAMPLE)
ANY_LENGTHS = Workload(name="any", bins=(LengthBin(prompt_tokens=1, output_tokens=1, weight=1),)).moments()


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Predicted seconds of an iteration, and what a correction multiplies: ``sequences`` have logits."""

    kernels_s: float
    step_s: float
    sample_s: float
    sequences: float

    @property
    def seconds(self) -> float:
        return self.kernels_s + self.step_s + self.sample_s


def rank_of(model: ModelSpec, tp: int) -> RankShape:
    """Return the part of a layer that each rank has. Raises InvalidProblemError if the model cannot be split so."""
    rank = rank_shape(model, tp)
    if rank is None:
        raise InvalidProblemError(
            f"--tp is {tp}, must divide the {model.q_heads} query heads of {model.name} and divide its "
            f"{model.head_groups} KV heads or be a multiple of them"
        )
    return rank


class CalibratedReplica:
    """A model on one tensor-parallel group, priced with the formulas of docs/cost-model.md."""

    def __init__(self, model: ModelSpec, profile: Profile, *, tp: int, link: Link) -> None:
        """Check that the replica is possible. Raises InvalidProblemError if the model cannot be split like that, or its
        weights do not fit.
        """
        rank = rank_of(model, tp)
        if model.draft is not None:
            raise InvalidProblemError(
                f"{model.name} drafts tokens: calibrate with a server without speculative decoding"
            )
        self.model, self.profile, self.tp, self._rank = model, profile, tp, rank
        self._fits = {op: profile.fit(op, model, tp) for op in Op}
        self._repeated = model.num_layers - model.prefix_layers
        kernels = replace(profile, fits=tuple(fit for fit in profile.fits if fit.op not in _HOST))
        self._cost = DeviceCost(model, kernels, ANY_LENGTHS, rank, link)
        self._by_tokens: dict[float, float] = {}
        self._by_sequences: dict[float, float] = {}
        weights = self._repeated * self._cost.layer_bytes() + self._cost.prefix_bytes()
        weights += self._cost.embedding_bytes() * (1 if model.tie_embeddings else 2) + self._cost.vision_bytes()
        if weights >= profile.room_bytes:
            raise InvalidProblemError(
                f"{model.name} has {weights / 2**30:.3g} GiB of weights on each of {tp} {profile.gpu}, which has "
                f"room for {profile.room_bytes / 2**30:.3g} GiB: check that --tp and --weights match the server"
            )

    def fit(self, op: Op) -> Fit | None:
        """Return the profile's fit for this replica, or None if it has none."""
        return self._fits[op]

    def price(self, observation: Observation) -> Price:
        """Return the mean price of the observation's parts."""
        prices = [(share, self._price(work)) for share, work in observation.parts]
        names = (field.name for field in fields(Price))
        return Price(**{name: sum(share * getattr(price, name) for share, price in prices) for name in names})

    def _price(self, work: ObservedWork) -> Price:
        tokens, sequences = work.decoding + work.chunk_tokens, work.decoding + work.prompts
        step, sample = self.fit(Op.STEP), self.fit(Op.SAMPLE)
        return Price(
            kernels_s=self._products_s(tokens, sequences) + self._decode_s(work) + self._prefill_s(work),
            step_s=step.seconds(tokens=tokens) if step else 0.0,
            sample_s=sample.seconds(tokens=sequences) if sample else 0.0,
            sequences=sequences,
        )

    def _products_s(self, tokens: float, sequences: float) -> float:
        """Return the seconds of all layers but for attention, and of the LM head."""
        cost, model = self._cost, self.model
        if tokens not in self._by_tokens:
            layers = self._repeated * cost.dense_s(tokens) + model.num_layers * cost.reduces_s(tokens)
            prefix = model.prefix_layers * cost.dense_s(tokens, prefix_layer=True) if model.prefix_layers else 0.0
            self._by_tokens[tokens] = float(layers + prefix)
        if sequences not in self._by_sequences:
            self._by_sequences[sequences] = float(cost.head_s(sequences))
        return self._by_tokens[tokens] + self._by_sequences[sequences]

    def _decode_s(self, work: ObservedWork) -> float:
        if not work.decoding:
            return 0.0
        model, rank, fit = self.model, self._rank, self.fit(Op.DECODE_ATTENTION)
        assert fit is not None, "every profile has one"
        context = work.attended_tokens / work.decoding
        attended, read = work.decoding * model.attended_tokens(context), work.decoding * model.read_tokens(context)
        layer_s = fit.seconds(
            flops=model.decode_attention_flops(attended, 1.0) * rank.groups * rank.queries_per_group
            + work.decoding * model.scan_flops(context),
            num_bytes=read * rank.groups * model.kv_bytes_per_token_group()
            + work.decoding * model.state_traffic_bytes(1.0) / model.state_ranks(self.tp),
            heads=work.decoding * rank.groups * rank.queries_per_group,
        )
        return model.num_layers * layer_s * (fit.mixed_factor if work.chunk_tokens else 1.0)

    def _prefill_s(self, work: ObservedWork) -> float:
        """Return the seconds of the chunks' attention; one of several equal chunks has a past."""
        if not work.chunk_tokens:
            return 0.0
        model, rank, fit = self.model, self._rank, self.fit(Op.PREFILL_ATTENTION)
        assert fit is not None, "every profile has one"
        prompts, heads = max(1.0, work.prompts), model.q_heads / self.tp
        chunk = work.chunk_tokens / prompts
        pairs = work.chunk_tokens * (chunk + 1) / 2 + chunk * work.past_tokens
        context = pairs / work.chunk_tokens
        pairs = work.chunk_tokens * model.attended_tokens(context)
        read = prompts * model.read_tokens(context) + work.chunk_tokens / 2  # as `DeviceCost.prefill_s`
        return model.num_layers * fit.seconds(
            flops=model.attention_flops(pairs, heads)
            + work.chunk_tokens * model.state_flops() / self.tp
            + work.chunk_tokens * model.scan_flops(context),
            num_bytes=read * rank.groups * model.kv_bytes_per_token_group(),
            tokens=work.chunk_tokens,
            heads=work.chunk_tokens * heads,
        )
