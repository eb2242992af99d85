"""The processes of a replica in a placement group of Ray: one bundle each, on the node that the plan names.

Ray reserves resources, carries processes to their nodes and reports nodes that are gone. When to start a process is
decided as for plain processes. vLLM connects its further stages by its own launch, not by Ray. This module is
imported only if Ray is installed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hetis.engines.commands import Addresses, Command, commands_of
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Layout, Process
from hetis.engines.serving import Serving
from hetis.runtime.launch.processes import FAILED, Started, StopRequests, prepare, start, supervise, write_file
from hetis.runtime.launch.ray_nodes import bundle_of, nodes_of

LOCAL = "local"
_ID_LABEL = "ray.io/node-id"  # set by Ray on every node
_ANSWER_S = 30.0  # time limit for the answer of a running actor
_log = logging.getLogger(__name__)


def run_on_ray(layout: Layout, serving: Serving, addresses: Addresses, *, address: str, start_s: float) -> int:
    """Start the processes in a placement group and supervise them until vLLM ends or a signal arrives.

    Args:
        address: address of the cluster; ``local`` starts a new one.
        start_s: time limit for Ray to reserve the resources.

    Returns:
        The exit code. The placement group and its processes are gone by then.

    Raises:
        LayoutError: nodes of the plan are missing, or lack the resources that it requires.
        OptionError: the key is not secret, or cannot be written here.
        ConnectionError: there is no such cluster.
    """
    _connect(address, len(layout.processes))
    try:
        # Not earlier: Ray's own handler of SIGTERM would end us three seconds later, whatever is still draining.
        stop = StopRequests()
        with stop.by_signals():
            return _run(layout, serving, addresses, stop, start_s=start_s)
    finally:
        ray.shutdown()


class ProcessActor:
    """An actor that holds one process on its node. If the actor ends, so does the process."""

    def __init__(self) -> None:
        self._process: Started | None = None

    def start(self, command: Command, secrets: Mapping[str, str]) -> None:
        """Write what the command needs, and start it. Raises OSError."""
        for name, text in secrets.items():
            write_file(name, text, mode=0o600)
        for name, text in command.files.items():
            write_file(name, text, mode=0o644)
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


def _run(layout: Layout, serving: Serving, addresses: Addresses, stop: StopRequests, *, start_s: float) -> int:
    nodes = nodes_of(layout.processes, addresses, ray.nodes())
    found = {name: str(node["NodeManagerAddress"]) for name, node in nodes.items()}
    commands = commands_of(layout, serving, replace(addresses, hosts={**addresses.hosts, **found}))
    secrets = prepare(commands, may_draw_key=True)
    gpus = serving.device == "cuda"
    group = _reserve(layout.processes, nodes, gpus=gpus, start_s=start_s)

    def start_in_bundle(command: Command) -> _OnNode:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=commands.index(command)
        )
        num_gpus = bundle_of(command.process, gpus=gpus).get("GPU", 0)
        actor = ray.remote(ProcessActor).options(num_cpus=1, num_gpus=num_gpus, scheduling_strategy=strategy).remote()
        # Ray chooses among the node's GPUs and passes them to the actor: the plan's numbers must not override them.
        environment = {name: text for name, text in command.environment.items() if not name.startswith("CUDA_")}
        own_secrets = {name: text for name, text in secrets.items() if name in command.secrets}
        return _OnNode(actor, replace(command, environment=environment), own_secrets)

    try:
        return supervise(commands, start_in_bundle, num_stops=lambda: stop.times, clock=time.monotonic, wait=stop.wait)
    finally:
        remove_placement_group(group)


class _OnNode:
    """A process in an actor. If the actor no longer answers, the process counts as ended."""

    def __init__(self, actor: Any, command: Command, secrets: Mapping[str, str]) -> None:
        self._actor, self._name = actor, command.process.name
        # All start at the same time, without waiting for one another's actors.
        self._started: Any = actor.start.remote(command, secrets)

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
    """Connect to a cluster, or start one on this machine that holds all processes however few CPUs it has."""
    own: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"num_cpus": max(processes, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.WARNING, configure_logging=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"--address {address}: {_first_line(error)}") from error


def _reserve(
    processes: Sequence[Process], nodes: Mapping[str, Mapping[str, Any]], *, gpus: bool, start_s: float
) -> PlacementGroup:
    group = placement_group(
        [bundle_of(process, gpus=gpus) for process in processes],
        strategy="PACK",  # the labels determine the nodes
        bundle_label_selector=[{_ID_LABEL: str(nodes[process.node]["NodeID"])} for process in processes],
    )
    if not group.wait(timeout_seconds=start_s):
        remove_placement_group(group)
        needs = ", ".join(f"{process.name} on {process.node}" for process in processes)
        each = "a CPU and a GPU" if gpus else "a CPU"
        raise LayoutError(f"Ray did not reserve {each} each for {needs} within {start_s:g} s")
    return group


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
