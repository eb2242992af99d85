"""Command lines of hetis-launch, which restarts processes, controls attention workers and stops them in order."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from hetis.formats.documents import dump
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.export.shell import not_reached
from hetis.planner.export.written import Written

PLAN_FILE = "plan.json"


def write_hetis_launch(launchable: Launchable) -> Written:
    """Return the plan, and for every node a script with a hetis-launch for each replica that has processes there."""
    files, shown = {PLAN_FILE: dump(launchable.plan, "json")}, list[str]()
    for node, here in launchable.by_node().items():
        path = f"{node}.sh"
        files[path] = _script(launchable, node, here)
        shown.append(path)
    return Written(
        files=files,
        shown=tuple(shown),
        endpoints={number: one.endpoint for number, one in launchable.replicas.items()},
        start=_HOW,
        not_carried=tuple(not_reached(launchable)),
    )


def _script(launchable: Launchable, node: str, here: list[tuple[int, LaunchableReplica]]) -> str:
    lines = ["#!/usr/bin/env bash", f"# Everything of hetis' plan on {node}.", "set -euo pipefail"]
    lines += [
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        "pids=()",
        """trap 'kill "${pids[@]}" 2>/dev/null; wait' TERM INT""",
    ]
    for number, one in here:
        lines += [f"{shlex.join(words(launchable, number, one, node))} &", "pids+=($!)"]
    return "\n".join((*lines, 'wait "${pids[@]}"', ""))


def words(launchable: Launchable, number: int, one: LaunchableReplica, node: str) -> list[str]:
    """Return the command line that runs a replica's part of a node."""
    addresses, settings = one.addresses, launchable.settings
    told = ["hetis-launch", "processes", "--plan", PLAN_FILE, "--replica", str(number), "--model", one.serving.model]
    told += ["--engine", launchable.engine.value, "--node", node, "--folder", one.name, "--kv-tokens"]
    told += [str(one.layout.kv_tokens), *_if_set("--dtype", settings.dtype, "auto")]
    told += [*_if_set("--device", settings.device, "cuda"), *_if_set("--vllm", shlex.join(settings.program), "")]
    for name in dict.fromkeys(process.node for process in one.layout.processes):
        if name in settings.hosts:
            told += ["--node-address", f"{name}={settings.hosts[name]}"]
    told += ["--worker-port", str(addresses.worker_port), "--master-port", str(addresses.master_port)]
    told += ["--kv-port", str(addresses.kv_port), "--key-file", addresses.key_file, "--"]
    told += ["--host", addresses.host(one.front_node), "--port", str(one.port)]
    return [*told, *_if_set("--served-model-name", settings.served_name, ""), *settings.options]


def _if_set(name: str, value: str, unset: str) -> Iterable[str]:
    return () if value == unset else (name, value)


_HOW = """Copy the folder to every node, and start `NODE.sh` there. `hetis-launch` (`pip install 'hetis[launch]'`)
starts again what ends. Where replicas have attention workers, `worker.key` is their key: a file of mode 0600, the same
everywhere."""
