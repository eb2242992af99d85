"""What limits a replica: its busiest stage, the latency limits and KV room it uses up, the next larger batch."""

from __future__ import annotations

from hetis.solver.explain import StageTime
from hetis.solver.placement.explanation.replica_view import ReplicaView
from hetis.solver.placement.explanation.wording import in_bytes, in_time, in_time_above, stage_name

NEAR = 0.95  # a limit used to this share is said to bind


def what_binds(view: ReplicaView) -> str:
    """One sentence on the stage, the limits and the memory that keep the rate where it is."""
    times = view.times()
    busiest = view.busiest()
    rate = f"busy {in_time(busiest.total_s / busiest.copies)} of every {in_time(view.interval_s(times))}"
    name = f"stage {busiest.stage + 1} ({stage_name(view.shape.stages[busiest.stage])})"
    if len(times) == 1:
        sentence = f"{name} is {rate}"
    elif view.shape.in_flight == 1:
        sentence = f"one micro-batch walks through all {len(times)} stages, so that their sum counts: {name} is {rate}"
    elif view.round_s(times) > busiest.total_s / busiest.copies * (1 + 1e-9):
        sentence = (
            f"{view.shape.in_flight} micro-batches in flight are too few to keep any stage busy: {name} is {rate}"
        )
    else:
        sentence = f"{name} is {rate}"
    return f"replica {view.number}: {sentence}; {_limits(view)}{_next_batch(view, times)}."


def _limits(view: ReplicaView) -> str:
    """Which of the latency limits and the KV room are nearly used up."""
    objective, one = view.problem.objective, view.replica
    said = [
        (value / limit, f"{name} {in_time(value)} of {in_time(limit)}")
        for name, value, limit in (
            ("mean TPOT", one.tpot_s, objective.tpot_limit_s),
            ("p95 TTFT", one.ttft_s, objective.ttft_limit_s),
        )
        if limit is not None
    ]
    full, where = view.kv_fill()
    said.append((full, f"KV room {full:.0%} planned ({where})"))
    binding = [text for share, text in said if share >= NEAR]
    if binding:
        return f"{'a limit binds' if len(binding) == 1 else 'limits bind'}: {', '.join(binding)}"
    return f"no limit is within 5%: {', '.join(text for _, text in said)}"


def _next_batch(view: ReplicaView, times: tuple[StageTime, ...]) -> str:
    """What stands in the way of the next larger micro-batch."""
    larger = [size for size in view.problem.family.micro_batches if size > view.mix.micro_batch]
    if not larger:
        return ""
    grown, objective = view.with_batch(min(larger)), view.problem.objective
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
    return f"; the next batch size, {grown.mix.micro_batch}, {effect}"
