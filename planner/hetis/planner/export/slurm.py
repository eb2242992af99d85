"""Slurm: a batch script per replica, which is a heterogeneous job on several nodes, and a step per process."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from hetis.engines.commands import Command
from hetis.engines.layout import ProcessKind
from hetis.planner.export.kubernetes import types_of_nodes
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.export.shell import not_reached
from hetis.planner.export.written import Written


def write_slurm(launchable: Launchable) -> Written:
    """Return a script for `sbatch` for each replica, and one that submits them all."""
    files, left_out = dict[str, str](), dict[int, tuple[str, ...]]()
    for number, one in launchable.replicas.items():
        shared = sorted({p.name.partition(".")[0] for p in one.layout.attention_workers if p.sharing > 1})
        if shared:
            left_out[number] = (f"several ranks have KV on {', '.join(shared)}: steps of a job do not share GPUs",)
            continue
        files |= {path: text for command in one.commands for path, text in command.files.items()}
        files[f"{one.name}.sbatch"] = _script(launchable, one)
    launchable = launchable.without(left_out)
    shown = tuple(f"{one.name}.sbatch" for one in launchable.replicas.values())
    submitted = (f"sbatch {path}" for path in shown)
    head = ("#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")"', "mkdir -p logs")
    files["submit.sh"] = "\n".join((*head, *submitted, ""))
    return Written(
        files=files,
        shown=shown,
        endpoints={number: one.endpoint for number, one in launchable.replicas.items()},
        start=_HOW,
        not_carried=(*not_reached(launchable), *_chosen_by_slurm(launchable)),
        left_out=left_out,
    )


def _script(launchable: Launchable, one: LaunchableReplica) -> str:
    """Return a script with a component for each node, which has all GPUs of the replica there."""
    nodes = list(dict.fromkeys(process.node for process in one.layout.processes))
    lines = ["#!/usr/bin/env bash", f"#SBATCH --job-name={launchable.settings.name}-{one.name}"]
    lines.append("#SBATCH --output=logs/%x-%j.log")
    for number, node in enumerate(nodes):
        gpus = sum(len(process.gpus) for process in one.layout.processes if process.node == node)
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH --nodelist={node}", "#SBATCH --nodes=1", f"#SBATCH --gpus-per-node={gpus}"]
    lines += ["set -euo pipefail", _STOP]
    for command in one.commands:
        lines += _step(one, command, nodes)
    return "\n".join((*lines, "wait -n", ""))


def _step(one: LaunchableReplica, command: Command, nodes: list[str]) -> Iterator[str]:
    process = command.process
    # Slurm hides the other GPUs, and numbers those of a step from 0.
    environment = {name: text for name, text in command.environment.items() if not name.startswith("CUDA_")}
    place = [f"--het-group={nodes.index(process.node)}"] if len(nodes) > 1 else []
    log = f"logs/{one.name}-{process.name.replace('/', '-')}-%j.log"
    step = ["srun", *place, "--nodes=1", "--ntasks=1", "--exact", f"--gpus={len(process.gpus)}", f"--output={log}"]
    kind = "further stage" if process.kind is ProcessKind.SERVER_STAGE else process.kind.value
    devices = ",".join(f"{process.node}/{gpu}" for gpu in process.gpus)
    yield f"# {kind} {process.name} on {devices}"
    told = [f"{name}={shlex.quote(text)}" for name, text in environment.items()]
    yield " ".join([*map(shlex.quote, step), "env", *told, shlex.join(command.shown), "&"])


def _chosen_by_slurm(launchable: Launchable) -> Iterator[str]:
    """Yield a sentence per mixed node of which a job has a part: Slurm chooses the GPUs."""
    for node, types in types_of_nodes(launchable.plan).items():
        if len(types) > 1 and node in launchable.by_node():
            yield f"node {node} has {' and '.join(sorted(types))}: which of them a step gets, Slurm says"


_STOP = """stop() { trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait || true; }
trap stop EXIT"""
_HOW = """Put this folder where every node sees it, and start `submit.sh`, or `sbatch rN.sbatch` for one replica. A
replica is one job on the plan's nodes; when one of its processes ends, the job does. The front listens on its node's
address; `VLLM_API_KEY` in the environment of `sbatch` is what clients must say. Where replicas have attention workers,
`worker.key` in this folder is their key, mode 0600."""
