"""Slurm's own `sbatch --test-only` accepts every exported job: its options, its nodes and their GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetis.planner.export import ExportTarget
from tests.planner.export.exporting import exported
from tests.planner.export.plans import PLANS
from tests.planner.export.slurm_controller import Controller, Programs

PROGRAMS = Programs()
NUM_GPUS = 8
NODES = {
    device.partition("/")[0] for plan in PLANS.values() for replica in plan.replicas for device in replica.devices()
}
pytestmark = pytest.mark.skipif(
    bool(PROGRAMS.missing),
    reason=f"NOT CHECKED BY SLURM: no {', '.join(PROGRAMS.missing)} on PATH, and HETIS_SLURM names no folder with them",
)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    with Controller(PROGRAMS, tmp_path_factory.mktemp("slurm"), dict.fromkeys(sorted(NODES), NUM_GPUS)) as running:
        yield running


def scripts(name: str, folder: Path) -> list[Path]:
    """Write the jobs of a plan as files."""
    made = exported(PLANS[name], ExportTarget.SLURM)
    found = []
    for path in made.shown:
        (folder / path).write_text(made.files[path])
        found.append(folder / path)
    return found


@pytest.mark.parametrize("name", sorted(set(PLANS) - {"workers of stages"}))
def test_slurm_takes_every_job(controller: Controller, name: str, tmp_path: Path) -> None:
    jobs = scripts(name, tmp_path)
    assert jobs
    for job in jobs:
        code, said = controller.tested(job)
        assert code == 0, said
        wanted = set(re.findall(r"^#SBATCH --nodelist=(\S+)$", job.read_text(), re.MULTILINE))
        [listed] = re.findall(r" on (?:nodes )?(\S+)(?: in partition all)?$", said.strip())
        assert set(listed.split(",")) == wanted


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (r"--gpus-per-node=\d+", f"--gpus-per-node={NUM_GPUS + 1}", "Requested node configuration is not available"),
        (r"--nodelist=\S+", "--nodelist=elsewhere", "Invalid node name specified"),
        (r"--gpus-per-node", "--gpus-on-node", "unrecognized option '--gpus-on-node"),
    ],
)
def test_slurm_refuses_what_is_wrong(
    controller: Controller, before: str, after: str, said: str, tmp_path: Path
) -> None:
    [job] = scripts("stages of two nodes", tmp_path)
    job.write_text(re.sub(before, after, job.read_text(), count=1))
    code, told = controller.tested(job)
    assert code != 0
    assert said in told
