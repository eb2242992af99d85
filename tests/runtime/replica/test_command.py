"""``hetis-launch`` as users start it: a replica in plain processes that outlives each of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.replica.main import main
from hetis.runtime.server.text import Tokens
from hetis.solver.plan import AttentionWorkerPool
from tests.command_line import command_of, environment, run_command
from tests.runtime.launch.plans import plan_of, stage_of
from tests.runtime.replica.replicas import documented, write_model, write_plan
from tests.runtime.server.live import engine_of

COMMAND = command_of("hetis.runtime.replica.main")
QUIET = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replica")
    write_plan(folder)
    write_model(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


class Launched:
    """A running `hetis-launch`, by what it logs and what its front answers."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self.url, self._log = process, url, log

    def pids(self, name: str) -> list[int]:
        """Of all lives of a process, the present one last."""
        return [int(found) for found in re.findall(rf" {re.escape(name)}: process (\d+)", self.log())]

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until(self, holds: Callable[[], bool], *, limit_s: float = 240) -> None:
        deadline_s = time.monotonic() + limit_s
        while not holds():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.2)

    def serves(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def up(self) -> dict[str, bool]:
        return {one["name"]: one["up"] for one in httpx.get(f"{self.url}/hetis/heads", timeout=30).json()["devices"]}


@contextmanager
def launched(folder: Path, line: str, *, log: Path) -> Iterator[Launched]:
    """Starts a command as it is printed, but on free ports, and with one thread."""
    port = free_port()
    ours, _, of_serve = line.partition(" -- ")
    assert of_serve == "--port 8080"
    command = [*COMMAND, *shlex.split(ours)[1:], "--store-port", str(free_port())]
    command += ["--", "--port", str(port), "--threads", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment(**QUIET))
    try:
        yield Launched(process, log, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.terminate()
        process.wait(60)


def kill_in_stream(url: str, body: dict[str, Any], pid: int) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as stream:
        for _ in stream.iter_lines():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Nobody has asked for its exit code yet where its parent is gone, too.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def test_a_replica_outlives_its_worker_and_its_engine(tmp_path: Path) -> None:
    folder = tmp_path
    write_model(folder)
    plan = plan_of(
        stage_of(num_layers=3),
        stage_of(first_layer=3, num_layers=1, devices=("c/0",), kv_head_groups_kept=8),
        pools=(AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0",), kv_head_groups=6),),
    )
    write_plan(folder, plan)
    model = folder / "models" / "tiny"
    prompt = Tokens.from_folder(model).encode("kill me")
    (alone,) = generate(engine_of(model, pages=(400,)), [prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    line, _ = documented("processes")
    with launched(folder, line, log=tmp_path / "log") as run:

        def answer() -> str:
            text: str = httpx.post(f"{run.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
            return text

        run.wait_until(run.serves)
        assert run.up() == {"a/0": True, "b/0": True, "c/0": True}
        assert answer() == alone.text

        # A worker: the engine goes on without it until it is back.
        os.kill(run.pids("b/0")[-1], signal.SIGKILL)
        assert answer() == alone.text
        run.wait_until(lambda: len(run.pids("b/0")) == 2)

        # The engine: its clients are told, and the next one has the same worker and the same stage.
        long = body | {"max_tokens": 200, "stream": True}
        with pytest.raises(httpx.TransportError):
            kill_in_stream(run.url, long, run.pids("engine")[-1])
        run.wait_until(lambda: len(run.pids("engine")) == 2 and run.serves())
        assert run.up() == {"a/0": True, "b/0": True, "c/0": True}
        assert answer() == alone.text
        assert len(run.pids("c/0")) == 1

        running = [run.pids(name)[-1] for name in ("engine", "b/0", "c/0")]
        run.process.terminate()
        assert run.process.wait(120) == 0, run.log()
        assert all(is_gone(pid) for pid in running)
    assert "Traceback" not in run.log()


def test_what_was_started_here_ends_when_we_are_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    lines = [
        "import os, signal, sys",
        "from types import SimpleNamespace",
        "from hetis.runtime.replica.here import start",
        "told = SimpleNamespace(here=('sleep', '600'), environment={}, process=SimpleNamespace(name='sleeper'))",
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


def run_in_process(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hetis-launch", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_what_runs_where_is_shown_in_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_in_process(monkeypatch, folder, "show", "--plan", "plan.json", "-m", "models/tiny", "--form", "json")
    rows = json.loads(capsys.readouterr().out)
    assert (code, [(row["name"], row["node"]) for row in rows]) == (0, [("engine", "a"), ("b/0", "b"), ("b/1", "b")])


@pytest.mark.parametrize("verb", ["show", "kubernetes"])
def test_what_the_documentation_prints_is_what_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    line, wanted = documented(verb)
    code = run_in_process(monkeypatch, folder, *shlex.split(line.partition(" > ")[0])[1:])
    printed = capsys.readouterr().out
    assert code == 0
    if verb == "show":
        assert printed == wanted
    else:
        assert [one["kind"] for one in yaml.safe_load_all(printed)].count("StatefulSet") == 3


def test_a_machine_that_the_plan_does_not_know_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_in_process(monkeypatch, folder, "processes", "--plan", "plan.json", "-m", "models/tiny", "--node", "c")
    assert (code, capsys.readouterr().err.splitlines()) == (
        3,
        ["hetis-launch: this machine is c, the replica is on a, b: give --node or --all-here"],
    )


def test_a_plan_that_is_none_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_in_process(monkeypatch, folder, "show", "--plan", "models/tiny/config.json", "-m", "models/tiny")
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert all(line.startswith("hetis-launch: models/tiny/config.json") for line in lines)
    assert lines


def test_help_has_examples_and_exit_codes() -> None:
    done = run_command(COMMAND, "--help")
    assert done.returncode == 0
    assert "hetis-launch show --plan plan.json" in done.stdout
    assert "Exit codes: 0 ended" in done.stdout
