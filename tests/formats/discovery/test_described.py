"""Nodes as people see them: ``kubectl describe``, ResourceSlices of further drivers, and MIG slices by their tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.discovery.fleet import Discovered, discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError

DESCRIBED = """\
Name:               gpu-1
Labels:             nvidia.com/gpu.count=8
                    nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3
                    topology.kubernetes.io/zone=us-east-1a
Annotations:        node.alpha.kubernetes.io/ttl: 0
Taints:             nvidia.com/gpu=present:NoSchedule
Unschedulable:      false
Conditions:
  Type             Status  LastHeartbeatTime                 LastTransitionTime                Reason         Message
  ----             ------  -----------------                 ------------------                ------         -------
  Ready            True    Wed, 02 Apr 2025 10:12:01 +0000   Mon, 10 Mar 2025 10:13:01 +0000   KubeletReady   ready
Capacity:
  cpu:                192
  nvidia.com/gpu:     8
Allocatable:
  cpu:                191
  nvidia.com/gpu:     8
System Info:
  Machine ID:                 abc
Allocated resources:
  (Total limits may be over 100 percent, i.e., overcommitted.)
  Resource           Requests     Limits
  --------           --------     ------
  cpu                8 (4%)       0 (0%)
  nvidia.com/gpu     2            2
Events:              <none>


Name:               gpu-2
Labels:             nvidia.com/gpu.product=NVIDIA-L40S
Annotations:        <none>
Taints:             team=a:NoExecute
Unschedulable:      true
Conditions:
  Type             Status  LastHeartbeatTime                 LastTransitionTime                Reason           Message
  Ready            False   Wed, 02 Apr 2025 10:12:01 +0000   Mon, 10 Mar 2025 10:13:01 +0000   KubeletNotReady  down
Capacity:
  nvidia.com/gpu:     4
Allocatable:
  nvidia.com/gpu:     4
"""


def found_in(folder: Path, content: str, name: str = "host.txt", **said: str) -> Discovered:
    (folder / name).write_text(content)
    return discovered(read_inventory([str(folder / name)]), name="c", said=said)


def boards_of(fleet: Discovered) -> dict[str, tuple[str, int]]:
    """Return the type of each group of nodes, and how many GPUs of it the group has."""
    return {one.name: (one.gpus[0].gpu, one.count * one.gpus[0].count) for one in fleet.cluster.node_groups}


def test_nodes_are_read_as_kubectl_describes_them(tmp_path: Path) -> None:
    fleet = found_in(tmp_path, DESCRIBED)
    assert boards_of(fleet) == {"gpu-1": ("H100-SXM-80GB", 6)}
    assert fleet.cluster.node_groups[0].zone == "us-east-1a"
    assert fleet.left_out == (
        "gpu-1: 2 GPUs (NVIDIA-H100-80GB-HBM3): in use by all/pods",
        "gpu-2: 4 GPUs (NVIDIA-L40S): cordoned, not ready (KubeletNotReady), tainted team=a:NoExecute",
    )
    assert not [note for note in fleet.assumed if "no pods were given" in note]


def test_a_description_with_wrong_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"capacity\.nvidia\.com/gpu: is 'eight', must be a number of GPUs"):
        found_in(tmp_path, DESCRIBED.replace("nvidia.com/gpu:     8", "nvidia.com/gpu:     eight"))


def sliced(driver: str, devices: list[dict[str, Any]]) -> str:
    spec = {"driver": driver, "nodeName": "n", "pool": {"name": "n", "generation": 1}}
    return json.dumps(
        {"kind": "ResourceSlice", "apiVersion": "resource.k8s.io/v1", "spec": spec | {"devices": devices}}
    )


def devices(count: int, **words: str) -> list[dict[str, Any]]:
    attributes = {name: {"string": word} for name, word in words.items()}
    return [{"name": f"gpu-{i}", "attributes": attributes} for i in range(count)]


@pytest.mark.parametrize(
    ("driver", "words", "gpu"),
    [
        ("gpu.amd.com", {"type": "amdgpu", "productName": "AMD_Instinct_MI300X_OAM"}, "MI300X-192GB"),
        ("gaudi.intel.com", {"model": "Gaudi2"}, "Gaudi2-96GB"),
        ("tpu.google.com", {"tpuGen": "v6e"}, "TPU-v6e"),
    ],
)
def test_devices_of_further_drivers_are_whole(tmp_path: Path, driver: str, words: dict[str, str], gpu: str) -> None:
    assert boards_of(found_in(tmp_path, sliced(driver, devices(8, **words)))) == {"n": (gpu, 8)}


def test_a_device_without_a_product_is_named_after_its_driver(tmp_path: Path) -> None:
    slices = sliced("gpu.nvidia.com", devices(2))
    assert boards_of(found_in(tmp_path, slices, **{"gpu.nvidia.com": "L4"})) == {"n": ("L4", 2)}


def test_a_device_that_is_not_healthy_is_left_out(tmp_path: Path) -> None:
    both = devices(2, model="Gaudi2")
    both[1] = {"name": "gpu-1", "attributes": {"model": {"string": "Gaudi2"}, "healthy": {"bool": False}}}
    fleet = found_in(tmp_path, sliced("gaudi.intel.com", both))
    assert (boards_of(fleet), fleet.left_out) == ({"n": ("Gaudi2-96GB", 1)}, ("n: 1 GPU (Gaudi2): unhealthy",))


def test_mig_devices_of_slices_are_parts_unless_they_are_only_possible(tmp_path: Path) -> None:
    parts = devices(3, type="mig", productName="NVIDIA A100-SXM4-80GB", profile="2g.20gb")
    assert boards_of(found_in(tmp_path, sliced("gpu.nvidia.com", parts))) == {"n-2g.20gb": ("A100-SXM-80GB-2g.20gb", 3)}
    possible = [one | {"consumesCounters": [{"counterSet": "gpu-0"}]} for one in parts]
    whole = devices(1, type="gpu", productName="NVIDIA A100-SXM4-80GB")
    fleet = found_in(tmp_path, sliced("gpu.nvidia.com", [*whole, *possible]))
    assert boards_of(fleet) == {"n": ("A100-SXM-80GB", 1)}


MIG_TABLE = """\
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:07:00.0 Off |                   On |
| N/A   31C    P0             44W /  400W |      87MiB /  81559MiB |     N/A      Default |
|                                         |                        |              Enabled |
+-----------------------------------------+------------------------+----------------------+
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:0F:00.0 Off |                    0 |
| N/A   30C    P0             62W /  400W |       4MiB /  81559MiB |      0%      Default |
|                                         |                        |             Disabled |
| MIG devices:                                                                            |
| GPU  GI  CI  MIG |                     Memory-Usage |        Vol|        Shared         |
|  0    2   0   0  |              37MiB /  40448MiB   | 60      0 |  3   0    3    0    3 |
|                  |                 0MiB /  65535MiB |           |                       |
|  0    9   0   1  |              12MiB /   9984MiB   | 16      0 |  1   0    1    0    1 |
|  0   10   0   2  |              12MiB /   9984MiB   | 16      0 |  1   0    1    0    1 |
"""


def test_nvidia_smis_table_lists_mig_slices(tmp_path: Path) -> None:
    """60 multiprocessors of 132 are three sevenths of an H100: the copy engines say so."""
    fleet = found_in(tmp_path, MIG_TABLE)
    assert boards_of(fleet) == {
        "host-3g.40gb": ("H100-SXM-80GB-3g.40gb", 1),
        "host-1g.10gb": ("H100-SXM-80GB-1g.10gb", 2),
        "host": ("H100-SXM-80GB", 1),
    }
    assert fleet.left_out == ()


def test_slices_belong_to_the_gpu_of_their_number(tmp_path: Path) -> None:
    """As of ``nvidia-smi -i 0``, but of another GPU."""
    other = re.sub(r"(?m)^\|( +)0( +)(?=NVIDIA|\d)", r"|\g<1>3\2", MIG_TABLE)
    assert boards_of(found_in(tmp_path, other)) == boards_of(found_in(tmp_path, MIG_TABLE))


def test_slurm_counts_mig_slices_of_each_profile(tmp_path: Path) -> None:
    gres = "Gres=gpu:nvidia_h100_80gb_hbm3_1g.10gb:7,gpu:nvidia_h100_80gb_hbm3_3g.40gb:1"
    used = "AllocTRES=cpu=4,gres/gpu=2,gres/gpu:nvidia_h100_80gb_hbm3_1g.10gb=2"
    fleet = found_in(
        tmp_path,
        f"NodeName=n1 {gres}\n   State=MIXED {used}\nNodeName=n2 Gres=gpu:1g.10gb:7 State=IDLE\n",
        gpu="none",
    )
    assert boards_of(fleet) == {"n1-1g.10gb": ("H100-SXM-80GB-1g.10gb", 5), "n1-3g.40gb": ("H100-SXM-80GB-3g.40gb", 1)}
    assert "n1: 2 GPUs (nvidia_h100_80gb_hbm3_1g.10gb): in use by jobs" in fleet.left_out
    with pytest.raises(DocumentError, match="GPU 'gpu' is not in the catalogue; --gpu 'gpu=TYPE'"):
        found_in(tmp_path, "NodeName=n2 Gres=gpu:1g.10gb:7 State=IDLE\n")
