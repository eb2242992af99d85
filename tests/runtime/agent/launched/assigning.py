"""Assignments as a planner derives them from a plan, and settings of engines that are stand-ins for vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.processes import free_ports
from hetis.planner.convert.documents import document_of
from hetis.planner.convert.plans import gpu_kinds_to_proto, replica_to_proto
from hetis.planner.fleet.replica import devices_of, nodes_of
from hetis.runtime.agent.launched.parts import EngineSettingsDocument
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.v1.executor_service_pb2 import ApplyAssignmentRequest
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, EnginePeer, KvPartner
from tests.engines.plans import MODEL, plan_of, stage_of

LOAD, SERVE, DRAIN = (
    AssignmentGoal.ASSIGNMENT_GOAL_LOAD,
    AssignmentGoal.ASSIGNMENT_GOAL_SERVE,
    AssignmentGoal.ASSIGNMENT_GOAL_DRAIN,
)
FAKE = Path(__file__).parents[2] / "launch" / "fake_vllm.py"
NODE, REPLICA = "a", "clusters/c/replicas/p-0"


def settings_of(**changes: Any) -> EngineSettingsDocument:
    fields = {"apiVersion": "hetis/v1", "kind": "EngineSettings", "engine": "vllm", "model": "{name}"}
    return EngineSettingsDocument.model_validate(fields | changes)


def fake_settings(folder: Path, **changes: Any) -> EngineSettingsDocument:
    """The engine is ``fake_vllm.py``, on free ports, controlled by what ``control`` writes."""
    control(folder)
    fields = {
        "program": [sys.executable, str(FAKE), "serve"],
        "device": "cpu",
        "addresses": {NODE: "127.0.0.1"},
        "port": free_ports(4),
        "environment": {"FAKE_VLLM": str(folder / "fake.json")},
        "router_delay": "0s",
        "drain_timeout": "60s",
    }
    return settings_of(**(fields | changes))


def control(folder: Path, **state: object) -> None:
    """Set the behaviour of the fake engines from now on; see ``fake_vllm.py``."""
    written = folder / "fake.new"
    written.write_text(json.dumps(state), encoding="utf-8")
    written.rename(folder / "fake.json")


def lives(folder: Path) -> list[str]:
    """Return the fake engines' log of starts and termination signals."""
    log = folder / "fake.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def asked(folder: Path) -> list[str]:
    """Return the number of running requests in the fake engines' metrics, for each time they were read."""
    log = folder / "fake.asked"
    return log.read_text(encoding="utf-8").split() if log.exists() else []


def replica_on(*devices: str, **changes: Any) -> ReplicaPlan:
    """A replica of one stage on these devices."""
    stage = stage_of(tp=len(devices), devices=devices, kv_head_groups_kept=8 // len(devices))
    return plan_of(stage, **changes).replicas[0]


def assigned(
    replica: ReplicaPlan | None = None,
    *,
    plan: Plan | None = None,
    node: str = NODE,
    name: str = REPLICA,
    goal: AssignmentGoal.ValueType = SERVE,
    model: ModelSpec = MODEL,
    peers: Sequence[EnginePeer] = (),
    kv_partners: Sequence[KvPartner] = (),
    types: Mapping[str, GpuType] | None = None,
) -> Assignment:
    """Return the planner's assignment of a replica of a plan (by default: made without fixed settings) to a node;
    ``types`` are those of the fleet, if it sends them.
    """
    replica = replica or replica_on("a/0")
    shape = replica_to_proto(replica, plan or plan_of(*replica.stages))
    return Assignment(
        replica=name,
        plan="plans/p",
        goal=goal,
        shape=shape,
        primary_node=nodes_of(shape)[0],
        devices=[device for device in devices_of(shape) if device.startswith(f"{node}/")],
        model=document_of(model),
        peers=peers,
        kv_partners=kv_partners,
        gpu_kinds=() if types is None else gpu_kinds_to_proto(replica, kv_partners, types),
    )


def applying(assignment: Assignment, generation: int = 1, *, epoch: int = 1) -> ApplyAssignmentRequest:
    return ApplyAssignmentRequest(epoch=epoch, generation=generation, assignment=assignment)


def removing(name: str = REPLICA, generation: int = 9, *, epoch: int = 1) -> ApplyAssignmentRequest:
    return ApplyAssignmentRequest(epoch=epoch, generation=generation, removed_replica=name)
