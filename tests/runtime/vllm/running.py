"""Runs `engine.py` in vLLM's own environment, and attention workers in ours."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runtime.launch.vllm_python import ENVIRONMENT, PYTHON, PYTHONPATH, ROOT

KEY = "a key of sixteen letters or more"
# ``cuda`` where these tests have a GPU, which engines and workers then share, and vLLM's backend for it.
DEVICE = os.environ.get("HETIS_VLLM_DEVICE", "cpu")
BASE_BACKEND = os.environ.get("HETIS_VLLM_BASE_BACKEND", "TRITON_ATTN")
LIMIT_S = 1800.0  # limit for a scenario, on a busy machine

Acts = list[dict[str, Any]]


class _Server:
    """The process that imports vLLM once and forks for every engine, see `engine.py`."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed at the end of this process
        self._process = subprocess.Popen(
            [str(PYTHON), "-m", "tests.runtime.vllm.engine"],
            cwd=ROOT,
            env=_environment(None),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # so that all engines can be ended at once
        )
        atexit.register(self.end)

    def run(self, scenario: dict[str, Any]) -> str:
        """Return the exit code of a scenario, or an empty text if the server itself has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(LIMIT_S, self._kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps(scenario) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline().strip()
        except BrokenPipeError:
            return ""
        finally:
            watchdog.cancel()

    def end(self) -> str:
        """End the server and all that it started, and return its log."""
        atexit.unregister(self.end)
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self._log.seek(0)
        said = self._log.read()
        self._log.close()
        return said

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@cache
def _server() -> _Server:
    return _Server()


def _environment(config: Path | None) -> dict[str, str]:
    own = {"PYTHONPATH": PYTHONPATH, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = ENVIRONMENT | own
    return environment if config is None else environment | {"HETIS_VLLM_CONFIG": str(config)}


def run_engine(model: Path, acts: Acts, *, config: Path | None, **options: Any) -> list[dict[str, Any]]:
    """Return what each act returned."""
    if DEVICE != "cpu":
        backend = "CUSTOM" if config else BASE_BACKEND
        options = {"attention_backend": backend, "async_scheduling": False, "kv_cache_memory_bytes": 2**30} | options
    with tempfile.TemporaryDirectory() as folder:
        log, results = Path(folder, "log"), Path(folder, "results")
        scenario = {
            "model": str(model),
            "hetis": config is not None,
            "acts": acts,
            "options": options,
            "environment": _environment(config),
            "log": str(log),
            "results": str(results),
        }
        code = _server().run(scenario)
        said = ""
        if code != "0":  # ends whatever the engine has started and left behind
            said = _server().end()
            _server.cache_clear()
        output = said + (log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
        assert code == "0", f"vLLM ended with {code or 'its server'}: {output[-4000:]}"
        found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
        return found


@contextmanager
def workers(folder: Path, count: int) -> Iterator[tuple[list[int], list[str]]]:
    """Attention workers as processes: their process ids and addresses."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    ports = [folder / f"w{i}.port" for i in range(count)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "hetis.runtime.worker",
                "--name",
                f"w{i}",
                "--listen",
                "127.0.0.1:0",
                "--port-file",
                str(port),
                "--kv-memory",
                "64MiB",
                "--device",
                DEVICE,
                "--key-file",
                str(key),
            ],
            stderr=subprocess.DEVNULL,
        )
        for i, port in enumerate(ports)
    ]
    try:
        for process, port in zip(processes, ports, strict=True):
            while not port.exists():
                with pytest.raises(subprocess.TimeoutExpired):  # it keeps running
                    process.wait(0.2)
        yield [process.pid for process in processes], [port.read_text().strip() for port in ports]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def config_of(
    folder: Path,
    addresses: Sequence[Sequence[str]],
    *,
    policy: str = "remote",
    timeout_s: float = 30,
    transport: str = "auto",
    encrypt: bool = False,
) -> Path:
    """Write the plugin's configuration file, with a worker for each list of addresses."""
    path = folder / "workers.yaml"
    listed = [
        {"name": f"w{i}", "addresses": list(one), "keyFile": str(folder / "key")} for i, one in enumerate(addresses)
    ]
    document = {
        "apiVersion": "hetis/v1",
        "kind": "VllmWorkers",
        "calibrate": False,  # the demo tests calibration
        "baseBackend": None if DEVICE == "cpu" else BASE_BACKEND,
        "timeoutS": timeout_s,
        "transport": transport,
        "encrypt": encrypt,
        "dispatch": {"policy": policy},
        "workers": listed,
    }
    path.write_text(yaml.safe_dump(document))
    return path
