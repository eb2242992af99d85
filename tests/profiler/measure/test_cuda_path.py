"""The path of a CUDA GPU, without one: the order of events, graphs and readings, and a whole run. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from hetis.formats.catalogue import find_model
from hetis.profiler.measure.points import Extent, MeasuredPoint

if find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

from hetis.profiler.measure import device as device_room
from hetis.profiler.measure import kernels as kernels_room
from hetis.profiler.measure import session
from hetis.profiler.measure.device import CudaDevice, Operator, open_device
from hetis.profiler.measure.watch import GpuAddress
from tests.models import replace
from tests.profiler.measure.fake_cuda import FakeCuda, FakeTorch

TINY = replace(
    find_model("Qwen/Qwen3-0.6B").model, hidden=64, q_heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=256
)
EXTENT = Extent(
    tokens=(1, 2, 4, 8, 16), prompts=(64, 128), pasts=(0, 64, 128), batches=(1, 2, 4), contexts=(128, 256, 512),
    kv_limit_bytes=2**20, messages=(2**13, 2**14, 2**16, 2**18), links=(2**10, 2**12, 2**14, 2**16), tps=(1, 2),
)  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake GPU for the modules that open and use one."""
    fake = FakeCuda()
    for room in (device_room, kernels_room):
        monkeypatch.setattr(room, "torch", FakeTorch(fake))
    return fake


def test_the_device_is_known_by_uuid_bus_and_cache(cuda: FakeCuda) -> None:
    device = open_device("cuda:0")
    assert isinstance(device, CudaDevice)
    assert device.address == GpuAddress(uuid="1234", bus="00000000:3B:00.0")
    assert (device.pool.cache.num_bytes, device.pool.cache.origin) == (2**20, "as reported by the driver")
    assert (device.name, device.architecture) == ("Fake GPU", "Hopper")


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "one by one"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_the_look_is_after_all_was_queued_and_before_it_is_waited_for(cuda: FakeCuda, graph: bool, cold: bool) -> None:
    device = CudaDevice(0)
    calls = [lambda: cuda.queued.append("call")] * 3
    timer = device.timer(Operator(calls, cold), graph=graph, while_queued=lambda: cuda.queued.append("look"))
    timer(2)  # captures, uploads
    cuda.queued.clear()
    assert timer(2) >= 0.0
    ahead = [] if cold else ["call"]
    batch = ["replay"] if graph else ["call"] * 3
    assert cuda.queued == [*ahead, "event", *batch, "event", "look", "wait"]


def test_a_batch_is_whole_rotations_and_counts_for_the_calls_asked_for(cuda: FakeCuda) -> None:
    made: list[int] = []

    def call(index: int) -> Callable[[], None]:
        return lambda: made.append(index)

    timer = CudaDevice(0).timer(Operator([call(index) for index in range(5)], cold=True))
    timer(7)
    assert made == [0, 1, 2, *range(5), *range(5)]  # three calls set libraries up, then come the captured ones
    made.clear()
    assert timer(7) > 0
    assert timer(6) > 0
    assert (made, cuda.captured) == ([], 1)  # ten calls in both cases, so one graph


def test_a_quick_run_reaches_every_operator(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session, "extent_of", lambda **_: EXTENT)
    news = []
    request = session.RunRequest(device="cuda:0", gpu="", model=TINY, quick=True, limit_s=300.0)
    monkeypatch.setattr(
        session, "QUICK_RULES", (session.QUICK_RULES[0], replace(RULE, limit_s=0.02, warm_up_s=0.0, max_batches=3))
    )
    result = session.measure(request, news.append)
    tables = {(table.op.value, table.cold) for table in result.measurements.tables}
    assert {("gemm", True), ("layer", True), ("decode_attention", True), ("kv_copy", True)} <= tables
    assert {("prefill_attention", False), ("transfer", False), ("all_reduce", False)} <= tables
    paths = {
        path for table in result.measurements.tables if table.op.value == "transfer" for path in table.text("path")
    }
    assert paths == {"h2d", "d2h", "d2d", "loopback"}
    assert all(math.isfinite(one) for table in result.measurements.tables for one in table.seconds)
    assert any("NVML is not available" in note for note in result.disturbances)
    assert any(
        "2 times the last-level cache of 1MiB (as reported by the driver)" in note for note in result.measurements.notes
    )
    assert any("engines on Hopper have kernels up to twice as fast" in note for note in result.measurements.notes)
    assert "driver unknown" in result.measurements.provenance.host
    assert news


RULE = session.QUICK_RULES[1]


@pytest.mark.parametrize("past", [0, 64])
def test_prompts_are_timed_with_one_kernel_whether_or_not_tokens_come_before_them(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, past: int
) -> None:
    """cuDNN, which torch prefers on Hopper, cannot do both: a fit over an H100's times of two kernels was 18% off."""
    allowed = []

    def attention(*_: object, **__: object) -> None:
        backends = torch.backends.cuda
        allowed.append((backends.flash_sdp_enabled(), backends.cudnn_sdp_enabled()))

    monkeypatch.setattr(kernels_room.functional, "scaled_dot_product_attention", attention)
    columns = {"batch": 1, "tokens": 64, "past_tokens": past, "query_heads": 4, "kv_heads": 2, "head_dim": 16}
    kernels = kernels_room.Kernels(CudaDevice(0), TINY)
    kernels._prefill(MeasuredPoint(op="prefill_attention", kernel="torch sdpa", columns=columns)).calls[0]()
    assert allowed == [(True, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled(), "as before"
