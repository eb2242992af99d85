"""What is planned, for which objective, and in what the problems of several plans differ, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from rich.text import Text

from hetis.formats.documents import digest
from hetis.planner.report.figures import digits, plural
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.constraints import described
from hetis.solver.plan import Objective
from hetis.solver.problem import PlacementProblem


def problem_title(inputs: Inputs | PlacementProblem) -> Text:
    fleet = f"{inputs.cluster.name} ({plural(inputs.cluster.num_gpus(), 'GPU')})"
    return named_problem(inputs.model.name, fleet, inputs.workload.name)


def named_problem(model: str, fleet: str, workload: str) -> Text:
    return Text.assemble((model, "bold"), " on ", (fleet, "bold"), " for ", (workload, "bold"))


def goal_line(objective: Objective) -> Text:
    return Text(f"{goal_words(objective)}; {limits_words(objective)}", style="dim")


def goal_words(objective: Objective) -> str:
    """Return what is planned for, such as ``cost for 12 requests/s``."""
    demand = "" if objective.demand_rps is None else f" for {digits(objective.demand_rps)} requests/s"
    return f"{objective.kind.value}{demand}"


def limits_words(objective: Objective) -> str:
    ttft, tpot = objective.ttft_limit_s, objective.tpot_limit_s
    ttft_words = "unlimited" if ttft is None else f"up to {ttft:g} s" if ttft >= 0.1 else f"up to {1e3 * ttft:g} ms"
    return f"TTFT p95 {ttft_words}, TPOT {'unlimited' if tpot is None else f'up to {1e3 * tpot:g} ms'}"


def problem_line(inputs: Inputs | PlacementProblem, objective: Objective) -> str:
    """Return a line with what is planned, and for which objective."""
    return f"{problem_title(inputs).plain}: {goal_line(objective).plain}"


# --- in what problems differ


LIMITS = "latency limits"

# The subjects in which problems may differ, each with a function that returns a value to compare and words for it.
_SUBJECTS: Mapping[str, Callable[[PlacementProblem], tuple[Hashable, str]]] = {
    "objective": lambda it: ((it.objective.kind, it.objective.demand_rps), goal_words(it.objective)),
    LIMITS: lambda it: ((it.objective.ttft_limit_s, it.objective.tpot_limit_s), limits_words(it.objective)),
    "model": lambda it: (digest(it.model), it.model.name),
    "workload": lambda it: (digest(it.workload), it.workload.name),
    "fleet": lambda it: (digest(it.cluster), f"{it.cluster.name} ({plural(it.cluster.num_gpus(), 'GPU')})"),
    "strategy": lambda it: (it.family.name, it.family.name),
    "engine": lambda it: (it.family.engine, "none" if it.family.engine is None else it.family.engine.name),
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


def changed_values(before: PlacementProblem, after: PlacementProblem) -> dict[str, tuple[str, str]]:
    """Return the subjects in which two problems differ, profiles excepted, with the values of both in words."""
    found = dict[str, tuple[str, str]]()
    for subject, read in _SUBJECTS.items():
        (value, words), (other, other_words) = read(before), read(after)
        if value != other:
            found[subject] = (words, f"{other_words}, different in detail" if words == other_words else other_words)
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
