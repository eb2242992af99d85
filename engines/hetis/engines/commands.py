"""Command lines for a layout, with the addresses of all processes and the plugin's configuration file."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from hetis.commands.endpoints import is_ip, joined
from hetis.engines.layout import Layout, Process
from hetis.engines.serving import (
    CONFIG_VARIABLE,
    HOST_VARIABLE,
    KV_HOST_VARIABLE,
    KV_PORT,
    KV_PORT_VARIABLE,
    MASTER_PORT,
    Meeting,
    Serving,
    arguments_of,
    drain_s,
    serves_kv_addresses,
    variables_of,
)
from hetis.engines.versions import Engine
from hetis.solver.plan import Role

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
WORKER_PORT = 7070
WORKER_STEP = 64  # ports for the processes on one GPU: a replica has at most so many ranks
STOPS_S, SERVER_STOPS_S = 10.0, 30.0  # the engine's own time-out for running requests is added to these
KEY_VARIABLE = "HETIS_WORKER_KEY"  # an alternative to a key file for workers and the plugin
WORKER = ("hetis-worker",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Addresses at which processes reach each other, and paths of their files."""

    # address or host name of each node; nodes not listed are reached by their own names
    hosts: Mapping[str, str] = field(default_factory=dict)
    worker_port: int = WORKER_PORT  # port of the first worker process on a node; further ones use the ports after it
    worker_step: int = 0  # a worker's port depends on its GPU alone, whose ports begin this much after the last one's
    master_port: int = MASTER_PORT  # port where the engine's processes on several nodes connect
    kv_port: int = KV_PORT  # port where decode replicas request KV from a prefill replica; vLLM's decode binds it, too
    all_here: bool = False  # every process runs on this machine, whichever node the plan assigns
    config_file: str = "hetis-launch/workers.yaml"  # path of the plugin's file
    key_file: str = "hetis-launch/worker.key"  # path of the key of vLLM and the workers, on every node

    def host(self, node: str) -> str:
        return LOOPBACK if self.all_here else self.hosts.get(node, node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The command that starts one process."""

    process: Process
    shown: tuple[str, ...]  # program and options as users write them
    # variables to set in addition to the existing environment
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # files that must exist before it starts, by path
    secrets: tuple[str, ...] = ()  # files that only its user may read, which must exist and are not in ``files``
    stops_s: float = STOPS_S  # grace period after a request to stop, before the process is killed

    @property
    def line(self) -> str:
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.shown)])


def commands_of(layout: Layout, serving: Serving, addresses: Addresses) -> tuple[Command, ...]:
    """Return the command of every process, vLLM's first.

    A worker on the same node as the vLLM process that calls it listens on the loopback interface, and shares memory
    with it. Other workers listen on their node's address in ``addresses`` or, if that is a name, on all its addresses,
    because the name may resolve differently there.
    """
    places = dict(_places(layout, addresses))
    config = config_of(
        layout,
        places,
        key_file=addresses.key_file,
        executor=serving.executor,
        dispatch=serving.dispatch,
        encrypts=serving.encrypts,
    )
    master = _reached(layout.servers[0], layout.servers, addresses)
    is_vllm = layout.engine is not Engine.SGLANG
    commands = []
    for number, process in enumerate(layout.servers):
        environment = _gpus(process, serving.device)
        if is_vllm and len(layout.servers) > 1 and is_ip(own := _reached(process, layout.servers, addresses)):
            environment[HOST_VARIABLE] = own
        if layout.workers:
            environment[CONFIG_VARIABLE] = addresses.config_file
        if is_vllm and not number and layout.role is not Role.UNIFIED:  # SGLang has an option for this
            if serves_kv_addresses(layout):
                environment[KV_HOST_VARIABLE] = addresses.host(process.node)
            # Other decode replicas listen too, though nobody asks them; vLLM never starts if its port is taken.
            environment[KV_PORT_VARIABLE] = str(addresses.kv_port)
        meeting = Meeting(host=master, port=addresses.master_port, kv_port=addresses.kv_port)
        commands.append(
            Command(
                process=process,
                shown=arguments_of(layout, serving, number, meeting),
                environment=environment | variables_of(layout),
                files={addresses.config_file: yaml.safe_dump(config, sort_keys=False)} if layout.workers else {},
                secrets=(addresses.key_file,) if layout.workers else (),
                stops_s=SERVER_STOPS_S + drain_s(serving.options),
            )
        )
    for process in layout.attention_workers:
        host, port = places[process.name]
        settings = worker_settings(process, listen=joined(_own(host), port), device=serving.device)
        settings["--key-file"] = addresses.key_file
        commands.append(
            Command(
                process=process,
                shown=(*WORKER, *(text for setting in settings.items() for text in setting)),
                environment=_gpus(process, serving.device),
                secrets=(addresses.key_file,),
            )
        )
    return tuple(commands)


def config_of(
    layout: Layout,
    places: Mapping[str, tuple[str, int]],
    *,
    key_file: str,
    executor: str = "",
    dispatch: str = "",
    encrypts: bool = False,
) -> dict[str, Any]:
    """Return the content of the plugin's file in the form of `hetis.runtime.vllm.settings`.

    ``places`` maps the name of each worker process to its host and port.
    """
    workers = [
        {"name": one.name, "addresses": [joined(*places[name]) for name in one.processes], "keyFile": key_file}
        for one in layout.workers
    ]
    own: dict[str, Any] = {"executor": executor} if executor else {}
    if dispatch:
        own["dispatch"] = {"policy": dispatch}
    if encrypts:
        own["encrypt"] = True
    return {"apiVersion": "hetis/v1", "kind": "VllmWorkers", **own, "workers": workers}


def worker_settings(process: Process, *, listen: str, device: str) -> dict[str, str]:
    """Return the options of a worker, except for its key; they are the same wherever it runs."""
    return {"--name": process.name, "--listen": listen, "--kv-memory": f"{process.kv_bytes}B", "--device": device}


def as_json(commands: Sequence[Command]) -> str:
    rows = [
        {
            "name": command.process.name,
            "kind": command.process.kind.value,
            "node": command.process.node,
            "gpus": list(command.process.gpus),
            "kv_bytes": command.process.kv_bytes,
            "command": list(command.shown),
            "environment": dict(command.environment),
            "files": dict(command.files),
        }
        for command in commands
    ]
    return json.dumps(rows, indent=2)


def as_shell(commands: Sequence[Command]) -> str:
    """Return the shell commands of each node: files first, then a line per process."""
    lines = list[str]()
    for node in dict.fromkeys(command.process.node for command in commands):
        lines.append(f"# on {node}")
        here = [command for command in commands if command.process.node == node]
        files = {path: text for command in here for path, text in command.files.items()}
        for path, text in files.items():
            folder = str(PurePosixPath(path).parent)
            lines.append(f"mkdir -p {shlex.quote(folder)} && cat > {shlex.quote(path)} <<'YAML'\n{text}YAML")
        lines += [command.line for command in here]
    return "\n".join(lines)


def _places(layout: Layout, addresses: Addresses) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the host and port of every worker process by name. Ports are counted per node, or per GPU."""
    used: Counter[tuple[str, int]] = Counter()
    for process in layout.attention_workers:
        first = addresses.worker_step * process.gpus[0]
        place = "" if addresses.all_here else process.node, first
        is_near = process.node == layout.caller(process).node
        port = addresses.worker_port + first + used[place]
        yield process.name, (LOOPBACK if is_near else addresses.host(process.node), port)
        used[place] += 1


def _reached(process: Process, processes: Sequence[Process], addresses: Addresses) -> str:
    is_alone = len({one.node for one in processes}) == 1
    return LOOPBACK if is_alone else addresses.host(process.node)


def _gpus(process: Process, device: str) -> dict[str, str]:
    """Return variables that select GPUs by driver index, as in plans; CUDA's default order puts the fastest first."""
    if device == "cpu":
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, process.gpus))}


def _own(host: str) -> str:
    """Return the address on which to listen, given the ``host`` through which other processes connect."""
    return host if is_ip(host) else ANY
