"""Every verb that reads a profile file refuses one that no GPU of its type can reach, as ``hetis-profile check`` does.

The GPU type is that of the cluster, whose peaks may differ from the catalogue's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import dump
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.sources import load_inputs
from hetis.profiler.roofline import modelled_profile
from hetis.solver.profile import Fit, Op, Piece, Profile
from tests.planner.cli.test_dispatch_cli import A100_L4

GPU = "H200-SXM-141GB"
PROBLEM = ("-m", "Llama-3.1-8B", "-w", "1024/256")
CLUSTER = """
apiVersion: hetis/v1
kind: Cluster
name: one
gpu_types: {{{types}}}
nodes: [{{name: n, gpus: [{{type: {gpu}, count: 2}}]}}]
network: {{bandwidth: 400Gbps, latency: 10us}}
"""
FASTER = f"{GPU}: {{memory: 141GiB, memory_bandwidth: 20TB/s, fp16: 4000TFLOPS, architecture: Hopper, nvlink: 450GB/s}}"


def times_all(fit: Fit, factor: float) -> Fit:
    names = Piece.__dataclass_fields__
    return replace(
        fit,
        pieces=tuple(Piece(**{name: factor * getattr(piece, name) for name in names}) for piece in fit.pieces),
    )


def times(factor: float, op: Op) -> Callable[[Profile], Profile]:
    """Return the change of a profile by a factor on an operator's times."""
    return lambda profile: replace(
        profile, fits=tuple(times_all(fit, factor) if fit.op is op else fit for fit in profile.fits)
    )


def no_time(profile: Profile) -> Profile:
    return replace(profile, fits=tuple(times_all(fit, 0.0) for fit in profile.fits))


def petabytes(profile: Profile) -> Profile:
    return replace(profile, usable_bytes=10**15, reserve_bytes=10**16)


IMPOSSIBLE = pytest.mark.parametrize(
    ("change", "said"),
    [
        (times(1 / 3, Op.DENSE), "dense reaches 2198 TFLOP/s, H200-SXM-141GB at most 989"),
        (times(1e3, Op.DENSE), "dense: a layer on 8,192 tokens "),
        (no_time, "decode_attention: 512 requests of 256 tokens "),
        (petabytes, "usable_bytes is 1PB, more than the 141GiB of a H200-SXM-141GB"),
        (petabytes, "reserve_bytes is 10PB, which leaves nothing of usable_bytes"),
    ],
    ids=["three times too fast", "milliseconds", "no time", "more memory", "all of it reserved"],
)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER.format(types="", gpu=GPU))
    return path


def saved(profile: Profile, path: Path) -> Path:
    path.write_text(dump(profile))
    return path


@pytest.mark.parametrize("verb", [("place",), ("compare",), ("what-if", "--add", f"{GPU}=1")], ids=lambda v: v[0])
@IMPOSSIBLE
def test_verbs_that_plan_refuse_it(
    verb: tuple[str, ...], change: Callable[[Profile], Profile], said: str, cluster: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = saved(change(modelled_profile(find_gpu(GPU).gpu)), tmp_path / "p.yaml")
    assert run([*verb, "-c", str(cluster), *PROBLEM, "--profile", str(path)]) == ExitCode.INVALID
    errors = capsys.readouterr().err
    assert f"{path}: {said}" in errors
    assert "Warning" not in errors


def test_the_peaks_are_those_of_the_cluster(cluster: Path, tmp_path: Path) -> None:
    path = saved(times(1 / 3, Op.DENSE)(modelled_profile(find_gpu(GPU).gpu)), tmp_path / "p.yaml")
    cluster.write_text(CLUSTER.format(types=FASTER, gpu=GPU))
    loaded = load_inputs(cluster=str(cluster), model=PROBLEM[1], workload=PROBLEM[3], profiles=[str(path)])
    assert loaded.origins["profiles"] == {GPU: str(path)}


def test_a_type_of_the_users_own_is_checked_by_its_own_peaks(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER.format(types=FASTER.replace(GPU, "Own"), gpu="Own"))
    own = replace(find_gpu(GPU).gpu, name="Own", fp16_flops=4e15, mem_bytes_per_s=2e13)
    path = saved(modelled_profile(own), tmp_path / "p.yaml")
    assert load_inputs(cluster=str(cluster), model=PROBLEM[1], workload=PROBLEM[3], profiles=[str(path)])
    saved(times(1 / 3, Op.DENSE)(modelled_profile(own)), path)
    assert run(["place", "-c", str(cluster), *PROBLEM, "--profile", str(path)]) == ExitCode.INVALID
    assert f"{path}: dense reaches 8889 TFLOP/s, Own at most 4000" in capsys.readouterr().err


def test_dispatch_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(times(1e-3, Op.DECODE_ATTENTION)(modelled_profile(find_gpu("L4").gpu)), tmp_path / "p.yaml")
    assert run(["dispatch", "--state", A100_L4, "--profile", str(path)]) == ExitCode.INVALID
    assert f"{path}: decode_attention" in capsys.readouterr().err
