"""Planners and agents under faults, which are real processes, and what a planner answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml

from examples.processes import free_ports
from hetis.planner.client import Client
from hetis.v1 import cluster_service_pb2
from tests.faults.history import Led, Read
from tests.faults.proxy import Proxy

ROOT = Path(__file__).parents[2]


REGISTER, SERVED = "clusters/register", "clusters/served"


_VALUE = re.compile(r"r(\d+)")


def _environment() -> dict[str, str]:
    """Return an environment in which `hetis` is imported from the same place as here."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {name: value for name, value in os.environ.items() if not name.startswith("HETIS_")} | {
        "PYTHONPATH": os.pathsep.join(paths)
    }


class Planner:
    """A `hetis-planner` that may be killed and restarted, and its connection to the store.

    ``options`` are further words of its command line, of which later ones override earlier ones.
    """

    def __init__(self, name: str, folder: Path, store: str, lease_s: float, options: Sequence[str] = ()) -> None:
        found = sa.make_url(store)
        assert found.host is not None
        assert found.port is not None
        self.name = name
        self.network = Proxy((found.host, found.port))
        host, port = self.network.address
        own = free_ports(2)
        self.address, self.page = f"127.0.0.1:{own}", f"127.0.0.1:{own + 1}"
        self._log = folder / f"{name}.log"
        self._options = [
            *("--listen", self.address, "--status-page", self.page),
            *("--store", found.set(host=host, port=port).render_as_string(hide_password=False)),
            *("--set", f"leadership.lease={lease_s:g}s", "--set", "solver.processes=1"),
            *("--set", "agents.heartbeat=1s"),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hetis.planner.service.main", *self._options],
                stdout=log,
                stderr=log,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def shown(self) -> dict[str, Any] | None:
        """Return the first part of its page, or None if it does not answer."""
        return None if (found := self._all_shown()) is None else found["planner"]

    def serving(self, cluster: str) -> int | None:
        """Return how many replicas of a cluster it shows as SERVING; None if it does not answer, or not of it yet."""
        shown = {one["name"]: one for one in (self._all_shown() or {}).get("clusters", ())}
        return int(shown[cluster]["replicas"].get("SERVING", 0)) if cluster in shown else None

    def _all_shown(self) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"http://{self.page}/", timeout=2) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (OSError, ValueError):
            return None

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.page}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def terms(self) -> list[Led]:
        """Return when it began to lead, by its own log."""
        return [
            Led(planner=self.name, epoch=entry["epoch"], time_s=at_s, taken_s=at_s - entry["began_in_s"])
            for at_s, entry in self._said("leading")
        ]

    def _said(self, message: str) -> list[tuple[float, dict[str, Any]]]:
        found = list[tuple[float, dict[str, Any]]]()
        for line in self.lines():
            if f'"{message}"' not in line:
                continue  # most of a long log
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("message") == message:
                    found.append((datetime.fromisoformat(entry["time"]).timestamp(), entry))
        return found

    def lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.kill()
        self.network.close()


class Agent:
    """The `hetis-agent` of a node with a simulated engine."""

    def __init__(self, node: str, folder: Path, servers: str) -> None:
        self._log = folder / f"agent-{node}.log"
        self._file = self._log.open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "examples.simulated_engine", "--server", servers),
                *("--node", f"{SERVED}/nodes/{node}", "--simulated-devices", "L4:2"),
                *("--state-dir", str(folder / f"state-{node}")),
            ],
            stdout=self._file,
            stderr=self._file,
            env=_environment(),
        )

    def epochs(self) -> list[tuple[float, int]]:
        """Return the Unix time and the epoch of each Welcome."""
        found = list[tuple[float, int]]()
        for line in self._log.read_text(errors="replace").splitlines():
            match = re.match(r"(\S+ \S+) INFO .*connected: epoch (\d+)", line)
            if match:
                moment = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                found.append((moment, int(match[2])))
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._file.close()


def read(client: Client, *, timeout_s: float = 20.0) -> Read:
    began_s = time.time()
    request = cluster_service_pb2.GetClusterRequest(name=REGISTER)
    cluster = client.clusters.GetCluster(request, timeout=timeout_s).cluster
    match = _VALUE.fullmatch(str(yaml.safe_load(cluster.document.content)["name"]))
    assert match is not None
    version = int(cluster.etag.removeprefix("v"))
    return Read(version=version, value=match[1], began_s=began_s, ended_s=time.time())
