"""The processes of a replica in a placement group of Ray: one bundle each, on the node that the plan names.

Ray sets resources apart, carries processes to their nodes and tells of nodes that are gone; what is started when is
decided as for plain processes. Imported only where Ray is.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.replica.asking import Asked
from hetis.runtime.replica.commands import Addresses, Command
from hetis.runtime.replica.here import Told, start
from hetis.runtime.replica.processes import PlannedProcess
from hetis.runtime.replica.ray_nodes import bundle_of, nodes_of
from hetis.runtime.replica.supervising import FAILED, supervise

LOCAL = "local"
_ID_LABEL = "ray.io/node-id"  # that Ray gives every node
_ANSWER_S = 30.0  # for an actor that is there
_log = logging.getLogger(__name__)


def run_on_ray(asked: Asked, addresses: Addresses, *, address: str, start_s: float, worker_device: str) -> int:
    """Starts the processes in a placement group and looks after them until the engine ends or a signal comes.

    Args:
        address: of the cluster; ``local`` starts one of its own.
        start_s: until Ray has set the resources apart.

    Returns:
        The exit code. The placement group is gone by then, and so are the processes.

    Raises:
        LayoutError: nodes of the plan are not there, or lack what it asks for.
        ConnectionError: there is no such cluster.
    """
    _connect(address, len(asked.processes))
    try:
        # Not before: Ray's own handler of SIGTERM would end us three seconds later, whatever is still draining.
        told = Told()
        with told.by_signals():
            return _run(asked, addresses, told, start_s=start_s, worker_device=worker_device)
    finally:
        ray.shutdown()


class Runner:
    """An actor: holds one process on its node. If the actor ends, the process does."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Command) -> None:
        """Raises OSError."""
        self._process = start(command)

    def poll(self) -> int | None:
        assert self._process is not None, "a process was started"
        return self._process.poll()

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


def _run(asked: Asked, addresses: Addresses, told: Told, *, start_s: float, worker_device: str) -> int:
    nodes = nodes_of(asked.processes, addresses, ray.nodes())
    found = {name: str(node["NodeManagerAddress"]) for name, node in nodes.items()}
    commands = asked.commands(replace(addresses, hosts={**addresses.hosts, **found}), worker_device=worker_device)
    with_gpus = worker_device == "cuda"
    group = _reserve(asked.processes, nodes, gpus=with_gpus, start_s=start_s)
    try:
        starter = _Starter(group, commands, gpus=with_gpus)
        return supervise(commands, starter.start, told=lambda: told.times, clock=time.monotonic, wait=told.wait)
    finally:
        remove_placement_group(group)


class _Starter:
    """Starts commands in the bundles of a group."""

    def __init__(self, group: PlacementGroup, commands: Sequence[Command], *, gpus: bool) -> None:
        self._group, self._gpus = group, gpus
        self._bundles = {command.process.name: number for number, command in enumerate(commands)}

    def start(self, command: Command) -> _OnNode:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=self._bundles[command.process.name]
        )
        gpus = bundle_of(command.process, gpus=self._gpus).get("GPU", 0)
        actor = ray.remote(Runner).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy).remote()
        # Ray chooses which of the node's GPUs it is, and says so to the actor: the plan's number must not overrule it.
        return _OnNode(actor, replace(command, environment={}))


class _OnNode:
    """A process in an actor. One whose actor does not answer any more has ended."""

    def __init__(self, actor: Any, command: Command) -> None:
        self._actor, self._name = actor, command.process.name
        self._started: Any = actor.start.remote(
            command
        )  # all start at the same time: nobody waits for an actor to come

    def poll(self) -> int | None:
        try:
            if self._started is not None:
                if not ray.wait([self._started], timeout=0)[0]:
                    return None
                ray.get(self._started)
                self._started = None
            code: int | None = ray.get(self._actor.poll.remote(), timeout=_ANSWER_S)
        except RayError as error:
            _log.warning("%s: its actor failed: %s", self._name, _first_line(error))
            code = FAILED
        if code is not None:
            ray.kill(self._actor)
        return code

    def terminate(self) -> None:
        self._actor.terminate.remote()

    def kill(self) -> None:
        ray.kill(self._actor)


def _connect(address: str, processes: int) -> None:
    """To a cluster, or to one of this machine alone, which is to hold all processes however few CPUs it has."""
    own: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"num_cpus": max(processes, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.WARNING, configure_logging=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"--address {address}: {_first_line(error)}") from error


def _reserve(
    processes: Sequence[PlannedProcess], nodes: Mapping[str, Mapping[str, Any]], *, gpus: bool, start_s: float
) -> PlacementGroup:
    group = placement_group(
        [bundle_of(process, gpus=gpus) for process in processes],
        strategy="PACK",  # the labels say where each is
        bundle_label_selector=[{_ID_LABEL: str(nodes[process.node]["NodeID"])} for process in processes],
    )
    if not group.wait(timeout_seconds=start_s):
        remove_placement_group(group)
        needs = ", ".join(f"{process.name} on {process.node}" for process in processes)
        each = "a CPU and a GPU" if gpus else "a CPU"
        raise LayoutError(f"Ray did not set {each} each apart for {needs} within {start_s:g} s")
    return group


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
