"""Sentences that explain where head groups went."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.use_cases.dispatch import Dispatched, Redispatched
from hetis.planner.use_cases.stage_sources import LoadedStage
from hetis.planner.use_cases.stage_times import StageTimes
from hetis.profiler.defaults import MODELLED
from hetis.solver.dispatch.problem import Path, Resource, Unplaced
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.redispatch.problem import MoveReason, RedispatchPlan

PATHS = {
    Path.CHAIN: "the relaxation was solved exactly, as a chain by comparative advantage",
    Path.MIXED: "some devices are held by two rows at once; the chain was solved on mixtures of them",
    Path.LP: "HiGHS solved the relaxation",
    Path.MILP: "HiGHS searched whole head groups",
}


def explain_dispatch(found: Dispatched) -> tuple[str, ...]:
    """Explain what limits the placement, its bound, the value of more memory, and waiting requests."""
    return tuple(_dispatch_sentences(found))


def explain_redispatch(found: Redispatched) -> tuple[str, ...]:
    """Explain what limits the stage, why anything moves, when that pays, and what remains."""
    return tuple(_redispatch_sentences(found))


def costs_sentence(stage: LoadedStage) -> str | None:
    """Return a sentence on devices with modelled costs, or None if all costs are given or measured."""
    modelled = [device for device in stage.saved.devices if stage.origins[device.name] == MODELLED]
    if not modelled:
        return None
    gpus = ", ".join(dict.fromkeys(device.gpu or "" for device in modelled))
    return f"modelled, not measured: attention costs of {gpus} ({plural(len(modelled), 'device')})"


def bottleneck_sentence(stage: LoadedStage, times: StageTimes) -> str:
    """Return a sentence on the slowest device and where its time goes."""
    if times.makespan_s == 0:
        return "Nothing runs."
    if times.bottleneck is None:
        return (
            f"The primary's network card is the slowest: exchanging with the attention workers takes it "
            f"{seconds(times.card_s)} per layer."
        )
    name, time = stage.saved.devices[times.bottleneck].name, times.devices[times.bottleneck]
    return (
        f"{name} is the slowest with {seconds(time.seconds)} per layer: {seconds(time.kv_s)} for reading "
        f"{digits(time.kv_bytes / 1e6)} MB of KV, {seconds(time.heads_s)} for {plural(time.heads, 'query head')}, "
        f"{seconds(time.call_s)} whatever it holds."
    )


def _dispatch_sentences(found: Dispatched) -> Iterator[str]:
    stage, plan = found.stage, found.plan
    devices = stage.saved.devices
    yield bottleneck_sentence(stage, found.after)
    if found.after.makespan_s == found.before.makespan_s > 0:
        yield "It was that slow before: the new requests fit beside what runs and cost no time."
    if plan.gap <= 1e-9:
        yield "No placement of these requests is faster: the bound is reached."
    else:
        yield f"No placement of these requests is over {percent(plan.gap)} faster, proved by weak duality."
    weights = {device.name: float(plan.prices.piece[i].sum()) for i, device in enumerate(devices)}
    used = {name: weight for name, weight in weights.items() if weight > 0.005 and _is_used(found, name)}
    if plan.prices.nic > 0.005:
        used["the primary's network card"] = plan.prices.nic
    if used:
        shares = ", ".join(f"{name} {weight:.0%}" for name, weight in sorted(used.items(), key=lambda w: -w[1])[:8])
        yield f"The bound rests on the time of {shares}: only if these had less to do would all be done sooner."
    elif plan.groups.any():
        yield "The bound is the time of what runs already."
    yield from _memory_sentences(found)
    for one in plan.unplaced:
        yield _unplaced_sentence(found, one)


def _is_used(found: Dispatched, name: str) -> bool:
    """Return whether the device holds heads; idle ones also have prices: what using them would have to save."""
    return found.after.devices[found.stage.snapshot.stage.devices.index(name)].heads > 0


def _memory_sentences(found: Dispatched) -> Iterator[str]:
    saved = found.stage.saved
    block_bytes = saved.heads.kv_bytes_per_token * saved.heads.block_tokens * saved.num_layers
    priced = [(device.name, float(found.plan.prices.block_s[i])) for i, device in enumerate(saved.devices)]
    binding = [(name, price) for name, price in priced if price > 0]
    if not binding and found.plan.groups.any():
        if found.plan.unplaced:
            yield "No memory row binds for the requests that were placed: one more KV block would not speed these up."
        else:
            yield "No memory row binds: one more KV block would save nothing anywhere."
    for name, price in sorted(binding, key=lambda one: -one[1])[:8]:
        yield (
            f"KV memory of {name} binds: one more block there ({block_bytes / 2**20:.3g} MiB in all layers) "
            f"would save at most {_tiny(price)} per layer."
        )


def _unplaced_sentence(found: Dispatched, waiting: Unplaced) -> str:
    request = found.requests.requests[waiting.request]
    heads = found.stage.saved.heads
    blocks = -(-(request.context_tokens + request.output_tokens) // heads.block_tokens)
    needs = f"Request {waiting.id} waits: it needs {heads.head_groups} x {blocks:,} KV blocks per layer"
    missing, groups = waiting.missing, plural(waiting.missing, "head group")
    if waiting.resource is Resource.KV_BLOCKS:
        return f"{needs}, {missing:,} more than all devices together have left."
    if waiting.proved:
        return f"{needs}, which are free, but not in one piece for every head group: {groups} fit on no device whole."
    return (
        f"{needs}, which are free, but no way was found to fit {groups} whole beside the requests before it. "
        "That is not proved: --exact settles it, given the time."
    )


def _redispatch_sentences(found: Redispatched) -> Iterator[str]:
    plan, stage = found.plan, found.stage
    names = stage.snapshot.stage.devices
    yield bottleneck_sentence(stage, found.before)
    if not stage.saved.requests:
        return
    if not found.triggers:
        yield "No trigger has fired: a running stage would not look."
    yield from (f"Trigger: {trigger}." for trigger in found.triggers)
    if not plan.moves:
        yield "Nothing moves: no move saves more than it costs while its request is expected to run."
    counts = {reason: sum(move.groups for move in plan.moves if move.reason is reason) for reason in MoveReason}
    told = {
        MoveReason.BALANCE: "to make the slowest device faster",
        MoveReason.MEMORY: "because their device is, or will be, short of KV blocks, or another move needs the room",
        MoveReason.DRAIN: "to empty a draining device",
        MoveReason.DETOUR: "over a third device, until their target has room",
    }
    for reason, count in counts.items():
        if count:
            yield f"{plural(count, 'head group')} {'moves' if count == 1 else 'move'} {told[reason]}."
    if plan.moves:
        saved_s = plan.makespan_before_s - plan.makespan_after_s
        copying = sum(move.seconds for move in plan.moves)
        per_step = f", {digits(saved_s * stage.saved.num_layers * 1e3)} ms per decode step" if saved_s > 0 else ""
        yield (
            f"The slowest device goes from {seconds(plan.makespan_before_s)} to {seconds(plan.makespan_after_s)} per "
            f"layer{per_step}; copying takes {seconds(copying)} of link time."
        )
        paying = [(move.payback_steps, move) for move in plan.moves if move.payback_steps is not None]
        if paying:
            steps, last = max(paying, key=lambda one: one[0])
            yield (
                f"The move that pays last is {last.request} to {names[last.target]}: its time is won back after "
                f"{digits(steps, 2)} decode steps."
            )
    if plan.short_after >= 1:
        yield (
            f"{plan.short_after:,.0f} KV blocks are expected to be short, or stay on draining devices; "
            f"they were {plan.short_before:,.0f}."
        )
    elif plan.short_before >= 1:
        yield f"{plan.short_before:,.0f} KV blocks were expected to be short, or lay on draining devices: none stay so."
    for device, held in zip(stage.saved.devices, found.reached.groups.sum(axis=0), strict=True):
        if device.status is DeviceStatus.DRAINING and held:
            yield (
                f"{device.name} still holds {plural(int(held), 'head group')}: those of requests with groups under way "
                "wait for them, others found no room."
            )
    if plan.gap <= 1e-9:
        yield "No plan does better on makespan, moving and short memory together: the bound is reached."
    else:
        yield (
            f"The best plan's makespan, moving and short memory together are at most {could_fall(plan)} lower, proved "
            "by weak duality."
        )
    if plan.refused:
        yield f"{plural(len(plan.refused), 'move')} that would help cannot be made; the table says why."


def could_fall(plan: RedispatchPlan) -> str:
    """Return the largest share of the objective by which the best plan could be lower; at most 100%."""
    return percent(1.0 - plan.bound_s / plan.objective_s)


def _tiny(value_s: float) -> str:
    """Return nanoseconds where `seconds` would show leading zeros."""
    return f"{digits(value_s * 1e9)} ns" if value_s < 1e-7 else seconds(value_s)
