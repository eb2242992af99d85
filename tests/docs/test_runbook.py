"""The runbook of docs/operations.md runs as it stands, on machines that are folders, against PostgreSQL."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from examples.processes import free_ports
from tests.docs.machines import ROOT, Machine
from tests.docs.pages import runbook
from tests.planner.store.postgres import database_on_small_disk, fill, find_binaries, running_server

OLDER = "0f9c8a92^"  # the last commit with the tables of v0003
LIMIT_S = 120.0  # limit for what takes seconds, on a busy machine
PLANNERS = ("planner-1", "planner-2")
NODES = ("gpu-a", "gpu-b", "gpu-c")


def until(is_so: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end_s, what
        time.sleep(0.2)


def installed(source: Path, folder: Path) -> Path:
    """Install the wheel of a tree as pip does, beside the libraries of this environment, and return its programs."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        str(folder / "bin/python"),
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", *folder.glob("*.whl")], check=True)
    return folder / "bin"


def older_tree(folder: Path) -> Path:
    """Return the tree of an earlier version, from the history of this repository."""
    packed = subprocess.run(["git", "archive", OLDER], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"NOT RUN: the clone has no commit {OLDER}")
    folder.mkdir()
    subprocess.run(["tar", "-x"], input=packed.stdout, cwd=folder, check=True)
    return folder


class Fleet:
    """All machines, and what the test looks at between two blocks."""

    def __init__(self, folder: Path, database: str, disk: Path | None) -> None:
        ports = free_ports(4)
        self.ports = servers = {name: ports + number for number, name in enumerate(PLANNERS)}
        new, old = installed(ROOT, folder / "new"), installed(older_tree(folder / "tree"), folder / "old")
        shared = {f"{name}.example:8470": f"localhost:{port}" for name, port in servers.items()}
        shared |= {f"DNS:{name}.example": "DNS:localhost" for name in servers}
        shared |= {"postgresql://hetis:PASSWORD@db.example/hetis": database}
        self.database, self.disk = database, disk
        self.machines = dict[str, Machine]()
        shared |= {"sleep 30": "sleep 5"}  # `reload`, which is a second here
        for name in ("admin", *servers, *NODES):
            page = f"127.0.0.1:{servers.get(name, 0) + len(servers)}"
            own = {"0.0.0.0:8470": f"localhost:{servers.get(name)}", "http://127.0.0.1:8471": f"http://{page}"}
            services = {"HETIS_STATUS_PAGE__ADDRESS": page, "HETIS_RELOAD": "1s", "HETIS_SOLVER__PROCESSES": "1"}
            self.machines[name] = Machine(
                name,
                folder,
                replaced=shared | own if name in servers else shared,
                installed={True: new, False: old},
                services=services if name in servers else {"HETIS_AGENT_SIMULATED_DEVICES": "L4:2"},
            )

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def read(self, command: str) -> Any:
        return json.loads(self["admin"].run(f"{command} -o json 2>/dev/null"))["items"]

    def states(self) -> dict[str, str]:
        """Return the states of the cluster's nodes."""
        return {one["name"].rpartition("/")[2]: one["state"] for one in self.read("hetis-plan get nodes")}

    def leads(self, name: str) -> bool:
        return self[name].code_of("curl -fs http://127.0.0.1:8471/leaderz") == 0

    def num_serving(self) -> int:
        return sum(one["state"] == "REPLICA_STATE_SERVING" for one in self.read("hetis-plan get replicas"))


@contextmanager
def engine(fleet: Fleet, node: str) -> Iterator[None]:
    """Run the engine of a node, which outlives its agent."""
    root = fleet[node].root
    command = [sys.executable, "-m", "examples.simulated_engine", "--node", f"clusters/night/nodes/{node}"]
    command += ["--simulated-devices", "L4:2", "--socket", str(root / "run/hetis/engine.sock")]
    with (
        (root / "run/engine.log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
    ):
        yield
        process.terminate()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    if find_binaries() is None:
        pytest.skip("NOT RUN: PostgreSQL is not installed")
    # Not pytest's folder: the paths of Unix sockets are limited to 107 characters.
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hetis-runbook-"))
        server = stack.enter_context(running_server())
        fleet = Fleet(Path(folder), *stack.enter_context(database_on_small_disk(server)))
        for machine in fleet.machines.values():
            stack.callback(machine.stop)
        for node in NODES:
            stack.enter_context(engine(fleet, node))
        yield fleet


def has_traffic(fleet: Fleet) -> bool:
    """Return whether the store has a table of the present version that the older one lacks."""
    with psycopg.connect(fleet.database) as connection:
        return connection.execute("SELECT to_regclass('traffic')").fetchone() != (None,)


def serves_by_older_planners(fleet: Fleet) -> None:
    assert fleet.states() == {"gpu-a": "NODE_STATE_READY", "gpu-b": "NODE_STATE_READY"}
    assert fleet.num_serving() == len(fleet.read("hetis-plan get replicas"))
    assert not has_traffic(fleet)


def has_a_backup(fleet: Fleet) -> None:
    assert len([*(fleet["planner-1"].root / "var/lib/hetis-backup").glob("*.db")]) == 1


def has_migrated(fleet: Fleet) -> None:
    until(lambda: any(map(fleet.leads, PLANNERS)), "no planner leads after the upgrade")
    assert has_traffic(fleet)
    assert fleet.num_serving()


def is_ready(fleet: Fleet) -> None:
    until(lambda: set(fleet.states().values()) == {"NODE_STATE_READY"}, "an upgraded agent does not come back")


def install_added_node(fleet: Fleet) -> None:
    (
        _,
        (_, install),
        *_,
    ) = runbook()
    (start,) = [block for names, block in runbook() if names == ["gpu-a", "gpu-b"] and "enable --now" in block]
    fleet["gpu-c"].run(install)
    to = "gpu-c:/etc/hetis"
    fleet["admin"].run(f"scp ca.pem {to}/; scp gpu-c.pem {to}/node.pem; scp gpu-c.key {to}/node.key")
    fleet["gpu-c"].run(start)
    until(lambda: fleet.states()["gpu-c"] == "NODE_STATE_READY", "the added node does not connect")


def has_moved(fleet: Fleet) -> None:
    (drained,) = [one for one in fleet.read("hetis-plan get nodes") if one["name"].endswith("gpu-b")]
    assert drained["draining"]
    used = {node for one in fleet.read("hetis-plan get replicas") for node in one["nodes"]}
    assert used == {"gpu-a", "gpu-c"}


def is_gone(fleet: Fleet) -> None:
    assert fleet.states().keys() == {"gpu-a", "gpu-c"}


def is_renewed(fleet: Fleet) -> None:
    for machine in map(fleet.__getitem__, PLANNERS):
        renewed = (machine.root / "etc/hetis/planner.pem").read_text().strip()
        server = ("localhost", fleet.ports[machine.name])
        until(partial(_shows, server, renewed), "the certificate is the old one")


def _shows(server: tuple[str, int], certificate: str) -> bool:
    return ssl.get_server_certificate(server).strip() == certificate


def has_another_leader(fleet: Fleet) -> None:
    until(lambda: any(map(fleet.leads, PLANNERS)), "no planner leads after the loss of the leader")
    assert fleet.num_serving()
    ready = "curl -fs http://127.0.0.1:8471/readyz"
    until(lambda: all(fleet[name].code_of(ready) == 0 for name in PLANNERS), "the lost planner is not started again")


def fill_disk(fleet: Fleet) -> None:
    """Fill the database's disk, see what an operator sees, and make room again."""
    if fleet.disk is None:  # where none may be mounted
        return
    fill(fleet.disk)
    nodes = "".join(f"- {{name: n{uuid.uuid4().hex}, gpus: [{{type: L4}}]}}\n" for _ in range(3000))
    cluster = f"apiVersion: hetis/v1\nkind: Cluster\nname: big\nnodes:\n{nodes}"
    cluster += "network: {bandwidth: 100Gbps, latency: 20us}\n"
    (fleet["admin"].root / "home/big.yaml").write_text(cluster)
    # While the leader's term ends, too, because its renewal finds no room, no answer may be a leader's.
    full, apply = "its disk is full: make room there", partial(fleet["admin"].failing, "hetis-plan apply big.yaml")
    until(lambda: full in apply(), "nobody says that the disk is full")
    assert fleet.num_serving()
    ready = "curl -fs http://127.0.0.1:8471/readyz"

    def is_noticed() -> bool:
        if all(fleet[name].code_of(ready) == 0 for name in PLANNERS):
            apply()  # another may lead since the last change, and learns of the disk by its own
        return not all(fleet[name].code_of(ready) == 0 for name in PLANNERS)

    until(is_noticed, "the leader calls itself ready")
    (fleet.disk / "full").unlink()


def writes_again(fleet: Fleet) -> None:
    fleet["admin"].run("hetis-plan apply big.yaml; hetis-plan delete clusters/big")


def lose_store(fleet: Fleet) -> None:
    with psycopg.connect(fleet.database) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


def is_obeyed(fleet: Fleet) -> None:
    until(lambda: any(map(fleet.leads, PLANNERS)), "no planner leads after the restoration")
    until(lambda: fleet.states()["gpu-a"] == "NODE_STATE_READY", "an agent does not follow the restored store")


# By a part of a block that only it has: what to do before it, and what must be so after it.
BEFORE = {"until curl": fill_disk, "restore --replace": lose_store}
AFTER = {
    "--name first": serves_by_older_planners,
    "start hetis-backup": has_a_backup,
    "systemctl restart hetis-agent": is_ready,
    "hetis-plan apply night.yaml\nsign gpu-c": install_added_node,
    "hetis-plan drain": has_moved,
    "mv without.yaml": is_gone,
    "sign planner 90 DNS:planner-1.example,DNS:planner-2.example\nfor": is_renewed,
    "kill -s KILL": has_another_leader,
    "until curl": writes_again,
}


def test_the_runbook_runs_in_order(fleet: Fleet) -> None:
    made = []
    for names, block in runbook():
        for part, prepare in BEFORE.items():
            if part in block:
                prepare(fleet)
        for name in names:
            fleet[name].run(block)
        for part, check in AFTER.items():
            if part in block:
                check(fleet)
                made.append(part)
        if block == "systemctl start hetis-planner\n":
            (is_obeyed if "kill -s KILL" in made else has_migrated)(fleet)
    assert made == list(AFTER), "blocks of the runbook are others now"
