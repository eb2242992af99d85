"""The limits of a replica: its busiest stage, the latency limits and KV room that it uses up, the next larger batch."""

from __future__ import annotations

from hetis.solver.explain import StageTime
from hetis.solver.placement.explanation.replica_view import ReplicaView
from hetis.solver.placement.explanation.wording import in_bytes, in_time, in_time_above, stage_name
from hetis.solver.plan import Role

NEAR = 0.95  # share of a limit from which it is said to bind


def what_binds(view: ReplicaView) -> str:
    """Return one sentence on the stage, the wire, the limits and the memory that determine the rate."""
    times = view.times()
    busiest = view.busiest()
    rate = f"busy {in_time(busiest.total_s / busiest.copies)} of every {in_time(view.interval_s(times))}"
    name = f"stage {busiest.stage + 1} ({stage_name(view.shape, view.shape.stages[busiest.stage])})"
    if view.shape.shared_by and max(view.shared_card_s()) > max(busiest.total_s / busiest.copies, view.round_s(times)):
        sentence = f"the attention workers that its stages share are busy all of the time, {name} is {rate}"
    elif len(times) == 1:
        sentence = f"{name} is {rate}"
    elif view.shape.in_flight == 1:
        sentence = f"one micro-batch walks through all {len(times)} stages, so that their sum counts: {name} is {rate}"
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
