"""Uses of a fit by a plan outside the measured sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hetis.planner.use_cases.grouping import group_replicas
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op
from hetis.solver.workload import WorkloadMoments

_WORDS = {
    "tokens": "tokens",
    "batch": "requests",
    "past_tokens": "tokens of past",
    "context_tokens": "tokens of context",
    "kv_bytes": "MB of KV",
    "num_bytes": "bytes",
}
_UNITS = {"kv_bytes": 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A fit with the sizes at which a plan uses it."""

    gpu: str
    op: Op
    tp: int
    sizes: Mapping[str, float]


def outside_regions(plan: Plan, problem: PlacementProblem) -> tuple[str, ...]:
    """Return a sentence per GPU type and operator about its furthest use, with the size and the measured range."""
    furthest: dict[tuple[str, Op, str], tuple[float, str]] = {}
    workload = problem.workload.clipped_to(problem.model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    for group in group_replicas(plan.replicas):
        own = problem.of_replica(group.first)
        for use in _uses(group.first, moments, own):
            fit = own.profiles[use.gpu].fit(use.op, own.model, use.tp)
            if fit is None or fit.region is None:
                continue
            for name in fit.region.outside(**use.sizes):
                unit = _UNITS.get(name, 1.0)
                low, high, size = (value / unit for value in (*getattr(fit.region, name), use.sizes[name]))
                off = size / max(high, 1.0 / unit) if size > high else low / max(size, 1e-9)
                sentence = f"{use.op} of {use.gpu} at {_number(size)} {_WORDS[name]}, measured {_span(low, high)}"
                key = (use.gpu, use.op, name)
                if key not in furthest or off > furthest[key][0]:
                    furthest[key] = (off, sentence)
    by_op: dict[tuple[str, Op], tuple[float, str]] = {}
    for (gpu, op, _), found in furthest.items():
        by_op[gpu, op] = max(by_op.get((gpu, op), (0.0, "")), found)
    return tuple(f"outside the region of its fit: {sentence}" for _, sentence in by_op.values())


def _uses(replica: ReplicaPlan, moments: WorkloadMoments, problem: PlacementProblem) -> Iterator[Use]:
    b, C, model = replica.micro_batch, replica.chunk_tokens, problem.model
    decoding = b * model.step_tokens  # their tokens, drafts included
    attended = model.attended_tokens(moments.resident_context)
    kvb = model.kv_bytes_per_token_group()
    # The average chunk: as in docs/cost-model.md, it attends to a tokens, to half of itself on average.
    a = model.attended_tokens(moments.prefill_pairs / moments.mean_computed)
    past, context = max(0.0, a - C / 2), a + C / 2

    def decode(pairs: float) -> dict[str, float]:
        return {"batch": float(b), "context_tokens": attended, "kv_bytes": pairs * attended * kvb}

    for position, stage in enumerate(replica.stages):
        for tokens in sorted({decoding, decoding + C} - {0}):
            yield Use(gpu=stage.gpu, op=Op.DENSE, tp=stage.tp, sizes={"tokens": float(tokens)})
            num_bytes = float(tokens * model.hidden * model.activation_bytes)
            if stage.tp > 1:
                sizes = {"num_bytes": num_bytes, "tokens": float(tokens)}
                yield Use(gpu=stage.gpu, op=Op.ALL_REDUCE, tp=stage.tp, sizes=sizes)
            if replica.expert_parallel:  # tokens of all copies are exchanged, half of the message at a time
                ranks, all_tokens = stage.tp * stage.copies, stage.copies * tokens
                sizes = {"num_bytes": stage.copies * num_bytes / 2, "tokens": all_tokens / 2}
                yield Use(gpu=stage.gpu, op=Op.ALL_REDUCE, tp=ranks, sizes=sizes)
            if position > 0:
                yield Use(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes={"num_bytes": num_bytes})
        if C:
            kv_bytes = context * max(1.0, model.head_groups / stage.tp) * kvb
            prefill = {"tokens": float(C), "past_tokens": past, "context_tokens": context, "kv_bytes": kv_bytes}
            yield Use(gpu=stage.gpu, op=Op.PREFILL_ATTENTION, tp=stage.tp, sizes=prefill)
        if b and stage.kv_head_groups_kept:
            sizes = decode(b * stage.kv_head_groups_kept)
            yield Use(gpu=stage.gpu, op=Op.DECODE_ATTENTION, tp=stage.tp, sizes=sizes)
        if replica.role is Role.PREFILL:
            sent = {"num_bytes": C * model.head_groups * kvb}
            yield Use(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes=sent)
        if replica.role is Role.DECODE and stage.kv_head_groups_kept:
            kept = min(stage.tp, model.head_groups) * stage.kv_head_groups_kept
            received = {"num_bytes": moments.mean_prompt * kept * kvb}
            yield Use(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes=received)
    for pool in replica.attention_workers:
        stage = replica.stages[pool.stage]
        cards = len(pool.devices) / stage.copies
        yield Use(gpu=pool.gpu, op=Op.DECODE_ATTENTION, tp=1, sizes=decode(b * pool.kv_head_groups * stage.tp / cards))


def _span(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if high else "without any"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
