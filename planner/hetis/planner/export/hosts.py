"""Targets that start processes on hosts: scripts for vLLM and SGLang, hetis-launch, compose, Slurm."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from hetis.commands.endpoints import is_ip
from hetis.engines.commands import Command
from hetis.engines.layout import Process, ProcessKind
from hetis.engines.pods import CACHE
from hetis.engines.versions import Engine
from hetis.formats.documents import dump, yaml_text
from hetis.formats.errors import DocumentError, Problem
from hetis.planner.export.pair_routers import KEY_VARIABLE, PORT, pair_groups, router_of, router_words, unweighted
from hetis.planner.export.pairs import pairs_beyond_the_plan
from hetis.planner.export.replicas import (
    Launchable,
    LaunchableReplica,
    Written,
    engine_image,
    missing_images,
    worker_image,
)


def _written(
    launchable: Launchable, files: Mapping[str, str], shown: Iterable[str], start: str, not_carried: Iterable[str] = ()
) -> Written:
    """Return files for a target that starts processes on hosts, where the front ends of replicas listen."""
    endpoints = {number: one.endpoint for number, one in launchable.replicas.items()}
    groups = pair_groups(launchable)
    routers = {} if not groups else {_ROUTER: _router_script(launchable, endpoints)}
    return Written(
        files={**files, **routers},
        shown=tuple(shown),
        endpoints=endpoints,
        routers=tuple(f"127.0.0.1:{PORT + group.number}" for group in groups),
        start=f"{start}{_HOW_ROUTERS.format(router=router_of(launchable.engine)) if groups else ''}",
        not_carried=(
            *_not_reached(launchable),
            *unweighted(launchable),
            *pairs_beyond_the_plan(launchable, "the router of pairs", in_groups=True),
            *not_carried,
        ),
    )


def _not_reached(launchable: Launchable) -> Iterator[str]:
    """Yield the features that the commands lack because a node is known only by name and has no address."""
    for one in launchable.replicas.values():
        address = one.commands[0].environment.get("VLLM_NIXL_SIDE_CHANNEL_HOST")
        if address is not None and not is_ip(address):
            yield f"{one.name}: NIXL needs an address to listen on, but {one.front_node} has none: give --node-address"


# --- routers of pairs, beside nginx


_ROUTER = "router/start.sh"
_HOW_ROUTERS = """

A request takes a prefill and a decode replica: `router/start.sh` starts a router for each group of replicas that the
plan's routes join ({router}, `pip install` it), on 127.0.0.1. `router/nginx.conf` stands in front of these routers and
of the other replicas, on the same machine."""


def _router_script(launchable: Launchable, endpoints: Mapping[int, str]) -> str:
    """Return a script that starts the router of each group; if one ends, the others and the script do, too."""
    key = f'{KEY_VARIABLE}="${{VLLM_API_KEY:-}}" ' if launchable.engine is not Engine.SGLANG else ""
    lines = (
        key + shlex.join(router_words(launchable, group, endpoints, host="127.0.0.1"))
        for group in pair_groups(launchable)
    )
    return _script("The routers of hetis' plan: each sends a request to a prefill and a decode replica.", lines)


# --- scripts: a folder per node, with a script for each replica that has processes there


_HEAD = """#!/usr/bin/env bash
# {what}
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
"""
_START = """pids=()
stop() {
  trap - EXIT INT TERM
  kill "${pids[@]}" 2>/dev/null || true
  wait || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
"""
_END = 'wait -n "${pids[@]}"\n'  # exits with the process's status, for a supervisor; the others are stopped


def write_shell(launchable: Launchable) -> Written:
    files, shown = dict[str, str](), list[str]()
    for node, here in launchable.by_node().items():
        for _, one in here:
            commands = [command for command in one.commands if command.process.node == node]
            files |= {f"{node}/{path}": text for command in commands for path, text in command.files.items()}
            files[f"{node}/{one.name}.sh"] = _shell_script(one, node, commands)
            shown.append(f"{node}/{one.name}.sh")
        files[f"{node}/start.sh"] = _everything(node, (f"./{one.name}.sh" for _, one in here))
    return _written(launchable, files, shown, _HOW_SCRIPTS.format(key=_KEY if launchable.has_workers else ""))


def _shell_script(one: LaunchableReplica, node: str, commands: list[Command]) -> str:
    """Return a script that starts a replica's processes on one node; if one ends, the others and the script do, too."""
    whole = len({process.node for process in one.layout.processes}) == 1
    what = f"{one.name} of hetis' plan ({one.plan.role.value}): {'all' if whole else 'its part'} on {node}."
    lines = [_HEAD.format(what=what), f"{_START}mkdir -p logs\n"]
    for command in commands:
        process = command.process
        log = shlex.quote(f"logs/{one.name}-{process.name.replace('/', '-')}.log")
        gpus = ",".join(map(str, process.gpus))
        lines += [
            f"# {process.kind.value} {process.name}: GPU {gpus} of {node}\n"
            f"env {command.line} >{log} 2>&1 &\n"
            "pids+=($!)\n"
        ]
    return "\n".join((*lines, _END))


def _everything(node: str, lines: Iterable[str]) -> str:
    """Return a script that runs ``lines``, one per replica of a node."""
    return _script(f"Everything of hetis' plan on {node}: it ends when one of its replicas does.", lines)


def _script(what: str, lines: Iterable[str]) -> str:
    """Return a script that runs ``lines``; if one ends, the others and the script do, too."""
    head = _HEAD.format(what=what)
    started = "".join(f"{line} &\npids+=($!)\n" for line in lines)
    return f"{head}\n{_START}\n{started}\n{_END}"


_HOW_SCRIPTS = """\
Copy the folder of each node there, and start `start.sh` in it, or `rN.sh` for a replica; logs are in `logs/`.
A script ends with its processes, and they with it, so that systemd or another supervisor can keep it running: best each
`rN.sh`, since `start.sh` ends all replicas of the node when one of them ends.

The front of a replica listens on its node's address; `VLLM_API_KEY` in the environment is the key that clients send
(SGLang: give `-- --api-key KEY`).{key}"""
_KEY = """

`worker.key` must be in every node's folder, mode 0600, the same everywhere: the key of vLLM and its attention
workers."""


# --- hetis-launch, which restarts processes, controls attention workers and stops them in order


PLAN_FILE = "plan.json"


def write_hetis_launch(launchable: Launchable) -> Written:
    """Return the plan, and for every node a script that runs hetis-launch for each replica with processes there."""
    files, shown = {PLAN_FILE: dump(launchable.plan, "json")}, list[str]()
    for node, here in launchable.by_node().items():
        path = f"{node}.sh"
        files[path] = _everything(node, (shlex.join(words(launchable, number, one, node)) for number, one in here))
        shown.append(path)
    return _written(launchable, files, shown, _HOW_LAUNCH)


def words(launchable: Launchable, number: int, one: LaunchableReplica, node: str) -> list[str]:
    addresses, settings = one.addresses, launchable.settings
    words = ["hetis-launch", "processes", "--plan", PLAN_FILE, "--replica", str(number), "--model", one.serving.model]
    words += ["--engine", launchable.engine.value, "--node", node, "--folder", one.name]
    if one.layout.fixes_kv or settings.device != "cuda":
        words += ["--kv-tokens", str(one.layout.kv_tokens)]
    words += _if_set("--dtype", settings.dtype, "auto")
    words += _if_set("--device", settings.device, "cuda")
    words += _if_set("--vllm", shlex.join(shlex.split(settings.program)), "")
    for name in dict.fromkeys(process.node for process in one.layout.processes):
        if name in settings.hosts:
            words += ["--node-address", f"{name}={settings.hosts[name]}"]
    words += ["--worker-port", str(addresses.worker_port), "--master-port", str(addresses.master_port)]
    words += ["--kv-port", str(addresses.kv_port), "--key-file", addresses.key_file]
    words += [*(["--encrypt"] if one.serving.encrypts else []), "--"]
    words += ["--host", addresses.host(one.front_node), "--port", str(one.port)]
    return [*words, *_if_set("--served-model-name", settings.served_name, ""), *settings.engine_options]


def _if_set(name: str, value: str, unset: str) -> Iterable[str]:
    return () if value == unset else (name, value)


_HOW_LAUNCH = """\
Copy the folder to every node, and start `NODE.sh` there. `hetis-launch` (`pip install 'hetis[launch]'`)
starts again what ends. Where it cannot, it ends, and `NODE.sh` with it and the node's other replicas, so that a
supervisor hears of it. Where replicas have attention workers, `worker.key` is their key: a file of mode 0600, the same
everywhere."""


# --- compose: a file per node, with a service for each process on the host's network


_CACHE_VOLUME = "models"
_CONFIG, _KEY_FILE = "/etc/hetis/workers.yaml", "/run/secrets/worker-key"


def write_compose(launchable: Launchable) -> Written:
    """Return a folder for each node with its compose.yaml and the plugin's files. Raises DocumentError with every
    missing image.
    """
    if missing := missing_images(launchable):
        raise DocumentError(Problem(file="export", message=message) for message in missing)
    files, shown = dict[str, str](), list[str]()
    for node, here in launchable.by_node().items():
        services, secret = dict[str, Any](), False
        for _, one in here:
            inside = replace(one, addresses=replace(one.addresses, config_file=_CONFIG, key_file=_KEY_FILE))
            for command in inside.commands:
                if command.process.node == node:
                    # Names of services must not contain slashes or dots.
                    name = re.sub(r"[/.+]", "-", f"{one.name}-{command.process.name}")
                    services[name] = _service(launchable, one, command)
                    files |= {f"{node}/{one.addresses.config_file}": text for text in command.files.values()}
                    secret = secret or bool(command.secrets)
        whole: dict[str, Any] = {"name": launchable.settings.name, "services": services}
        if not launchable.settings.model_cache:
            whole["volumes"] = {_CACHE_VOLUME: {}}
        if secret:
            whole["secrets"] = {"worker-key": {"file": "./worker.key"}}
        files[f"{node}/compose.yaml"] = yaml_text(whole)
        shown.append(f"{node}/compose.yaml")
    return _written(launchable, files, shown, _HOW_COMPOSE, launchable.restarted_alone())


def _service(launchable: Launchable, one: LaunchableReplica, command: Command) -> dict[str, Any]:
    """Return the service of a process. ``command`` names files by their places in the container, ``one`` outside it."""
    process = command.process
    is_worker = process.kind is ProcessKind.ATTENTION_WORKER
    mounts = [(f"./{one.addresses.config_file}", inside) for inside in command.files]
    if one.serving.model.startswith("/") and not is_worker:
        mounts.append((one.serving.model, one.serving.model))
    service: dict[str, Any] = {
        "image": worker_image(launchable, one) if is_worker else engine_image(launchable, one),
        # Replaces the image's entry point: these words are the whole command.
        "entrypoint": list(command.shown[:1]),
        "command": list(command.shown[1:]),
        "environment": {**command.environment, **_seen_gpus(process)},
        "network_mode": "host",
        "ipc": "host",
        "restart": "unless-stopped",
        "stop_grace_period": f"{command.stops_s:g}s",
        "labels": {"hetis.devices": ",".join(f"{process.node}/{gpu}" for gpu in process.gpus)},
        **_given_gpus(process),
    }
    if mounts:  # not as SOURCE:TARGET, since a path may have colons
        service["volumes"] = [
            {"type": "bind", "source": source, "target": target, "read_only": True} for source, target in mounts
        ]
    if not is_worker:  # models that engines download stay when containers go
        kept = {"type": "bind", "source": launchable.settings.model_cache, "bind": {"create_host_path": True}}
        volume = kept if launchable.settings.model_cache else {"type": "volume", "source": _CACHE_VOLUME}
        service.setdefault("volumes", []).append({**volume, "target": CACHE})
        service["environment"]["HF_HOME"] = CACHE
    if command.secrets:
        service["secrets"] = ["worker-key"]
    if process.kind is ProcessKind.SERVER:
        test = ["CMD", "python3", "-c", _health_check(one)]
        service["healthcheck"] = {"test": test, "interval": "10s", "timeout": "5s", "start_period": "30m"}
    elif process.kind is ProcessKind.SERVER_STAGE:  # it serves no port, which the image's own check would ask
        service["healthcheck"] = {"disable": True}
    service = _without_variables(service)
    if process.kind is ProcessKind.SERVER and launchable.engine is not Engine.SGLANG:
        service["environment"]["VLLM_API_KEY"] = "${VLLM_API_KEY:-}"
    if not is_worker:
        service["environment"]["HF_TOKEN"] = None  # passed on if it is set
    return service


def _health_check(one: LaunchableReplica) -> str:
    """Return a Python script that fails unless the front end answers; its certificate may be for another name."""
    if one.serving.has_tls:
        unverified = "context=ssl._create_unverified_context()"
        return f"import ssl, urllib.request as u; u.urlopen('https://{one.endpoint}/health', {unverified})"
    return f"import urllib.request as u; u.urlopen('http://{one.endpoint}/health')"


def _without_variables(value: Any) -> Any:
    """Return a value in which every $ is escaped: compose would replace $NAME by variables of its own environment."""
    if isinstance(value, dict):
        return {key: _without_variables(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_variables(each) for each in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _given_gpus(process: Process) -> dict[str, Any]:
    """Return the fields that give a service its GPUs. AMD's get all devices; a variable selects those that are used."""
    if process.vendor == "AMD":
        return {
            "devices": [f"{path}:{path}" for path in ("/dev/kfd", "/dev/dri")],
            "group_add": ["video"],
            "security_opt": ["seccomp=unconfined"],
        }
    reserved = {"driver": "nvidia", "device_ids": [str(gpu) for gpu in sorted(process.gpus)], "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [reserved]}}}}


def _seen_gpus(process: Process) -> dict[str, str]:
    """Return the environment that orders the ranks; a container with some of NVIDIA's GPUs numbers them from 0."""
    numbers = process.gpus if process.vendor == "AMD" else [sorted(process.gpus).index(gpu) for gpu in process.gpus]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))}


_HOW_COMPOSE = """\
Copy the folder of each node there: `docker compose up -d`. Containers use the host's network and the GPUs of
the plan by index (NVIDIA container toolkit; AMD's devices, whose groups the image's user must be in).
`VLLM_API_KEY` in the environment, or in `.env`, is the key that clients send (SGLang: give `-- --api-key KEY`), and
`HF_TOKEN` there is the token by which engines download gated models.
Where replicas have attention workers, `worker.key` beside the file is their key: mode 0600, owned by the user that
the images run as, 10001 in ours (`sudo chown 10001 worker.key`)."""


# --- Slurm: a batch script per replica (a heterogeneous job if it spans several nodes), and a step per process


def why_no_job(_: Launchable, one: LaunchableReplica) -> Iterator[str]:
    """Yield why a replica cannot be a job of Slurm."""
    if shared := sorted({p.name.partition(".")[0] for p in one.layout.attention_workers if p.sharing > 1}):
        yield f"several ranks have KV on {', '.join(shared)}: steps of a job do not share GPUs"


def write_slurm(launchable: Launchable) -> Written:
    """Return a script for `sbatch` for each replica, and a script that submits them all."""
    files = dict[str, str]()
    for one in launchable.replicas.values():
        files |= {path: text for command in one.commands for path, text in command.files.items()}
        files[f"{one.name}.sbatch"] = _batch_script(launchable, one)
    shown = tuple(f"{one.name}.sbatch" for one in launchable.replicas.values())
    submitted = (f"sbatch {path}" for path in shown)
    head = ("#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")"')
    files["submit.sh"] = "\n".join((*head, *submitted, ""))
    chosen = launchable.mixed_nodes("which of them a step gets, Slurm decides")
    return _written(launchable, files, shown, _HOW_SLURM, chosen)


def _batch_script(launchable: Launchable, one: LaunchableReplica) -> str:
    """Return a script with a component for each node, which requests the replica's GPUs there, and CPUs for them.

    Nodes are not requested whole (``--exclusive``): other replicas of the plan may be on them.
    """
    nodes = list(dict.fromkeys(process.node for process in one.layout.processes))
    lines = ["#!/usr/bin/env bash", f"#SBATCH --job-name={launchable.name_of(one)}"]
    lines.append("#SBATCH --requeue")  # after the loss of a node
    lines.append("#SBATCH --open-mode=append")
    lines.append("#SBATCH --signal=B:TERM@120")  # engines finish what runs before the job's time ends
    lines.append("#SBATCH --output=%x-%j.log")  # not in logs/: if the folder is missing, the job fails silently
    for number, node in enumerate(nodes):
        here = [process for process in one.layout.processes if process.node == node]
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH --nodelist={node}", "#SBATCH --nodes=1", f"#SBATCH --ntasks={len(here)}"]
        lines.append(f"#SBATCH --gpus-per-node={sum(len(process.gpus) for process in here)}")
        lines.append(f"#SBATCH --cpus-per-gpu={_CPUS_PER_GPU}")
        lines += [f"#SBATCH {word}" for word in shlex.split(launchable.settings.sbatch)]
    lines += ["set -euo pipefail", "mkdir -p logs", _STOP]
    for command in one.commands:
        lines += _step(one, command, nodes)
    return "\n".join((*lines, "wait -n", ""))


# vLLM's front end and scheduler keep a CPU busy each, and so does every rank. Few machines with GPUs have less.
_CPUS_PER_GPU = 4


def _step(one: LaunchableReplica, command: Command, nodes: list[str]) -> Iterator[str]:
    process = command.process
    # Slurm hides the other GPUs, and numbers those of a step from 0.
    environment = {name: text for name, text in command.environment.items() if not name.startswith("CUDA_")}
    place = [f"--het-group={nodes.index(process.node)}"] if len(nodes) > 1 else []
    log = f"logs/{one.name}-{process.name.replace('/', '-')}-%j.log"
    # Whatever a step does not specify, it takes from the job: all GPUs and all memory of the node, so that other steps
    # wait for it to end. GPUs per task are for --cpus-per-gpu, which counts by those; --mem=0 shares the job's memory.
    gpus = [f"--gpus-per-{part}={len(process.gpus)}" for part in ("node", "task")]
    step = ["srun", *place, "--nodes=1", "--ntasks=1", "--exact", *gpus, "--mem=0", f"--output={log}"]
    kind = "further stage" if process.kind is ProcessKind.SERVER_STAGE else process.kind.value
    devices = ",".join(f"{process.node}/{gpu}" for gpu in process.gpus)
    yield f"# {kind} {process.name} on {devices}"
    words = [f"{name}={shlex.quote(text)}" for name, text in environment.items()]
    yield " ".join([*map(shlex.quote, step), "env", *words, shlex.join(command.shown), "&"])


_STOP = """stop() { trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait || true; }
trap stop EXIT"""
_HOW_SLURM = """\
Put this folder where every node sees it, and start `submit.sh`, or `sbatch rN.sbatch` for one replica. A
replica is one job on the plan's nodes; when one of its processes ends, the job does. The front listens on its node's
address; `VLLM_API_KEY` in the environment of `sbatch` is the key that clients send. Where replicas have attention
workers, `worker.key` in this folder is their key, mode 0600.

A job has 4 CPUs for each of its GPUs, and the memory that your partition gives by default. `sbatch` reads other
numbers from its environment: `SBATCH_CPUS_PER_GPU=16 SBATCH_MEM_PER_GPU=100G ./submit.sh`. Partition and time are given
with `export --sbatch '--partition=gpu --time=7-0'`; jobs are queued again after the loss of a node. vLLM needs at least
two CPUs, and one for each GPU. What a job says
is in `NAME-JOB.log`, what its processes say in `logs/`."""
