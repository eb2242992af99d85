"""From planned processes to command lines: who is told what, and where each is reached."""

from __future__ import annotations

import ipaddress
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hetis.runtime.replica.processes import PlannedProcess, ProcessKind
from hetis.runtime.replica.roles import PromptSite, PromptSites

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
STORE_PORT, KV_PORT = 8500, 8700
PROGRAMS = {
    ProcessKind.ENGINE: ("hetis-serve",),
    ProcessKind.STAGE: ("python", "-m", "hetis.runtime.stages"),
    ProcessKind.ATTENTION_WORKER: ("python", "-m", "hetis.runtime.worker"),
}
_MODULES = {
    ProcessKind.ENGINE: "hetis.runtime.server.main",
    ProcessKind.STAGE: "hetis.runtime.stages",
    ProcessKind.ATTENTION_WORKER: "hetis.runtime.worker",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What the engine is told beside its workers; ``options`` are those of `hetis-serve` as they stand.

    ``prompts``: of a replica with a role, where prompts are computed.
    """

    plan: str
    replica: int
    model: str
    options: tuple[str, ...] = ()
    prompts: PromptSites = field(default_factory=PromptSites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where processes reach each other.

    Attributes:
        hosts: of nodes, an address or a name; a node that is not here is called by its own name.
        store_port: of the engine's node, where workers say where they are.
        kv_port: of the engine of replica 0, where it computes prompts for others; of the replicas after it the next.
        all_here: every process is on this machine, whatever node the plan says.
    """

    hosts: Mapping[str, str] = field(default_factory=dict)
    store_port: int = STORE_PORT
    kv_port: int = KV_PORT
    all_here: bool = False

    def host(self, node: str) -> str:
        return self.hosts.get(node, node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How one process is started: its options in order, and what its environment needs beside what is there."""

    process: PlannedProcess
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def shown(self) -> tuple[str, ...]:
        """As users write it."""
        return (*PROGRAMS[self.process.kind], *self.arguments)

    @property
    def here(self) -> tuple[str, ...]:
        """With the Python that runs now."""
        return (sys.executable, "-m", _MODULES[self.process.kind], *self.arguments)

    @property
    def line(self) -> str:
        """For a shell."""
        return " ".join([*(f"{name}={shlex.quote(text)}" for name, text in self.environment.items()), self._joined])

    @property
    def _joined(self) -> str:
        return shlex.join(self.shown)


def commands_of(
    processes: Sequence[PlannedProcess], engine: EngineArguments, addresses: Addresses, *, worker_device: str
) -> tuple[Command, ...]:
    """The command of every process, in the order of the list.

    What listens does so on the loopback where nobody else needs it: with every process on one node, and workers beside
    their stage, which then share memory with it. Other processes, and the store they look into, listen on the address
    that their node has in ``addresses``; where that is a name, on all addresses of the node, since a name may mean
    another address there than elsewhere.
    """
    primary = processes[0]
    is_alone = addresses.all_here or all(process.node == primary.node for process in processes)
    store_host = LOOPBACK if is_alone else addresses.host(primary.node)
    store = _joined(store_host, addresses.store_port)
    opened = _joined(_own(store_host), addresses.store_port)
    told = replace(engine, options=(*_prompt_options(engine.prompts, addresses), *engine.options))
    commands = []
    for process in processes:
        if process.kind is ProcessKind.ENGINE:
            arguments = engine_arguments(told, processes, opened, device=worker_device)
        else:
            is_near = is_alone or process.node == _caller(process, processes).node
            listens = _listens(LOOPBACK if is_near else addresses.host(process.node))
            settings = settings_of(process, store, device=worker_device, model=engine.model)
            arguments = as_options(settings | listens)
        commands.append(Command(process=process, arguments=arguments, environment=_environment(process, worker_device)))
    return tuple(commands)


def engine_arguments(
    engine: EngineArguments, processes: Sequence[PlannedProcess], store: str, *, device: str
) -> tuple[str, ...]:
    """Options of `hetis-serve` for the engine of these processes, whose store listens there."""
    arguments = ["--model", engine.model, "--plan", engine.plan, "--replica", str(engine.replica)]
    arguments += ["--compute", device]
    if len(processes) > 1:
        arguments += ["--store", store]
    for process in processes:
        if process.kind is ProcessKind.STAGE:
            arguments += ["--stage", f"{process.name}={process.stage}"]
        elif process.kind is ProcessKind.ATTENTION_WORKER:
            arguments += ["--worker", process.name]
    return (*arguments, *engine.options)


def _prompt_options(sites: PromptSites, addresses: Addresses) -> tuple[str, ...]:
    """What `hetis-serve` is told of engines that compute prompts: on the loopback where all of them are on one node."""

    def at(site: PromptSite, *, own: bool) -> str:
        host = LOOPBACK if addresses.all_here or site.is_near else addresses.host(site.node)
        return _joined(_own(host) if own else host, addresses.kv_port + site.replica)

    listens = ("--kv-listen", at(sites.own, own=True)) if sites.own is not None else ()
    asks = (text for site in sites.others for text in ("--prefill", at(site, own=False)))
    return (*listens, *asks)


def settings_of(process: PlannedProcess, store: str, *, device: str, model: str) -> dict[str, str]:
    """What a stage or a worker must be told wherever it runs, by option; the engine tells a stage the rest."""
    told = {"--name": process.name, "--store": store}
    if process.kind is ProcessKind.STAGE:
        return told | {"--model": model, "--device": device}
    return told | {"--kv-memory": f"{process.kv_bytes}B", "--device": device}


def as_options(settings: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(text for setting in settings.items() for text in setting)


def _caller(process: PlannedProcess, processes: Sequence[PlannedProcess]) -> PlannedProcess:
    """Who connects to a stage or a worker: the engine to its stages, and each stage to its workers."""
    if process.kind is ProcessKind.STAGE:
        return processes[0]
    return next(other for other in processes if other.stage == process.stage)


def _listens(host: str) -> dict[str, str]:
    if host == LOOPBACK:
        return {}  # as it is without being asked
    own = _own(host)
    return {"--listen": _joined(own, 0)} | ({} if own == host else {"--advertise": host})


def _environment(process: PlannedProcess, worker_device: str) -> dict[str, str]:
    if worker_device == "cpu":
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(number) for number in process.gpus)}


def _own(host: str) -> str:
    """What a process listens on that others reach at ``host``."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return ANY
    return host


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
