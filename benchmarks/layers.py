"""Placements of layers: seconds, gap, and whether a small queueing model of the chain agrees with the objective.

    python -m benchmarks.layers [--quick] [--json]

The fleets are two examples (`examples/layers-24.yaml`, `layers-42.yaml`) and two to which nothing was fitted. Each is
placed by the plan, by maximum flow, and by others (short searches from several seeds, random chains). ``rate`` is the
objective and ``flow`` the static flow, both in requests per second; ``queued`` is what
`benchmarks.measuring.layers_queue` serves. The last row of a fleet has the rank correlation (Spearman) of rate and of
flow with the queue's result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.layers_queue import ChainQueue
from benchmarks.measuring.rows import Row
from examples.layers_fleets import fleet
from hetis.formats.documents import from_data, load_layers_problem
from hetis.solver.budget import Budget
from hetis.solver.layers import solve
from hetis.solver.layers.plan import LayersPlan
from hetis.solver.layers.problem import LayersProblem
from hetis.solver.layers.solve import solve_layers, solve_max_flow

EXAMPLES = Path(__file__).parents[1] / "examples"
FLEETS = ("layers-24", "layers-42")
UNSEEN = {  # fleets to which no constant of the model was fitted: nodes of each GPU type, prompt and output tokens
    "unseen, 16 of 3 types": ({"H100-PCIe-80GB": 2, "RTX-3090": 6, "P100-PCIe-16GB": 8}, (900.0, 250.0)),
    "unseen, 16 A10": ({"A10": 16}, (500.0, 400.0)),
}
EFFORTS = (0, 3, 30, 300)  # moves per node of the short searches: from random chains to good plans
SEEDS, SEEDS_QUICK = 3, 1
WARM_UP_S, MEASURED_S = 60.0, 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A placement with the queue's result."""

    name: str
    plan: LayersPlan
    queued_rps: float


def main() -> None:
    """Print all rows."""
    arguments = rows.parser("benchmarks.layers", __doc__).parse_args()
    rows.show(all_rows(quick=arguments.quick, only=arguments.only), arguments, name="layers")


def all_rows(*, quick: bool, only: str = "") -> Iterator[Row]:
    """Yield the rows of every fleet."""
    for name, problem in problems():
        if only in name:
            yield from fleet_rows(name, problem, seeds=SEEDS_QUICK if quick else SEEDS)


def problems() -> Iterator[tuple[str, LayersProblem]]:
    """Yield the examples' problems, and fleets of the same roofline to which the model was not fitted."""
    for name in FLEETS:
        yield name, load_layers_problem(EXAMPLES / f"{name}.yaml")
    for name, (counts, (prompt, output)) in UNSEEN.items():
        problem = from_data(fleet(name, counts))
        assert isinstance(problem, LayersProblem)
        yield name, replace(problem, mean_prompt_tokens=prompt, mean_output_tokens=output)


def fleet_rows(title: str, problem: LayersProblem, *, seeds: int) -> Iterator[Row]:
    """Yield a row per placement, then one with rank correlations."""
    judged = []
    for name, plan in placements(problem, seeds=seeds):
        served = ChainQueue(problem, plan).run(warm_up_s=WARM_UP_S, measured_s=MEASURED_S)
        judged.append(Judged(name=name, plan=plan, queued_rps=served.rate_rps))
        yield {
            "name": f"{title}, {name}",
            "rate": plan.rate_rps,
            "flow": plan.flow_rps,
            "queued": served.rate_rps,
            "queued_over_rate": served.rate_rps / plan.rate_rps,
            "bound": plan.bound_rps,
            "gap": plan.gap,
            "cpu_s": plan.solver_s,
        }
    queued = [one.queued_rps for one in judged]
    yield {
        "name": f"{title}, rank correlation over {len(judged)}",
        "rate": spearman([one.plan.rate_rps for one in judged], queued),
        "flow": spearman([one.plan.flow_rps for one in judged], queued),
        "queued": None,
        "queued_over_rate": None,
        "bound": None,
        "gap": None,
        "cpu_s": None,
    }


def placements(problem: LayersProblem, *, seeds: int) -> Iterator[tuple[str, LayersPlan]]:
    """Yield the plan, the placement of maximum flow, and worse ones."""
    solve_layers(problem, budget=Budget(time_limit_s=0.0, clock=time.process_time))  # compile first
    yield "plan", solve_layers(problem, budget=Budget(clock=time.process_time))
    yield "most flow", solve_max_flow(problem, budget=Budget(clock=time.process_time))
    for effort in EFFORTS:
        few = mock.patch.multiple(solve, MOVES_PER_NODE=effort, FINAL_MOVES_PER_NODE=0, STARTS=1, FINALISTS=0)
        for seed in range(seeds):
            with few:
                yield f"{effort} moves per node, seed {seed}", solve_layers(problem, seed=seed)
                yield f"{effort} moves per node for flow, seed {seed}", solve_max_flow(problem, seed=seed)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two sequences without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


if __name__ == "__main__":
    main()
