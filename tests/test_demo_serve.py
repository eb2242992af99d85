"""The demo is the runtime in small: heads move, a worker dies and comes back, and every text is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demos_texts_are_those_of_the_unsplit_engine_though_heads_move_and_a_worker_dies() -> None:
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
    assert seen["same"] == [True, True]
    assert seen["is_back"]
    assert seen["moved_heads"] >= 5
    assert len({name for heads in seen["maps"] for name in heads}) == 3
    assert seen["predicted_s"] > 0
    assert "Traceback" not in done.stderr
