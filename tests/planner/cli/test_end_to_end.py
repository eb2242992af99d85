"""The real solver behind the real command line: place, check, explain, and Ctrl-C during a search."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hetis.solver.placement.families import STRATEGIES
from tests.command_line import environment
from tests.fleets import fleet
from tests.planner.command_line import COMMAND, hetis_plan, hetis_plan_here

SMALL = fleet("small", "a100: 2 A100-PCIe-80GB", "2 l4: 2 L4")
# A workload that is simulated quickly.
INPUTS = ("--cluster", "small.yaml", "--model", "Meta-Llama-3-8B", "--workload", "humaneval_lengths")
# The promised keys of the JSON form.
PLAN_FIELDS = {"kind", "strategy", "result", "inputs", "replicas"}
RESULT_FIELDS = {"status", "objective", "value", "bound", "gap", "unit", "solve_s"}
REPLICA_FIELDS = {"rate", "ttft_s", "tpot_s", "micro_batch", "in_flight", "stages", "attention_workers"}
STAGE_FIELDS = {"gpu", "tp", "copies", "first_layer", "num_layers", "devices", "kv_head_groups_kept"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small cluster and its plan, placed once, in a separate process."""
    path = tmp_path_factory.mktemp("placed")
    (path / "small.yaml").write_text(SMALL)
    done = hetis_plan("place", *INPUTS, "-o", "json", "--out", "plan.json", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "stdout.json").write_text(done.stdout)
    return path


def place(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return hetis_plan_here("place", *INPUTS, *options, cwd=folder)


def found_by(folder: Path, *options: str) -> dict[str, Any]:
    """Return the plan without a simulation, which takes most of the time and never raises the value."""
    done = place(folder, *options, "--no-verify", "-o", "json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """Return the best plan on any rung, whatever that is worth."""
    return found_by(folder, "--rung", "workers")


@pytest.fixture
def plan(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return document


def test_the_plan_has_the_promised_fields(plan: dict[str, Any]) -> None:
    assert plan.keys() >= PLAN_FIELDS
    assert plan["result"].keys() >= RESULT_FIELDS
    assert plan["replicas"]
    for replica in plan["replicas"]:
        assert replica.keys() >= REPLICA_FIELDS
        for stage in replica["stages"]:
            assert stage.keys() >= STAGE_FIELDS


def test_stdout_and_the_file_hold_the_same_plan(folder: Path, plan: dict[str, Any]) -> None:
    assert json.loads((folder / "stdout.json").read_text()) == plan


def test_the_plan_names_all_it_was_made_from(plan: dict[str, Any]) -> None:
    inputs = plan["inputs"]
    assert inputs["origins"]["cluster"] == "small.yaml"
    assert inputs["origins"]["profiles"] == {"A100-PCIe-80GB": "fitted", "L4": "modelled"}
    assert all(digest.startswith("sha256:") for digest in inputs["digests"]["profiles"].values())
    assert {"hetis", "python", "highspy", "numba"} <= inputs["versions"].keys()
    assert inputs["seed"] == 0


def test_check_and_explain_work_from_the_plan_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.json").write_text((folder / "plan.json").read_text())
    checked = hetis_plan("check", "moved.json", "-o", "json", cwd=tmp_path)
    assert checked.returncode == 0
    found = json.loads(checked.stdout)
    assert (found["ok"], found["violations"]) == (True, [])
    assert "result.bound" in found["taken_on_trust"]
    explained = hetis_plan("explain", "moved.json", "-o", "json", cwd=tmp_path)
    assert explained.returncode == 0, explained.stderr
    document = json.loads(explained.stdout)
    assert document["kind"] == "Explanation"
    assert document["memory"]
    assert document["stage_times"]
    assert document["attention_workers"]
    assert document["queueing"]["ttft_p95_s"] > 0


@pytest.fixture(scope="module")
def again(folder: Path) -> subprocess.CompletedProcess[str]:
    """The same problem placed again, saved, simulated and shown as tables."""
    return place(folder, "--out", "again.json")


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("replicas", 0, "rate"), 1e6, "RATE"),
        (("replicas", 0, "stages", 0, "devices", 0), "a100/9", "KNOWN_DEVICE"),
        (("replicas", 0, "kv_tokens"), 0, "KV_TOKENS"),
        (("result", "bound"), 0.0, "BOUND"),
        (("family",), "anything at all", "FAMILY"),
        (("prices", 0, "dual"), -5, "FINITE"),
        (("prices",), [], "PRICES"),
    ],
)
def test_check_rejects_a_plan_that_was_tampered_with(
    path: tuple[str | int, ...], value: object, rule: str, plan: dict[str, Any], tmp_path: Path
) -> None:
    target: Any = plan
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = hetis_plan_here("check", "plan.json", cwd=tmp_path)
    assert done.returncode == 2
    assert rule.lower() in done.stdout


def test_a_model_that_does_not_fit_is_proved_infeasible(tmp_path: Path) -> None:
    lines = [line for line in SMALL.splitlines() if "L4" not in line]
    (tmp_path / "one.yaml").write_text("\n".join(lines).replace("A100-PCIe-80GB, count: 2", "RTX-2080Ti, count: 1"))
    done = hetis_plan_here("place", "-c", "one.yaml", "-m", "Llama-2-7B", "-w", "1024/256", "-o", "json", cwd=tmp_path)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["result"]["status"] == "infeasible"
    assert document["reasons"]
    assert all(reason in done.stderr for reason in document["reasons"])


def test_requests_of_one_output_token_have_no_time_between_tokens(folder: Path) -> None:
    """One prompt takes longer than the default limit on TPOT."""
    asked = ("-c", "small.yaml", "-m", "Meta-Llama-3-8B", "-w", "4000/1", "--ttft", "5s", "--tpot", "1ms")
    done = hetis_plan_here("place", *asked, "--out", "one.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^ *(TPOT|Simulated.*TPOT)", done.stdout, re.MULTILINE)
    assert "requests have one output token" in done.stdout
    saved = json.loads((folder / "one.json").read_text())
    assert saved["objective"]["tpot_limit_s"] is None
    assert hetis_plan_here("check", "one.json", cwd=folder).returncode == 0
    compared = hetis_plan_here("compare", *asked, "--strategies", "hetis", "--no-verify", cwd=folder)
    assert "TPOT unlimited" in compared.stdout


def test_every_strategy_is_compared(folder: Path) -> None:
    done = hetis_plan_here("compare", *INPUTS, "--ttft", "none", "--tpot", "none", "-o", "json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {entry["strategy"]: entry for entry in json.loads(done.stdout)["strategies"]}
    assert list(found) == list(STRATEGIES)
    assert all(entry["plan"] is not None for entry in found.values())
    for name, strategy in STRATEGIES.items():
        result = found[name]["result"]
        if name != "hetis-paper":  # it pools cards over a whole replica, which no bound covers
            assert result["value"] <= result["bound"]
        if not strategy.is_published:  # published heuristics know no engine's rules
            assert result["bound"] <= found["hetis"]["result"]["bound"]


@pytest.mark.parametrize("objective", ["throughput", "cost", "gpus"])
def test_every_objective_is_answered(objective: str, folder: Path) -> None:
    done = place(folder, "--objective", objective, "--rate", "0.5", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["objective"] == objective


def test_roles_of_a_plan_are_those_that_were_asked_for(folder: Path, whole: dict[str, Any]) -> None:
    assert whole["inputs"]["roles"] == ["unified", "prefill", "decode"]
    unified = found_by(folder, "--roles", "unified")
    assert unified["inputs"]["roles"] == ["unified"]
    assert {replica["role"] for replica in unified["replicas"]} == {"unified"}
    assert unified["result"]["value"] <= whole["result"]["bound"] * (1 + 1e-6)
    split = found_by(folder, "--roles", "decode,prefill")
    assert split["inputs"]["roles"] == ["prefill", "decode"]
    assert {replica["role"] for replica in split["replicas"]} == {"prefill", "decode"}
    assert split["kv_routes"]
    assert split["result"]["value"] <= whole["result"]["bound"] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--strategy", "hexgen9"), "'hexgen9' is not one of "),
        (("--roles", "unified,prefil"), "'prefil' is not one of unified, prefill, decode, did you mean prefill?"),
        (("--roles", "decode"), "'decode' has decode replicas without prefill replicas, which they need"),
        (("--roles", ""), "'' is not one of unified, prefill, decode"),
        (
            ("--strategy", "uniform", "--roles", "prefill,decode"),
            "strategy uniform has unified replicas only, prefill, decode are asked for",
        ),
    ],
)
def test_strategies_and_roles_that_do_not_exist_are_refused(
    folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = place(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.replace("│", " ").split())


MANY_GPUS = fleet(
    "many-gpus",
    "8 h100: 8 H100-SXM-80GB",
    "8 a100: 8 A100-SXM-80GB",
    "16 l40s: 4 L40S",
    "16 l4: 4 L4",
    "8 v100: 8 V100-SXM2-32GB",
    "16 a10: 4 A10G",
    "16 r3090: 4 RTX-3090",
)


def test_ctrl_c_saves_and_prints_the_incumbent(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(MANY_GPUS)
    arguments = ["place", "-c", str(tmp_path / "cluster.yaml"), "-m", "Llama-2-70B", "-w", "azure_conv_2023"]
    arguments += ["--ttft", "none", "--tpot", "none"]  # a search that does not end soon
    process = subprocess.Popen(
        [
            *COMMAND,
            *arguments,
            "--gap",
            "0",
            "--time-limit",
            "10min",
            "-o",
            "json",
            "--out",
            str(tmp_path / "plan.json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "incumbent" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert json.loads(out) == json.loads((tmp_path / "plan.json").read_text())
    result = json.loads(out)["result"]
    assert result["status"] in ("interrupted", "optimal")  # the search may end between its incumbent and the signal
    assert result["value"] > 0
    assert result["bound"] >= result["value"]  # however early it was stopped
    assert "stopping with the best plan so far" in err
    assert hetis_plan("check", str(tmp_path / "plan.json")).returncode == 0
