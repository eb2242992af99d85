"""Attention workers as processes behind the front: killed, they cost no token; started again, they take heads again."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.text import Tokens
from tests.command_line import environment
from tests.runtime.server.live import engine_of
from tests.runtime.server.test_command import run, serving

NAMES = ("w1", "w2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Processes:
    """Workers that say where they are in one store."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._of: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", "hetis.runtime.worker", "--name", name, "--store", self._store]
        command += ["--kv-memory", "4MiB"]
        self._of[name] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(OMP_NUM_THREADS="1")
        )

    def kill(self, name: str) -> None:
        self._of[name].kill()
        self._of[name].wait(30)

    def end(self) -> None:
        for name in self._of:
            self.kill(name)


@pytest.fixture
def workers() -> Iterator[tuple[str, Processes]]:
    store = f"127.0.0.1:{free_port()}"
    processes = Processes(store)
    with ExitStack() as stack:
        stack.callback(processes.end)
        for name in NAMES:
            processes.start(name)
        yield store, processes


def wait_for(holds: Callable[[], bool], *, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "it never held"
        time.sleep(0.05)


def test_a_worker_killed_in_the_middle_of_a_stream_costs_no_token_and_comes_back(
    folder: Path, workers: tuple[str, Processes]
) -> None:
    store, processes = workers
    prompt = Tokens.from_folder(folder).encode("kill a worker")
    (wanted,) = generate(engine_of(folder, pages=(800,)), [prompt], SamplingParams(max_tokens=400, ignore_eos=True))
    options = ["-m", str(folder), "--device", "primary=cpu:4MiB", "--store", store, "--seats", "4"]
    options += ["--redispatch", "off"]  # heads are where the test puts them
    for name in NAMES:
        options += ["--worker", name]
    body = {"model": folder.name, "prompt": prompt, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    with serving(*options) as (_, url, _), httpx.Client(base_url=url, timeout=60) as client:

        def heads() -> Any:
            return client.get("/hetis/heads").json()

        def up() -> dict[str, bool]:
            return {device["name"]: device["up"] for device in heads()["devices"]}

        assert up() == {"primary": True, "w1": True, "w2": True}
        texts, name = [], ""
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=120) as answer:
            import json

            for number, line in enumerate(line for line in answer.iter_lines() if line):
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    break
                chunk = json.loads(event)
                assert "error" not in chunk, chunk
                texts.append(chunk["choices"][0]["text"])
                name = chunk["id"]
                if number == 10:
                    owners = heads()["requests"][0]["heads"]
                    for target, wanted_heads in (("w1", (0, 1, 2)), ("w2", (3, 4))):
                        for head in wanted_heads:
                            if owners[head] != target:
                                move = {"request": name, "heads": [head], "to": target}
                                assert client.post("/hetis/moves", json=move).json() == {"moved": True}
                if number == 40:
                    assert heads()["requests"][0]["heads"][:5] == ["w1"] * 3 + ["w2"] * 2
                    processes.kill("w1")
        assert "".join(texts) == wanted.text
        wait_for(lambda: up() == {"primary": True, "w1": False, "w2": True})
        processes.start("w1")
        wait_for(lambda: up()["w1"])
        again = client.post("/v1/completions", json=body).json()
        assert again["choices"][0]["text"] == wanted.text


def test_a_worker_that_does_not_come_is_named(folder: Path) -> None:
    code, lines = run(
        *("-m", str(folder), "--port", "0", "--store", f"127.0.0.1:{free_port()}", "--worker", "w9"),
        *("--worker-timeout", "0.5"),
    )
    assert (code, lines) == (1, ["hetis-serve: worker w9 did not say where it is within 0.5 s"])


def test_workers_and_their_store_belong_together(folder: Path) -> None:
    code, lines = run("-m", str(folder), "--worker", "w1", "--worker", "w1", "--device", "w1=cpu:1MiB")
    assert code == 2
    assert lines == [
        "hetis-serve: --worker w1: the name is taken",
        "hetis-serve: --worker needs --store HOST:PORT, where workers say where they are",
    ]
    assert run("-m", str(folder), "--store", "here", "--worker", "w1")[1] == [
        "hetis-serve: --store is 'here', must be HOST:PORT such as 127.0.0.1:8500"
    ]
