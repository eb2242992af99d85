"""``hetis-serve`` as users start it: what it says, how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hetis.formats.plan import plan_to_data
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.server.errors import ServeError
from hetis.runtime.server.options import checked_compute, checked_devices
from hetis.runtime.server.text import Tokens
from hetis.solver.plan import Plan, Role
from tests.command_line import command_of, environment, run_command
from tests.runtime.launch.plans import POOL, plan_of, sharing, stage_of
from tests.runtime.server.live import engine_of

COMMAND = command_of("hetis.runtime.server.main")


def run(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of stderr, logs left out."""
    done = run_command(COMMAND, *arguments, timeout_s=120)
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("hetis-serve: ")]


@contextmanager
def serving(*arguments: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server in a process of its own, its address, and what it logged until it served."""
    command = [*COMMAND, "--port", "0", "--threads", "1", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**more))
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving (\S+) at (http://\S+)", line):
                yield process, found[2], lines
                break
        else:
            pytest.fail("".join(lines))
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()


def write(folder: Path, plan: Plan) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan_to_data(plan)), encoding="utf-8")
    return str(path)


def test_help_has_examples_and_exit_codes() -> None:
    done = run_command(COMMAND, "--help")
    assert done.returncode == 0
    assert "--device cpu:2GiB" in done.stdout
    assert "Exit codes: 0 stopped" in done.stdout


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    code, lines = run(
        *(
            "--device",
            "cpu:2",
            "--device",
            "tpu:0:1GiB",
            "--compute",
            "gpu",
            "--dtype",
            "int4",
            "--seats",
            "0",
            "--port",
            "70000",
        ),
        *("--host", "0.0.0.0", "--model", str(tmp_path / "none"), "--kv-tokens", "5", "--body-limit", "0B"),
        *("--chunk-tokens", "2000000", "--log-level", "loud"),
    )
    assert code == 2
    text = "\n".join(lines)
    for message in (
        f"--model {tmp_path}/none: no such folder",
        "--device 'cpu:2': '2'",
        "--device is 'tpu:0:1GiB', must be [NAME=]cpu:SIZE or [NAME=]cuda:N[:SIZE]",
        "--compute is 'gpu', must be auto, cpu, cuda",
        "--dtype is 'int4', must be auto, float32",
        "--seats is 0, must be >= 1",
        "--port is 70000, must be >= 0 and <= 65535",
        "--chunk-tokens is 2000000, must be >= 1 and <= 1048576",
        "--host 0.0.0.0 can be reached from other machines",
        "--kv-tokens is in place of a plan's, and needs --plan",
        "--body-limit is 0B, must be > 0",
        "--log-level is 'loud', must be debug, info, warning or error",
    ):
        assert message in text


@pytest.mark.parametrize("form", ["cpu", "cpu:", "cuda", "cuda:1GiB", "cuda:x:1GiB", "cuda:0:", "cuda:01", "cuda:1000"])
def test_a_device_is_a_cpu_with_a_size_or_a_gpu_with_its_number(form: str) -> None:
    with pytest.raises(ServeError, match=r"must be \[NAME=\]cpu:SIZE or \[NAME=\]cuda:N\[:SIZE\]"):
        checked_devices([form])


def test_devices_say_where_they_compute_and_how_much_they_hold() -> None:
    assert checked_devices(["big=cuda:1:20GiB", "cuda:0", "cpu:1KiB"]) == (
        DeviceRoom(name="big", kv_bytes=20 * 2**30, device="cuda:1"),
        DeviceRoom(name="cuda1", kv_bytes=None, device="cuda:0"),
        DeviceRoom(name="cpu2", kv_bytes=1024, device="cpu"),
    )
    with pytest.raises(ServeError, match="--compute and --device: a device says what it computes on"):
        checked_compute("cpu", has_devices=True)


def test_gpus_that_are_not_there_are_refused_with_what_torch_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = write(tmp_path, plan_of(stage_of(), pools=(POOL,)))
    code, lines = run("-m", str(folder), "--port", "0", "--plan", plan, "--compute", "cuda")
    wanted = "hetis-serve: 3 CUDA devices are needed, one for each device here, torch finds 0"
    assert (code, lines) == (3, [wanted])


def test_who_steers_the_engine_is_checked_as_a_whole(tmp_path: Path) -> None:
    for options, message in (
        (["--executor", "0.0.0.0:7000"], "--executor 0.0.0.0:7000 can be reached from other machines"),
        (["--executor", "unix:"], "--executor unix:: there is no folder"),
        (["--executor", f"unix:{tmp_path}/no/e.sock"], f"there is no folder {tmp_path}/no"),
        (["--executor", f"unix:{tmp_path}/{'x' * 100}"], "bytes, may have 107"),
        (["--executor", "here"], "--executor is 'here', must be unix:PATH or HOST:PORT"),
        (["--redispatch", "planner"], "--redispatch planner needs --executor"),
        (["--redispatch", "me"], "--redispatch is 'me', must be auto, own, planner, off"),
    ):
        code, lines = run(*options)
        assert code == 2
        assert message in "\n".join(lines)


def test_a_socket_that_is_a_file_is_left_alone(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine", encoding="utf-8")
    code, lines = run("-m", str(folder), "--port", "0", "--executor", f"unix:{path}")
    assert code == 4
    assert lines == [f"hetis-serve: --executor unix:{path}: cannot listen on unix:{path}: it is there, and no socket"]
    assert path.read_text(encoding="utf-8") == "mine"


def test_without_a_model_it_says_what_one_is() -> None:
    assert run() == (
        2,
        ["hetis-serve: --model is missing: the folder of a model (config.json, safetensors, tokenizer)"],
    )


def test_a_port_that_is_taken_is_an_exit_code_of_its_own(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, lines = run("--model", str(folder), "--port", str(port))
    assert code == 4
    assert lines == [f"hetis-serve: cannot listen on 127.0.0.1:{port}: address already in use"]


def test_a_model_that_cannot_be_run_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    code, lines = run("--model", str(tmp_path), "--port", "0")
    assert code == 2
    assert "tokenizer.json" in lines[0]


def test_a_key_that_is_none_is_refused_and_never_shown(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret\n", encoding="utf-8")
    code, lines = run("--model", str(folder), "--api-key-file", str(path))
    assert code == 2
    assert "must have at least 16 printable characters" in lines[0]
    assert "secret" not in lines[0]


def test_it_serves_drains_on_sigterm_and_ends_with_zero(folder: Path) -> None:
    key = "a-key-that-nobody-logs"
    with serving("-m", str(folder), "--device", "big=cpu:2MiB", "--device", "cpu:1MiB", HETIS_API_KEY=key) as (
        process,
        url,
        lines,
    ):
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": folder.name, "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        heads = httpx.get(f"{url}/hetis/heads", headers=headers).json()
        assert {device["name"]: device["kv_pages"] for device in heads["devices"]} == {"big": 512, "cpu1": 256}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            assert [line for line in events if line][-1] == "data: [DONE]"
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0
        text = "".join(lines) + rest
        assert "device big: 512 KV pages (2 MiB), 1024 tokens of all heads" in text
        assert "starting: reading the model\n" in text
        assert re.search("starting: (compiling|loading) the dispatcher.*\n", text)
        assert "draining: 1 open requests" in text
        assert key not in text
        assert "Traceback" not in text


def test_a_signal_while_it_starts_ends_it_at_once_with_zero() -> None:
    # In the place of the command: an event loop whose thread loads for longer than anybody waits.
    code = """
import asyncio, time
from hetis.runtime.server import main

async def load():
    await asyncio.to_thread(time.sleep, 600)

def app():
    print("loading", flush=True)
    asyncio.run(load())

main.app = app
main.main()
"""
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "loading\n"
                process.send_signal(number)
                _, said = process.communicate(timeout=120)
            finally:
                process.kill()
        assert (process.returncode, said) == (0, f"hetis-serve: stopped by {number.name}\n")


def test_a_plan_starts_as_it_stands(folder: Path, tmp_path: Path) -> None:
    with serving("-m", str(folder), "--plan", write(tmp_path, sharing()), "--replica", "0") as (_, url, _):
        devices = httpx.get(f"{url}/hetis/heads", timeout=60).json()["devices"]
        # 1,000 tokens are 63 pages of a head: two heads are kept, six are shared by two workers, of each stage.
        assert [(device["name"], device["stage"], device["kv_pages"]) for device in devices] == [
            *(("a/0", 0, 126), ("b/0.stage0", 0, 189), ("b/1.stage0", 0, 189)),
            *(("c/0", 1, 126), ("b/0.stage1", 1, 189), ("b/1.stage1", 1, 189)),
        ]
        body = {"model": folder.name, "prompt": "a plan", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    prompt = Tokens.from_folder(folder).encode("a plan")
    (wanted,) = generate(engine_of(folder), [prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    assert text == wanted.text


def test_a_plan_that_this_engine_cannot_run_is_refused_with_every_reason(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(
        stage_of(tp=3, num_layers=2, devices=("a/0", "a/1", "a/2")),
        stage_of(num_layers=2, first_layer=2),
        role=Role.DECODE,
    )
    code, lines = run("-m", str(folder), "--port", "0", "--plan", write(tmp_path, plan))
    assert code == 3
    assert lines == [
        "hetis-serve: the replica decodes what others prefill: give --prefill HOST:PORT for each prefill replica",
        "hetis-serve: stage 0: tensor parallelism of 3 does not divide 16 query heads, 8 KV heads and an intermediate "
        "size of 256",
        "hetis-serve: stage 1: the plan places 2 KV heads, the model has 8",
    ]


def test_a_file_that_is_no_plan_is_refused_with_its_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("apiVersion: hetis/v1\nkind: Plan\nreplicas: 5\n", encoding="utf-8")
    code, lines = run("-m", str(folder), "--port", "0", "--plan", str(path))
    assert code == 2
    assert any("plan.yaml:3: replicas" in line for line in lines)
