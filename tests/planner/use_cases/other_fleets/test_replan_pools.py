"""Replicas that share a queue are re-planned as such: pools of classes of requests, and prompts for all."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fleets import fleet
from tests.planner.command_line import invoke
from tests.planner.use_cases.other_fleets.test_replan import replanned, run_plan
from tests.planner.use_cases.verification.test_classes import WORKLOAD

MIXED = fleet("mixed", "h: 2 H100-SXM-80GB", "a: 2 A100-PCIe-80GB", "2 l: 4 L4", "2 t: 2 RTX-3090")


def test_pools_of_classes_stay_and_serve_other_traffic(tmp_path: Path) -> None:
    """Traffic without long prompts has no classes, and then neither has the plan."""
    (tmp_path / "fleet.yaml").write_text(MIXED)
    (tmp_path / "usual.yaml").write_text(WORKLOAD.replace(", ttft: 1s", ""))
    uncut = WORKLOAD.partition("classes:")[0] + "histogram:" + WORKLOAD.partition("histogram:")[2]
    (tmp_path / "longer.yaml").write_text(uncut.replace("weight: 5}", "weight: 8}"))
    (tmp_path / "short.yaml").write_text(uncut.partition("  - {prompt_tokens: 12000")[0])
    run_plan(tmp_path, "-w", str(tmp_path / "usual.yaml"), "-m", "llama-3.1-8b", "--ttft", "5s", "--worth", "0")
    assert json.loads((tmp_path / "running.json").read_text())["classes"]
    for name in ("longer", "short"):
        out = str(tmp_path / f"{name}.json")
        found = replanned(tmp_path, "fleet.yaml", "-w", str(tmp_path / f"{name}.yaml"), "--out", out)
        assert invoke("check", out).exit_code == 0
        assert bool(json.loads(Path(out).read_text())["classes"]) == (name == "longer")
        assert ("class long has no requests" in json.dumps(found)) == (name == "short")


def test_what_runs_well_together_is_not_reset_as_if_each_replica_were_alone(tmp_path: Path) -> None:
    """Five replicas share prompts; four keep their limit on TTFT too, which one alone would not with these settings."""
    (tmp_path / "fleet.yaml").write_text(before := fleet("five", "5 l4: 2 L4"))
    (tmp_path / "less.yaml").write_text(before.replace("count: 5", "count: 4"))
    limits = ("--rung", "node", "--ttft", "1500ms", "--tpot", "100ms")
    run_plan(tmp_path, "-m", "Llama-3.1-8B", "-w", "2000/200", *limits)
    answer = replanned(tmp_path, "less.yaml")
    running = json.loads((tmp_path / "running.json").read_text())
    assert running["result"]["unified_lanes"] == len(running["replicas"]) == 5
    assert answer["transition"]["steps"] == []  # type: ignore[index]
    assert answer["plan"]["result"]["unified_lanes"] == len(answer["plan"]["replicas"]) == 4  # type: ignore[index]
