"""Times of a profile at typical points of one layer, to compare profiles."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.profiler.calibrate.replica import ANY_LENGTHS, rank_of
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Op, Profile

_LINK_BYTES_PER_S = 25e9  # for typical messages: a wire factor is multiplied with this


def typical_times(profile: Profile, model: ModelSpec, tp: int) -> Iterator[tuple[Op, str, float]]:
    """Yield (operator, point, seconds) at the same points in the same order; 0 s if the profile has no fit for it.

    The features are those of docs/cost-model.md. Times of dense layers include routed experts, by the experts' own fit
    if the profile has one, as in plans. Raises InvalidProblemError if the model cannot be split ``tp`` ways.
    """
    link = Link(bytes_per_s=_LINK_BYTES_PER_S, latency_s=0.0)
    cost = DeviceCost(model, profile, ANY_LENGTHS, rank_of(model, tp), link)
    heads, groups = model.q_heads / tp, max(1.0, model.head_groups / tp)
    kv_bytes = model.kv_bytes_per_token_group()

    def at(op: Op, point: str, **features: float) -> tuple[Op, str, float]:
        fit = profile.fit(op, model, tp)
        return op, point, 0.0 if fit is None else fit.seconds(**features)

    for tokens in (1, 16, 64, 256, 1024, 4096):
        yield Op.DENSE, f"{tokens} tokens", float(cost.dense_s(float(tokens)))
    for tokens, past in ((512, 0), (2048, 0), (2048, 8192)):
        context = past + tokens / 2
        yield at(
            Op.PREFILL_ATTENTION,
            f"{tokens} tokens after {past}",
            flops=model.attention_flops(tokens * model.attended_tokens(context), heads)
            + tokens * model.state_flops() / tp
            + tokens * model.scan_flops(context),
            num_bytes=(model.read_tokens(context) + tokens / 2) * groups * kv_bytes,
            tokens=tokens,
            heads=tokens * heads,
        )
    for batch, context in ((1, 1024), (8, 1024), (32, 1024), (32, 4096), (128, 2048)):
        attended = model.attended_tokens(context)
        yield at(
            Op.DECODE_ATTENTION,
            f"batch {batch}, context {context}",
            flops=model.decode_attention_flops(attended, 1.0) * batch * heads + batch * model.scan_flops(context),
            num_bytes=batch * groups * model.read_tokens(context) * kv_bytes
            + batch * model.state_traffic_bytes(1.0) / model.state_ranks(tp),
            heads=batch * heads,
        )
    for op in (Op.ALL_REDUCE, Op.TRANSFER):
        for num_bytes, words in ((2.0**14, "16 KiB"), (2.0**20, "1 MiB"), (2.0**26, "64 MiB")):
            wire_s = num_bytes / _LINK_BYTES_PER_S
            yield at(op, f"{words} at 25 GB/s", num_bytes=num_bytes, wire_s=wire_s)
    yield at(Op.STEP, "64 tokens", tokens=64.0)
    yield at(Op.SAMPLE, "64 sequences", tokens=64.0)
