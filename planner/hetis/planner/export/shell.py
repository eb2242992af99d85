"""Plain commands: a folder for each node with a script for each replica that has processes there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from hetis.engines.commands import Command
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.export.written import Written
from hetis.solver.plan import Role

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
mkdir -p logs
"""


def write_shell(launchable: Launchable) -> Written:
    """Return scripts for vLLM or SGLang."""
    files, shown = dict[str, str](), list[str]()
    for node, here in launchable.by_node().items():
        for _, one in here:
            commands = [command for command in one.commands if command.process.node == node]
            files |= {f"{node}/{path}": text for command in commands for path, text in command.files.items()}
            files[f"{node}/{one.name}.sh"] = _script(one, node, commands)
            shown.append(f"{node}/{one.name}.sh")
        files[f"{node}/start.sh"] = _everything(node, [one.name for _, one in here])
    return Written(
        files=files,
        shown=tuple(shown),
        endpoints={number: one.endpoint for number, one in launchable.replicas.items()},
        start=_HOW.format(key=_KEY if launchable.has_workers else ""),
        not_carried=tuple(not_reached(launchable)),
    )


def not_reached(launchable: Launchable) -> Iterator[str]:
    """Yield the features that commands lack if nodes are only known by name."""
    for one in launchable.replicas.values():
        address = one.commands[0].environment.get("VLLM_NIXL_SIDE_CHANNEL_HOST")
        if one.plan.role is Role.PREFILL and address is not None and not address.replace(".", "").isdigit():
            yield f"{one.name}: NIXL listens on an address, and {one.front_node} has none: give --node-address"


def _script(one: LaunchableReplica, node: str, commands: list[Command]) -> str:
    """Return a script that starts a replica's processes on one node; if one ends, the others and the script do, too."""
    whole = len({process.node for process in one.layout.processes}) == 1
    what = f"{one.name} of hetis' plan ({one.plan.role.value}): {'all' if whole else 'its part'} on {node}."
    lines = [_HEAD.format(what=what), _START]
    for command in commands:
        process = command.process
        log = shlex.quote(f"logs/{one.name}-{process.name.replace('/', '-')}.log")
        gpus = ",".join(map(str, process.gpus))
        lines += [
            f"# {process.kind.value} {process.name}: GPU {gpus} of {node}\n"
            f"env {command.line} >{log} 2>&1 &\n"
            "pids+=($!)\n"
        ]
    lines.append('wait -n "${pids[@]}"\n')
    return "\n".join(lines)


def _everything(node: str, names: list[str]) -> str:
    """Return a script that starts all replicas of a node; if one ends, the others keep running."""
    head = _HEAD.format(what=f"Everything of hetis' plan on {node}.")
    started = "".join(f"./{name}.sh &\npids+=($!)\n" for name in names)
    return f'{head}\n{_START}\n{started}\nwait "${{pids[@]}}"\n'


_HOW = """Copy the folder of each node there, and start `start.sh` in it, or `rN.sh` for a replica; logs are in `logs/`.
A script ends with its processes, and they with it, so that systemd or another supervisor can keep it running.

The front of a replica listens on its node's address; `VLLM_API_KEY` in the environment is what clients must say
(SGLang: give `-- --api-key KEY`).{key}"""
_KEY = """

`worker.key` must be in every node's folder, mode 0600, the same everywhere: the key of vLLM and its attention
workers."""
