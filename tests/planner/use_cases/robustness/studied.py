"""Problems of small fleets and their plans, each found once."""

from __future__ import annotations

from functools import cache

from hetis.formats.documents import load_cluster, load_model, load_workload
from hetis.profiler.roofline import modelled_profile
from hetis.solver.engine_rules import MICRO_BATCHES, EngineRules, Family
from hetis.solver.placement.families import run_by
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.models import replace
from tests.planner.command_line import EXAMPLES

FLEETS = ("paper", "h100-p100", "split")  # without and with attention workers; prefill and decode apart


@cache
def posed(fleet: str) -> PlacementProblem:
    cluster = load_cluster(EXAMPLES / f"{'h100-l4' if fleet == 'split' else fleet}.yaml")
    # Half of the settings that are tried: pricing tries all of them, again and again.
    family = run_by(Family(micro_batches=MICRO_BATCHES[::2], roles=(Role.UNIFIED,)), EngineRules(name="vllm-hetis"))
    model, goal = load_model("Llama-2-70B"), Objective(ttft_limit_s=4.0)
    if fleet == "split":
        family, goal = replace(family, roles=(Role.PREFILL, Role.DECODE)), replace(goal, ttft_limit_s=30.0)
    names = {slots.gpu for group in cluster.node_groups for slots in group.gpus}
    return PlacementProblem(
        cluster=cluster,
        model=model,
        workload=load_workload("azure_conv_2023"),
        profiles={name: modelled_profile(cluster.gpu_types[name]) for name in names},
        objective=goal,
        family=family,
    )


@cache
def planned(fleet: str) -> Plan:
    return solve_placement(posed(fleet))
