"""``hetis-plan export``: files in the requested place, one message for all errors, documented codes."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hetis.formats.plan import plan_to_data
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.plan import Plan
from tests.planner.export.plans import PLANS, STAGE_COPIES, made_of


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return saved(tmp_path, PLANS["unlike replicas"])


def saved(folder: Path, plan: Plan) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan_to_data(plan)), encoding="utf-8")
    return path


def test_a_folder_has_everything_and_its_scripts_can_be_started(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)  # empty, which is as good as none
    assert run(["export", str(plan_file), "--to", "vllm", "--out", str(out), "--", "--max-model-len", "512"]) == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        *("README.md", "a/r0.sh", "a/r1.sh", "a/start.sh", "b/r2.sh", "b/start.sh"),
        *("router/envoy.yaml", "router/litellm.yaml", "router/nginx.conf", "router/weights.json"),
    ]
    assert all(os.access(path, os.X_OK) == (path.suffix == ".sh") for path in out.rglob("*.*"))
    assert "--max-model-len 512 >" in (out / "a/r0.sh").read_text(encoding="utf-8")
    assert "vllm serve tiny " in (out / "a/r0.sh").read_text(encoding="utf-8"), "the model's name in the plan"
    assert "tiny by vllm" in (out / "README.md").read_text(encoding="utf-8")


def test_a_folder_with_something_in_it_is_left_alone(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(plan_file), "--to", "vllm", "--out", str(tmp_path)]) == ExitCode.INVALID
    assert f"{tmp_path} is not empty: choose another, or use --force" in capsys.readouterr().err
    assert run(["export", str(plan_file), "--to", "vllm", "--out", str(tmp_path), "--force"]) == 0
    assert run(["export", str(plan_file), "--to", "vllm", "--out", str(plan_file)]) == ExitCode.INVALID


def test_files_of_a_former_plan_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "worker.key").touch()
    for name, left in (("unlike replicas", ()), ("one GPU", ("a/r1.sh", "b/r2.sh", "b/start.sh"))):
        path = saved(tmp_path, PLANS[name])
        assert run(["export", str(path), "--to", "vllm", "--out", str(out), "--force"]) == ExitCode.OK
        said = capsys.readouterr().err
        assert ("still has files" in said) == bool(left)
        assert not left or f"{out} still has files that are not of this export: {', '.join(left)}" in said


def test_manifests_go_to_stdout_as_one_stream(plan_file: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["export", str(plan_file), "--to", "kubernetes", "--insecure"]) == 0
    kinds = [one["kind"] for one in yaml.safe_load_all(capfdbinary.readouterr().out)]
    assert kinds.count("StatefulSet") == 3


def test_a_part_of_the_traffic_is_exported_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, made_of(*PLANS["one GPU"].replicas, STAGE_COPIES))
    words = ["export", str(path), "--to", "vllm", "--out", str(tmp_path / "out")]
    assert run([*words, "--strict"]) == ExitCode.MISSED
    assert "- replica 1: stage 2: it has 2 copies, vLLM has one of each stage" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(words) == ExitCode.MISSED
    assert "error: what is exported serves 1 of 6 requests/s, so nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*words, "--partial"]) == 0
    said = capsys.readouterr().err
    assert "warning: replica 1: stage 2: it has 2 copies" in said
    assert "warning: what is exported serves 1 of 6 requests/s" in said


def test_a_plan_of_which_nothing_can_run_is_infeasible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, made_of(STAGE_COPIES))
    assert run(["export", str(path), "--to", "vllm"]) == ExitCode.INFEASIBLE
    assert capsys.readouterr().err == (
        "error: the plan cannot be exported with these options\n  - replica 0: stage 2: it has 2 copies, vLLM "
        "has one of each stage\n"
    )


def test_all_that_is_wrong_with_options_is_said_at_once(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--engine",
        "vllm",
        "--dtype",
        "int3",
        "--name",
        "No",
        "--namespace",
        "N",
        "--served-name",
        "-x",
        *(word for address in ("x", "a=10.0.0.300", "b=10.0.0.1:80") for word in ("--node-address", address)),
        "--",
        "--tp-size",
        "4",
    ]
    assert run(["export", str(plan_file), "--to", "sglang", *words]) == ExitCode.INVALID
    assert capsys.readouterr().err.splitlines() == [
        "error: 10 problems in the input",
        "  export: --served-name is '-x', must be a name",
        "  export: --node-address is 'x', must be NODE=HOST, such as gpu2=10.0.0.2",
        "  export: --node-address is 'a=10.0.0.300', must be NODE=HOST, such as gpu2=10.0.0.2",
        "  export: --node-address is 'b=10.0.0.1:80', must be NODE=HOST, such as gpu2=10.0.0.2",
        "  export: --tp-size cannot be passed to the engine: the plan sets it",
        "  export: --engine is vllm: --to sglang runs sglang",
        "  export: --dtype is 'int3', must be one of auto, bfloat16, float16, float32",
        "  export: --name is 'No', must be 1 to 30 lower-case letters, digits and -, starting with a letter",
        "  export: --namespace is 'N', must be 1 to 63 lower-case letters, digits and -",
        "  export: --namespace is N: --to sglang has no pods",
    ]


def test_options_that_the_plan_decides_are_refused_in_every_form(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "c.yaml", "--data-parallel-s", "2", "--kv-transfer-config.kv_role=kv_both"]
    assert run(["export", str(plan_file), "--to", "vllm", "--", *words]) == ExitCode.INVALID
    assert capsys.readouterr().err.splitlines() == [
        "error: 3 problems in the input",
        "  export: --config cannot be passed to the engine: it could override the plan, give its options on "
        "the command line",
        "  export: --data-parallel-size cannot be passed to the engine: the plan sets it",
        "  export: --kv-transfer-config cannot be passed to the engine: the plan sets it",
    ]


def test_an_address_is_of_a_node_of_the_plan_or_its_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = PLANS["unlike replicas"]  # this plan is on a and b
    nodes = [{"name": "spare"}, {"name": "gpu", "count": 2}]
    documents = {**plan.inputs["documents"], "cluster": {"nodes": nodes}}
    path = saved(tmp_path, replace(plan, inputs={"documents": documents}))

    def refused(to: str, *names: str) -> list[str]:
        words = [word for name in names for word in ("--node-address", f"{name}=10.0.0.1")]
        code = run(["export", str(path), "--to", to, "--insecure", *words])
        said = [line for line in capsys.readouterr().err.splitlines() if "--node-address" in line]
        assert (code == ExitCode.INVALID) == bool(said)
        return said

    assert not refused("vllm", "a", "b", "spare", "gpu-0", "gpu-1")
    assert refused("vllm", "a", "gpu-3") == [
        "  export: --node-address: 'gpu-3' is not a node of the plan, did you mean gpu-1?"
    ]
    assert refused("slurm", "zzz", "ray-head") == [
        "  export: --node-address: 'zzz' is not a node of the plan, its nodes are a, b, gpu-0, gpu-1, spare",
        "  export: --node-address: 'ray-head' is not a node of the plan, its nodes are a, b, gpu-0, gpu-1, spare",
    ]
    assert not refused("ray", "ray-head")


def test_a_plan_is_tried_on_cpus_by_another_program(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = saved(tmp_path, PLANS["stages of a node"])
    words = ["--device", "cpu", "--program", "python -m vllm.entrypoints.openai.api_server", "--model", "/models/tiny"]
    assert run(["export", str(path), "--to", "vllm", *words]) == 0
    [line] = [line for line in capfdbinary.readouterr().out.decode().splitlines() if line.startswith("env ")]
    assert line.startswith(
        "env VLLM_PP_LAYER_PARTITION=3,1 python -m vllm.entrypoints.openai.api_server --model /models/tiny "
        "--pipeline-parallel-size 2 "
    )
    assert run(["export", str(path), "--to", "hetis-launch", *words]) == 0
    assert "--device cpu --vllm 'python -m vllm" in capfdbinary.readouterr().out.decode()
    assert run(["export", str(path), "--to", "compose", "--device", "cpu", "--program", "'"]) == ExitCode.INVALID
    said = capfdbinary.readouterr().err.decode()
    assert "--device is cpu: --to compose is for GPUs" in said
    assert '--program is "\'": No closing quotation' in said


def test_a_plan_without_its_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = plan_to_data(PLANS["one GPU"])
    del data["inputs"]
    (tmp_path / "plan.json").write_text(json.dumps(data), encoding="utf-8")
    code = run(["export", str(tmp_path / "plan.json"), "--to", "vllm"])
    assert code == ExitCode.INVALID
    assert "Traceback" not in capsys.readouterr().err


def test_an_altered_plan_is_exported_with_a_warning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas on the same GPUs, of a plan that has what it was made from."""
    placed = tmp_path / "placed.json"
    sizes = ["-c", "examples/fleet-160.yaml", "-m", "Llama-3.1-8B", "-w", "500/50", "--no-verify"]
    assert run(["place", *sizes, "--strategy", "uniform", "--time-limit", "2s", "--out", str(placed), "-q"]) == 0
    document = json.loads(placed.read_text())
    first, second, *_ = document["replicas"]
    second["stages"][0]["devices"] = first["stages"][0]["devices"]
    placed.write_text(json.dumps(document))
    assert run(["export", str(placed), "--to", "vllm", "--out", str(tmp_path / "out")]) == 0
    assert "does not pass `hetis-plan check`" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(placed.read_bytes())))
    assert run(["export", "-", "--to", "vllm"]) == 0, "standard input is read once"
    assert "does not pass `hetis-plan check`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "kubernetes"], "give --api-key-secret, or --insecure to serve without a key"),
        (["--to", "kubernetes", "--insecure", "--api-key-secret", "k"], "contradict each other"),
        (["--to", "dynamo", "--insecure", "--api-key-secret", "k"], "contradict each other"),
        (["--to", "kubernetes", "--api-key-secret", "X_Y"], "--api-key-secret is 'X_Y', must be the name of an object"),
        (["--to", "lws", "--insecure", "--hf-token-secret", "hub:"], "is 'hub:', must be SECRET or SECRET:KEY"),
        (["--to", "lws", "--insecure", "--hf-token-secret", "hub:a b"], "with letters, digits, -, _ and . in KEY"),
        (
            ["--to", "dynamo", "--insecure", "--hf-token-secret", "X_Y"],
            "--hf-token-secret is 'X_Y', must be the name of an object",
        ),
        (["--to", "kubernetes", "--insecure", "--model-claim", "c", "--model", "m"], "--model is 'm', must be like"),
        (["--to", "lws", "--insecure", "--model-claim", "c", "--model", "/tmp/m"], "/tmp is mounted by pods"),
        (["--to", "vllm", "--model", "-x"], "--model is '-x', must be a name or a folder"),
        (["--to", "compose", "--image", "a b"], "an image name has spaces"),
        (["--to", "vllm", "--model-claim", "c"], "--model-claim is c: --to vllm has no pods"),
        (["--to", "slurm", "--image", "i"], "--image is i: --to slurm has no containers"),
        (["--to", "vllm", "--api-key-secret", "k"], "--to vllm reads no Secrets of Kubernetes, set VLLM_API_KEY"),
        (["--to", "sglang", "--hf-token-secret", "k"], "--to sglang reads no Secrets of Kubernetes, set HF_TOKEN"),
        (["--to", "compose", "--worker-key-secret", "k"], "put the key into worker.key beside its files"),
        (["--to", "lws", "--insecure", "--port", "9000"], "--port is 9000: --to lws serves at port 8000"),
        (["--to", "lws", "--insecure", "--node-address", "a"], "takes none, pods have addresses of their own"),
    ],
)
def test_wrong_options_are_mistakes_of_the_caller(
    plan_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(["export", str(plan_file), *words]) == ExitCode.INVALID
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "vllm"], "engines ask clients for a key only if VLLM_API_KEY is set"),
        (["--to", "vllm", "--", "--api-key", "k"], ""),
        (["--to", "sglang"], "engines ask clients for no key: give -- --api-key KEY"),
        (["--to", "ray"], "Ray Serve asks clients for no key"),
        (["--to", "dynamo"], "Dynamo's front end asks clients for no key"),
        (["--to", "lws", "--insecure"], "anyone in the cluster can send requests: --insecure"),
        (["--to", "lws", "--api-key-secret", "keys"], ""),
    ],
)
def test_engines_without_a_key_are_warned_of(
    plan_file: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(plan_file), *words]) == ExitCode.OK
    found = [line for line in capsys.readouterr().err.splitlines() if "key" in line or "--insecure" in line]
    assert [said in line for line in found] == [True] * bool(said)
