"""A host's answers through NVML become its fleet; what the library refuses is unknown."""

from __future__ import annotations

import sys
from typing import Any

import pynvml as real
import pytest

from hetis.formats.catalogue import find_gpu
from hetis.formats.discovery.fleet import Discovered, discovered
from hetis.formats.discovery.nvml import read_nvml
from hetis.formats.errors import DocumentError
from hetis.solver.cluster import Link
from tests.runtime.agent.devices.fake_nvml import GIB, Gpu, fake_pynvml

ADDRESSES = [f"00000000:{slot:02X}:00.0" for slot in range(0x3A, 0x42)]
SWITCH = "00000000:C0:00.0"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")


def found(
    monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, with_busy: bool = False, **settings: Any
) -> tuple[Discovered, Any]:
    module: Any = fake_pynvml(*gpus, **settings)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return discovered(read_nvml(with_busy=with_busy), name="test", said={}), module


def idle(number: int, **fields: Any) -> Gpu:
    given: dict[str, Any] = {"bus_id": ADDRESSES[number], "memory_used_bytes": 600 * 2**20}
    return Gpu(**given | fields)


def slots(fleet: Discovered) -> dict[str, dict[str, int]]:
    return {group.name: {one.gpu: one.count for one in group.gpus} for group in fleet.cluster.node_groups}


def test_what_may_be_used_is_the_fleet_and_the_rest_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, module = found(
        monkeypatch,
        idle(0),
        idle(1, processes=[41, 42], memory_used_bytes=70 * GIB),
        idle(2, memory_used_bytes=30 * GIB),
        idle(3, slices=[Gpu(), Gpu()]),
        idle(4, recovery=real.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET),
        idle(5, compute_mode=real.NVML_COMPUTEMODE_PROHIBITED),
        idle(6, refused={"open": real.NVML_ERROR_GPU_IS_LOST}),
        idle(7, name="NVIDIA L4", memory_bytes=23034 * 2**20),
        names={41: "/opt/venv/bin/python3"},
    )
    assert slots(fleet) == {"gpu-7": {"A100-SXM-80GB": 1, "L4": 1}}
    assert {one.reserved_bytes for one in fleet.cluster.node_groups[0].gpus} == {768 * 2**20}, "600 MiB in steps of 256"
    board = "NVIDIA A100-SXM4-80GB"
    assert fleet.left_out == (
        f"gpu-7: 1 GPU (index 1; {board}): in use by python3, process 42",
        f"gpu-7: 1 GPU (index 2; {board}): 30 of 80 GiB in use, but not by a visible process",
        f"gpu-7: 1 GPU (index 3; {board}): MIG is on (2 parts); nvidia-smi -L names its slices",
        f"gpu-7: 1 GPU (index 4; {board}): the driver asks for recovery (Drain and Reset)",
        f"gpu-7: 1 GPU (index 5; {board}): its compute mode is Prohibited",
        "gpu-7: 1 GPU (index 6; no name): the driver cannot read it",
    )
    assert fleet.assumed[0] == "NVML only describes this host, gpu-7, and does not report its zone"
    assert module.shutdowns == 1


def test_busy_gpus_are_kept_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = idle(0, processes=[41]), idle(1, memory_used_bytes=9 * GIB), idle(2, slices=[])
    fleet, _ = found(monkeypatch, *gpus, with_busy=True)
    assert slots(fleet) == {"gpu-7": {"A100-SXM-80GB": 2}}
    assert fleet.cluster.node_groups[0].gpus[0].reserved_bytes == 0
    assert fleet.left_out == (
        "gpu-7: 1 GPU (index 2; NVIDIA A100-SXM4-80GB): MIG is on; nvidia-smi -L names its slices",
    )


def test_a_gpu_in_mig_mode_is_left_out_although_its_slices_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"nvmlDeviceGetMaxMigDeviceCount": real.NVML_ERROR_NO_PERMISSION}
    fleet, _ = found(monkeypatch, idle(0), idle(1, slices=[Gpu()], refused=refused))
    assert slots(fleet) == {"gpu-7": {"A100-SXM-80GB": 1}}
    assert fleet.left_out == (
        "gpu-7: 1 GPU (index 1; NVIDIA A100-SXM4-80GB): MIG is on; nvidia-smi -L names its slices",
    )


@pytest.mark.parametrize(
    ("board", "memory", "remotes", "link"),
    [
        # A bridge of four links between two PCIe boards, whose GPU type has none.
        ("NVIDIA A40", 46068, [[1] * 4, [0] * 4], Link(bytes_per_s=4 * 14.0625e9, latency_s=0.0)),
        # Twelve links to switches, as the type has them, so that the file need not state them.
        ("NVIDIA A100-SXM4-80GB", 81920, [[None] * 12] * 2, None),
        # No links although the type has them: a virtual machine that got the GPUs without their switches.
        (
            "NVIDIA A100-SXM4-80GB",
            81920,
            [[], []],
            Link(bytes_per_s=find_gpu("A100-SXM-80GB").gpu.pcie_bytes_per_s, latency_s=0.0),
        ),
    ],
)
def test_nvlinks_are_counted(
    monkeypatch: pytest.MonkeyPatch, board: str, memory: int, remotes: list[list[int | None]], link: Link | None
) -> None:
    gpus = [
        idle(
            number,
            name=board,
            memory_bytes=memory * 2**20,
            remotes=[SWITCH if other is None else ADDRESSES[other].lower() for other in ends],
            links=set(ADDRESSES) if ends else set(),
        )
        for number, ends in enumerate(remotes)
    ]
    fleet, _ = found(monkeypatch, *gpus)
    assert fleet.cluster.node_groups[0].intra_link == link


def test_links_of_some_pairs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {0: 1, 1: 0, 2: 3, 3: 2}
    gpus = [
        idle(
            one,
            name="NVIDIA A40",
            memory_bytes=46068 * 2**20,
            remotes=[ADDRESSES[other]] * 4,
            links={ADDRESSES[other]},
        )
        for one, other in pairs.items()
    ]
    fleet, _ = found(monkeypatch, *gpus)
    assert fleet.cluster.node_groups[0].intra_link is None
    assert "gpu-7: only some pairs of GPUs have NVLinks; the file has a single link for all pairs" in fleet.assumed


@pytest.mark.parametrize("call", ["nvmlDeviceGetP2PStatus", "nvmlDeviceGetNvLinkState"])
def test_links_that_are_not_told_are_those_of_the_type(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    refused = {call: real.NVML_ERROR_NOT_SUPPORTED}
    fleet, _ = found(monkeypatch, *(idle(n, links=set(ADDRESSES), refused=refused) for n in range(2)))
    assert fleet.cluster.node_groups[0].intra_link is None
    assert not any("NVLink" in line for line in fleet.assumed)


def test_a_driver_that_tells_names_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: real.NVML_ERROR_NO_PERMISSION for name in dir(fake_pynvml()) if name.startswith("nvmlDeviceGet")}
    fleet, _ = found(monkeypatch, idle(0, refused={n: e for n, e in names.items() if n != "nvmlDeviceGetName"}))
    assert slots(fleet) == {"gpu-7": {"A100-SXM-80GB": 1}}


def test_what_is_missing_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(error: int, name: str = "nvmlInit") -> str:
        with pytest.raises(DocumentError) as caught:
            found(monkeypatch, refused={name: error})
        return str(caught.value)

    without_library = refusal(real.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert without_library == "nvml: needs libnvidia-ml.so.1, which is not on this host: it comes with NVIDIA's driver"
    assert refusal(real.NVML_ERROR_DRIVER_NOT_LOADED) == "nvml: NVIDIA's library cannot be used: Driver Not Loaded"
    assert refusal(real.NVML_ERROR_UNKNOWN, "nvmlDeviceGetCount") == "nvml: cannot count the GPUs: Unknown Error"
    with pytest.raises(DocumentError, match="nvml: has no GPUs in its 1 node"):
        found(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DocumentError) as caught:
        read_nvml()
    told = "nvml: needs nvidia-ml-py, which is not installed: pip install nvidia-ml-py"
    assert str(caught.value) == told
