"""The wheel holds every module and every data file, and the base install needs no solver."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("solver", "formats", "profiler", "simulator", "engines", "planner", "runtime", "proto")
# Imports everything the base install promises with the extras made unimportable.
BASE_PROGRAM = """
import hetis, sys
assert hetis.__version__ and [name for name in sys.modules if name.startswith("hetis.")] == []
for name in ("highspy", "numba", "ortools", "typer", "rich", "cvxpy"):
    sys.modules[name] = None
import hetis.formats, hetis.formats.documents, hetis.formats.catalogue
import hetis.solver.problem, hetis.solver.plan, hetis.solver.explain, hetis.solver.check
import hetis.profiler.roofline
import hetis.v1.plan_service_pb2_grpc, hetis.v1.agent_service_pb2_grpc
hetis.profiler.roofline.modelled_profile(hetis.formats.catalogue.find_gpu("L4").gpu)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree."""
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
