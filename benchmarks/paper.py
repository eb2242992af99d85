"""The comparison of the Hetis paper, simulated: every strategy on its cluster, models and traces.

    python -m benchmarks.paper [--quick] [--json] [--only TEXT] [--seeds K]

The cluster is `examples/paper.yaml` (4 A100-80GB, 4 RTX 3090, 4 P100). Lengths are those of the catalogue's ShareGPT
(first turns), HumanEval and LongBench, clipped to each model's context; `clipped` is the share that was clipped. Every
strategy plans for the same objective (none of its own tuning is held back) with the same CPU time, and its plan is then
simulated. `splitwise`, `hexgen` and `hexgen2` are the best of their families, found by our search. `...-paper` are
planned and routed by the papers' own rules, if known (docs/strategies.md). The columns:

- `throughput_rps`: the rate with requests always waiting, over the seeds, with the half width of its 95% interval;
- `ttft_p95_s`, `tpot_p95_s`: at one rate for all strategies of a case, 70% of the weakest strategy's throughput;
- `kv_blocks`: blocks of 16 tokens in all layers for which its replicas have room;
- `hetis_over`, `kv_over`, `ttft_over`, `tpot_over`: `hetis` over this strategy, above 1 if `hetis` is better, and
  `paper_*` the most that the paper reports of the same ("up to"; it does not say for which case);
- `no_worse`: whether `hetis` serves at least as much, within the 95% interval of the difference by seed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.saturating import served
from hetis.formats.documents import load_workload
from hetis.planner.use_cases.simulation.simulate import MIN_REQUESTS, TURNS
from hetis.simulator.metrics import Summary, prediction_of
from hetis.simulator.steadiness import over_runs
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import HetisError, NoPlanFoundError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

MODELS = ("Llama-13B", "OPT-30B", "Llama-2-70B")
TRACES = {
    "ShareGPT": "sharegpt_first_turn_lengths",
    "HumanEval": "humaneval_lengths",
    "LongBench": "longbench_lengths",
}
OBJECTIVE = Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None)
TIME_LIMIT_S = 30.0  # CPU seconds, so that other work on the machine does not cut searches short
ROUTERS = {  # routing rules of strategies whose papers have their own
    "hexgen-paper": Settings(router="fewest-requests"),
    "splitwise-paper": Settings(router="fewest-tokens"),
}
QUICK_S = 2.0  # with ``--quick``
COMPILING_S = 1.0  # CPU seconds; a compilation in progress is finished
LATENCY_LOAD = 0.7  # share of the weakest strategy's throughput
BLOCK_TOKENS = 16
# The most that the paper reports for Hetis over each: throughput, KV blocks, p95 TTFT, p95 TPOT.
OVER_SPLITWISE, OVER_HEXGEN = (2.25, 1.87, 1.47, 1.39), (1.33, 1.87, 1.22, 1.39)
PAPER = {
    "splitwise": OVER_SPLITWISE,
    "splitwise-paper": OVER_SPLITWISE,
    "hexgen": OVER_HEXGEN,
    "hexgen-paper": OVER_HEXGEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A strategy on a case; without a plan, ``note`` has the reason."""

    strategy: str
    plan: Plan | None
    note: str
    saturated: Summary | None = None
    by_seed: tuple[float, ...] = ()
    loaded: Summary | None = None


def main() -> None:
    """Print one row per model, trace and strategy."""
    parser = rows.parser("benchmarks.paper", __doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every load")
    parser.add_argument("--processes", type=int, default=0, help="runs at once; 0: all cores")
    arguments = parser.parse_args()
    found = cases(
        quick=arguments.quick, only=arguments.only, seeds=arguments.seeds,
        processes=1 if arguments.quick else arguments.processes,
    )  # fmt: skip
    rows.show(found, arguments, name="paper")


def cases(*, quick: bool, only: str, seeds: int, processes: int) -> Iterator[Row]:
    """Yield the rows of every model and trace; with ``quick``, of only one, with two seeds and short runs."""
    compile_searches()
    for model in MODELS[:1] if quick else MODELS:
        for trace, workload in list(TRACES.items())[-1 if quick else 0 :]:
            names = {strategy: f"{model}, {trace}, {strategy}" for strategy in STRATEGIES}
            if not any(only in name for name in names.values()):
                continue
            posed = problem(example("paper"), model=model, workload=workload, objective=OBJECTIVE)
            outcomes = simulated(
                posed,
                workload,
                seeds=2 if quick else seeds,
                turns=1 if quick else TURNS,
                at_least=20 if quick else MIN_REQUESTS,
                processes=processes,
                time_limit_s=QUICK_S if quick else TIME_LIMIT_S,
            )
            found = (row(names[one.strategy], one, outcomes, posed) for one in outcomes)
            yield from (one for one in found if only in str(one["name"]))


def simulated(
    posed: PlacementProblem, workload: str, *, seeds: int, turns: int, at_least: int, processes: int,
    time_limit_s: float,
) -> list[Outcome]:  # fmt: skip
    """Plan with every strategy, run each plan saturated, then all at one rate."""
    lengths = load_workload(workload)
    outcomes = []
    for outcome in [planned(posed, strategy, time_limit_s) for strategy in STRATEGIES]:
        if outcome.plan is not None:
            with served(
                outcome.plan, posed, lengths, seeds=seeds, turns=turns, at_least=at_least, processes=processes
            ) as server:
                summary, by_seed = server.saturated(ROUTERS.get(outcome.strategy))
            outcomes.append(replace(outcome, saturated=summary, by_seed=tuple(by_seed)))
        else:
            outcomes.append(outcome)
    rate_rps = LATENCY_LOAD * min((float(np.mean(one.by_seed)) for one in outcomes if one.by_seed), default=math.nan)
    return [_loaded(one, posed, workload, rate_rps, seeds, turns, at_least, processes) for one in outcomes]


def compile_searches() -> None:
    """Plan a small case once with every strategy, so that no measured time includes compiling."""
    posed = problem(example("paper"), model="Llama-13B", objective=OBJECTIVE)
    for strategy in STRATEGIES:
        budget = Budget(time_limit_s=COMPILING_S, clock=time.process_time)
        with contextlib.suppress(NoPlanFoundError):
            solve_placement(posed, strategy=strategy, budget=budget)


def planned(posed: PlacementProblem, strategy: str, time_limit_s: float) -> Outcome:
    """Return the strategy's plan, or the reason why it has none."""
    budget = Budget(time_limit_s=time_limit_s, clock=time.process_time)
    try:
        return Outcome(strategy=strategy, plan=solve_placement(posed, strategy=strategy, budget=budget), note="")
    except HetisError as error:
        return Outcome(strategy=strategy, plan=None, note=str(error).splitlines()[0])


def _loaded(
    outcome: Outcome, posed: PlacementProblem, workload: str, rate_rps: float, seeds: int, turns: int,
    at_least: int, processes: int,
) -> Outcome:  # fmt: skip
    if outcome.plan is None:
        return outcome
    lengths = load_workload(workload)
    with served(
        outcome.plan, posed, lengths, seeds=seeds, turns=turns, at_least=at_least, processes=processes
    ) as server:
        return replace(outcome, loaded=server.at(rate_rps, ROUTERS.get(outcome.strategy)))


def row(name: str, one: Outcome, outcomes: list[Outcome], posed: PlacementProblem) -> Row:
    """Compare a strategy with `hetis`, and with the paper's figures for the two."""
    ours = next(outcome for outcome in outcomes if outcome.strategy == "hetis")
    paper = PAPER.get(one.strategy, (None, None, None, None))
    served_rps = one.saturated.throughput_rps if one.saturated is not None else None
    return {
        "name": name,
        "gpus": sum(len(r.devices()) for r in one.plan.replicas) if one.plan is not None else 0,
        "planned_rps": prediction_of(one.plan).rate_rps if one.plan is not None else None,
        "throughput_rps": served_rps.value if served_rps is not None else None,
        "half_width_rps": served_rps.half_width if served_rps is not None else None,
        "hetis_over": _ratio(ours.by_seed, one.by_seed),
        "paper_throughput": paper[0],
        "kv_blocks": _kv_blocks(one),
        "kv_over": _over(_kv_blocks(ours), _kv_blocks(one)),
        "paper_kv": paper[1],
        "ttft_p95_s": one.loaded.ttft_s.p95 if one.loaded is not None else None,
        "ttft_over": _over(_latency(one, "ttft_s"), _latency(ours, "ttft_s")),
        "paper_ttft": paper[2],
        "tpot_p95_s": one.loaded.tpot_s.p95 if one.loaded is not None else None,
        "tpot_over": _over(_latency(one, "tpot_s"), _latency(ours, "tpot_s")),
        "paper_tpot": paper[3],
        "no_worse": _no_worse(ours.by_seed, one.by_seed),
        "clipped": posed.workload.clipped_ratio,
        "note": one.note,
    }


def _kv_blocks(one: Outcome) -> float | None:
    return sum(r.kv_tokens for r in one.plan.replicas) / BLOCK_TOKENS if one.plan is not None else None


def _latency(one: Outcome, name: str) -> float | None:
    return float(getattr(one.loaded, name).p95) if one.loaded is not None else None


def _ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float | None:
    return float(np.mean(ours) / np.mean(theirs)) if ours and theirs and np.mean(theirs) > 0 else None


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _no_worse(ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
    """Compare by seed, since a seed draws the same requests for both."""
    if not ours or not theirs:
        return "-"
    difference = over_runs(np.subtract(ours, theirs).tolist())
    slack = difference.half_width if difference.half_width >= 0 else 0.0
    return "yes" if difference.value + slack >= 0 else "no"


if __name__ == "__main__":
    main()
