"""The processes of a replica for other programs and for shells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from hetis.runtime.replica.commands import Command


def as_json(commands: Sequence[Command]) -> str:
    """A list of objects, one per process, in the order of the plan."""
    rows = [
        {
            "name": command.process.name,
            "kind": command.process.kind.value,
            "node": command.process.node,
            "gpus": list(command.process.gpus),
            "kv_bytes": command.process.kv_bytes,
            "command": list(command.shown),
            "environment": dict(command.environment),
        }
        for command in commands
    ]
    return json.dumps(rows, indent=2)


def as_shell(commands: Sequence[Command]) -> str:
    """A line per process, those of a node together under its name."""
    return "\n".join(_lines(commands))


def _lines(commands: Sequence[Command]) -> Iterator[str]:
    for node in dict.fromkeys(command.process.node for command in commands):
        yield f"# on {node}"
        yield from (command.line for command in commands if command.process.node == node)
