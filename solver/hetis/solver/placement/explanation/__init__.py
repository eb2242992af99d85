"""Explanations of a plan from its own numbers and the cost model alone, without another search.

Sentences that say "at least" or "at most" are proofs; the others compare numbers of the cost model.
"""

from __future__ import annotations

from hetis.solver.placement.explanation.facts import Explanation, StageTime
from hetis.solver.placement.explanation.idle_gpus import held_by_class, why_idle
from hetis.solver.placement.explanation.kv_traffic import link_sentences, route_sentences
from hetis.solver.placement.explanation.replica_view import ReplicaView, replica_views
from hetis.solver.placement.explanation.worker_pools import attention_workers
from hetis.solver.placement.wording import in_bytes, in_time, in_time_above, stage_name
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem

__all__ = ["explain_plan", "held_by_class", "link_sentences"]


def explain_plan(plan: Plan, problem: PlacementProblem) -> Explanation:
    """Explain where memory and time go, what limits every replica, and why GPUs are idle.

    Replicas that differ only in device names are explained once, under the number of the first. ``bottlenecks`` has one
    sentence for each of these, in the order of their numbers.

    Raises:
        InvalidProblemError: the plan names devices, layers or settings that its problem does not have.
    """
    views = replica_views(plan, problem)
    return Explanation(
        memory=tuple(bar for view in views for bar in view.memory()),
        stage_times=tuple(part for view in views for part in view.times()),
        bottlenecks=tuple(what_binds(view) for view in views),
        idle=tuple(why_idle(plan, problem, views)),
        attention_workers="\n".join(attention_workers(plan, problem, views)),
        kv_routes=tuple(route_sentences(plan, problem)),
    )


# --- the limits of a replica: its busiest stage, the latency limits and KV room it uses up, the next larger batch


NEAR = 0.95  # share of a limit from which it counts as binding


def what_binds(view: ReplicaView) -> str:
    """Return one sentence on the stage, the wire, the limits and the memory that determine the rate."""
    times = view.times()
    busiest = view.busiest()
    rate = f"busy {in_time(busiest.total_s / busiest.copies)} of every {in_time(view.interval_s(times))}"
    name = f"stage {busiest.stage + 1} ({stage_name(view.shape, view.shape.stages[busiest.stage])})"
    if view.shape.shared_by and max(view.shared_card_s()) > max(busiest.total_s / busiest.copies, view.round_s(times)):
        sentence = f"the attention workers that its stages share are always busy, {name} is {rate}"
    elif len(times) == 1:
        sentence = f"{name} is {rate}"
    elif view.shape.in_flight == 1:
        sentence = f"one micro-batch passes through all {len(times)} stages, so that their sum counts: {name} is {rate}"
    elif view.round_s(times) > busiest.total_s / busiest.copies * (1 + 1e-9):
        sentence = (
            f"{view.shape.in_flight} micro-batches in flight are too few to keep any stage busy: {name} is {rate}"
        )
    else:
        sentence = f"{name} is {rate}"
    role = "" if view.role is Role.UNIFIED else f" ({view.role})"
    return f"replica {view.number}{role}: {sentence}{_wire(view, busiest)}; {_limits(view)}{_next_size(view, times)}."


def _wire(view: ReplicaView, busiest: StageTime) -> str:
    """Return how long the KV of a request is on the wire, compared with the time of its busiest stage."""
    if view.role is Role.UNIFIED:
        return ""
    way = "leaves" if view.role is Role.PREFILL else "arrives"
    text = f", KV {way} in {in_time(busiest.kv_wire_s)} of the {in_time(busiest.total_s)} that a request takes there"
    if busiest.kv_wait_s > 0:
        text += f", {busiest.kv_wait_s / busiest.total_s:.0%} of which is waiting for it"
    return text


def _limits(view: ReplicaView) -> str:
    """Return which of the latency limits and the KV room are nearly used up."""
    objective, one = view.problem.objective, view.replica
    said = [
        (value / limit, f"{name} {in_time(value)} of {in_time(limit)}")
        for name, value, limit in (
            ("mean TPOT", one.tpot_s, objective.tpot_limit_s),
            ("p95 TTFT", one.ttft_s, objective.ttft_limit_s),
        )
        if limit is not None and value > 0  # prefill replicas have no TPOT, decode replicas no TTFT
    ]
    full, where = view.kv_fill()
    said.append((full, f"KV room {full:.0%} planned ({where})"))
    binding = [text for share, text in said if share >= NEAR]
    if binding:
        return f"{'a limit binds' if len(binding) == 1 else 'limits bind'}: {', '.join(binding)}"
    return f"no limit is within 5%: {', '.join(text for _, text in said)}"


def _next_size(view: ReplicaView, times: tuple[StageTime, ...]) -> str:
    """Return what prevents the next larger micro-batch, or for a prefill replica the next larger chunk."""
    family, b, C = view.problem.family, view.mix.micro_batch, view.mix.chunk_tokens
    prefills = view.role is Role.PREFILL
    larger = [
        size for size in (family.chunk_tokens if prefills else family.micro_batches) if size > (C if prefills else b)
    ]
    if not larger:
        return ""
    size, objective = min(larger), view.problem.objective
    grown = (
        view.with_sizes(micro_batch=b, chunk_tokens=size)
        if prefills
        else view.with_sizes(micro_batch=size, chunk_tokens=C)
    )
    interval_s = grown.interval_s(grown.times())
    short = [bar for bar in grown.memory() if bar.free_bytes < 0]
    breaks = [
        f"takes {name} to {in_time_above(value, limit)}"
        for name, value, limit in (
            ("mean TPOT", grown.tpot_s(interval_s), objective.tpot_limit_s),
            ("p95 TTFT", grown.ttft_s(interval_s), objective.ttft_limit_s),
        )
        if limit is not None and value > limit * (1 + 1e-9)
    ]
    if short:
        breaks.append(f"lacks {in_bytes(-min(bar.free_bytes for bar in short))} on a GPU of stage {short[0].stage + 1}")
    gain = view.interval_s(times) / interval_s - 1
    effect = " and ".join(breaks) if breaks else f"changes the rate by {gain:+.1%}"
    return f"; the next {'chunk' if prefills else 'batch'} size, {size}, {effect}"
