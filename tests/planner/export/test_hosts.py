"""Exports for hosts: scripts, services of compose, and jobs of Slurm."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hetis.formats.errors import DocumentError
from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import launchable
from tests.planner.export import reading
from tests.planner.export.exporting import SETTINGS, exported
from tests.planner.export.plans import (
    CARDS_SHARED,
    PLANS,
    apart,
    model_of,
)


@pytest.mark.parametrize("name", PLANS)
def test_hetis_launch_understands_what_it_is_told(name: str, tmp_path: Path) -> None:
    made = exported(PLANS[name], ExportTarget.HETIS_LAUNCH)
    found = reading.read_hetis_launch(made.files, tmp_path)
    assert found == {f"r{i}": reading.planned(one) for i, one in enumerate(PLANS[name].replicas)}


def test_only_the_engine_that_listens_is_asked_for_its_health() -> None:
    made = exported(PLANS["three nodes twice"], ExportTarget.COMPOSE)
    services = [one for path in made.files if path.endswith("compose.yaml") for one in
                yaml.safe_load(made.files[path])["services"].values()]  # fmt: skip
    headless = [one for one in services if "--headless" in one["command"]]
    assert headless
    assert all(one["healthcheck"] == {"disable": True} for one in headless)
    assert all("test" in one["healthcheck"] for one in services if one not in headless)


def test_services_of_compose_share_the_hosts_network_and_run_the_image_of_their_process() -> None:
    files = exported(PLANS["attention workers"], ExportTarget.COMPOSE).files
    services = [
        one
        for path in files
        if path.endswith("compose.yaml")
        for one in yaml.safe_load(files[path])["services"].values()
    ]
    images = {SETTINGS.image: "/models/tiny", SETTINGS.worker_image: "--listen"}
    assert {one["image"] for one in services} == images.keys()
    for one in services:
        assert images[one["image"]] in (*one["entrypoint"], *one["command"])
        assert (one["network_mode"], one["ipc"], one["restart"]) == ("host", "host", "unless-stopped")
        is_engine = one["image"] == SETTINGS.image
        mount = {"type": "bind", "source": "/models/tiny", "target": "/models/tiny", "read_only": True}
        assert (mount in one.get("volumes", [])) == is_engine
        if is_engine:
            assert one["healthcheck"]["start_period"] == "30m", "weights take long to load"


def test_the_front_of_hetis_launch_listens_at_its_nodes_address() -> None:
    files = exported(PLANS["unlike replicas"], ExportTarget.HETIS_LAUNCH, port=9000).files
    told = [line for path in ("a.sh", "b.sh") for line in files[path].splitlines() if "hetis-launch processes" in line]
    assert [reading.option(line.split(), "--host") for line in told] == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    assert [reading.option(line.split(), "--port") for line in told] == ["9000", "9001", "9000"]


def test_replicas_of_a_node_have_ports_of_their_own() -> None:
    for name, plan in PLANS.items():
        found, taken = launchable(plan, model_of(plan), SETTINGS), list[tuple[str, int]]()
        for one in found.replicas.values():
            taken.append((one.front_node, one.port))
            copies = one.layout.data_parallel
            taken += [(one.front_node, one.addresses.kv_port + copy) for copy in range(copies)]
            if len(one.layout.servers) > 1 or copies > 1:
                taken.append((one.front_node, one.addresses.master_port))
            for process, command in zip(one.layout.processes, one.commands, strict=True):
                if listen := reading.option(list(command.shown), "--listen"):
                    taken.append((process.node, int(listen.rpartition(":")[2])))
        assert len(set(taken)) == len(taken), name


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.COMPOSE, ExportTarget.SLURM])
def test_addresses_of_ipv6_have_brackets_before_a_port(target: ExportTarget) -> None:
    made = exported(PLANS["one GPU"], target, hosts={"a": "fd00::1"})
    assert "server [fd00::1]:8000 weight=1000;" in made.files["router/nginx.conf"]
    [model] = yaml.safe_load(made.files["router/litellm.yaml"])["model_list"]
    assert model["litellm_params"]["api_base"] == "http://[fd00::1]:8000/v1"
    assert "address: fd00::1\n" in made.files["router/envoy.yaml"]
    assert json.loads(made.files["router/weights.json"])["endpoints"][0]["endpoint"] == "[fd00::1]:8000"
    assert "| [fd00::1]:8000 |" in made.files["README.md"]
    rest = "".join(text for path, text in made.files.items() if path != "router/envoy.yaml")
    assert "fd00::1:" not in rest
    assert ("http://[fd00::1]:8000/health" in rest) == (target is ExportTarget.COMPOSE)
    ray = exported(PLANS["one GPU"], ExportTarget.RAY, hosts={"ray-head": "fd00::9"})
    assert json.loads(ray.files["router/weights.json"])["endpoints"][0]["endpoint"].startswith("[fd00::9]:8000/")
    apart_there = exported(apart("H100", "T4"), target, hosts={"a": "fd00::1", "d": "fd00::2"})
    assert not any("NIXL" in lost for lost in apart_there.lost), "it listens on such an address"


@pytest.mark.parametrize("name", ["attention workers", "stages of two nodes", "unlike replicas"])
def test_all_steps_of_a_slurm_job_start_and_share_its_memory(name: str) -> None:
    """A step inherits from the job whatever it does not request: all GPUs of the node, all memory, one CPU."""
    made = exported(PLANS[name], ExportTarget.SLURM)
    for path in made.shown:
        head, _, body = made.files[path].partition("set -euo pipefail")
        components = [dict(re.findall(r"#SBATCH --(\S+?)=(\S+)", part)) for part in head.split("#SBATCH hetjob\n")]
        steps = [line for line in body.splitlines() if line.startswith("srun ")]
        groups = [int((re.findall(r"--het-group=(\d+)", step) or ["0"])[0]) for step in steps]
        assert [int(one["ntasks"]) for one in components] == [groups.count(i) for i in range(len(components))]
        assert {one["cpus-per-gpu"] for one in components} == {"4"}
        for step in steps:
            assert re.search(r" --ntasks=1 --exact --gpus-per-node=(\d) --gpus-per-task=\1 --mem=0 ", step)
        assert "/" not in components[0]["output"], "a folder that is missing fails the job without a word"
        assert body.index("mkdir -p logs") < body.index("srun ")


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.SGLANG, ExportTarget.HETIS_LAUNCH])
def test_scripts_are_shell(target: ExportTarget, tmp_path: Path) -> None:
    for name in ("unlike replicas", "stages of two nodes", "prefill and decode"):
        for path, text in exported(PLANS[name], target).files.items():
            if path.endswith(".sh"):
                (tmp_path / "script.sh").write_text(text, encoding="utf-8")
                subprocess.run(["bash", "-n", tmp_path / "script.sh"], check=True)


def test_a_script_ends_with_its_processes_and_they_with_it(tmp_path: Path) -> None:
    """Stand-ins for vLLM are used: one ends with a code, the other waits for SIGTERM."""
    made = exported(PLANS["stages of two nodes"], ExportTarget.VLLM, hosts={"a": "127.0.0.1", "c": "127.0.0.1"})
    text = made.files["a/r0.sh"]
    [line] = [line for line in text.splitlines() if line.startswith("env ")]
    script = f'trap "echo told > {tmp_path}/told; exit 0" TERM; echo up > {tmp_path}/up; sleep 100 & wait'
    waits = f"bash -c '{script}' &\npids+=($!)"
    ends = f"bash -c 'until test -s {tmp_path}/up; do :; done; exit 7' &"
    (tmp_path / "r0.sh").write_text(text.replace(line, f"{waits}\n{ends}"), encoding="utf-8")
    done = subprocess.run(["bash", tmp_path / "r0.sh"], check=False, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "told").read_text() == "told\n"


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.HETIS_LAUNCH])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_supervisor_of_a_whole_node_hears_of_the_replica_that_ends(
    target: ExportTarget, failing: int, tmp_path: Path
) -> None:
    """Stand-ins for the two replicas of a node are used: one ends with a code, the other waits for SIGTERM."""
    made = exported(PLANS["unlike replicas"], target)
    text = made.files["a/start.sh" if target is ExportTarget.VLLM else "a.sh"]
    lines = [line for line in text.splitlines() if line.startswith(("./r", "hetis-launch "))]
    assert len(lines) == 2
    waits = f'sleep 100 & trap "echo told > {tmp_path}/told; kill $!; exit 0" TERM; echo up > {tmp_path}/up; wait'
    stand_ins = [waits, waits]
    stand_ins[failing] = f"until test -s {tmp_path}/up; do sleep 0.01; done; exit 7"
    for line, stand_in in zip(lines, stand_ins, strict=True):
        text = text.replace(f"{line}\n", f"bash -c '{stand_in}' &\n")
    (tmp_path / "node.sh").write_text(text, encoding="utf-8")
    done = subprocess.run(["bash", tmp_path / "node.sh"], check=False, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "told").read_text() == "told\n"


def test_compose_refuses_what_it_has_no_image_for() -> None:
    with pytest.raises(DocumentError) as caught:
        exported(PLANS["attention workers"], ExportTarget.COMPOSE, image="", worker_image="")
    assert [problem.message.partition(":")[0] for problem in caught.value.problems] == [
        "--image is missing",
        "--worker-image is missing",
    ]
    made = exported(PLANS["one GPU"], ExportTarget.COMPOSE, image="")
    [service] = yaml.safe_load(made.files["a/compose.yaml"])["services"].values()
    assert service["image"] == "vllm/vllm-openai:v0.32.0"


def test_compose_checks_the_health_of_an_engine_with_tls() -> None:
    made = exported(PLANS["one GPU"], ExportTarget.COMPOSE, engine_options=("--ssl-keyfile", "/tls/tls.key"))
    [service] = yaml.safe_load(made.files["a/compose.yaml"])["services"].values()
    script = service["healthcheck"]["test"][-1]
    assert "https://10.0.0.1:8000/health" in script
    compile(script, "health", "exec")


def test_cards_that_serve_several_ranks_are_processes_side_by_side() -> None:
    found = reading.read_shell(exported(CARDS_SHARED, ExportTarget.VLLM).files)
    assert found["r0"].workers == {"b/0", "b/1"}
