"""NVML readings of the GPU that CUDA uses, during its work and over the time between two readings."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from hetis.formats.catalogue import gpus
from hetis.profiler.measure.watch import GpuAddress, GpuWatch, architecture_of, strangers, throttle_reasons

# As listed by NVIDIA: developer.nvidia.com/cuda-gpus.
CAPABILITIES = {
    "P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "A40": (8, 6), "A10": (8, 6), "L4": (8, 9),
    "L40S": (8, 9), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0),
}  # fmt: skip
POWER_CAP, IDLE = 0x4, 0x1


@dataclass
class FakeGpu:
    """One GPU as seen by NVML."""

    uuid: str
    bus: str
    bits: int = IDLE
    violated_ns: dict[int, int] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)


class FakeNvml:
    """The functions of ``pynvml`` that a watch calls; ``gpus`` in NVML's order."""

    NVMLError = RuntimeError

    def __init__(self, *gpus: FakeGpu, counters: bool = True) -> None:
        self.gpus = gpus
        self.counters = counters

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's name

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.86"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        return self._found([gpu for gpu in self.gpus if f"GPU-{gpu.uuid}" == uuid])

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> FakeGpu:  # noqa: N802
        return self._found([gpu for gpu in self.gpus if gpu.bus == bus])

    def _found(self, gpus: list[FakeGpu]) -> FakeGpu:
        if not gpus:
            raise RuntimeError("Not Found")
        return gpus[0]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:  # noqa: N802
        return gpu.bits

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in gpu.pids]

    def nvmlDeviceGetViolationStatus(self, gpu: FakeGpu, policy: int) -> SimpleNamespace:  # noqa: N802
        if not self.counters:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(violationTime=gpu.violated_ns.get(policy, 0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def cool() -> FakeGpu:
    return FakeGpu(uuid="aaaa", bus="00000000:3B:00.0")


def hot() -> FakeGpu:
    return FakeGpu(uuid="bbbb", bus="00000000:86:00.0", bits=POWER_CAP)


@pytest.mark.parametrize("by", ["uuid", "bus"])
@pytest.mark.parametrize("swapped", [False, True], ids=["CUDA's order", "the other order"])
def test_the_gpu_is_the_one_that_cuda_means_whatever_nvml_s_order(by: str, swapped: bool) -> None:
    gpus = [cool(), hot()]
    for gpu, reasons in zip(gpus, ({}, {"software power cap": 1}), strict=True):
        address = GpuAddress(uuid=gpu.uuid) if by == "uuid" else GpuAddress(bus=gpu.bus)
        watch = GpuWatch(address, clock=Clock(), nvml=FakeNvml(*(gpus[::-1] if swapped else gpus)))
        watch.look()
        assert watch.news().reasons == reasons


def test_a_part_of_a_gpu_is_found_by_the_bus_of_the_whole() -> None:
    gpu = hot()
    watch = GpuWatch(GpuAddress(uuid="of a MIG instance", bus=gpu.bus), clock=Clock(), nvml=FakeNvml(cool(), gpu))
    watch.look()
    assert watch.news().reasons == {"software power cap": 1}


def test_a_gpu_that_is_not_found_is_not_another_one() -> None:
    for address in (GpuAddress(uuid="cccc"), GpuAddress()):
        watch = GpuWatch(address, clock=Clock(), nvml=FakeNvml(hot()))
        watch.begin()
        watch.look()
        watch.look_at_processes({1})
        assert not watch.news().watched
        assert watch.news().looks == 0


def test_looks_are_counted_and_not_repeated_at_once() -> None:
    gpu = cool()
    now_s = 0.0
    watch = GpuWatch(GpuAddress(uuid=gpu.uuid), clock=lambda: now_s, nvml=FakeNvml(gpu))
    for now_s in (1.0, 1.001, 2.0, 3.0):
        gpu.bits = POWER_CAP if now_s > 2.5 else IDLE
        watch.look()
    assert (watch.news().looks, watch.news().reasons) == (3, {"software power cap": 1})


def test_what_the_counters_say_counts_from_the_beginning_only() -> None:
    gpu = cool()
    gpu.violated_ns = {0: 5_000_000_000, 1: 7}
    now_s = 50.0
    watch = GpuWatch(GpuAddress(uuid=gpu.uuid), clock=lambda: now_s, nvml=FakeNvml(gpu))
    now_s = 60.0
    watch.begin()
    assert watch.news().held_s == {}
    gpu.violated_ns, now_s = {0: 5_500_000_000, 1: 7, 4: 9_000_000_000}, 62.0
    news = watch.news()
    assert news.held_s == {"power": pytest.approx(0.5)}  # low utilisation (4) is harmless
    assert news.elapsed_s == pytest.approx(2.0)


def test_what_was_seen_before_the_beginning_is_forgotten() -> None:
    gpu = hot()
    gpu.pids = [1, 2]
    watch = GpuWatch(GpuAddress(uuid=gpu.uuid), clock=Clock(), nvml=FakeNvml(gpu))
    watch.look()
    watch.look_at_processes({1})
    watch.begin()
    news = watch.news()
    assert (news.looks, news.reasons, news.other_processes) == (0, {}, 0)


def test_a_gpu_without_counters_is_looked_at_all_the_same() -> None:
    gpu = hot()
    watch = GpuWatch(GpuAddress(uuid=gpu.uuid), clock=Clock(), nvml=FakeNvml(gpu, counters=False))
    watch.begin()
    watch.look()
    news = watch.news()
    assert (news.watched, news.held_s, news.reasons) == (True, {}, {"software power cap": 1})


def test_the_most_strangers_at_once_are_remembered() -> None:
    gpu = cool()
    watch = GpuWatch(GpuAddress(uuid=gpu.uuid), clock=Clock(), nvml=FakeNvml(gpu))
    for others in ([7, 8], [8]):
        gpu.pids = [os.getpid(), *others]
        watch.look_at_processes({os.getpid()})
    assert watch.news().other_processes == 2


@pytest.mark.parametrize(
    ("running", "own", "expected"),
    [
        ([1, 2, 3], {1}, 2),
        ([1], {1}, 0),
        ([1, 2], {1, 2, 5}, 0),
        ([4001, 4002], {1}, 1),  # process ids of the host, seen from a container: one of the two is ours
        ([4001], {1, 2}, 0),
        ([], {1}, 0),
    ],
)
def test_strangers_are_counted_also_where_our_own_number_is_not_known(
    running: list[int], own: set[int], expected: int
) -> None:
    assert strangers(running, own) == expected


def test_idle_clocks_are_no_throttling() -> None:
    assert throttle_reasons(0x1 | 0x2 | 0x100) == set()
    assert throttle_reasons(0x4 | 0x40) == {"software power cap", "hardware thermal slowdown"}


def test_architectures_are_called_what_the_catalogue_calls_them() -> None:
    known = {entry.gpu.name.partition("-")[0]: entry.gpu.architecture for entry in gpus()}
    for name, capability in CAPABILITIES.items():
        assert architecture_of(*capability) == known[name], name
    names = re.compile(r"RTX-PRO-|RTX-50\d\d(?!-Ada)")
    workstations = {entry.gpu.architecture for entry in gpus() if names.match(entry.gpu.name)}
    assert {architecture_of(12, 0), architecture_of(12, 1)} == workstations


def test_what_has_no_name_keeps_its_number() -> None:
    assert architecture_of(5, 2) == "sm_52"
    assert architecture_of(15, 0) == "sm_150"


def test_the_driver_is_known_though_the_gpu_is_not() -> None:
    assert GpuWatch(GpuAddress(), clock=Clock(), nvml=FakeNvml()).driver() == "570.86"
