"""A plan on this very machine from its own measurements: measure, fit, place. Needs torch."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from hetis.formats.measurements import MeasuredOp, load_measurements
from hetis.formats.profile import load_profile
from tests.planner.command_line import hetis_plan
from tests.profiler.command_line import hetis_profile, hetis_profile_process

pytestmark = pytest.mark.skipif(
    find_spec("torch") is None, reason="torch is not installed: pip install 'hetis[profiler]' to run this"
)
MODEL = "Qwen/Qwen3-0.6B"
RUN = ("run", "--device", "cpu", "--quick", "--model", MODEL, "--out", "raw.json", "--cluster-out", "cluster.yaml")
ALL_OPS = {"dense", "prefill_attention", "decode_attention", "all_reduce", "transfer"}


def has_cuda() -> bool:
    """Return whether torch is installed and detects a GPU."""
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def test_a_quick_run_on_this_machine_becomes_a_plan(tmp_path: Path) -> None:
    done = hetis_profile_process(*RUN, "--time-limit", "25", "-o", "json", cwd=tmp_path)
    if "are too short" in done.stderr:  # the machine was busy
        done = hetis_profile_process(*RUN, "--time-limit", "200", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    raw = load_measurements(tmp_path / "raw.json")
    assert {table.op for table in raw.tables} >= {MeasuredOp.GEMM, MeasuredOp.LAYER, MeasuredOp.DECODE_ATTENTION}
    assert raw.provenance.engine == "torch"

    fitted = fit(tmp_path)
    if "check the unit" in fitted.stderr:  # the machine stalled during an operator's few rows
        again = hetis_profile_process(*RUN, "--time-limit", "200", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        fitted = fit(tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["held_out_mape"]  # the set of operators in it depends on the machine's load
    assert {fit.op.value for fit in load_profile(tmp_path / "p.json").fits} >= ALL_OPS
    checked = hetis_profile("check", "p.json", "--cluster", "cluster.yaml", cwd=tmp_path)
    assert checked.returncode in (0, 2), checked.stderr  # results of a shared host may be implausible

    arguments = ("--cluster", "cluster.yaml", "--model", MODEL, "--workload", "300/50", "--profile", "p.json")
    placed = hetis_plan("place", *arguments, "--objective", "throughput", "-o", "json", cwd=tmp_path)
    assert placed.returncode == 0, placed.stderr
    assert raw.gpu in placed.stdout


def fit(folder: Path) -> subprocess.CompletedProcess[str]:
    """Fit with raised peaks: those measured under other load are too low, and `fit` refuses results above them.

    If the machine was busy only later, raised peaks are too high, and rows look as if they had another unit.
    """
    measured = (folder / "cluster.yaml").read_text(encoding="utf-8")
    for factor in (4, 2, 1, 8):
        (folder / "cluster.yaml").write_text(with_peaks(measured, factor), encoding="utf-8")
        done = hetis_profile(
            "fit", "raw.json", "--cluster", "cluster.yaml", "--out", "p.json", "-o", "json", cwd=folder
        )  # fmt: skip
        if done.returncode == 0:
            break
    return done


def with_peaks(cluster: str, factor: int) -> str:
    document = yaml.safe_load(cluster)
    (gpu,) = document["gpu_types"].values()
    for peak in ("memory_bandwidth", "fp16"):
        number, unit = re.fullmatch(r"([\d.]+)(\D+)", gpu[peak]).groups()  # type: ignore[union-attr]
        gpu[peak] = f"{factor * float(number):g}{unit}"
    return str(yaml.safe_dump(document))


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_a_quick_run_on_a_gpu_is_fitted(tmp_path: Path) -> None:
    arguments = ("run", "--device", "cuda:0", "--quick", "--out", "raw.json", "--cluster-out", "cluster.yaml")
    done = hetis_profile_process(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    raw = load_measurements(tmp_path / "raw.json")
    paths = {path for table in raw.tables if table.op is MeasuredOp.TRANSFER for path in table.text("path")}
    assert {"h2d", "d2h", "d2d"} <= paths
    assert all(table.cold for table in raw.tables if table.op in (MeasuredOp.GEMM, MeasuredOp.DECODE_ATTENTION))
    assert any("(as reported by the driver)" in note for note in raw.notes)
    assert "driver unknown" not in raw.provenance.host  # NVML works wherever CUDA does
    assert not any("NVML is not available" in note for note in raw.notes)
    fitted = hetis_profile(
        "fit", "raw.json", "--cluster", "cluster.yaml", "--out", "p.json", "-o", "json", cwd=tmp_path
    )
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["held_out_mape"]["decode_attention"] < 0.5
    arguments = ("--cluster", "cluster.yaml", "--model", "Llama-3.1-8B", "--workload", "300/50", "--profile", "p.json")
    placed = hetis_plan("place", *arguments, "--objective", "throughput", "-o", "json", cwd=tmp_path)
    assert placed.returncode == 0, placed.stderr
