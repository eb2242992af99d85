"""The processes of a demo are stopped however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = """
import sys, time
from pathlib import Path
from examples.processes import DemoProcesses

with DemoProcesses(Path(sys.argv[1])) as processes:
    print(processes._start("sleeper", ["/bin/sleep", "600"]).pid, flush=True)
    time.sleep(600)
"""


def test_a_demo_that_gets_sigterm_stops_its_processes(tmp_path: Path) -> None:
    """In the past they ran on, a planner and its agents among them."""
    with subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        sleeper = int(demo.stdout.readline())
        demo.terminate()
        assert demo.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper, 0)
