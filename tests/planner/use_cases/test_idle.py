"""Plans beside what equal stages keep: a rung that has these keeps no less, and idle GPUs add what a note says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.planner.use_cases.place import pose
from hetis.planner.use_cases.request import PlacementRequest
from hetis.solver.budget import silent
from hetis.solver.plan import Plan

FLEET = """\
apiVersion: hetis/v1
kind: Cluster
name: some stay idle
nodes:
  - {{name: used, gpus: [{{type: A100-SXM-80GB, count: {count}}}]}}
  - {{name: idle, gpus: [{{type: {idle}, count: 4}}]}}
network: {{bandwidth: 100Gbps, latency: 20us}}
"""
ROUNDED = 0.006  # share by which three digits differ from a value


def request(tmp_path: Path, idle: str, count: int, model: str, workload: str) -> PlacementRequest:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET.format(idle=idle, count=count), encoding="utf-8")
    return PlacementRequest(cluster=str(path), model=model, workload=workload, rung="node")


def proven(of: PlacementRequest) -> Plan:
    return pose(of).prove(silent).plan


def ways_in(plan: Plan, idle: str) -> dict[str, float]:
    """Return what a plan's note says that its idle GPUs add, by option."""
    (note,) = (note for note in plan.notes if note.startswith(f"4 {idle} idle: at least "))
    found = re.findall(r"([\d.]+)(?: requests/s more)? with (--\S+ [^\s,]+)", note)
    return {option: float(value) for value, option in found}


@pytest.mark.parametrize(
    ("idle", "count", "model", "workload"),
    [
        ("L40S", 4, "Llama-2-70B", "8000/300"),
        pytest.param(
            "L4", 2, "Qwen2.5-32B", "4000/500",
            marks=pytest.mark.xfail(
                strict=True, reason="all replicas have one utilisation, at which the TTFT of these L4 is too long"
            ),
        ),
    ],
)  # fmt: skip
def test_idle_gpus_add_what_the_plan_says(tmp_path: Path, idle: str, count: int, model: str, workload: str) -> None:
    asked = request(tmp_path, idle, count, model, workload)
    plan = proven(asked)
    assert not any(device.startswith("idle/") for device in plan.devices())
    ways = ways_in(plan, idle)
    assert {option.split()[0] for option in ways} == {"--ttft", "--weights"}
    for option, more in ways.items():
        name, value = option.removeprefix("--").split()
        found = proven(replace(asked, **{name: value}))  # type: ignore[arg-type]
        assert found.result.value >= plan.result.value + more * (1.0 - ROUNDED), option


MIXED = """\
apiVersion: hetis/v1
kind: Cluster
name: three types
nodes:
  - {name: a, count: 2, gpus: [{type: MI300X, count: 8}]}
  - {name: b, count: 2, gpus: [{type: H100-SXM-80GB, count: 8}]}
  - {name: c, count: 4, gpus: [{type: L40S, count: 8}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""


@pytest.mark.parametrize("rung", ["node", "pipelines"])
def test_a_rung_keeps_no_less_than_equal_stages_on_it(tmp_path: Path, rung: str) -> None:
    """Plans of higher saturated rates than these have fewer seats, for which requests wait."""
    path = tmp_path / "fleet.yaml"
    path.write_text(MIXED, encoding="utf-8")
    plan = proven(PlacementRequest(cluster=str(path), model="Llama-3.1-70B", workload="azure_conv_2023", rung=rung))
    assert plan.result.value >= plan.inputs["equal_stages_value"] * (1.0 - 1e-9)


def test_nothing_is_said_of_gpus_in_use_or_of_plans_for_a_demand(tmp_path: Path) -> None:
    asked = request(tmp_path, "L40S", 4, "Llama-2-70B", "8000/300")
    without_idle = proven(replace(asked, weights="L40S=fp8"))
    assert any(device.startswith("idle/") for device in without_idle.devices())
    for plan in (without_idle, proven(replace(asked, objective="gpus", rate=0.5))):
        assert not any(" idle: " in note for note in plan.notes)
