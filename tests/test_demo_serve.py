"""The demo of the runtime in small: its story happens, and its text is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_heads_move_while_the_demo_streams_and_the_text_is_that_of_the_unsplit_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo_serve", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["same"]
    assert seen["moved_heads"] >= 5
    assert len({name for heads in seen["maps"] for name in heads}) == 3
    assert seen["predicted_s"] > 0
    assert "Traceback" not in done.stderr
