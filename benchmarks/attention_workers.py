"""The gain from attention workers: the rate with them over the proven bound of the same family without them.

    python -m benchmarks.attention_workers [--quick] [--json]

Two strong GPUs with eight weak ones (examples/h100-l4.yaml, examples/h100-p100.yaml) serve Llama-3.1-70B under several
lengths and TPOT limits, with TTFT unlimited. The paper's cluster serves Llama-2-70B under the default limits and
without limits. ``bound_without`` is the proven bound of the `hetis` family with ``max_pool = 0``. ``ratio`` is ``value
/ bound_without``. Above 1, no plan without attention workers reaches the rate. A row has no ratio if no plan without
them exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import DEFAULT_LIMITS, NO_LIMITS, Case, example, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.solving import Solve, measure
from hetis.solver.plan import Objective

FLEETS = ("h100-l4", "h100-p100")
LENGTHS = ("8000/300", "500/2000", "1024/256", "16000/1000")
TPOT_LIMITS_S = (0.05, 0.1, 0.2, None)
TIME_LIMIT_S = 20.0


def main() -> None:
    """Print one row per fleet, lengths and limit."""
    parser = rows.parser("benchmarks.attention_workers", __doc__)
    arguments = parser.parse_args()
    chosen = (case for case in cases(quick=arguments.quick) if arguments.only in case.name)
    rows.exit_if_crashed(rows.show(map(compare, chosen), arguments, name="attention_workers"))


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield every combination; with ``quick``, only that of the acceptance test."""
    for fleet in FLEETS:
        for lengths in LENGTHS[:1] if quick else LENGTHS:
            for tpot_s in TPOT_LIMITS_S[:1] if quick else TPOT_LIMITS_S:
                limit = f"{1000 * tpot_s:g} ms" if tpot_s else "no limit"
                objective = Objective(ttft_limit_s=None, tpot_limit_s=tpot_s)
                posed = problem(example(fleet), model="Llama-3.1-70B", workload=lengths, objective=objective)
                yield Case(name=f"{fleet}, {lengths}, {limit}", problem=posed)
    if not quick:
        for limits, objective in (("default limits", DEFAULT_LIMITS), ("no limit", NO_LIMITS)):
            yield Case(name=f"paper, azure_conv_2023, {limits}", problem=problem(example("paper"), objective=objective))


def compare(case: Case) -> Row:
    """Solve a case with attention workers and without."""
    family = case.problem.family
    best = measure(Solve(problem=case.problem, time_limit_s=TIME_LIMIT_S))
    others = replace(case.problem, family=replace(family, max_pool=0))
    without = measure(Solve(problem=others, time_limit_s=TIME_LIMIT_S))
    return {
        "name": case.name,
        "gpus": case.problem.cluster.num_gpus(),
        "types": len(case.problem.cluster.types_used()),
        "status": best.status,
        "value": best.value,
        "bound": best.bound,
        "gap": best.gap,
        "bound_without": without.bound,
        "ratio": best.value / without.bound if without.bound > 0 else math.inf,
        "seconds": best.first.seconds,
        "peak_mib": best.peak_mib,
        "note": best.note or "no attention workers",
    }


if __name__ == "__main__":
    main()
