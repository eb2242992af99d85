"""``hetis-plan place`` as it comes, in a process of its own, for a fleet that is listed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORTEST = "azure_conv_2023"


@dataclass(frozen=True, slots=True)
class Case:
    """A fleet as (count of nodes, GPUs per node, type) each, a model, and its requests."""

    nodes: tuple[tuple[int, int, str], ...]
    model: str
    workload: str = SHORTEST
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        fleet = " + ".join(f"{count * size} {_short(gpu)}" for count, size, gpu in self.nodes)
        return f"{fleet}, {self.model}"

    def file(self, path: Path) -> str:
        """Write the fleet and return the path."""
        nodes = [
            {"name": f"{gpu.lower().split('-')[0]}-{i}", "count": count, "gpus": [{"type": gpu, "count": size}]}
            for i, (count, size, gpu) in enumerate(self.nodes)
        ]
        network = {"bandwidth": "100Gbps", "latency": "20us"}
        document = {"apiVersion": "hetis/v1", "kind": "Cluster", "name": "fleet", "nodes": nodes, "network": network}
        path.write_text(json.dumps(document), encoding="utf-8")
        return str(path)


def _short(gpu: str) -> str:
    """Return a GPU type without its form: ``A100-80``, ``RTX-3090``."""
    return re.sub(r"-(SXM2?|PCIe)|GB$", "", gpu)


def placed(*arguments: str) -> tuple[dict[str, Any] | None, float]:
    """Return the plan of ``hetis-plan place``, None if there is none, and the user seconds of the command."""
    before = os.times().children_user
    command = [sys.executable, "-m", "hetis.planner.cli", "place", *arguments, "-q", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return (document if document.get("replicas") else None), os.times().children_user - before
