"""Placement problems for measurements: the fleets of ``examples/``, scaled versions, and fleets listed here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hetis.formats.documents import from_data, load_cluster, load_model, load_workload
from hetis.planner.use_cases.sources import named
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.placement.families import DEFAULT_ENGINE, run_by
from hetis.solver.plan import Objective
from hetis.solver.problem import PlacementProblem

EXAMPLES = Path(__file__).parents[2] / "examples"
DEFAULT_LIMITS = Objective()
NO_LIMITS = Objective(ttft_limit_s=None, tpot_limit_s=None)
NODE_SIZES = {
    "H100-SXM-80GB": 8,
    "A100-SXM-80GB": 8,
    "L40S": 4,
    "L4": 4,
    "V100-SXM2-32GB": 8,
    "T4": 4,
    "A10G": 4,
    "A100-PCIe-40GB": 4,
}

PRICES = {"A100-PCIe-40GB": 3.67}  # the catalogue has no price for it; that of A100-SXM-40GB is used


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fleet under load."""

    name: str
    problem: PlacementProblem


def example(name: str) -> Cluster:
    """Return the fleet of ``examples/NAME.yaml``."""
    return load_cluster(EXAMPLES / f"{name}.yaml")


def fleet(name: str, *nodes: tuple[int, int, str]) -> Cluster:
    """Return a fleet in one zone on a 100 Gb/s network, made of ``(nodes, GPUs per node, GPU type)``."""
    document = {
        "apiVersion": "hetis/v1",
        "kind": "Cluster",
        "name": name,
        "nodes": [
            {"name": f"n{index}", "count": count, "gpus": [{"type": gpu, "count": gpus} | _price_of(gpu)]}
            for index, (count, gpus, gpu) in enumerate(nodes)
        ],
        "network": {"bandwidth": "100Gbps", "latency": "20us"},
    }
    cluster = from_data(document, name=name)
    assert isinstance(cluster, Cluster)
    return cluster


def _price_of(gpu: str) -> dict[str, float]:
    return {"usd_per_hour": PRICES[gpu]} if gpu in PRICES else {}


def scaled(cluster: Cluster, times: int) -> Cluster:
    """Return the cluster with ``times`` as many nodes of every kind."""
    groups = tuple(replace(group, count=group.count * times, numbered=True) for group in cluster.node_groups)
    return replace(cluster, name=f"{times} x {cluster.name}", node_groups=groups)


def of_types(num_types: int, num_gpus: int) -> Cluster:
    """Return ``num_gpus`` GPUs, a multiple of 8, split evenly, in eights, over the first ``num_types`` types."""
    share, rest = divmod(num_gpus // 8, num_types)
    types = list(NODE_SIZES.items())[:num_types]
    nodes = [((share + (i < rest)) * (8 // size), size, gpu) for i, (gpu, size) in enumerate(types)]
    return fleet(f"{num_gpus} GPUs of {num_types} types", *nodes)


def problem(
    cluster: Cluster,
    *,
    model: str = "Llama-2-70B",
    workload: str = "azure_conv_2023",
    objective: Objective = DEFAULT_LIMITS,
) -> PlacementProblem:
    """Return the placement of a catalogue model for a workload, with modelled profiles, for the default engine."""
    spec = load_model(model)
    return PlacementProblem(
        cluster=cluster,
        model=spec,
        workload=load_workload(workload).clipped_to(spec.max_position),
        profiles={name: modelled_profile(cluster.gpu_types[name]) for name in cluster.types_used()},
        objective=objective,
        family=run_by(Family(), named(EngineRules(name=""), DEFAULT_ENGINE)),
    )
