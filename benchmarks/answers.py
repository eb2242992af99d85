"""How long `hetis-plan place` takes to answer: processor and wall seconds of the whole command, and of its phases.

    python -m benchmarks.answers [--quick] [--json]

Llama-2-70B with 8,000 prompt and 300 output tokens, which its context cuts to 4,096. ``user`` is user time of the whole
command, simulation included, ``wall`` its wall time, ``target`` the user seconds that it should take, ``to_plan`` the
user seconds after which the proven plan is shown. The phases are differences between commands that end earlier:
``import`` (--help), ``read`` (--dry-run), ``search`` with everything shown (--no-verify), ``simulate``. *cold* starts
with nothing compiled: neither bytecode nor kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet
from benchmarks.measuring.rows import Row
from hetis.formats.documents import dump
from hetis.solver.cluster import Cluster

EXAMPLES = Path(__file__).parents[1] / "examples"
REQUEST = ("--model", "Llama-2-70B", "--workload", "8000/300")


class Case(NamedTuple):
    """A fleet, in a file or built here, and the user seconds that an answer should take."""

    name: str
    fleet: Path | Cluster
    target_s: float
    is_cold: bool = False


class Took(NamedTuple):
    """The time that a command took, in seconds."""

    user_s: float
    wall_s: float


def main() -> None:
    """Print one row per fleet."""
    parser = rows.parser("benchmarks.answers", __doc__)
    arguments = parser.parse_args()
    chosen = [one for one in cases() if arguments.only in one.name][: 1 if arguments.quick else None]
    shown = rows.show((measured(one) for one in chosen), arguments, name="answers")
    rows.exit_if_crashed(shown)


def cases() -> Iterator[Case]:
    """Yield the fleets, the smallest first, and that one cold."""
    clouds = (
        (8, 8, "H100-SXM-80GB"), (20, 8, "A100-SXM-40GB"), (30, 4, "L4"), (8, 4, "V100-PCIe-32GB"),
    )  # fmt: skip
    yield Case("12 GPUs of 3 types", EXAMPLES / "paper.yaml", 3.0)
    yield Case("160 GPUs of 5 types", EXAMPLES / "fleet-160.yaml", 5.0)
    yield Case("376 GPUs of 4 types", fleet("clouds", *clouds), 6.0)
    yield Case("10,000 GPUs of 8 types", EXAMPLES / "fleet-10000.yaml", 10.0)
    yield Case("12 GPUs of 3 types, cold", EXAMPLES / "paper.yaml", 15.0, is_cold=True)


def measured(case: Case) -> Row:
    """Return the row of a case: the whole command, and what its phases add to each other."""
    with tempfile.TemporaryDirectory() as folder:
        path = case.fleet
        if isinstance(path, Cluster):
            (made := Path(folder) / "fleet.yaml").write_text(dump(path, "yaml"))
            path = made
        place = ("place", "--cluster", str(path), *REQUEST)
        if not case.is_cold:
            command(*place, "--no-verify")  # compiles what is missing
        caches = {"NUMBA_CACHE_DIR": f"{folder}/kernels", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        environment = caches if case.is_cold else {}
        whole = command(*place, environment=environment)
        steps = [command(*words).user_s for words in (("--help",), (*place, "--dry-run"), (*place, "--no-verify"))]
    imports, read, search = (max(0.0, after - before) for before, after in zip((0.0, *steps), steps, strict=False))
    return {
        "name": case.name,
        "status": "in time" if whole.user_s <= case.target_s else "late",
        "user_s": whole.user_s,
        "target_s": case.target_s,
        "wall_s": whole.wall_s,
        "to_plan_s": None if case.is_cold else steps[-1],
        "import_s": imports,
        "read_s": read,
        "search_s": search,
        "simulate_s": None if case.is_cold else max(0.0, whole.user_s - steps[-1]),
    }


def command(*words: str, environment: Mapping[str, str] | None = None) -> Took:
    """Run a `hetis-plan` command and return the time it took.

    Raises:
        SystemExit: the command failed.
    """
    before, started_s = os.times().children_user, time.monotonic()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-m", "hetis.planner.cli", *words], capture_output=True, env=kept | dict(environment or {}),
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} exited with {done.returncode}: {done.stderr[-500:]}")
    return Took(os.times().children_user - before, time.monotonic() - started_s)


if __name__ == "__main__":
    main()
