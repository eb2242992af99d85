"""What is planned, and for which objective, in words."""

from __future__ import annotations

from rich.text import Text

from hetis.planner.report.figures import (
    digits,
    plural,
)
from hetis.planner.use_cases.sources import Inputs
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
