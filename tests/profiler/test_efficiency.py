"""The shipped efficiencies are the command's output for the tables, to the byte, and their stated errors hold."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from hetis.profiler.fit.pieces import split
from hetis.profiler.fit.points import Points
from hetis.profiler.roofline import shipped_efficiencies
from hetis.solver.profile import FitScope, Op
from tools import efficiency
from tools.efficiency import _fit, _pairs
from tools.left_out import joined

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "data"
SHARED = ROOT.parent / "shared" / "data"
needs_tables = pytest.mark.skipif(
    not SHARED.exists(), reason=f"{SHARED} is not here: the shipped efficiencies were NOT compared with the tables"
)


@needs_tables
@pytest.mark.soak
def test_the_command_makes_the_shipped_bytes(tmp_path: Path) -> None:
    out, made = tmp_path / "efficiency.json", tmp_path / "tables"
    assert efficiency.main(["--data", str(SHARED / "profiles"), "--out", str(out), "--tables", str(made)]) == 0
    assert out.read_bytes() == resources.files("hetis.profiler").joinpath("efficiency.json").read_bytes()
    assert {path.name for path in made.iterdir()} == {path.name for path in DATA.glob("modelled-*.csv")}
    for path in made.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name


def test_without_tables_only_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = efficiency.Calibration(efficiencies=shipped_efficiencies(), pairs=())
    monkeypatch.setattr(efficiency, "calibrate", lambda *_: made)
    out = tmp_path / "efficiency.json"
    assert efficiency.main(["--data", str(tmp_path), "--out", str(out)]) == 0
    assert out.read_bytes() == resources.files("hetis.profiler").joinpath("efficiency.json").read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("architecture", ["Ada", "Ampere", "Hopper"])
def test_measured_architectures_keep_the_bars(architecture: str) -> None:
    """10% in the serving range for attention, 8% for dense; all-reduces bend where libraries change their algorithm."""
    ops = shipped_efficiencies().architectures[architecture].ops
    for name, bar in (
        ("dense", 0.08),
        ("decode_attention", 0.10),
        ("prefill_attention", 0.10),
        ("all_reduce_nvlink", 0.2),
    ):
        error = ops[name].held_out_mape
        assert error is None if not ops[name].measured_on else error is not None and error <= bar


def test_a_missing_table_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "efficiency.json"
    assert efficiency.main(["--data", str(tmp_path), "--out", str(out)]) == 1
    assert str(tmp_path / "vidur_collectives.csv.gz") in capsys.readouterr().err
    assert not out.exists()


def made_up(architecture_s: float) -> Points:
    """Fifty layers on one GPU: a launch, and twice the time of the bytes at the peak."""
    byte_s = np.linspace(1e-5, 1e-3, 50)
    return Points(
        op=Op.DENSE,
        scope=FitScope(),
        features=np.stack([np.ones(50), np.zeros(50), byte_s], axis=1),
        seconds=architecture_s * (1e-5 + 2.0 * byte_s),
        shapes=["one"] * 50,
        sizes={"tokens": byte_s},
        origin="a test",
    )


def test_a_pair_of_gpus_says_how_far_each_is_from_the_other() -> None:
    """Oracle: a GPU 1.25 times slower is predicted a fifth too fast, and the reverse a quarter too slow."""
    fast_by_slow, slow_by_fast = _pairs("dense", {"slow": made_up(1.25), "fast": made_up(1.0)})
    assert (fast_by_slow.fitted, fast_by_slow.judged, fast_by_slow.num_points) == ("slow", "fast", 50)
    assert (fast_by_slow.mape, fast_by_slow.bias) == pytest.approx((0.25, 0.25), rel=0.02)
    assert (slow_by_fast.mape, slow_by_fast.bias) == pytest.approx((0.2, -0.2), rel=0.02)


def test_gpus_of_one_architecture_share_a_fit_that_held_out_points_do_not_touch() -> None:
    sets = [made_up(1.0), made_up(1.0)]
    clean = _fit(sets, ("a", "b"))
    (piece,) = clean.pieces
    assert (piece.fixed_s, piece.byte) == pytest.approx((1e-5, 2.0), rel=0.02)
    assert (clean.num_points, clean.measured_on) == (100, ("a", "b"))
    judged = split(joined(sets)).judged
    seconds = joined(sets).seconds.copy()
    seconds[judged] *= 3.0
    spoilt = _fit([replace(joined(sets), seconds=seconds)], ("a", "b"))
    assert spoilt.pieces == clean.pieces
    assert spoilt.held_out_mape is not None
    assert spoilt.held_out_mape > 0.5
