"""Compiled kernels of the search, loaded or compiled before a search's time limit starts to run.

Kernels are compiled once per installation, which takes up to a minute, longer than many time limits. Solving the
smallest possible problem compiles them all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from hetis.formats import catalogue
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Progress, Report
from hetis.solver.cluster import Cluster, GpuSlots, Link, Network, NodeGroup
from hetis.solver.compiled import is_cached
from hetis.solver.placement.families import DEFAULT_ENGINE, run_by
from hetis.solver.placement.pipelines import best_equal_split
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem
from hetis.solver.published import PUBLISHED
from hetis.solver.published.replicas import best_split
from hetis.solver.workload import LengthBin, Workload

COMPILING = "compiling"

_GPU, _MODEL = "A100-SXM-80GB", "Llama-2-7B"


def are_cached() -> bool:
    """Return whether the compiled kernels of all searches are on disk."""
    return is_cached(best_equal_split)


def load_kernels(num_gpus: int = 1, *, for_engine: bool = True, report: Report) -> None:
    """Compile what the search of plans that an engine runs needs."""
    if not are_cached():
        report(Progress(phase=COMPILING, elapsed_s=0.0))
        solve_placement(_smallest_of_engine())
        solve_placement(_smallest_of_engine(), strategy="uniform")  # to which plans are compared


def compile_kernels(num_gpus: int, strategies: Collection[str], *, for_engine: bool = True, report: Report) -> None:
    """Ensure that these strategies can search without compiling anything."""
    load_kernels(num_gpus, for_engine=for_engine, report=report)
    if not is_cached(best_split) and not PUBLISHED.keys().isdisjoint(strategies):
        report(Progress(phase=COMPILING, elapsed_s=0.0))
        for strategy in PUBLISHED:
            solve_placement(_smallest_problem(2), strategy=strategy)


def compile_all_kernels() -> None:
    """Compile the kernels of every strategy; takes up to a minute the first time."""
    compile_kernels(1, PUBLISHED, report=lambda _progress: None)


def load_cached_kernels() -> None:
    """Load the kernels before there is work, which takes a second; does nothing if they are not compiled yet."""
    if are_cached():
        solve_placement(_smallest_of_engine())


def _smallest_of_engine() -> PlacementProblem:
    problem = _smallest_problem(1)
    return replace(problem, family=run_by(problem.family, EngineRules(name=DEFAULT_ENGINE)))


def _smallest_problem(num_nodes: int) -> PlacementProblem:
    gpu = catalogue.find_gpu(_GPU).gpu
    return PlacementProblem(
        cluster=Cluster(
            name="smallest",
            node_groups=(NodeGroup(name="node", gpus=(GpuSlots(gpu=gpu.name, count=1),), count=num_nodes),),
            gpu_types={gpu.name: gpu},
            network=Network(default=Link(bytes_per_s=10e9, latency_s=10e-6)),
        ),
        model=catalogue.find_model(_MODEL).model,
        workload=Workload(name="one", bins=(LengthBin(prompt_tokens=512.0, output_tokens=128.0, weight=1.0),)),
        profiles={gpu.name: modelled_profile(gpu)},
    )
