"""What idle GPUs would add on their own, if a limit or their precision gave way: computed by the search's tables.

Replicas of equal stages on nothing but a type's idle GPUs stand beside those of a plan, which keeps its own GPUs. So
what they serve under a longer limit, or with weights of 8 bits, is at least what the whole plan would gain by it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from hetis.planner.use_cases.precision import for_engine, in_precision, refused_by
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.planner.use_cases.verification.equal_stages import value_within
from hetis.solver.budget import Budget
from hetis.solver.constraints import AtMost, Exclude, Replicas, Selection, Unit, Use
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left
from hetis.solver.placement.explanation.idle_gpus import idle_classes
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.problem import PlacementProblem

MOST_TYPES = 4  # those with the most idle memory
LONGEST = 8.0  # times its limit: the longest latency that is suggested
STEPS = 5  # bisections between a limit and the longest: to within 7% of the shortest
FP8 = "fp8"
LEAST_SHARE = 0.005  # of the plan's rate: below, nothing is worth a sentence


def with_uses_of_idle(plan: Plan, problem: PlacementProblem, loaded: LoadedInputs, seed: int, budget: Budget) -> Plan:
    """Return the plan with a note for each type of idle GPUs that a longer limit or smaller weights would use.

    ``problem`` is that of the plan's rung. Plans for a demand, or under a limit on their size, need no more GPUs.
    """
    bounded = any(isinstance(each, AtMost | Replicas) for each in problem.constraints)
    if not plan.objective.maximises or bounded or Role.UNIFIED not in problem.family.roles:
        return plan
    idle = Counter[str]()
    for each in idle_classes(plan, problem.cluster):
        idle[each.price.gpu] += each.idle
    largest = sorted(idle, key=lambda gpu: -idle[gpu] * problem.profiles[gpu].usable_bytes)[:MOST_TYPES]
    notes = [note for gpu in largest if (note := _note(gpu, idle[gpu], plan, problem, loaded, seed, budget))]
    return replace(plan, notes=(*notes, *plan.notes)) if notes else plan


def _note(
    gpu: str, count: int, plan: Plan, problem: PlacementProblem, loaded: LoadedInputs, seed: int, budget: Budget
) -> str:
    """Return what idle GPUs of a type would add, and by which option; empty: by none, or no time was left."""
    alone = _only_idle(gpu, plan, problem)

    def rate(of: PlacementProblem) -> float:
        found = value_within(budget, of, seed)
        return 0.0 if found is None or found.value is None else found.value

    if is_nothing_left(alone):
        return ""
    ways = list(_ways(gpu, alone, loaded, rate))
    worthwhile = [(option, value) for option, value in ways if value >= LEAST_SHARE * plan.result.value]
    if not worthwhile:
        return ""
    (first, most), *others = sorted(worthwhile, key=lambda way: -way[1])
    listed = (
        f"{most:.3g} {plan.objective.unit} more with {first}",
        *(f"{x:.3g} with {option}" for option, x in others),
    )
    return f"{count:,} {gpu} idle: at least {', or '.join(listed)}"


def _ways(
    gpu: str, alone: PlacementProblem, loaded: LoadedInputs, rate: Callable[[PlacementProblem], float]
) -> Iterator[tuple[str, float]]:
    """Yield options and what the idle GPUs then serve on their own."""
    goal = alone.objective
    limits: tuple[tuple[str, float | None, Callable[[float | None], Objective]], ...] = (
        ("--ttft", goal.ttft_limit_s, lambda limit: replace(goal, ttft_limit_s=limit)),
        ("--tpot", goal.tpot_limit_s, lambda limit: replace(goal, tpot_limit_s=limit)),
    )
    for option, limit_s, under in limits:
        if limit_s is None or not rate(replace(alone, objective=under(LONGEST * limit_s))):
            continue
        low, high = 1.0, LONGEST
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if rate(replace(alone, objective=under(middle * limit_s))) else (middle, high)
        enough_s = _rounded_up(high * limit_s)
        shown = f"{enough_s:.3g}s" if enough_s >= 1.0 else f"{1e3 * enough_s:.3g}ms"
        yield f"{option} {shown}", rate(replace(alone, objective=under(enough_s)))
        break
    smaller = _in_fp8(gpu, alone, loaded)
    if smaller is not None and (value := rate(smaller)):
        yield f"--weights {gpu}={FP8}", value


def _rounded_up(seconds: float) -> float:
    """Return a time rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return float(f"{math.ceil(seconds / unit - 1e-9) * unit:.2g}")


def _only_idle(gpu: str, plan: Plan, problem: PlacementProblem) -> PlacementProblem:
    """Return the problem of unified replicas on nothing but a type's idle GPUs."""
    others = (each for each in problem.cluster.types_used() if each != gpu)
    taken = set[str]()
    if any(price.gpu == gpu and price.used for price in plan.prices) or plan.other_tenants():
        of_type = {device.name for device in problem.cluster.devices() if device.gpu == gpu}
        taken = of_type.intersection((*plan.devices(), *plan.held_by_others()))
    out = [Exclude(gpus=Selection(unit=Unit.TYPE, name=each)) for each in others]
    out += [Exclude(gpus=Selection(unit=Unit.GPU, name=each)) for each in sorted(taken)]
    kept = (each for each in problem.constraints if not isinstance(each, Use))  # the plan keeps what must be used
    family = replace(problem.family, roles=(Role.UNIFIED,))
    alone = replace(problem, family=family, constraints=tuple(dict.fromkeys((*kept, *out))))
    return alone if problem.cluster.network.between_nodes else apply_constraints(alone)


def _in_fp8(gpu: str, alone: PlacementProblem, loaded: LoadedInputs) -> PlacementProblem | None:
    """Return the problem with a type's weights in 8 bits; None: they have no more, or the engine runs none there."""
    engine = alone.family.engine
    if alone.model.on(gpu).weight_bytes <= 1.0 or engine is None:
        return None
    try:
        of_type = replace(loaded, inputs=replace(loaded.inputs, cluster=alone.cluster, constraints=()))
        smaller = in_precision(of_type, weights=FP8, kv=None)
        if gpu in refused_by(smaller.inputs.model, alone.cluster, engine.name):
            return None
        inputs = for_engine(smaller, engine).inputs
        posed = inputs.problem(alone.objective, "hetis", alone.family.roles, engine)
    except InvalidProblemError:
        return None
    return replace(
        posed, family=alone.family, cluster=alone.cluster, constraints=alone.constraints,
        constraint_index=alone.constraint_index,
    )  # fmt: skip
