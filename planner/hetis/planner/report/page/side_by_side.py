"""Several plans on one page: on one scale, in one table, and how the problems that they solve differ."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType

from hetis.formats.documents import digest
from hetis.planner.report.comparison import SIMULATED_MEANS
from hetis.planner.report.figures import digits, percent, plural, seconds, tokens
from hetis.planner.report.page.blocks import Block, Grid, Scale, ScaleRow, Sentences
from hetis.planner.report.plan import goal_words, kept_cell, limits_words
from hetis.planner.use_cases.compare import best_of, figures_of, kept_of
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.constraints import described
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

ROOM = 1.02  # ratio of an axis to its longest bar
LIMITS = "latency limits"


# The subjects in which problems may differ, each with a function that returns a value to compare and words for it.
_SUBJECTS: Mapping[str, Callable[[PlacementProblem], tuple[Hashable, str]]] = {
    "objective": lambda it: ((it.objective.kind, it.objective.demand_rps), goal_words(it.objective)),
    LIMITS: lambda it: ((it.objective.ttft_limit_s, it.objective.tpot_limit_s), limits_words(it.objective)),
    "model": lambda it: (digest(it.model), it.model.name),
    "workload": lambda it: (digest(it.workload), it.workload.name),
    "fleet": lambda it: (digest(it.cluster), f"{it.cluster.name} ({plural(it.cluster.num_gpus(), 'GPU')})"),
    "engine": lambda it: (it.family.engine, "any" if it.family.engine is None else it.family.engine.name),
    "engine settings": lambda it: (it.family.engine_settings, it.family.engine_settings.describe() or "none"),
    "constraints": lambda it: _constraints(it),
}
# Where one of these differs, a higher value is not a better plan.
_QUESTIONS = ("objective", LIMITS, "model", "workload")


def differences(problems: Sequence[tuple[str, PlacementProblem]]) -> dict[str, str]:
    """Return the subjects in which the problems of several plans differ: each value with the names of its plans."""
    found = dict[str, str]()
    for subject, read in _SUBJECTS.items():
        plans_of = defaultdict[tuple[Hashable, str], list[str]](list)
        for name, problem in problems:
            plans_of[read(problem)].append(name)
        if len(plans_of) > 1:
            found[subject] = "; ".join(_of_plans([words for _, words in plans_of], list(plans_of.values())))
    if changed := _changed_profiles([problem for _, problem in problems]):
        found["profiles"] = f"those of {', '.join(changed)}"
    return found


def difference_words(differing: Mapping[str, str]) -> str:
    """Return in a sentence in what the problems differ; nothing if they are the same."""
    if not differing:
        return ""
    *others, last = differing
    words = f"The plans differ in {', '.join(others)}{' and ' if others else ''}{last}"
    return f"{words}{'' if is_one_question(differing) else ', so none is marked as the best'}."


def is_one_question(differing: Mapping[str, str]) -> bool:
    """Return whether the better of two values belongs to the better plan, although the problems may differ."""
    return not differing.keys() & set(_QUESTIONS)


def _of_plans(values: Sequence[str], names: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, (value, of_value) in enumerate(zip(values, names, strict=True)):
        again = ", different in detail" if value in values[:number] else ""
        yield f"{value}{again}: {', '.join(of_value)}"


def _constraints(problem: PlacementProblem) -> tuple[Hashable, str]:
    words = tuple(sorted(described(constraint) for constraint in problem.constraints))
    return words, ", ".join(words) or "none"


def _changed_profiles(problems: Sequence[PlacementProblem]) -> list[str]:
    """Return the GPU types whose profiles are not the same in all problems that have them."""
    digests = defaultdict[str, set[str]](set)
    for problem in problems:
        for gpu, profile in problem.profiles.items():
            digests[gpu].add(digest(profile))
    return sorted(gpu for gpu, known in digests.items() if len(known) > 1)


def side_by_side(
    rows: Sequence[tuple[str, Plan, Inputs | PlacementProblem]],
    objective: Objective,
    differing: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Block]:
    """Yield the plans on one scale and in one table, with the best one in bold, and in what their problems differ.

    ``differing`` is made by `differences`. Plans that answer different questions have no best one, and those with
    different objectives no scale.
    """
    if not rows:
        return
    best = best_of([plan for _, plan, _ in rows]) if is_one_question(differing) else None
    if len({plan.objective.kind for _, plan, _ in rows}) == 1:
        yield _scale([(name, plan) for name, plan, _ in rows], objective, best)
    are_simulated = any(kept_of(plan) is not None for _, plan, _ in rows)
    limit = ["limit"] if LIMITS in differing else []
    columns = ["'", "requests/s", "kept", "output tokens/s", "bound", "gap", "USD/h", "USD per M tokens"]
    columns += ["TTFT p95", *limit, "TPOT mean", *limit, "KV tokens", "GPUs", "idle"]
    has_units = len({plan.objective.unit for _, plan, _ in rows}) > 1
    yield Grid(
        title="In figures",
        columns=tuple(columns),
        rows=tuple(
            (name, *_figures_row(plan, inputs, has_limits=bool(limit), has_unit=has_units))
            for name, plan, inputs in rows
        ),
        strong=best,
        note=SIMULATED_MEANS if are_simulated else "",
    )
    if differing:
        terms = tuple((f"{subject[0].upper()}{subject[1:]}", words) for subject, words in differing.items())
        yield Sentences(title="What differs", terms=terms)


def _scale(plans: Sequence[tuple[str, Plan]], objective: Objective, best: int | None) -> Scale:
    known = [plan.result.value for _, plan in plans]
    known += [plan.result.bound for _, plan in plans if math.isfinite(plan.result.bound)]
    axis = max(known) * ROOM or 1.0
    return Scale(
        title=f"{objective.kind.value.capitalize()} by the model, {objective.unit}",
        rows=tuple(
            ScaleRow(
                label=name,
                text=digits(plan.result.value, 4),
                share=plan.result.value / axis,
                mark=plan.result.bound / axis if math.isfinite(plan.result.bound) else None,
                strong=number == best,
            )
            for number, (name, plan) in enumerate(plans)
        ),
        note="The line is what no plan of the family can exceed." if objective.maximises else
        "The line is what no plan of the family can go below.",
    )  # fmt: skip


def _figures_row(plan: Plan, inputs: Inputs | PlacementProblem, *, has_limits: bool, has_unit: bool) -> tuple[str, ...]:
    figures, result, objective = figures_of(plan, inputs), plan.result, plan.objective
    dollars, per_million = figures.usd_per_hour, figures.usd_per_million_output_tokens
    limits_s = (objective.ttft_limit_s, objective.tpot_limit_s)
    ttft, tpot = ([("none" if it is None else seconds(it))] if has_limits else [] for it in limits_s)
    return (
        digits(figures.rate_rps),
        kept_cell(plan, unknown="–").plain,
        digits(figures.output_tokens_per_s),
        f"{digits(result.bound)}{f' {objective.unit}' if has_unit else ''}",
        percent(result.gap),
        "–" if dollars is None else digits(dollars),
        "–" if per_million is None else digits(per_million),
        seconds(figures.ttft_s) if plan.replicas else "–",
        *ttft,
        seconds(figures.tpot_s) if plan.replicas else "–",
        *tpot,
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,}",
        f"{figures.gpus_idle:,}",
    )
