"""The traffic demo to its end: a plan with more cards serves twice the traffic, and cards go back when it falls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_traffic_that_doubles_and_falls_is_followed_by_plans_with_bounds() -> None:
    command = [sys.executable, "-m", "examples.demo_traffic", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout)
    cards = [one["cards"] for one in changes]
    most = changes[cards.index(max(cards))]
    assert "requests/s are expected" in most["reason"]
    assert most["steps"][0].startswith("Start ")
    assert max(cards) > 2
    assert cards[-1] < max(cards)
    assert changes[-1]["steps"][0].startswith("Stop ")
    assert all(0 < one["gain"] <= one["bound"] for one in changes)
    assert "every process has been stopped" in done.stderr
