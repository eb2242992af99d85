"""What is found in the files of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats.discovery import FleetSource
from hetis.formats.discovery.fleet import Discovered, discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError, Problem

INPUTS = Path(__file__).parent / "inputs"


PROBLEM = Problem(file="here", message="")


def found(*names: str, with_busy: bool = False, source: FleetSource = FleetSource.AUTO, **said: str) -> Discovered:
    inventory = read_inventory([str(INPUTS / name) for name in names], source, with_busy=with_busy)
    return discovered(inventory, name="test", said={name.casefold(): type_ for name, type_ in said.items()})


def gpus(fleet: Discovered) -> dict[str, dict[str, int]]:
    """Return the GPUs of every node by type."""
    return {
        group.node_name(i): {slots.gpu: slots.count for slots in group.gpus}
        for group in fleet.cluster.node_groups
        for i in range(group.count)
    }


def reason(fleet: Discovered, node: str) -> str:
    return " | ".join(line.removeprefix(f"{node}: ") for line in fleet.left_out if line.startswith(f"{node}: "))


def refused(tmp_path: Path, name: str, content: str, source: FleetSource = FleetSource.AUTO) -> str:
    """Return the error for an unusable file."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DocumentError) as error:
        discovered(read_inventory([str(path)], source), name="test", said={})
    return str(error.value).replace(str(tmp_path), "")
