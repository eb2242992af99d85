"""The processes of the demo: one planner, and one agent with a simulated engine per node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from examples.processes import DemoProcesses

START_TIMEOUT_S = 300.0  # the first start on a machine compiles kernels


class Processes(DemoProcesses):
    """The processes that the demo starts."""

    def start_agent(self, node: str, *, server: str, devices: str, control: Path) -> None:
        command = [
            *("hetis-agent", "--server", server, "--node", f"clusters/demo/nodes/{node}"),
            *("--engine", "simulated", "--simulated-devices", devices, "--control", str(control)),
            *("--state-dir", str(self.folder / "agents" / node), "--seed", "1"),
        ]
        self._start(node, command)

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait like `DemoProcesses.wait_until`, with time for such processes to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)
