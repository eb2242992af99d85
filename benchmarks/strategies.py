"""Every strategy on the same fleets: goodput and time, by lengths of requests, with and without a TPOT limit.

    python -m benchmarks.strategies [--quick] [--json]

Llama-2-70B on five fleets: the paper's cluster, 8 A100 + 8 L4, 4 H100 + 8 L4, 2 H100 + 8 P100 and the 160 GPUs of
examples/fleet-160.yaml. Prompt/output tokens are 1024/256, 8000/300 and 500/2000 (cut to the model's context), TTFT is
unlimited, and TPOT is unlimited or at most 50 ms. A column is the goodput of a strategy in requests/s, or with ``_s``
its CPU seconds. A goodput of 0 means no plan; all but the published heuristics prove that there is none, unless their
time ran out. ``gap`` is the final gap of `hetis`, and ``best`` names the strategies within 0.1% of the best value.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.measuring import plots, rows
from benchmarks.measuring.instances import NO_LIMITS, example, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.cli.searching import no_native_output
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.errors import HetisError, InfeasibleError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

FAILED = "failed"  # status of a solve that crashed, or whose plan the checker refuses
LENGTHS = ("1024/256", "8000/300", "500/2000")
TPOT_LIMITS_S = (None, 0.05)
TIME_LIMIT_S = 10.0
TIE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fleet, lengths and a limit."""

    fleet: str
    lengths: str
    limit: str
    problem: PlacementProblem

    @property
    def name(self) -> str:
        return f"{self.fleet}, {self.lengths}, {self.limit}"


def main() -> None:
    """Print one row per fleet, lengths and limit, and draw them."""
    parser = rows.parser("benchmarks.strategies", __doc__)
    arguments = parser.parse_args()
    if not arguments.quick:
        for strategy in STRATEGIES:  # compile now, so that no row includes it
            answer(problem(example("h100-l4"), objective=NO_LIMITS), strategy, time_limit_s=60.0)
    chosen = [case for case in cases(quick=arguments.quick) if arguments.only in case.name]
    shown = rows.show((measured(case) for case in chosen), arguments, name="strategies")
    bars = [
        plots.Bars(
            panel=case.limit,
            group="{}\n{}".format(case.fleet.replace(" + ", "\n+ "), case.lengths),
            heights={name: float(row[name] or 0.0) / max(1e-300, float(row["hetis"] or 0.0)) for name in STRATEGIES},
        )
        for case, row in zip(chosen, shown, strict=True)
        if row["hetis"]
    ]
    if bars:
        plots.draw_bars(bars, name="strategies", label="goodput over that of hetis", document=arguments.markdown)
    rows.exit_if_crashed(shown)


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield every combination, or only the first one if ``quick``."""
    for name, cluster in list(_fleets())[: 1 if quick else None]:
        for tpot_s in TPOT_LIMITS_S[: 1 if quick else None]:
            for lengths in LENGTHS[: 1 if quick else None]:
                objective = Objective(ttft_limit_s=None, tpot_limit_s=tpot_s)
                yield Case(
                    fleet=name,
                    lengths=lengths,
                    limit="no limit" if tpot_s is None else f"TPOT {1e3 * tpot_s:g} ms",
                    problem=problem(cluster, workload=lengths, objective=objective),
                )


def _fleets() -> Iterator[tuple[str, Cluster]]:
    yield "paper", example("paper")
    yield "8 A100 + 8 L4", fleet("8 A100 + 8 L4", (1, 8, "A100-SXM-80GB"), (2, 4, "L4"))
    yield "4 H100 + 8 L4", fleet("4 H100 + 8 L4", (1, 4, "H100-SXM-80GB"), (2, 4, "L4"))
    yield "2 H100 + 8 P100", example("h100-p100")
    yield "160 GPUs", example("fleet-160")


def measured(case: Case) -> Row:
    """Solve a case with every strategy, contained ones before `hetis`."""
    answers = {name: answer(case.problem, name, time_limit_s=TIME_LIMIT_S) for name in list(STRATEGIES)[::-1]}
    best = max(found.value for found in answers.values())
    within = [name for name in STRATEGIES if best > 0.0 and answers[name].value >= best * (1.0 - TIE)]
    row: dict[str, rows.Cell] = {"name": case.name, "status": _status(answers), "best": ", ".join(within) or "no plan"}
    for name in STRATEGIES:
        row[name] = answers[name].value
    hetis = answers["hetis"]
    row["gap"] = (hetis.bound - hetis.value) / hetis.value if hetis.value else 0.0
    for name in STRATEGIES:
        row[f"{name}_s"] = answers[name].seconds
    return row


def _status(answers: dict[str, Answer]) -> str:
    return FAILED if any(found.status == FAILED for found in answers.values()) else answers["hetis"].status


# --- one strategy, here and in other benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of a strategy. Without a plan, the value is 0, and so is the bound if infeasibility is proved."""

    status: str
    value: float
    bound: float
    seconds: float
    note: str = ""


def answer(problem: PlacementProblem, strategy: str, *, time_limit_s: float) -> Answer:
    """Solve by one strategy, including the naming of GPUs.

    All seconds are CPU seconds of this process, so that a busy machine hardly changes plan and figures. The checker is
    not timed.
    """
    started = time.process_time()
    try:
        budget = Budget(time_limit_s=time_limit_s, clock=time.process_time)
        with no_native_output():
            plan = solve_placement(problem, strategy=strategy, budget=budget)
    except InfeasibleError as error:
        return _without_plan(Status.INFEASIBLE.value, 0.0, started, str(error))
    except HetisError as error:
        return _without_plan("none", math.inf, started, str(error))
    except Exception as error:  # a bug: the row reports it, and later rows are still measured
        traceback.print_exc()
        return _without_plan(FAILED, math.inf, started, repr(error))
    seconds = time.process_time() - started
    violations = check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(problem.family)))
    if violations:
        return _without_plan(FAILED, math.inf, started, f"the checker objects: {violations[0]}")
    result = plan.result
    return Answer(status=result.status.value, value=result.value, bound=result.bound, seconds=seconds)


def _without_plan(status: str, bound: float, started: float, note: str) -> Answer:
    return Answer(status=status, value=0.0, bound=bound, seconds=time.process_time() - started, note=note)


if __name__ == "__main__":
    main()
