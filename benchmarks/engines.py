"""What an engine's rules cost: the same fleets planned for stock vLLM and for vLLM with the plugin.

    python -m benchmarks.engines [--quick] [--json]

Goodput in requests/s of Llama-2-70B on azure_conv_2023, with a p95 TTFT of at most 5 s and a mean TPOT of at most 200
ms. A GPU on which an engine does not start is left out of its plans, or becomes an attention worker if the engine
supports them. SGLang has the rules of stock vLLM here. Columns named after an engine are values, those with ``_gap``
proven gaps, and those with ``_s`` CPU seconds. ``hetis_over_vllm`` is the plugin's value over that of stock vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, fleet, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.solving import FAILED, answer
from hetis.planner.use_cases.precision import constraints_of
from hetis.planner.use_cases.sources import named
from hetis.profiler.defaults import default_profile
from hetis.solver.cluster import Cluster
from hetis.solver.placement.families import run_by
from hetis.solver.plan import Objective
from hetis.solver.problem import EngineRules, PlacementProblem

ENGINES = ("vllm", "vllm-hetis")
LIMITS = Objective(ttft_limit_s=5.0, tpot_limit_s=0.2)
TIME_LIMIT_S = 60.0


def main() -> None:
    """Print one row per fleet."""
    parser = rows.parser("benchmarks.engines", __doc__)
    arguments = parser.parse_args()
    chosen = [one for one in fleets() if arguments.only in one[0]][: 1 if arguments.quick else None]
    for engine in ENGINES if chosen and not arguments.quick else ():  # compile first, so that no row includes it
        answer(posed(chosen[0][1], engine), "hetis", time_limit_s=TIME_LIMIT_S)
    shown = rows.show((measured(name, cluster) for name, cluster in chosen), arguments, name="engines")
    rows.exit_if_crashed(shown)


def fleets() -> Iterator[tuple[str, Cluster]]:
    """Yield five fleets of two to five GPU types, the smallest first."""
    yield "2 H100 + 8 L4", example("h100-l4")
    yield "paper, 12 GPUs", example("paper")
    yield "4 H100 + 8 A10G + 8 T4", fleet("mixed", (1, 4, "H100-SXM-80GB"), (2, 4, "A10G"), (2, 4, "T4"))
    yield "8 A100 + 16 L40S + 16 L4", fleet("clouds", (1, 8, "A100-SXM-80GB"), (4, 4, "L40S"), (4, 4, "L4"))
    yield "160 GPUs of 5 types", example("fleet-160")


def posed(cluster: Cluster, engine: str) -> PlacementProblem:
    """Return the placement for an engine as `hetis-plan place` poses it, with the shipped profiles."""
    whole = problem(cluster, objective=LIMITS)
    return replace(
        whole,
        family=run_by(whole.family, named(EngineRules(name=""), engine)),
        profiles={name: default_profile(cluster.gpu_types[name])[1] for name in whole.profiles},
        constraints=constraints_of(whole.model, cluster, engine),
    )


def measured(name: str, cluster: Cluster) -> Row:
    """Plan a fleet for every engine."""
    answers = {engine: answer(posed(cluster, engine), "hetis", time_limit_s=TIME_LIMIT_S) for engine in ENGINES}
    is_failed = any(found.status == FAILED for found in answers.values())
    stock, plugin = (answers[engine].value for engine in ENGINES)
    return {
        "name": name,
        "gpus": cluster.num_gpus(),
        "status": FAILED if is_failed else "ok",
        **{engine: found.value for engine, found in answers.items()},
        "hetis_over_vllm": plugin / stock if stock else None,
        **{f"{engine}_gap": found.gap for engine, found in answers.items()},
        **{f"{engine}_s": found.seconds for engine, found in answers.items()},
    }


if __name__ == "__main__":
    main()
