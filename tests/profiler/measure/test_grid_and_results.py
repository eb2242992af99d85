"""The points of a model, and the file of the measured points."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats.catalogue import find_model
from hetis.formats.measurements import MeasuredBy, MeasuredOp, load_measurements, save_measurements
from hetis.profiler.measure.points import Measured, TimedSample, extent_of, matrices, series_of
from hetis.profiler.measure.session import to_measurements
from hetis.profiler.measure.watch import GpuNews, disturbance_notes
from hetis.solver.errors import InvalidProblemError

LLAMA = find_model("meta-llama/Llama-3.1-8B").model
EXTENT = extent_of(on_cuda=True, quick=False)


def all_series(quick: bool = True) -> dict[str, tuple[int, set[str]]]:
    extent = extent_of(on_cuda=False, quick=quick)
    found = series_of(LLAMA, extent, paths=("d2d",), peer_kernel="gloo", peer_path="loopback")
    return {one.name: (len(one.candidates), {point.op for point in one.candidates}) for one in found}


def test_every_operator_of_the_cost_model_is_covered() -> None:
    ops = {op for _, found in all_series().values() for op in found}
    wanted = {"gemm", "layer", "prefill_attention", "decode_attention", "all_reduce", "transfer", "kv_copy"}
    assert ops == wanted


def test_the_matrices_of_a_rank_hold_the_parameters_of_the_model() -> None:
    for tp in (1, 2, 4, 8):
        shapes = matrices(LLAMA, tp)
        assert sum(n * k for name, (n, k) in shapes.items() if name != "lm_head") * tp == LLAMA.dense_layer_params()


def test_decode_candidates_stay_in_memory_and_cover_the_serving_range() -> None:
    found = series_of(LLAMA, EXTENT, paths=("d2d",), peer_kernel="", peer_path="")
    decode = next(one for one in found if one.name == "decode attention")
    sizes = {(p.columns["batch"], p.columns["context_tokens"]) for p in decode.candidates}
    assert {(4, 256), (4, 16384), (256, 256)} <= sizes
    kv = [p.columns["batch"] * p.columns["context_tokens"] * p.columns["kv_heads"] * 512 for p in decode.candidates]
    assert max(kv) <= EXTENT.kv_limit_bytes


@pytest.mark.parametrize(
    ("name", "what"),
    [("DeepSeek-V3", "latent attention"), ("Mixtral-8x7B", "experts"), ("Qwen3.5-27B", "linear attention")],
)
def test_models_without_kernels_are_refused(name: str, what: str) -> None:
    with pytest.raises(InvalidProblemError, match=what):
        series_of(find_model(name).model, EXTENT, paths=(), peer_kernel="", peer_path="")


def test_measured_points_become_a_file_that_can_be_read(tmp_path: Path) -> None:
    found = series_of(LLAMA, EXTENT, paths=("d2d",), peer_kernel="gloo", peer_path="loopback")
    measured = [
        Measured(
            point=point, sample=TimedSample(seconds=1.23456789e-3, spread=0.02, cold=point.op != "prefill_attention")
        )
        for one in found
        for point in one.candidates[:3]
    ]
    value = to_measurements("L4", MeasuredBy(tool="hetis-profile"), measured, ["a note"])
    again = to_measurements("L4", MeasuredBy(tool="hetis-profile"), measured[::-1], ["a note"])
    for path, one in ((tmp_path / "a.json", value), (tmp_path / "b.json", again)):
        save_measurements(path, one)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    read = load_measurements(tmp_path / "a.json")
    assert sum(len(table) for table in read.tables) == len(measured)
    decode = next(table for table in read.tables if table.op is MeasuredOp.DECODE_ATTENTION)
    assert decode.cold
    assert not next(table for table in read.tables if table.op is MeasuredOp.PREFILL_ATTENTION).cold
    assert decode.seconds[0] == 1.2346e-3


def test_points_that_a_cache_may_have_served_are_a_table_of_their_own_after_the_cold_ones() -> None:
    point = series_of(LLAMA, EXTENT, paths=("d2d",), peer_kernel="", peer_path="")[-1].candidates[0]
    measured = [
        Measured(point=point, sample=TimedSample(seconds=1e-3, spread=0.0, cold=cold)) for cold in (False, True)
    ]
    value = to_measurements("L4", MeasuredBy(tool="hetis-profile"), measured, [])
    assert [(table.cold, len(table)) for table in value.tables] == [(True, 1), (False, 1)]


def notes(**changes: object) -> list[str]:
    quiet: dict[str, object] = {
        "reference_s": (1e-3, 1.01e-3),
        "others_share": 0.01,
        "gpu": GpuNews(watched=True, looks=100, elapsed_s=10.0),
    }
    return disturbance_notes([], **(quiet | changes))  # type: ignore[arg-type]


def test_an_undisturbed_device_gets_no_note() -> None:
    assert notes() == []


def test_every_disturbance_gets_a_sentence() -> None:
    throttled = GpuNews(
        watched=True, looks=100, reasons={"software power cap": 12}, held_s={"heat": 0.5}, elapsed_s=10.0
    )
    assert notes(gpu=throttled) == [
        "the GPU was throttled while measuring (software power cap in 12 of 100 samples, limited by heat for 0.5 of "
        "10 s): its times are too long"
    ]
    assert notes(gpu=GpuNews(watched=True, other_processes=1)) == [
        "1 other process had the GPU open while measuring: it may have been shared"
    ]
    assert notes(gpu=GpuNews()) == [
        "NVML is not available: a throttled or shared GPU would only show as jitter and drift"
    ]
    assert notes(others_share=0.5) == ["other processes took 50% of the host's cores while measuring"]
    assert notes(reference_s=(1e-3, 2e-3)) == [
        "the same point took 1 ms at the start and 2 ms at the end (+100%): clocks or neighbours changed"
    ]


def test_one_look_in_a_hundred_is_no_throttling() -> None:
    news = GpuNews(watched=True, looks=100, reasons={"software power cap": 1}, held_s={"power": 0.1}, elapsed_s=10.0)
    assert notes(gpu=news) == []


def test_a_processor_has_no_clocks_to_look_at() -> None:
    assert notes(gpu=None) == []
