"""The processes of the demo: planner, agent, vLLM with hetis' plugin, and its attention workers."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import yaml

from examples.processes import DemoProcesses, ProcessError

START_S = 900  # the first start compiles kernels, which takes minutes on a busy machine
BLOCK_TOKENS = 32  # of vLLM's blocks; its CPU kernels need multiples of it
_ROOT = Path(__file__).parents[2]


def vllm_python() -> Path | None:
    """Return the Python of the virtual environment with vLLM (``make vllm``), or None if there is none."""
    python = Path(os.environ.get("HETIS_VLLM_PYTHON", _ROOT / ".venv-vllm" / "bin" / "python"))
    return python if python.exists() else None


class Processes(DemoProcesses):
    """The processes that the demo starts.

    Attributes:
        engine: the socket through which the agent controls vLLM.
    """

    def __init__(self, folder: Path, workers: tuple[str, ...]) -> None:
        super().__init__(folder)
        self._ports = {name: _free_port() for name in workers}
        self._key = folder / "worker.key"
        self._key.touch(mode=0o600)
        self._key.write_text(secrets.token_hex(16))
        self.engine = folder / "engine.sock"

    def start_agent(self, server: str, *, node: str, devices: str) -> None:
        """Start the agent, which connects to the planner, and to the engine once its socket exists."""
        command = ["hetis-agent", "--server", server, "--node", node, "--engine", f"unix://{self.engine}"]
        command += ["--simulated-devices", devices, "--state-dir", str(self.folder / "agent")]
        self._start("agent", command)

    def start_worker(self, name: str, kv_memory: str) -> None:
        """Start the worker, on the same port each time."""
        command = [Path(sys.executable).name, "-m", "hetis.runtime.worker", "--name", name]
        command += ["--listen", f"127.0.0.1:{self._ports[name]}", "--key-file", str(self._key)]
        self._start(_file(name), [*command, "--kv-memory", kv_memory])

    def kill_worker(self, name: str) -> None:
        """Kill the worker like a power cut."""
        self.kill(_file(name))

    def start_server(self, python: Path, model: Path, *options: str) -> str:
        """Start vLLM and return its address once it serves. Raises ProcessError if it does not."""
        port = _free_port()
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
        command += ["--kv-transfer-config", _CONNECTOR, *options]
        environment = {
            "HETIS_VLLM_CONFIG": str(self._settings()),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Its numba version differs: in a shared folder, each would discard the other's compiled code.
            "NUMBA_CACHE_DIR": str(python.parents[1] / "numba"),
        }
        self._start("server", command, environment=environment)
        url = f"http://127.0.0.1:{port}"
        self.wait_until(lambda: _is_healthy(url), "vLLM serves")
        return url

    def end_server(self) -> None:
        """Stop vLLM with SIGTERM, as Kubernetes does. Raises ProcessError if it did not exit cleanly."""
        self._running["server"].terminate()
        if self._running["server"].wait(60) != 0:
            raise ProcessError(f"vLLM did not end well:\n{self.tail('server', 40)}")

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_S) -> float:
        """Wait like `DemoProcesses.wait_until`, with time for such processes to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)

    # --- private

    def _settings(self) -> Path:
        """Return the plugin's file, which keeps groups in vLLM until the planner moves them."""
        path = self.folder / "workers.yaml"
        document = {
            "apiVersion": "hetis/v1",
            "kind": "VllmWorkers",
            "workers": [
                {"name": name, "addresses": [f"127.0.0.1:{port}"], "keyFile": str(self._key)}
                for name, port in self._ports.items()
            ],
            "dispatch": {"policy": "local"},
            "executor": str(self.engine),
        }
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path


_CONNECTOR = '{"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _file(name: str) -> str:
    return name.replace("/", "-")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
