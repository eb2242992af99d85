"""Nodes of clouds and tools whose labels or tables differ are read with the GPUs that they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory

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
        (node("n", {INSTANCE: "Standard_NC48ads_A100_v4"}, 2), "A100-PCIe-80GB", 2),
        (node("n", {INSTANCE: "Standard_NC80adis_H100_v5"}, 2), "H100-NVL-94GB", 2),
        (node("n", {INSTANCE: "Standard_ND96isr_H100_v5"}, 8), "H100-SXM-80GB", 8),
        (node("n", {INSTANCE: "BM.GPU.H200.8"}, 8), "H200-SXM-141GB", 8),
        (node("n", {"eks.amazonaws.com/instance-gpu-name": "l4"}, 4), "L4", 4),
        (node("n", {"karpenter.k8s.aws/instance-gpu-name": "l40s", INSTANCE: "g6e.12xlarge"}, 4), "L40S", 4),
        (node("n", {"gpu.nvidia.com/class": "H100_NVLINK_80GB", INSTANCE: "BM.GPU.H100.8"}, 8), "H100-SXM-80GB", 8),
        (node("n", {"amd.com/gpu.product-name": "AMD_Instinct_MI355X_OAM"}, 8, AMD), "MI355X-288GB", 8),
        (node("n", {"beta.amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}, 8, AMD), "MI300X-192GB", 8),
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


@pytest.mark.parametrize(
    ("content", "gpu", "count"),
    [
        (TABLE, "A100-SXM-80GB", 1),
        ("name, memory.total [MiB]\nNVIDIA A10G, 23028 MiB\nNVIDIA A10G, 23028 MiB\n", "A10G", 2),
        ("GPU 0: NVIDIA L4 (UUID: GPU-0)\nGPU 1: NVIDIA L4 (UUID: GPU-1)\n  MIG 1g.3gb Device 0: (UUID: M)\n", "L4", 1),
    ],
    ids=["table", "csv", "list"],
)
def test_what_nvidia_smi_prints_for_people_is_read(tmp_path: Path, content: str, gpu: str, count: int) -> None:
    assert gpus_in(tmp_path, content, "host.txt") == {"host": (gpu, count)}
