"""The traffic demo up to its first change: traffic doubles, and a plan with more cards is proposed and in force."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_traffic_that_doubles_is_followed_by_a_plan_with_a_bound() -> None:
    command = [sys.executable, "-m", "examples.demo_traffic", "--json", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    change = json.loads(done.stdout)[-1]
    assert "requests/s are expected" in change["reason"]
    assert 0 < change["gain"] <= change["bound"]
    assert change["steps"][0].startswith("Start ")
    assert change["cards"] > 2
    assert "every process has been stopped" in done.stderr
