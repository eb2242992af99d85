"""From a layout to command lines: who is told what, where each is reached, and the file that configures the plugin."""

from __future__ import annotations

import ipaddress
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from hetis.engines.layout import Layout, Process

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
WORKER_PORT, MASTER_PORT = 7070, 29501
STOPS_S, VLLM_STOPS_S = 10.0, 30.0  # vLLM's own time-out for requests that run is added
CONNECTOR = {"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
CONFIG_VARIABLE, PARTITION_VARIABLE, HOST_VARIABLE = "HETIS_VLLM_CONFIG", "VLLM_PP_LAYER_PARTITION", "VLLM_HOST_IP"
KEY_VARIABLE = "HETIS_WORKER_KEY"  # what a worker and the plugin take in place of a file
SERVE = ("vllm", "serve")
WORKER = ("hetis-worker",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What vLLM is told beside the layout.

    Attributes:
        model: as vLLM takes it, a folder or a name.
        program: that is vLLM; a last word other than ``serve`` is taken for its module of the front alone.
        options: of vLLM as they stand.
        dtype: of model and KV; ``auto`` as vLLM has it.
        device: ``cuda`` or ``cpu``.
        limits_kv: the ranks take no more memory for KV than the plan counts on.
        executor: Unix socket for the node's agent; empty: nobody steers the engine.
    """

    model: str
    program: tuple[str, ...] = SERVE
    options: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "cuda"
    limits_kv: bool = False
    executor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where processes reach each other, and where their files are.

    Attributes:
        hosts: of nodes, an address or a name; a node that is not here is called by its own name.
        worker_port: of the first worker process on a node; the others have the ports after it.
        master_port: where processes of vLLM on several nodes meet.
        all_here: every process is on this machine, whatever node the plan says.
        config_file: of the plugin.
        key_file: of vLLM's and the workers' key, on every node.
    """

    hosts: Mapping[str, str] = field(default_factory=dict)
    worker_port: int = WORKER_PORT
    master_port: int = MASTER_PORT
    all_here: bool = False
    config_file: str = "hetis-launch/workers.yaml"
    key_file: str = "hetis-launch/worker.key"

    def host(self, node: str) -> str:
        return LOOPBACK if self.all_here else self.hosts.get(node, node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How one process is started.

    Attributes:
        shown: program and options as users write them.
        environment: what its environment needs beside what is there.
        files: that must be there before it starts, by path.
        secrets: files that nobody but its user may read, which must be there and are not in ``files``.
        stops_s: what it has to end when it is told, before it is killed.
    """

    process: Process
    shown: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    stops_s: float = STOPS_S

    @property
    def line(self) -> str:
        """For a shell."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.shown)])


def commands_of(layout: Layout, serving: Serving, addresses: Addresses) -> tuple[Command, ...]:
    """The command of every process, vLLM's first.

    A worker beside the process of vLLM that calls it listens on the loopback, and shares memory with it. Others listen
    on the address that their node has in ``addresses``; where that is a name, on all addresses of the node, since a
    name may mean another address there than elsewhere.
    """
    places = dict(_places(layout, addresses))
    config = config_of(layout, places, key_file=addresses.key_file, executor=serving.executor)
    master = _reached(layout.vllm[0], layout.vllm, addresses)
    commands = []
    for number, process in enumerate(layout.vllm):
        environment = _gpus(process, serving.device)
        if len(layout.vllm) > 1 and _is_address(own := _reached(process, layout.vllm, addresses)):
            environment[HOST_VARIABLE] = own
        if layout.workers:
            environment[CONFIG_VARIABLE] = addresses.config_file
        commands.append(
            Command(
                process=process,
                shown=vllm_arguments(layout, serving, number, master=master, master_port=addresses.master_port),
                environment=environment | partition_of(layout),
                files={addresses.config_file: yaml.safe_dump(config, sort_keys=False)} if layout.workers else {},
                secrets=(addresses.key_file,) if layout.workers else (),
                stops_s=VLLM_STOPS_S + _drain_s(serving.options),
            )
        )
    for process in layout.attention_workers:
        host, port = places[process.name]
        settings = worker_settings(process, listen=_joined(_own(host), port), device=serving.device)
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


def vllm_arguments(
    layout: Layout, serving: Serving, number: int, *, master: str, master_port: int = MASTER_PORT
) -> tuple[str, ...]:
    """Program and options of one process of vLLM; ``master``: where its first process is reached."""
    stages, nodes = len(layout.layers), len(layout.vllm)
    arguments = [*serving.program, *(() if serving.program[-1] == "serve" else ("--model",)), serving.model]
    if layout.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(layout.tensor_parallel)]
    if stages > 1:
        arguments += ["--pipeline-parallel-size", str(stages)]
    if stages * layout.tensor_parallel > 1:
        arguments += ["--distributed-executor-backend", "mp"]
    if nodes > 1:
        arguments += ["--nnodes", str(nodes), "--node-rank", str(number)]
        arguments += ["--master-addr", master, "--master-port", str(master_port)]
    if number:
        arguments += ["--headless"]
    given = names_of(serving.options)
    bounds = {"--max-num-seqs": layout.seats, "--max-num-batched-tokens": layout.chunk_tokens + layout.seats}
    for name, value in bounds.items():
        if name not in given:
            arguments += [name, str(value)]
    if serving.dtype != "auto":
        arguments += ["--dtype", serving.dtype]
    if serving.limits_kv:
        arguments += ["--kv-cache-memory-bytes", str(layout.rank_kv_bytes)]
    if layout.workers:
        arguments += ["--kv-transfer-config", json.dumps(CONNECTOR)]
        if serving.device == "cuda":  # on a CPU the plugin takes the place of the one that there is
            arguments += ["--attention-backend", "CUSTOM"]
    return (*arguments, *serving.options)


def config_of(
    layout: Layout, places: Mapping[str, tuple[str, int]], *, key_file: str, executor: str = ""
) -> dict[str, Any]:
    """The plugin's file, of which `hetis.runtime.vllm.settings` has the form; ``places``: of worker processes."""
    workers = [
        {"name": one.name, "addresses": [_joined(*places[name]) for name in one.processes], "keyFile": key_file}
        for one in layout.workers
    ]
    steered = {"executor": executor} if executor else {}
    return {"apiVersion": "hetis/v1", "kind": "VllmWorkers", **steered, "workers": workers}


def worker_settings(process: Process, *, listen: str, device: str) -> dict[str, str]:
    """What a worker must be told wherever it runs, by option, but for its key."""
    return {"--name": process.name, "--listen": listen, "--kv-memory": f"{process.kv_bytes}B", "--device": device}


def partition_of(layout: Layout) -> dict[str, str]:
    """The variable by which vLLM gives each stage its layers."""
    return {PARTITION_VARIABLE: ",".join(map(str, layout.layers))} if len(layout.layers) > 1 else {}


def names_of(options: Sequence[str]) -> set[str]:
    """Names of vLLM's options among these words, which may be written with _ for -, and with = and a value."""
    return {word.partition("=")[0].replace("_", "-") for word in options if word.startswith("-")}


def as_json(commands: Sequence[Command]) -> str:
    """A list of objects, one per process."""
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
    """What each node's shell is to be told: files first, then a line per process."""
    return "\n".join(_lines(commands))


def _lines(commands: Sequence[Command]) -> Iterator[str]:
    for node in dict.fromkeys(command.process.node for command in commands):
        yield f"# on {node}"
        here = [command for command in commands if command.process.node == node]
        files = {path: text for command in here for path, text in command.files.items()}
        for path, text in files.items():
            folder = str(PurePosixPath(path).parent)
            yield f"mkdir -p {shlex.quote(folder)} && cat > {shlex.quote(path)} <<'YAML'\n{text}YAML"
        yield from (command.line for command in here)


def _places(layout: Layout, addresses: Addresses) -> Iterator[tuple[str, tuple[str, int]]]:
    """Host and port of every worker process, by name; ports are counted on each node."""
    used: Counter[str] = Counter()
    for process in layout.attention_workers:
        node = "" if addresses.all_here else process.node
        is_near = process.node == layout.caller(process).node
        yield process.name, (LOOPBACK if is_near else addresses.host(process.node), addresses.worker_port + used[node])
        used[node] += 1


def _reached(process: Process, processes: Sequence[Process], addresses: Addresses) -> str:
    is_alone = len({one.node for one in processes}) == 1
    return LOOPBACK if is_alone else addresses.host(process.node)


def _drain_s(options: Sequence[str]) -> float:
    """Seconds that vLLM lets running requests take when it is told to end."""
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in itertools.pairwise(words):
        if name.replace("_", "-") == "--shutdown-timeout" and value.isdecimal():
            return float(value)
    return 0.0


def _gpus(process: Process, device: str) -> dict[str, str]:
    """The GPUs by the driver's numbers, which a plan has; CUDA alone would count the fastest first."""
    if device == "cpu":
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, process.gpus))}


def _own(host: str) -> str:
    """What a process listens on that others reach at ``host``."""
    return host if _is_address(host) else ANY


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
