"""A fleet of equal cells, and a plan that gives each cell a replica, built from the proven plan of one cell."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.measuring.instances import fleet
from hetis.formats.documents import load_model, load_workload
from hetis.planner.convert.documents import document_of
from hetis.planner.use_cases.place import Settings, make_plan
from hetis.planner.use_cases.sources import Inputs, LoadedInputs
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.plan import ClassPrice, Objective, Plan, ReplicaPlan
from hetis.v1 import document_pb2

WORKERS = 8  # per cell
NODES_PER_CELL = 1 + WORKERS
MODEL, WORKLOAD = "Llama-2-70B", "16000/1000"
OBJECTIVE = Objective(ttft_limit_s=None, tpot_limit_s=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFleet:
    """A fleet to put under load.

    Attributes:
        cells: node ids of each replica, the primary's first.
        spare: nodes that no replica uses.
    """

    cluster: document_pb2.Document
    plan: document_pb2.Document
    cells: tuple[tuple[str, ...], ...]
    spare: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self.cells)) + len(self.spare)


def cell_fleet(num_nodes: int) -> CellFleet:
    """Return as many cells as fit into ``num_nodes``, each one node with two H100 and eight nodes with a P100."""
    num_cells, num_spare = divmod(num_nodes, NODES_PER_CELL)
    if num_cells < 1:
        raise ValueError(f"{num_nodes} nodes are less than a cell, which has {NODES_PER_CELL}")
    cluster, one = _cluster(num_cells, num_spare), cell_plan()
    inputs = _inputs(cluster)
    plan = replace(
        one,
        result=replace(
            one.result,
            value=one.result.value * num_cells,
            bound=one.result.value * num_cells * (one.result.bound / one.result.value),
        ),
        replicas=tuple(_in_cell(one.replicas[0], cell) for cell in range(num_cells)),
        prices=tuple(_in_fleet(price, num_cells, num_spare) for price in one.prices),
        runners_up=(),
        inputs={**one.inputs, "documents": inputs.documents(), "digests": inputs.digests()},
    )
    if violations := check_plan(plan, inputs.problem(OBJECTIVE, one.strategy)):
        raise ValueError(f"the plan of {num_cells} cells does not hold: {violations[0]}")
    cells = tuple(
        (f"n0-{cell}", *(f"n1-{WORKERS * cell + worker}" for worker in range(WORKERS))) for cell in range(num_cells)
    )
    spare = tuple(f"n1-{WORKERS * num_cells + index}" for index in range(num_spare))
    return CellFleet(cluster=document_of(cluster), plan=document_of(plan), cells=cells, spare=spare)


@cache
def cell_plan() -> Plan:
    """Return the plan of one cell: a replica with the H100 node as primary and all eight P100 as attention workers."""
    inputs = _inputs(_cluster(1, 0))
    settings = Settings()
    loaded = LoadedInputs(inputs=inputs, origins={})
    plan = make_plan(
        loaded,
        inputs.problem(OBJECTIVE, settings.strategy),
        settings,
        budget=Budget(time_limit_s=600.0, clock=time.process_time),  # takes 2 s, longer if kernels are compiled first
        report=lambda _: None,
    )
    if len(plan.replicas) != 1 or len(plan.replicas[0].attention_workers) != 1:
        raise ValueError("the plan of a cell is not one replica with one pool of attention workers")
    return plan


def _cluster(num_cells: int, num_spare: int) -> Cluster:
    return fleet("cells", (num_cells, 2, "H100-SXM-80GB"), (WORKERS * num_cells + num_spare, 1, "P100-PCIe-12GB"))


def _inputs(cluster: Cluster) -> Inputs:
    return Inputs(
        cluster=cluster,
        model=load_model(MODEL),
        workload=load_workload(WORKLOAD),
        profiles={name: modelled_profile(gpu) for name, gpu in cluster.gpu_types.items()},
    )


def _in_cell(one: ReplicaPlan, cell: int) -> ReplicaPlan:
    """Return the same replica on the nodes of another cell."""

    def moved(devices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_device_in_cell(device, cell) for device in devices)

    return replace(
        one,
        stages=tuple(replace(stage, devices=moved(stage.devices)) for stage in one.stages),
        attention_workers=tuple(replace(pool, devices=moved(pool.devices)) for pool in one.attention_workers),
    )


def _device_in_cell(device: str, cell: int) -> str:
    node, _, index = device.partition("/")
    group, _, number = node.partition("-")
    each = 1 if group == "n0" else WORKERS
    return f"{group}-{int(number) + each * cell}/{index}"


def _in_fleet(price: ClassPrice, num_cells: int, num_spare: int) -> ClassPrice:
    is_worker = price.gpus_per_node == 1
    return replace(
        price,
        available=price.available * num_cells + (num_spare if is_worker else 0),
        used=price.used * num_cells,
        as_attention_workers=price.as_attention_workers * num_cells,
    )
