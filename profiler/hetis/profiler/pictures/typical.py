"""A profile's times for typical points of one layer, for people to compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hetis.solver.model import ModelSpec
from hetis.solver.profile import Op, Profile

LINK_BYTES_PER_S = 25e9  # for messages: a wire factor is multiplied with this


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalTime:
    """Seconds of one operator at one point, or 0 if the profile has no fit for it."""

    op: str
    point: str
    seconds: float


def typical_times(profile: Profile, model: ModelSpec, tp: int) -> Iterator[TypicalTime]:
    """Yield the times, always for the same points in the same order. The features are those of docs/cost-model.md."""
    heads, groups = model.q_heads / tp, max(1.0, model.head_groups / tp)
    kv_bytes = model.kv_bytes_per_token_group()

    def at(op: Op, point: str, **features: float) -> TypicalTime:
        fit = profile.fit(op, model, tp)
        return TypicalTime(op=op.value, point=point, seconds=0.0 if fit is None else fit.seconds(**features))

    for tokens in (1, 16, 64, 256, 1024, 4096):
        activations = 8.0 * model.hidden * model.activation_bytes * tokens
        yield at(
            Op.DENSE,
            f"{tokens} tokens",
            flops=2.0 * tokens * model.active_layer_params() / tp,
            num_bytes=model.touched_layer_params(tokens) * model.weight_bytes / tp + activations,
            tokens=tokens,
        )
    for tokens, past in ((512, 0), (2048, 0), (2048, 8192)):
        attended = model.attended_tokens(past + tokens / 2)
        yield at(
            Op.PREFILL_ATTENTION,
            f"{tokens} tokens after {past}",
            flops=model.attention_flops(tokens * attended, heads),
            num_bytes=(past + tokens) * groups * kv_bytes,
            tokens=tokens,
        )
    for batch, context in ((1, 1024), (8, 1024), (32, 1024), (32, 4096), (128, 2048)):
        attended = model.attended_tokens(context)
        yield at(
            Op.DECODE_ATTENTION,
            f"batch {batch}, context {context}",
            flops=model.decode_attention_flops(attended, 1.0) * batch * heads,
            num_bytes=batch * groups * attended * kv_bytes,
            heads=batch * heads,
        )
    for op in (Op.ALL_REDUCE, Op.TRANSFER):
        for num_bytes, words in ((2.0**14, "16 KiB"), (2.0**20, "1 MiB"), (2.0**26, "64 MiB")):
            wire_s = num_bytes / LINK_BYTES_PER_S
            yield at(op, f"{words} at 25 GB/s", num_bytes=num_bytes, wire_s=wire_s)
    yield at(Op.STEP, "64 tokens", tokens=64.0)
