"""Nodes of clouds and tools whose labels or tables differ are read with the GPUs that they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats import catalogue
from hetis.formats.cluster import cluster_to_data, parse_cluster
from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError
from hetis.formats.positions import Text
from hetis.solver.cluster import Cluster, GpuSlots

NVIDIA, AMD = "nvidia.com/gpu", "amd.com/gpu"
INSTANCE = "node.kubernetes.io/instance-type"


def node(
    name: str, labels: dict[str, str], count: int, resource: str = NVIDIA, annotations: dict[str, str] | None = None
) -> dict[str, Any]:  # fmt: skip
    status = {each: {resource: str(count)} for each in ("capacity", "allocatable")}
    metadata = {"name": name, "labels": labels, "annotations": annotations or {}}
    return {"kind": "Node", "apiVersion": "v1", "metadata": metadata, "status": status}


def gpus_in(folder: Path, content: str, name: str = "nodes.json") -> dict[str, tuple[str, int]]:
    (folder / name).write_text(content)
    cluster = discovered(read_inventory([str(folder / name)]), name="c", said={}).cluster
    return {group.name: (group.gpus[0].gpu, group.gpus[0].count) for group in cluster.node_groups}


HAMI = {"hami.io/node-nvidia-register": json.dumps([{"id": f"GPU-{i}", "count": 10} for i in range(2)])}


@pytest.mark.parametrize(
    ("one", "gpu", "count"),
    [
        (node("n", {"beta.kubernetes.io/instance-type": "g5.12xlarge"}, 4), "A10G", 4),
        (node("n", {"k8s.amazonaws.com/accelerator": "nvidia-l4"}, 4), "L4", 4),
        (node("n", {"beta.amd.com/gpu.device-id": "74a5"}, 8, AMD), "MI325X-256GB", 8),
        (node("n", {INSTANCE: "ct6e-standard-4t"}, 4, "google.com/tpu"), "TPU-v6e", 4),
        (node("n", {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-3090"}, 20, NVIDIA, HAMI), "RTX-3090", 2),
        (
            node("n", {"nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.count": "4"}, 40, NVIDIA, HAMI),
            "L4",
            4,
        ),
    ],
)
def test_a_node_of_a_platform_has_its_gpus(tmp_path: Path, one: dict[str, Any], gpu: str, count: int) -> None:
    assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": (gpu, count)}


def test_nodes_without_labels_are_told_apart_by_their_machines(tmp_path: Path) -> None:
    nodes = [node("a", {INSTANCE: "new.8x"}, 2), node("b", {INSTANCE: "newer.8x"}, 2)]
    (tmp_path / "n.json").write_text(json.dumps({"kind": "List", "items": nodes}))
    found = read_inventory([str(tmp_path / "n.json")])
    assert [one.gpus[0].product for one in found.nodes] == ["new.8x", "newer.8x"]


SCONTROL = """\
NodeName=gpu01 Arch=x86_64 CoresPerSocket=32
   AvailableFeatures=l40s,ib
   Gres=gpu:l40s:4(S:0-1)
   State=MIXED ThreadsPerCore=1
   AllocTRES=cpu=8,mem=1G,gres/gpu=1
NodeName=gpu02 Arch=x86_64
   Gres=gpu:l4:2
   State=DOWN*+DRAIN Reason=broken fan [root@2026-01-01]
NodeName=cpu01 Arch=x86_64
   Gres=(null)
   State=IDLE
"""
TABLE = """\
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|   0  NVIDIA A100-SXM4-80GB          On  |   00000000:07:00.0 Off |                    0 |
| N/A   30C    P0             60W /  400W |       4MiB /  81920MiB |      0%      Default |
|   1  NVIDIA A100-SXM4-80GB          On  |   00000000:08:00.0 Off |                    0 |
| N/A   30C    P0             60W /  400W |   70000MiB /  81920MiB |      0%      Default |
"""


def test_scontrol_is_read_without_json(tmp_path: Path) -> None:
    assert gpus_in(tmp_path, SCONTROL, "scontrol.txt") == {"gpu01": ("L40S", 3)}
    found = read_inventory([str(tmp_path / "scontrol.txt")])
    assert found.nodes[0].left_out == ("1 GPU (l40s): in use by jobs",)
    assert "DRAIN" in found.nodes[1].left_out[0]


SHARED_MEMORY = """\
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
|   0  NVIDIA GB10                    On  |   0000000F:01:00.0 Off |                  N/A |
| N/A   36C    P8              4W /  N/A  | Not Supported          |      0%      Default |
"""
CUT = """\
| NVIDIA-SMI 460.32.03    Driver Version: 460.32.03    CUDA Version: 11.2     |
|   0  GeForce RTX 208...  Off  | 00000000:00:1F.0 Off |                  N/A |
| 30%   36C    P0    23W / 250W |      0MiB / 11019MiB |      0%      Default |
"""
HL_SMI = """\
| HL-SMI Version:                              hl-1.16.1-fw-50.1.2.0          |
|   0  HL-225              N/A  | 0000:33:00.0     N/A |                   0  |
| N/A   24C   N/A    92W / 600W |    768MiB / 98304MiB |     0%           N/A |
"""


@pytest.mark.parametrize(
    ("content", "gpu", "count"),
    [
        (TABLE, "A100-SXM-80GB", 1),
        (SHARED_MEMORY, "GB10", 1),
        (CUT, "RTX-2080Ti", 1),
        (HL_SMI, "Gaudi2-96GB", 1),
        ("name, memory.total [MiB]\nNVIDIA A10G, 23028 MiB\nNVIDIA A10G, 23028 MiB\n", "A10G", 2),
        ("0, NVIDIA L40S, 46068 MiB\n1, NVIDIA L40S, 46068 MiB\n", "L40S", 2),
        ("NVIDIA L40S\nNVIDIA L40S\n", "L40S", 2),
        ("GPU 0: NVIDIA L4 (UUID: GPU-0)\nGPU 1: NVIDIA L4 (UUID: GPU-1)\n", "L4", 2),
    ],
    ids=["table", "shared memory", "cut name", "hl-smi", "csv", "csv without header", "names", "list"],
)
def test_what_nvidia_smi_prints_for_people_is_read(tmp_path: Path, content: str, gpu: str, count: int) -> None:
    assert gpus_in(tmp_path, content, "host.txt") == {"host": (gpu, count)}


def slices_of(cluster: Cluster) -> dict[str, tuple[int, str, float, float]]:
    """Return number, resource, GiB and share of the card's TFLOPS by the names of groups."""
    card = catalogue.find_gpu("A100-SXM-80GB").gpu
    types = {group.name: cluster.gpu_types[group.gpus[0].gpu] for group in cluster.node_groups}
    return {
        group.name: (
            group.count,
            group.resource,
            types[group.name].memory_bytes / 2**30,
            types[group.name].fp16_flops / card.fp16_flops,
        )
        for group in cluster.node_groups
    }


def test_mig_slices_are_devices_with_their_share_of_the_card(tmp_path: Path) -> None:
    mixed = node("n", {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}, 0)
    for each in ("capacity", "allocatable"):
        mixed["status"][each] = {"nvidia.com/mig-1g.10gb": "3", "nvidia.com/mig-4g.40gb": "1"}
    limits = {"containers": [{"resources": {"limits": {"nvidia.com/mig-1g.10gb": "1"}}}], "nodeName": "n"}
    pod = {"kind": "Pod", "metadata": {"name": "p"}, "spec": limits, "status": {"phase": "Running"}}
    (tmp_path / "nodes.json").write_text(json.dumps({"kind": "List", "items": [mixed, pod]}))
    fleet = discovered(read_inventory([str(tmp_path / "nodes.json")]), name="c", said={})
    assert slices_of(fleet.cluster) == {
        "n-1g.10gb": (2, "nvidia.com/mig-1g.10gb", 10.0, pytest.approx(1 / 7)),
        "n-4g.40gb": (1, "nvidia.com/mig-4g.40gb", 40.0, pytest.approx(4 / 7)),
    }
    assert fleet.left_out == ("n: 1 slice (nvidia.com/mig-1g.10gb): in use by default/p",)
    assert any("nodes of their own" in one for one in fleet.assumed)
    assert parse_cluster(cluster_to_data(fleet.cluster), Text(file="c", text=None)) == fleet.cluster
    listed = "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)\n" + "".join(
        f"  MIG 3g.40gb     Device  {i}: (UUID: MIG-{i})\n" for i in range(2)
    )
    (tmp_path / "h.txt").write_text(listed + "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\n")
    host = discovered(read_inventory([str(tmp_path / "h.txt")]), name="c", said={})
    assert slices_of(host.cluster)["h-3g.40gb"][:3] == (2, "", 40.0)
    assert host.cluster.node_groups[-1].gpus_of_node() == {1: "A100-SXM-80GB"}
    (tmp_path / "h.txt").write_text(listed.replace("3g.40gb", "lots"))
    with pytest.raises(DocumentError, match=r"MIG profile 'lots' is not of the form 1g\.10gb"):
        discovered(read_inventory([str(tmp_path / "h.txt")]), name="c", said={})


def test_memory_that_a_tool_reports_counts(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text(
        "name, memory.total [MiB]\nNVIDIA A10G, 23028 MiB\nNVIDIA H100 80GB HBM3, 81559 MiB\n"
    )
    fleet = discovered(read_inventory([str(tmp_path / "h.csv")]), name="c", said={})
    assert fleet.cluster.gpu_types["A10G"].memory_bytes == 23028 * 2**20
    assert fleet.cluster.gpu_types["H100-SXM-80GB"].memory_bytes == 80 * 2**30, "0.4% less is nominal"
    assert "memory: 22.5 GiB of A10G, as reported, which `gpu_types` states" in fleet.assumed


DESKTOP = """+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|   0  NVIDIA GeForce RTX 4090        Off |   00000000:01:00.0  On |                  Off |
| 30%   40C    P8             20W /  450W |    2300MiB /  24564MiB |      3%      Default |
|   1  NVIDIA GeForce RTX 4090        Off |   00000000:02:00.0 Off |                  Off |
| 30%   40C    P8             20W /  450W |      12MiB /  24564MiB |      0%      Default |
"""
QUERIED = """name, memory.total [MiB], memory.used [MiB]
NVIDIA GeForce RTX 4090, 24564 MiB, 2300 MiB
NVIDIA GeForce RTX 4090, 24564 MiB, 12 MiB
"""


@pytest.mark.parametrize("content", [DESKTOP, QUERIED], ids=["table", "csv"])
def test_memory_in_use_is_reserved_on_each_gpu_of_a_node(tmp_path: Path, content: str) -> None:
    (tmp_path / "desk.txt").write_text(content)
    fleet = discovered(read_inventory([str(tmp_path / "desk.txt")]), name="c", said={})
    assert fleet.cluster.node_groups[0].gpus == (GpuSlots(gpu="RTX-4090", count=2, reserved_bytes=2304 * 2**20),)
    assert any("`reserved`" in one for one in fleet.assumed)
    kept = discovered(read_inventory([str(tmp_path / "desk.txt")], with_busy=True), name="c", said={})
    assert kept.cluster.node_groups[0].gpus == (GpuSlots(gpu="RTX-4090", count=2),)


STATIC = [
    {
        "gpu": i,
        "asic": {"market_name": "AMD Instinct MI300X OAM"},
        "vram": {"type": "HBM3", "size": {"value": 196592, "unit": "MB"}},
    }
    for i in range(2)
]
ROCM = {
    f"card{i}": {
        "Card Series": "AMD Instinct MI300X OAM",
        "Card Model": "0x74a1",
        "VRAM Total Memory (B)": "206141652992",
        "VRAM Total Used Memory (B)": str(297279488 if i else 90 * 2**30),
    }
    for i in range(3)
} | {"system": {"Driver version": "6.8.5"}}
AMD_TEXT = """\
GPU: {0}
    ASIC:
        MARKET_NAME: MI300X-O
    VRAM:
        TYPE: HBM3
        SIZE: 196592 MB
    PARTITION:
        ACCELERATOR_PARTITION: SPX
        CACHE SIZE: 32 KB
"""
AMD_TABLE = """\
| AMD-SMI 26.0.0+37d158ab      amdgpu version: 6.14.14  ROCm version: 7.0.1    |
| 0000:05:00.0    AMD Instinct MI300X | 0 %      37 °C   0           138/750 W |
|   0       0       7        SPX/NPS1 | 0 %        N/A           285/196592 MB |
| 0000:26:00.0    AMD Instinct MI300X | 0 %      37 °C   0           138/750 W |
|   1       1       6        SPX/NPS1 | 0 %        N/A           285/196592 MB |
"""
ROCM_TEXT = """\
====================================== Product Info ======================================
GPU[{0}]\t\t: Card Series: \t\tAMD Instinct MI250X
GPU[{0}]\t\t: Card Vendor: \t\tAdvanced Micro Devices, Inc. [AMD/ATI]
GPU[{0}]\t\t: VRAM Total Memory (B): 68702699520
"""
SINFO = """\
NODELIST    GRES         STATE
gpu[01-02]  gpu:a100:4   idle
gpu03       gpu:a100:4   drain
login       (null)       idle
"""
RAY_STATUS = """\
======== Autoscaler status: 2026-11-20 10:00:00.000000 ========
Node status
---------------------------------------------------------------
Active:
 1 node_a
 1 node_b
Resources
---------------------------------------------------------------
Usage:
 0.0/64.0 CPU
 2.0/8.0 GPU
 0.0/2.0 accelerator_type:L40S
 0B/400.00GiB memory
"""
RAY_VERBOSE = (
    RAY_STATUS
    + """
Node: aa11
 Usage:
  0.0/8.0 GPU
  0.0/1.0 accelerator_type:L40S
Node: bb22
 Usage:
  0.0/32.0 CPU
"""
)


@pytest.mark.parametrize(
    ("name", "content", "nodes"),
    [
        ("h.json", json.dumps(STATIC), {"h": ("MI300X-192GB", 2)}),
        ("h.json", json.dumps({"gpu_data": STATIC}), {"h": ("MI300X-192GB", 2)}),
        ("h.json", json.dumps(ROCM), {"h": ("MI300X-192GB", 2)}),
        ("h.txt", AMD_TEXT.format(0) + AMD_TEXT.format(1), {"h": ("MI300X-192GB", 2)}),
        ("h.txt", AMD_TABLE, {"h": ("MI300X-192GB", 2)}),
        ("h.txt", ROCM_TEXT.format(0) + ROCM_TEXT.format(1), {"h": ("MI250X-per-die", 2)}),
        ("sinfo.txt", "NODELIST|GRES|STATE\ngpu01|gpu:l40s:4|idle\n", {"gpu01": ("L40S", 4)}),
        ("sinfo.txt", SINFO.replace("a100", "l40s"), {"gpu01": ("L40S", 4), "gpu02": ("L40S", 4)}),
        ("ray.txt", RAY_STATUS, {"ray": ("L40S", 4)}),
        ("ray.txt", RAY_VERBOSE, {"aa11": ("L40S", 8)}),
    ],
    ids=[
        *("amd-smi", "new amd-smi", "rocm-smi", "amd-smi static", "amd-smi's table", "rocm-smi's text", "sinfo -o"),
        *("sinfo", "ray status", "ray status -v"),
    ],
)
def test_outputs_of_further_tools_are_read(
    tmp_path: Path, name: str, content: str, nodes: dict[str, tuple[str, int]]
) -> None:
    assert gpus_in(tmp_path, content, name) == nodes


NPU_SMI = """\
+---------------------------+---------------+----------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 95.3        43                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3352 / 65536         |
| 1     910B3               | OK            | 93.1        41                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3352 / 65536         |
"""
LSPCI = """\
00:02.0 VGA compatible controller: ASPEED Technology, Inc. ASPEED Graphics Family (rev 52)
17:00.0 3D controller: NVIDIA Corporation GA100 [A100 PCIe 80GB] (rev a1)
65:00.0 3D controller: NVIDIA Corporation GA100 [A100 PCIe 80GB] (rev a1)
65:00.1 Audio device: NVIDIA Corporation GA102 High Definition Audio Controller (rev a1)
"""


@pytest.mark.parametrize(
    ("content", "gpu"), [(NPU_SMI, "Ascend-910B-64GB"), (LSPCI, "A100-PCIe-80GB")], ids=["npu-smi info", "lspci"]
)
def test_lists_of_a_host_are_read(tmp_path: Path, content: str, gpu: str) -> None:
    assert gpus_in(tmp_path, content, "h.txt") == {"h": (gpu, 2)}


def test_a_machine_with_a_part_of_a_board_has_no_whole_board(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="GPU 'Standard_NV6ads_A10_v5' is not in the catalogue"):
        gpus_in(tmp_path, json.dumps({"kind": "List", "items": [node("n", {INSTANCE: "Standard_NV6ads_A10_v5"}, 1)]}))


def test_parts_of_amd_gpus_are_no_whole_gpus(tmp_path: Path) -> None:
    labels = {"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM", "amd.com/gpu.compute-memory-partition": "cpx_nps4"}
    cards = {"kind": "List", "items": [node("n", labels, 64, AMD)]}
    with pytest.raises(DocumentError, match=r"64 devices \(AMD_Instinct_MI300X_OAM\): parts of GPUs \(cpx_nps4\)"):
        gpus_in(tmp_path, json.dumps(cards))
    labels["amd.com/gpu.compute-memory-partition"] = "spx_nps1"
    cards = {"kind": "List", "items": [node("n", labels, 8, AMD)]}
    assert gpus_in(tmp_path, json.dumps(cards)) == {"n": ("MI300X-192GB", 8)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("h.json", json.dumps([STATIC[0] | {"partition": {"accelerator_partition": "CPX"}}])),
        ("h.txt", AMD_TABLE.replace("SPX/NPS1", "CPX/NPS1")),
    ],
)
def test_parts_of_amd_gpus_that_tools_of_hosts_list_are_left_out(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DocumentError, match=r"parts of GPUs \(CPX\), not whole GPUs"):
        gpus_in(tmp_path, content, name)


@pytest.mark.parametrize(
    "register",
    [
        json.dumps([{"id": f"GPU-{i}", "count": 10, "type": "NVIDIA-NVIDIA GeForce RTX 3090"} for i in range(2)]),
        "".join(f"GPU-{i},10,24576,100,NVIDIA-NVIDIA GeForce RTX 3090,0,true:" for i in range(2)),
    ],
    ids=["JSON", "colons"],
)
def test_hami_names_the_gpus_of_a_node_without_labels(tmp_path: Path, register: str) -> None:
    one = node("n", {}, 20, annotations={"hami.io/node-nvidia-register": register})
    assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": ("RTX-3090", 2)}


def test_a_register_that_names_no_gpus_is_none(tmp_path: Path) -> None:
    labels = {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-3090"}
    one = node("n", labels, 2, annotations={"hami.io/node-nvidia-register": "none"})
    assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": ("RTX-3090", 2)}


def test_slices_that_pods_use_are_left_out(tmp_path: Path) -> None:
    """Under the strategy ``single`` slices are called GPUs."""
    one = node("n", {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", "nvidia.com/gpu.count": "16"}, 16)
    resources = {"limits": {NVIDIA: "6"}}
    pod = {
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"nodeName": "n", "containers": [{"resources": resources}]},
        "status": {"phase": "Running"},
    }
    (tmp_path / "n.json").write_text(json.dumps({"kind": "List", "items": [one, pod]}))
    found = discovered(read_inventory([str(tmp_path / "n.json")]), name="c", said={})
    assert [(group.gpus[0].gpu, group.count) for group in found.cluster.node_groups] == [("A100-SXM-80GB-3g.40gb", 10)]
    assert found.left_out == ("n: 6 GPUs (NVIDIA-A100-SXM4-80GB): in use by default/p",)


def test_ascend_a3_nodes_have_two_dies_to_a_module(tmp_path: Path) -> None:
    one = node("n", {"node.kubernetes.io/npu.chip.name": "Ascend910", "accelerator-type": "module-a3-16"}, 16,
               "huawei.com/Ascend910")  # fmt: skip
    assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": ("Ascend-910C-per-die", 16)}


def test_a_card_divided_by_mig_is_left_out_of_nvidia_smis_table(tmp_path: Path) -> None:
    row = "|   0  NVIDIA H100 80GB HBM3  On  |   00000000:18:00.0 Off |  0 |\n"
    row += "| N/A   30C    P0    70W /  700W |       0MiB /  81559MiB |  0%   Default |\n|     |      |   {} |\n"
    table = "| NVIDIA-SMI 590.44.01   Driver Version: 590.44.01   CUDA Version: 13.1 |\n"
    assert gpus_in(tmp_path, table + row.format("Disabled") + row.format("Enabled"), "h.txt") == {
        "h": ("H100-SXM-80GB", 1)
    }


def test_coreweave_tells_boards_of_one_class_apart_by_their_memory(tmp_path: Path) -> None:
    for memory, gpu in (("40", "A100-SXM-40GB"), ("80", "A100-SXM-80GB")):
        one = node("n", {"gpu.nvidia.com/class": "A100_NVLINK", "gpu.nvidia.com/vram": memory}, 8)
        assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": (gpu, 8)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("h.json", '[{"gpu": 0, "vram": {}}]', "has GPUs without a name: amd-smi static --json"),
        ("ray.txt", RAY_STATUS.replace("/2.0 acc", "/3.0 acc"), "has totals, 8 GPUs of L40S, which do not say"),
        ("ray.txt", RAY_STATUS.replace("/8.0 GPU", "/0.0 GPU"), "has totals, 0 GPUs of L40S, which do not say"),
        ("sinfo.txt", SINFO.replace("gpu:a100:4", "gpu:a100:x"), "is 'gpu:a100:x', expected gpu:TYPE:COUNT"),
    ],
)
def test_what_further_tools_leave_open_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        gpus_in(tmp_path, content, name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("one", "gpu"),
    [
        (node("n", {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice"}, 4, "google.com/tpu"), "TPU-v6e"),
        (node("n", {"accelerator-type": "module-910b-8"}, 4, "huawei.com/Ascend910"), "Ascend-910B-64GB"),
        (node("n", {"node.kubernetes.io/npu.chip.name": "910B4"}, 4, "huawei.com/Ascend910"), "Ascend-910B4-32GB"),
    ],
)
def test_accelerators_of_other_vendors_are_found(tmp_path: Path, one: dict[str, Any], gpu: str) -> None:
    assert gpus_in(tmp_path, json.dumps({"kind": "List", "items": [one]})) == {"n": (gpu, 4)}
