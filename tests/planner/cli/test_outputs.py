"""A plan file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hetis.commands.terminal import Terminal
from hetis.formats.documents import dump, load_plan
from hetis.formats.errors import DocumentError
from hetis.planner.cli.outputs import refuse_unwritable, save
from tests.planner import plans

PLAN = plans.plan(plans.paper_replica())

# Saves a plan over `sys.argv[1]` after the line in {sabotage} has run.
PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from hetis.commands.terminal import Terminal
from hetis.planner.cli.outputs import save
from hetis.formats.errors import DocumentError
from tests.planner import plans
{sabotage}
try:
    save(Terminal(), plans.plan(*plans.large_replicas(2000)), Path(sys.argv[1]))
except DocumentError as error:
    print(error)
    sys.exit(7)
"""
DIE_BEFORE_RENAME = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
DISK_OF_100_KB = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


def save_in_process(path: Path, sabotage: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(sabotage=sabotage), str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )


@pytest.mark.parametrize("name", ["plan.json", "plan.yaml", "plan.yml", "plan"])
def test_a_saved_plan_reads_back_equal(name: str, tmp_path: Path) -> None:
    save(Terminal(), PLAN, tmp_path / name)
    assert load_plan(tmp_path / name) == PLAN
    assert (tmp_path / name).read_text().startswith("apiVersion" if name.endswith("ml") else "{")


def test_a_process_that_dies_leaves_the_old_plan(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    save(Terminal(), PLAN, target)
    done = save_in_process(target, DIE_BEFORE_RENAME)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == dump(PLAN, "json")


@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_what_was_there_and_says_so(old: bool, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    if old:
        save(Terminal(), PLAN, target)
    done = save_in_process(target, DISK_OF_100_KB)
    assert done.returncode == 7, done.stderr
    assert f"{target}: cannot be written" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == (["plan.json"] if old else [])
    assert not old or target.read_text() == dump(PLAN, "json")


def test_what_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no folder"):
        refuse_unwritable(tmp_path / "missing" / "plan.json")
    with pytest.raises(DocumentError, match="is a folder"):
        refuse_unwritable(tmp_path)
    refuse_unwritable(tmp_path / "plan.json")
