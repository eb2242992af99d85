"""The reasons why no plan exists: which requirements conflict, and what must change for a plan to exist.

    Requirements  demand, limits, constraints, roles and strategy as requested; memory, links and cuts as given
    Trial of S    whether some plan keeps a subset S of them: the best rate under its limits against its demand
    Conflict      a minimal S that no plan keeps (found by leaving out each member in turn)
    Relaxation    of a member of a conflict, keeping the others: the best rate for a demand, the best latency for a
                  limit, faster links, smaller weights, a constraint dropped; or GPUs to add with nothing given up

The search that found no plan also answers the trials, each until its result is certain and no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.constraints import AtMost, Duty, Replicas, Use
from hetis.solver.errors import InfeasibleError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left
from hetis.solver.placement.infeasible.relaxations import (
    Market,
    Offer,
    Relaxation,
    growths,
    may_help,
    relaxations_of,
    smaller_memory,
    smaller_weights,
)
from hetis.solver.placement.infeasible.requirements import Requirement, Subject, keeping, requirements_of
from hetis.solver.placement.infeasible.trials import Conflict, Trials, conflicts_among
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.wording import in_bytes, listed
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem

__all__ = [
    "Conflict",
    "ExplainedInfeasibleError",
    "Infeasibility",
    "Market",
    "Offer",
    "Relaxation",
    "Requirement",
    "infeasible",
    "why_infeasible",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasibility:
    """An explanation of why a problem has no plan; ``reasons`` state all of it in sentences, the most telling first."""

    conflicts: tuple[Conflict, ...]
    relaxations: tuple[Relaxation, ...]
    reasons: tuple[str, ...]


class ExplainedInfeasibleError(InfeasibleError):
    """No plan of the family exists; ``why`` gives the reasons as values."""

    def __init__(self, reasons: tuple[str, ...], why: Infeasibility) -> None:
        super().__init__(reasons)
        self.why = why


def why_infeasible(problem: PlacementProblem, settings: SearchSettings, market: Market | None = None) -> Infeasibility:
    """Explain a problem that was proved infeasible, with the change that each member of a conflict needs.

    The budget is the caller's; the explanation states which parts it had no time for. ``market`` gives GPU types to add
    besides those of the fleet; with None nothing is added.
    """
    trials = Trials(problem, settings)
    settings.tell("no plan exists: searching for the reasons")
    given = requirements_of(problem)
    fleet = [requirement for requirement in given if requirement.subject.is_of_fleet]
    requested = [requirement for requirement in given if not requirement.subject.is_of_fleet]
    fits = trials.of(fleet).exists if requested else False
    if fits is None:
        text = f"no time was left to determine the cause: memory, or {listed(requested)}"
        return Infeasibility(conflicts=(), relaxations=(), reasons=(*_known_at_once(trials, given), text))
    if not fits:
        return _of_the_fleet(trials, given, fleet, market)
    conflicts = tuple(conflicts_among(trials, given))
    suggested = tuple(_of_what_was_requested(trials, given, conflicts))
    grown: tuple[Relaxation, ...] = ()
    if any(may_help(conflict.members) for conflict in conflicts):
        if all(member.subject is not Subject.MEMORY for conflict in conflicts for member in conflict.members):
            grown = tuple(
                smaller_weights(trials, None, given)
            )  # they also take less time; where memory is short, above
        if market is not None:
            grown = (*grown, *growths(trials, given, market))
    relaxations = (*(each for each in suggested if isinstance(each, Relaxation)), *grown)
    reasons = [each.sentence if isinstance(each, Relaxation) else each for each in (*suggested, *grown)]
    return Infeasibility(conflicts=conflicts, relaxations=relaxations, reasons=tuple(reasons))


def infeasible(
    problem: PlacementProblem, settings: SearchSettings, market: Market | None = None
) -> ExplainedInfeasibleError:
    """Return `why_infeasible` as the error to raise, or without reasons if the budget does not allow for them."""
    if not settings.budget.explains:
        reasons = ("no plan of the family exists",)
        return ExplainedInfeasibleError(reasons, Infeasibility(conflicts=(), relaxations=(), reasons=reasons))
    why = why_infeasible(problem, settings, market)
    return ExplainedInfeasibleError(why.reasons, why)


def _known_at_once(trials: Trials, given: Sequence[Requirement]) -> Iterator[str]:
    """Yield what needs no search: limits and a demand that exceed what the GPUs can do in dense work alone."""
    demand = [r for r in given if r.subject is Subject.DEMAND]
    limits = [r for r in given if r.subject in (Subject.TPOT, Subject.TTFT)]
    others, share = [r for r in given if r not in demand], trials.problem.assumptions.planned_utilisation
    bound = share * trials.rate_bound(others)
    if limits and bound == 0.0:
        yield f"{listed(limits)} cannot be kept: dense work alone takes longer on any GPUs of this fleet"
        bound, limits = share * trials.rate_bound([r for r in others if r not in limits]), []
    if demand and 0.0 < bound < demand[0].value:
        within = f" within {listed(limits)}" if limits else ""
        yield f"{demand[0]} is above {bound:.4g}, the most that all GPUs serve even at dense work alone{within}"


def _of_the_fleet(
    trials: Trials, given: Sequence[Requirement], fleet: Sequence[Requirement], market: Market | None
) -> Infeasibility:
    """Explain why nothing fits, whatever is requested: memory, forbidden cuts, or no usable GPU at all."""
    reason = why_nothing_fits(build_cost_tables(apply_constraints(keeping(trials.problem, fleet))))
    if not trials.of(()).exists:
        return Infeasibility(conflicts=(), relaxations=(), reasons=(reason,))
    (conflict,) = conflicts_among(trials, fleet)
    members = {member.subject: member for member in conflict.members}
    relaxations: list[Relaxation] = []
    if Subject.CUTS in members:
        others = [member for member in conflict.members if member.subject is not Subject.CUTS]
        relaxations += relaxations_of(trials, members[Subject.CUTS], others)
    if Subject.MEMORY in members:
        relaxations += smaller_memory(trials, members[Subject.MEMORY], given)
        relaxations += growths(trials, given, market) if market is not None else ()
    reasons = (reason, *(relaxation.sentence for relaxation in relaxations))
    return Infeasibility(conflicts=(conflict,), relaxations=tuple(relaxations), reasons=reasons)


def _of_what_was_requested(
    trials: Trials, given: Sequence[Requirement], conflicts: Sequence[Conflict]
) -> Iterator[str | Relaxation]:
    """Yield sentences on every conflict and its members, with requests before facts of the fleet."""
    if len(conflicts) > 1:
        yield "several conflicts exist, and all must be resolved: each statement assumes that the others are lifted"
    blamed = {member for conflict in conflicts for member in conflict.members}
    rest = [r for r in given if r not in blamed or r.subject.is_of_fleet]
    for conflict in conflicts:
        suggested: list[Relaxation] = []
        for member in conflict.members:
            others = [r for r in given if r != member and (r in rest or r in conflict.members)]
            suggested += relaxations_of(trials, member, others)
        if len(conflict.members) > 1:
            yield _together(conflict.members, suggested)
        if not conflict.is_minimal:
            yield "no time was left to determine whether all of these conflict"
        yield from _what_is_short(trials, given, rest, conflict)
        yield from suggested


def _ways_out(members: Sequence[Requirement], suggested: Sequence[Relaxation]) -> str:
    """Return which members of a conflict need to give way; a member may also be in conflicts that are not reported."""
    enough = {each.about for each in suggested if each.is_tried}
    one_each = [member for member in members if member in enough]
    if len(one_each) == len(members):
        return "relaxing any one of them is enough"
    if one_each:
        return f"relaxing {' or '.join(map(str, one_each))} is enough"
    return "more than one must be relaxed"


def _together(members: Sequence[Requirement], suggested: Sequence[Relaxation]) -> str:
    """Return a sentence stating that members of a conflict exclude one another, and which need to give way.

    Facts of the fleet hold whatever is requested. Sentences about a limit or demand presuppose them, so as not to
    suggest that the limit or demand alone could be met. Nobody can relax what an engine does not run.
    """
    requested = [member for member in members if not member.subject.is_of_fleet]
    facts = [member for member in members if member.subject.is_of_fleet]
    ways_out = _ways_out(members, suggested)
    if not facts or not requested:
        return f"each can be kept, but not together: {listed(members)}; {ways_out}"
    is_by_engine = all(getattr(member.constraint, "by", "") for member in requested)
    if is_by_engine and [fact.subject for fact in facts] == [Subject.MEMORY]:
        return f"{listed(facts)} is not enough, {listed(requested)}"
    together = " together" if len(requested) > 1 else ""
    return f"{listed(requested)} cannot be kept{together} with {listed(facts)} as given; {ways_out}"


def _what_is_short(
    trials: Trials, given: Sequence[Requirement], rest: Sequence[Requirement], conflict: Conflict
) -> Iterator[str]:
    """Yield how much memory is missing, if the cause is memory and not a number of requests or seconds."""
    subjects = {member.subject for member in conflict.members}
    sums = any(isinstance(member.constraint, Use | Replicas | AtMost) for member in conflict.members)
    if Subject.MEMORY in subjects and not sums and not subjects & {Subject.DEMAND, Subject.TPOT, Subject.TTFT}:
        kept = [r for r in given if r in rest or r in conflict.members]
        requested = [r for r in kept if r.subject not in (Subject.DEMAND, Subject.TPOT, Subject.TTFT)]
        found = apply_constraints(keeping(trials.problem, requested))
        if is_nothing_left(found):
            return
        costs = build_cost_tables(found)
        if conflict.is_minimal:
            yield why_nothing_fits(costs)
        elif costs.ranks:
            # The last shortage is only inferred: memory that is in a conflict for lack of time may not be the cause.
            *certain, _ = _shortages(costs)
            yield from certain[:1]


def why_nothing_fits(costs: CostTables) -> str:
    """Return one sentence on a problem whose family holds no replica even without limits."""
    if not costs.ranks:
        model, sizes = costs.problem.model, "/".join(map(str, costs.problem.family.tp_sizes))
        return f"{model.name}: its {model.q_heads} query heads cannot be split by any of TP {sizes} on this fleet"
    return next(_shortages(costs))


def _shortages(costs: CostTables) -> Iterator[str]:
    """Yield shortages, from the plainest to the one that remains when all others are excluded."""
    profiles = {(c.gpu, c.reserved_bytes): costs.problem.profile_of(c.gpu, c.reserved_bytes) for c in costs.classes}
    if all(profile.room_bytes <= 0 for profile in profiles.values()):
        yield "the memory of every GPU is smaller than what an engine reserves: " + listed(
            f"{gpu} has {in_bytes(profile.usable_bytes)}{f' beside {in_bytes(reserved)} in use' if reserved else ''}, "
            f"the engine's reserve is {in_bytes(profile.reserve_bytes)}"
            for (gpu, reserved), profile in profiles.items()
        )
    problem, model = costs.problem, min(costs.problem.models(), key=lambda model: model.weight_bytes)
    if (fewest := _fewest_layers(problem)) > model.num_layers:
        yield f"{model.name} has {model.num_layers} layers, fewer than the {fewest} that every stage is to have"
    room, whose = _usable_by_a_replica(costs)
    weights = model.params() * model.weight_bytes
    tables, decodes = costs.scopes[-1].tables, [mix.micro_batch > 0 for mix in costs.mixes]
    tokens, state_bytes = float(tables.kv_tokens[decodes].min()), float(tables.state_bytes[decodes].min())  # fewest
    kv = model.num_layers * model.head_groups * model.kv_bytes_per_token_group() * tokens
    kv += model.num_layers * state_bytes
    batch = min(problem.family.micro_batches)
    requests = f"{batch} request{'' if batch == 1 else 's'}, the smallest batch"
    if weights > room:
        yield f"{model.name} needs {in_bytes(weights)} for weights alone; {whose} has {in_bytes(room)} usable"
    apart, fleet_room = Role.UNIFIED not in problem.family.roles, sum(_rooms(costs))
    if apart and weights <= room and 2.0 * weights > fleet_room:
        yield (
            f"{model.name} needs {in_bytes(2.0 * weights)} for two copies of the weights, to prefill and to decode; "
            f"this fleet has {in_bytes(fleet_room)} usable"
        )
    if weights + kv > room:
        yield (
            f"{model.name} needs {in_bytes(weights + kv)}: {in_bytes(weights)} for weights and {in_bytes(kv)} for the "
            f"KV of {requests}; {whose} has {in_bytes(room)} usable"
        )
    held, tp, gpu, needed, usable = _largest_share(costs)
    if held < 1:
        yield (
            f"a layer of {model.name} needs {in_bytes(needed)} on each of {tp} GPUs, activations included; "
            f"{gpu} has {in_bytes(usable)} usable"
        )
    layers, most = model.num_layers - model.prefix_layers, _most_layers(costs)
    if most < layers:
        yield (
            f"the GPUs that a replica may use hold at most {most} of {layers} layers of {model.name}, without KV: a "
            f"layer needs {in_bytes(needed)} on each of {tp} {gpu}, which have {in_bytes(usable)} usable"
        )
    where = "every GPU of a prefill and a decode replica side by side" if apart else "every GPU"
    yield (
        f"{model.name} needs {in_bytes(weights)} for weights and {in_bytes(kv)} for the KV of {requests}; {whose} has "
        f"{in_bytes(room)} usable, but no {_whole_replica(problem, model)} keeps {where} within its memory"
    )


def _fewest_layers(problem: PlacementProblem) -> int:
    return 1 if problem.family.engine is None else problem.family.engine.min_layers


def _whole_replica(problem: PlacementProblem, model: ModelSpec) -> str:
    """Return what a replica of the family may be split into."""
    engine, fewest = problem.family.engine, _fewest_layers(problem)
    of_layers = "of whole layers" if fewest == 1 else f"of at least {fewest} layers"
    if engine is None or max(engine.stages_of(role, model) for role in problem.family.roles) > 1:
        return f"{'split into stages' if 2 * fewest <= model.num_layers else 'replica of one stage'} {of_layers}"
    if engine.max_stages == 1:
        return "replica of one stage"
    why = ", as its layers share indexers" if engine.keeps_indexers_together(model) else ""
    return f"replica of one stage (all that {engine.name} runs{why})"


def _rooms(costs: CostTables) -> list[float]:
    """Return the bytes besides the engine's own on all GPUs of every class; 0 if it reserves more than they have."""
    rooms = costs.scopes[-1].tables.worker_room_bytes
    return [max(0.0, float(room)) * c.available for room, c in zip(rooms, costs.classes, strict=True)]


def _usable_by_a_replica(costs: CostTables) -> tuple[float, str]:
    """Return the bytes besides the engine's own on all GPUs that one replica may use together, and whose they are."""
    rooms = _rooms(costs)
    builds = costs.problem.builds()
    if costs.problem.family.mixed_types and len(builds) > 1:
        own = {gpu: costs.problem.build_of(gpu) for gpu in dict.fromkeys(c.gpu for c in costs.classes)}
        by_build = dict.fromkeys(builds, 0.0)
        for c, room in zip(costs.classes, rooms, strict=True):
            if Duty.PRIMARY not in c.constraints.barred:
                by_build[own[c.gpu]] += room
        most = max(by_build, key=lambda build: by_build[build])
        gpus = ", ".join(gpu for gpu, build in own.items() if build == most)
        return by_build[most], f"a replica on GPUs of one vendor and precision, at most all {gpus},"
    if costs.problem.family.mixed_types or len(rooms) == 1:
        return sum(rooms), "this fleet"
    largest = int(np.argmax(rooms))
    c = costs.classes[largest]
    return rooms[largest], f"a replica of one device class, at most {c.available} {c.gpu},"


def _largest_share(costs: CostTables) -> tuple[float, int, str, float, float]:
    """Return the best place for a layer: layers per rank (below 1 if none), TP size, GPU, needed and usable bytes."""
    t = costs.scopes[-1].tables
    found = []
    for s, (device_class, tp) in enumerate(costs.ranks):
        needed = float(t.layer_bytes[s] + t.act_bytes[:, :, s].min())
        held = (float(t.room_bytes[s]) - float(t.act_bytes[:, :, s].min())) / float(t.layer_bytes[s])
        found.append((held, tp, costs.classes[device_class].gpu, needed, float(t.room_bytes[s])))
    return max(found)


def _most_layers(costs: CostTables) -> int:
    """Return an upper bound on the repeated layers that a replica holds, ignoring KV and embeddings."""
    t = costs.scopes[-1].tables
    most = [0] * len(costs.classes)
    for s, (device_class, tp) in enumerate(costs.ranks):
        on_rank = max(0.0, float(t.room_bytes[s]) - float(t.act_bytes[:, :, s].min())) // float(t.layer_bytes[s])
        groups = costs.classes[device_class].available // tp
        most[device_class] = max(most[device_class], int(on_rank) * groups)
    return sum(most) if costs.problem.family.mixed_types else max(most)
