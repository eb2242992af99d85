"""The shipped efficiencies are what the command makes of the tables, to the byte; their stated errors hold."""

from __future__ import annotations

import csv
import gzip
from importlib import resources
from pathlib import Path

import pytest

from hetis.profiler import calibrate
from hetis.profiler.efficiency import shipped
from hetis.profiler.tables import A40, A100, H100, L40S, TableError, read_rows

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_tables = pytest.mark.skipif(
    not SHARED.exists(), reason=f"{SHARED} is not here: the shipped efficiencies were NOT compared with the tables"
)


@needs_tables
def test_the_command_makes_the_shipped_bytes(tmp_path: Path) -> None:
    out, doc = tmp_path / "efficiency.json", tmp_path / "doc.md"
    assert calibrate.main(["--data", str(SHARED / "profiles"), "--out", str(out), "--doc", str(doc)]) == 0
    assert out.read_bytes() == resources.files("hetis.profiler").joinpath("efficiency.json").read_bytes()
    assert doc.read_bytes() == (ROOT / "docs" / "profiles-modelled.md").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.md", "efficiency.json"]


@needs_tables
def test_the_peaks_of_measured_gpus_are_the_catalogue_s() -> None:
    with (SHARED / "gpus.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    for gpu in (A40, A100, H100, L40S):
        row = rows[gpu.name]
        assert gpu.flops == float(row["fp16_dense_tflops"]) * 1e12
        assert gpu.bytes_per_s == float(row["mem_bw_gbs"]) * 1e9
        link = float(row["pcie_gbs"]) if gpu in (A40, L40S) else float(row["nvlink_gbs"]) / 2
        assert gpu.link_bytes_per_s == link * 1e9


@pytest.mark.parametrize("architecture", ["Ada", "Ampere", "Hopper"])
def test_measured_architectures_keep_the_bars(architecture: str) -> None:
    """DESIGN section 10 asks for 10% in the serving range; prefill and all-reduce are not there yet."""
    ops = shipped().architectures[architecture].ops
    for name, bar in (
        ("dense", 0.08),
        ("decode_attention", 0.08),
        ("prefill_attention", 0.15),
        ("all_reduce_nvlink", 0.2),
    ):
        error = ops[name].held_out_mape
        assert error is None if not ops[name].measured_on else error is not None and error <= bar


def test_a_missing_table_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "efficiency.json"
    assert calibrate.main(["--data", str(tmp_path), "--out", str(out)]) == 1
    assert str(tmp_path / "vidur_layer_ops.csv.gz") in capsys.readouterr().err
    assert not out.exists()


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.csv.gz", "wt", encoding="utf-8") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(TableError, match=r"t\.csv\.gz: no column c, d$"):
        list(read_rows(tmp_path, "t.csv.gz", "a", "c", "d"))


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"a\n" + b"1\n" * 10_000)
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TableError, match=r"t\.csv\.gz: "):
        list(read_rows(tmp_path, "t.csv.gz", "a"))
