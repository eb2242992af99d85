"""NVML's answers are reported; what it refuses is unknown, and only its absence is an error."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pynvml as real
import pytest

from hetis.runtime.agent.devices import LOST, Devices, DevicesUnavailableError, digest_of, discover, open_devices
from hetis.v1 import inventory_pb2, report_pb2
from tests.runtime.agent.devices.fake_nvml import GIB, Gpu, fake_pynvml

REFUSALS = [real.NVML_ERROR_NOT_SUPPORTED, real.NVML_ERROR_NO_PERMISSION, real.NVML_ERROR_FUNCTION_NOT_FOUND]


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, **settings: Any) -> Any:
    module = fake_pynvml(*gpus, **settings)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def opened(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, **settings: Any) -> Devices:
    with_gpus(monkeypatch, *gpus, **settings)
    return open_devices("nvml", host_name="node-0")


def test_an_inventory_holds_everything_that_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Gpu(links={"00000000:3C:00.0"})
    second = Gpu(uuid="GPU-1", bus_id="00000000:3C:00.0", links={"00000000:3B:00.0"}, limit_mw=350_000)
    inventory = opened(monkeypatch, first, second).inventory()
    assert inventory.source == inventory_pb2.DEVICE_SOURCE_NVML
    assert inventory.driver_version == "580.65.06"
    assert inventory.host_name == "node-0"
    assert inventory.num_cpus > 0
    assert inventory.memory_bytes > 0
    assert inventory.digest == digest_of(inventory)
    assert list(inventory.devices) == [
        inventory_pb2.GpuDevice(
            index=0,
            gpu_type="A100-SXM-80GB",
            product_name="NVIDIA A100-SXM4-80GB",
            uuid="GPU-0",
            memory_bytes=80 * GIB,
            compute_capability=80,
            pci_bus_id="00000000:3B:00.0",
            pcie_bytes_per_s=32e9,
            linked_devices=[1],
            max_clock_hz=1410e6,
            power_limit_w=400,
        ),
        inventory_pb2.GpuDevice(
            index=1,
            gpu_type="A100-SXM-80GB",
            product_name="NVIDIA A100-SXM4-80GB",
            uuid="GPU-1",
            memory_bytes=80 * GIB,
            compute_capability=80,
            pci_bus_id="00000000:3C:00.0",
            pcie_bytes_per_s=32e9,
            linked_devices=[0],
            max_clock_hz=1410e6,
            power_limit_w=350,
        ),
    ]


def test_the_digest_changes_with_a_device_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened(monkeypatch, Gpu()).inventory().digest
    assert opened(monkeypatch, Gpu(memory_used_bytes=7)).inventory().digest == one
    assert opened(monkeypatch, Gpu(uuid="GPU-9")).inventory().digest != one
    assert one.startswith("sha256:")
    assert len(one) == len("sha256:") + 64


def test_a_sample_holds_everything_that_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    (report,) = opened(monkeypatch, Gpu()).sample()
    assert report == report_pb2.DeviceReport(
        index=0,
        memory_used_bytes=3 * GIB,
        busy_ratio=0.37,
        clock_hz=1380e6,
        temperature_c=61,
        power_w=312.5,
    )


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (real.nvmlClocksEventReasonGpuIdle, [report_pb2.THROTTLE_REASON_IDLE]),
        (real.nvmlClocksEventReasonSwPowerCap, [report_pb2.THROTTLE_REASON_POWER]),
        (real.nvmlClocksEventReasonSwThermalSlowdown, [report_pb2.THROTTLE_REASON_THERMAL]),
        (real.nvmlClocksThrottleReasonHwThermalSlowdown, [report_pb2.THROTTLE_REASON_THERMAL]),
        (real.nvmlClocksEventReasonApplicationsClocksSetting, [report_pb2.THROTTLE_REASON_SETTING]),
        (real.nvmlClocksEventReasonSyncBoost, [report_pb2.THROTTLE_REASON_SETTING]),
        (real.nvmlClocksThrottleReasonHwPowerBrakeSlowdown, [report_pb2.THROTTLE_REASON_HARDWARE]),
        (
            real.nvmlClocksThrottleReasonHwSlowdown | real.nvmlClocksThrottleReasonHwThermalSlowdown,
            [report_pb2.THROTTLE_REASON_THERMAL, report_pb2.THROTTLE_REASON_HARDWARE],
        ),
        (1 << 40, []),  # a reason newer than this code
    ],
)
def test_clock_event_reasons_are_told(monkeypatch: pytest.MonkeyPatch, bits: int, reasons: list[int]) -> None:
    (report,) = opened(monkeypatch, Gpu(reasons=bits)).sample()
    assert list(report.throttle_reasons) == reasons


def test_an_older_driver_calls_them_throttle_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(
        reasons=real.nvmlClocksThrottleReasonSwPowerCap,
        refused={
            "nvmlDeviceGetCurrentClocksEventReasons": real.NVML_ERROR_FUNCTION_NOT_FOUND,
            "nvmlDeviceGetTemperatureV": real.NVML_ERROR_FUNCTION_NOT_FOUND,
        },
    )
    (report,) = opened(monkeypatch, gpu).sample()
    assert list(report.throttle_reasons) == [report_pb2.THROTTLE_REASON_POWER]
    assert report.temperature_c == 61


@pytest.mark.parametrize("error", REFUSALS)
def test_what_is_refused_is_not_known(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    devices = opened(monkeypatch, Gpu(refused={"*": error}))
    (device,) = devices.inventory().devices
    assert device == inventory_pb2.GpuDevice(index=0)
    (report,) = devices.sample()
    assert report == report_pb2.DeviceReport(index=0)


def test_a_driver_that_says_nothing_of_itself_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        "nvmlSystemGetDriverVersion": real.NVML_ERROR_NO_PERMISSION,
        "nvmlEventSetCreate": real.NVML_ERROR_NOT_SUPPORTED,
    }
    devices = opened(monkeypatch, Gpu(), refused=refused)
    assert devices.inventory().driver_version == ""
    assert devices.sample()[0].unhealthy == ""
    devices.close()


def test_a_gpu_that_is_lost_while_we_run_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, well = Gpu(), Gpu(bus_id="00000000:3C:00.0")
    devices = opened(monkeypatch, lost, well)
    lost.refused = {"*": real.NVML_ERROR_GPU_IS_LOST}
    first, second = devices.sample()
    assert first == report_pb2.DeviceReport(index=0, unhealthy=LOST)
    assert second.unhealthy == ""


def test_a_gpu_that_is_lost_stays_in_the_inventory_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    devices = opened(monkeypatch, gpu)
    before = devices.inventory()
    gpu.refused = {"*": real.NVML_ERROR_GPU_IS_LOST}
    assert devices.inventory() == before


def test_a_gpu_that_cannot_be_opened_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = opened(monkeypatch, Gpu(refused={"open": real.NVML_ERROR_GPU_IS_LOST}), Gpu(uuid="GPU-1"))
    assert [(device.index, device.uuid) for device in devices.inventory().devices] == [(1, "GPU-1")], (
        "the driver's index"
    )


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (Gpu(remapped_rows=(3, 1, 1, 0)), ""),  # remapped at the next reset; it works until then
        (Gpu(remapped_rows=(3, 9, 0, 1)), "could not be remapped"),
        (Gpu(remapped_rows=(0, 1, 0, 0), uncorrected=1), ""),  # contained and remapped
        (Gpu(uncorrected=2, refused={"nvmlDeviceGetRemappedRows": real.NVML_ERROR_NOT_SUPPORTED}), "2 uncorrected"),
        (Gpu(refused={"nvmlDeviceGetRemappedRows": real.NVML_ERROR_NOT_SUPPORTED}), ""),
    ],
)
def test_memory_errors_make_a_gpu_unhealthy_when_it_cannot_mend_them(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, said: str
) -> None:
    (report,) = opened(monkeypatch, gpu).sample()
    assert said in report.unhealthy
    assert bool(report.unhealthy) == bool(said)


@pytest.mark.parametrize(("xid", "unhealthy"), [(79, True), (48, True), (13, False), (43, False), (94, False)])
def test_a_critical_event_stays_unless_an_application_caused_it(
    monkeypatch: pytest.MonkeyPatch, xid: int, unhealthy: bool
) -> None:
    gpu, other = Gpu(), Gpu(bus_id="00000000:3C:00.0")
    module = with_gpus(monkeypatch, gpu, other)
    devices = open_devices("nvml")
    assert module.registered == [gpu, other]
    module.events.append((gpu, xid))
    for _ in range(2):
        first, second = devices.sample()
        assert (f"XID {xid}" in first.unhealthy) == unhealthy
        assert second.unhealthy == ""


def test_a_gpu_in_mig_mode_is_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [
        Gpu(name="NVIDIA A100-SXM4-80GB MIG 3g.40gb", uuid=f"MIG-{n}", memory_bytes=40 * GIB, busy_percent=0)
        for n in range(2)
    ]
    whole, last = Gpu(slices=slices), Gpu(name="NVIDIA L4", memory_bytes=23034 * 2**20, bus_id="00000000:3C:00.0")
    with_gpus(monkeypatch, whole, last)
    found = discover("nvml").devices
    assert [(d.index, d.uuid, d.mig_slice, d.gpu_type, d.memory_bytes // GIB) for d in found] == [
        (1, "GPU-0", False, "L4", 24),
        (2, "MIG-0", True, "", 40),
        (3, "MIG-1", True, "", 40),
    ]


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_gpu_whose_slices_cannot_be_counted_is_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_missing: bool
) -> None:
    call = "nvmlDeviceGetMaxMigDeviceCount"
    refused = {} if is_missing else {call: real.NVML_ERROR_NO_PERMISSION}
    module = with_gpus(monkeypatch, Gpu(slices=[Gpu()], refused=refused))
    if is_missing:
        delattr(module, call)
        monkeypatch.delattr(module, "NVML_DEVICE_MIG_ENABLE", raising=False)
    assert [(one.uuid, one.mig_slice) for one in discover("nvml").devices] == [("GPU-0", False)]
    assert "slices of the GPU 00000000:3B:00.0 cannot be counted" in caplog.text


def test_a_gpu_in_mig_mode_without_slices_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(opened(monkeypatch, Gpu(slices=[])).inventory().devices) == []


@pytest.mark.parametrize(
    "error",
    [real.NVML_ERROR_LIBRARY_NOT_FOUND, real.NVML_ERROR_DRIVER_NOT_LOADED, real.NVML_ERROR_NO_PERMISSION],
)
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_without_a_driver_nvml_is_refused_and_auto_has_no_devices(
    monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    with_gpus(monkeypatch, Gpu(), refused={call: error})
    with pytest.raises(DevicesUnavailableError, match="NVML can"):
        open_devices("nvml")
    assert discover("auto").source == inventory_pb2.DEVICE_SOURCE_NONE


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    with pytest.raises(DevicesUnavailableError, match=r"pip install 'hetis\[agent\]'"):
        open_devices("nvml")
    assert discover("auto").source == inventory_pb2.DEVICE_SOURCE_NONE


def test_auto_takes_nvml_where_it_works_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = with_gpus(monkeypatch, Gpu())
    assert len(discover("auto").devices) == 1
    assert module.shutdowns == 1
