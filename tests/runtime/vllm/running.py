"""Runs `engine.py` in vLLM's own environment, and attention workers in ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HETIS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
KEY = "a key of sixteen letters or more"
ROOTS = ("engines", "formats", "planner", "profiler", "proto", "runtime", "simulator", "solver")

needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"NOT TESTED: vLLM is not installed in {PYTHON.parents[1]} (make vllm)"
)

Acts = list[dict[str, Any]]


def run_engine(model: Path, acts: Acts, *, config: Path | None, **options: Any) -> list[dict[str, Any]]:
    """Return what each act returned."""
    scenario = {"model": str(model), "hetis": config is not None, "acts": acts, "options": options}
    environment = os.environ | {
        # Of this tree, whichever the environment was made for.
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ROOTS),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # Its numba is another one: in one folder each would throw away what the other has compiled.
        "NUMBA_CACHE_DIR": str(PYTHON.parents[1] / "numba"),
    }
    environment.pop("HETIS_VLLM_CONFIG", None)
    if config is not None:
        environment["HETIS_VLLM_CONFIG"] = str(config)
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.runtime.vllm.engine"],
        cwd=ROOT,
        env=environment,
        input=json.dumps(scenario),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"vLLM ended with {done.returncode}: {done.stderr[-4000:]}"
    results: list[dict[str, Any]] = json.loads(lines[0].removeprefix("RESULT "))["results"]
    return results


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
                "cpu",
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
                with pytest.raises(subprocess.TimeoutExpired):  # it goes on running
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
) -> Path:
    """The plugin's file: a worker for each list of addresses."""
    path = folder / "workers.yaml"
    listed = [
        {"name": f"w{i}", "addresses": list(one), "keyFile": str(folder / "key")} for i, one in enumerate(addresses)
    ]
    document = {
        "apiVersion": "hetis/v1",
        "kind": "VllmWorkers",
        "calibrate": False,  # the demo measures
        "timeoutS": timeout_s,
        "transport": transport,
        "dispatch": {"policy": policy},
        "workers": listed,
    }
    path.write_text(yaml.safe_dump(document))
    return path
