"""The devices that a source denotes, and the GPU type of a product name."""

from __future__ import annotations

import socket

import pytest

from hetis.formats.catalogue import gpus
from hetis.runtime.agent.devices import COOL_C, MAX_CLOCK_HZ, DevicesUnavailableError, discover, gpu_of, open_devices
from hetis.v1 import inventory_pb2, report_pb2

MIB = 2**20


@pytest.mark.parametrize(
    ("product", "memory_mib", "gpu_type"),
    [
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-SXM-80GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-PCIe-40GB"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe-80GB"),
        ("NVIDIA H100 NVL", 95830, "H100-NVL-94GB"),
        ("NVIDIA H200", 143771, "H200-SXM-141GB"),  # the name of the SXM board has no more than this
        ("NVIDIA H200 NVL", 143771, "H200-NVL-141GB"),
        ("NVIDIA GH200 480GB", 97871, "GH200-96GB"),
        ("NVIDIA B200", 183359, "B200-SXM-180GB"),
        ("NVIDIA L4", 23034, "L4"),  # ECC takes one sixteenth
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA A10G", 22731, "A10G"),
        ("Tesla T4", 15360, "T4"),
        ("Tesla V100-SXM2-16GB", 16384, "V100-SXM2-16GB"),
        ("Tesla P100-PCIE-16GB", 16280, "P100-PCIe-16GB"),
        ("NVIDIA GeForce RTX 3090", 24576, "RTX-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, "RTX-3090Ti"),
        ("NVIDIA GeForce RTX 4090 D", 24564, "RTX-4090D"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX-PRO-6000-Server-96GB"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX-6000-Ada"),
        # Names that mislead: the memory of a cut-down board, a vGPU, a slice, a laptop's chip, nothing at all.
        ("NVIDIA A100-SXM4-80GB", 65536, ""),
        ("GRID A100D-20C", 20480, ""),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40192, ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, ""),
        ("Matrox G200", 8, ""),
        ("", 0, ""),
    ],
)
def test_a_product_is_a_type_when_name_and_memory_agree(product: str, memory_mib: int, gpu_type: str) -> None:
    found = gpu_of(product, memory_mib * MIB)
    assert (found.name if found else "") == gpu_type


def test_every_nvidia_type_is_found_by_its_own_name_and_memory() -> None:
    for known in gpus():
        assert gpu_of(known.gpu.name, known.gpu.memory_bytes) == known.gpu


def test_simulated_devices_are_of_the_types_that_are_said() -> None:
    inventory = discover("simulated:A100-SXM-80GB:2, l4:2", host_name="sim-3")
    assert inventory.source == inventory_pb2.DEVICE_SOURCE_SIMULATED
    assert [(d.index, d.gpu_type, list(d.linked_devices)) for d in inventory.devices] == [
        (0, "A100-SXM-80GB", [1]),
        (1, "A100-SXM-80GB", [0]),
        (2, "L4", []),
        (3, "L4", []),
    ]
    assert len({device.uuid for device in inventory.devices}) == 4
    assert inventory == discover("simulated:A100-SXM-80GB:2,L4:2", host_name="sim-3")


def test_simulated_devices_are_idle_and_well() -> None:
    first, second = open_devices("simulated:L4:2").sample()
    assert first == report_pb2.DeviceReport(index=0, clock_hz=MAX_CLOCK_HZ, temperature_c=COOL_C)
    assert second.index == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "unknown source of devices ''"),
        ("rocm", "expected `auto`, `nvml`, `none`"),
        ("none:3", "unknown source"),
        ("simulated", "simulated devices are ''"),
        ("simulated:A100-SXM-80GB", "must be TYPE:COUNT"),
        ("simulated:A100-SXM-80GB:x", "must be TYPE:COUNT"),
        ("simulated:A100-SXM-80GX:4", "did you mean A100-SXM-80GB?"),
        ("simulated:A100-SXM:4", "ambiguous"),
        ("simulated:L4:65", "at most 64"),
        ("simulated:L4:99999999999999999999", "at most 64"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(source: str, said: str) -> None:
    with pytest.raises(DevicesUnavailableError) as caught:
        open_devices(source)
    assert said in str(caught.value)


def test_a_node_without_gpus_has_an_inventory_of_its_own() -> None:
    devices = open_devices("none")
    inventory = devices.inventory()
    assert inventory.source == inventory_pb2.DEVICE_SOURCE_NONE
    assert inventory.host_name == socket.gethostname()
    assert list(inventory.devices) == devices.sample() == []
    devices.close()
