"""The wheel holds every module and every data file, and the base install needs no solver."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("solver", "formats", "profiler", "simulator", "engines", "planner", "runtime", "proto")
# Imports everything that the base install promises, with the extras made unimportable.
BASE_PROGRAM = """
import hetis, sys
assert hetis.__version__ and [name for name in sys.modules if name.startswith("hetis.")] == []
for name in ("highspy", "numba", "typer", "rich", "cvxpy"):
    sys.modules[name] = None
import hetis.formats, hetis.formats.documents, hetis.formats.catalogue
import hetis.solver.problem, hetis.solver.plan, hetis.solver.placement.explanation, hetis.solver.check
import hetis.profiler.roofline
import hetis.v1.plan_service_pb2_grpc, hetis.v1.agent_service_pb2_grpc
hetis.profiler.roofline.modelled_profile(hetis.formats.catalogue.find_gpu("L4").gpu)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hetis/")}
    tree = {
        path.relative_to(ROOT / root).as_posix()
        for root in ROOTS
        for path in (ROOT / root / "hetis").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree
    typed = ("solver", "formats", "profiler", "simulator", "engines", "planner", "runtime", "v1")
    assert {"hetis/__init__.py", "hetis/py.typed", *(f"hetis/{root}/py.typed" for root in typed)} <= packed
    assert "hetis/v1/plan_service.proto" in packed
    assert any(name.endswith(".json") for name in packed)


def test_an_unpacked_wheel_works_far_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + BASE_PROGRAM
    program += f"assert hetis.__file__.startswith({str(tmp_path)!r}), hetis.__file__\n"
    program += f"assert hetis.formats.__file__.startswith({str(tmp_path)!r}), hetis.formats.__file__\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ORDERS = {"as listed": ROOTS, "reversed": ROOTS[::-1], "planner last": (*ROOTS[:5], *ROOTS[6:], "planner")}
EVERY_ROOT = (
    "import hetis.solver.errors, hetis.formats.errors, hetis.engines.layout, hetis.v1, hetis.runtime, hetis.planner"
)


def run_with(roots: Sequence[Path], program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that finds our packages only in these folders.

    Without site (-S), no link of an editable install is followed.
    """
    libraries = [one for one in sys.path if Path(one).name == "site-packages"]
    begin = f"import sys\nsys.path[:0] = {[str(one) for one in (*roots, *libraries)]!r}\n"
    return subprocess.run(
        [sys.executable, "-S", "-c", begin + program], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("order", ORDERS)
def test_the_roots_are_one_package_in_any_order(order: str, tmp_path: Path) -> None:
    """The root with ``__init__`` defines ``hetis`` and finds the others, wherever it is among them."""
    program = EVERY_ROOT + "\nassert hetis.__version__ and 'place' in dir(hetis)"
    done = run_with([ROOT / root for root in ORDERS[order]], program, tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_the_planner_the_other_roots_are_a_namespace(tmp_path: Path) -> None:
    """The roots below the planner must not need it; without it, no root defines ``hetis``."""
    program = (
        "import hetis.solver.errors, hetis.formats.errors\n"
        "assert getattr(hetis, '__file__', None) is None and not hasattr(hetis, 'place'), hetis\n"
    )
    done = run_with([ROOT / root for root in ("formats", "solver")], program, tmp_path)
    assert done.returncode == 0, done.stderr


def test_packages_of_others_may_join(tmp_path: Path) -> None:
    """A folder later on the path that adds a package to ``hetis`` is found, as with any namespace."""
    (tmp_path / "hetis" / "added").mkdir(parents=True)
    (tmp_path / "hetis" / "added" / "__init__.py").write_text("HERE = True\n")
    roots = [*(ROOT / root for root in ROOTS), tmp_path]
    done = run_with(roots, "import hetis.added, hetis.solver.errors\nassert hetis.added.HERE", tmp_path)
    assert done.returncode == 0, done.stderr
