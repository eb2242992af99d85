"""Every part of the demo's story happens, and nothing is left running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_cluster_demo_tells_its_whole_story(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo_cluster", "--json", "--keep", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["plan"]["active"]
    assert seen["plan"]["gap"] < 1e-6
    assert seen["plan"]["attention_workers"] >= 2  # the story moves heads between them
    assert seen["pressure"]["after"] > seen["pressure"]["before"]
    assert seen["slow"]["after_s"] < seen["slow"]["before_s"]
    assert seen["slow"]["moves"] > 0
    assert seen["killed"]["finished_since"] > 3
    assert seen["planner"]["steps_meanwhile"] > 0
    assert "gone" in seen["recovered"]["proposal"]
    assert "every process has been stopped" in done.stderr
    traceback = [path.name for path in tmp_path.glob("*.log") if "Traceback" in path.read_text(encoding="utf-8")]
    assert not traceback
