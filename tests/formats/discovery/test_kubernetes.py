"""Nodes of Kubernetes: what labels, pods, slices, claims and taints leave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.discovery import FleetSource
from hetis.formats.discovery.fleet import Discovered, discovered, file_text
from hetis.formats.discovery.nvidia import DriverGpu
from hetis.formats.discovery.reading import read_inventory
from tests.formats.discovery.fleets import INPUTS, found, gpus, reason, refused


def test_nodes_of_kubernetes_have_what_their_labels_and_pods_leave() -> None:
    fleet = found("kubectl_nodes.json", "kubectl_pods.json")
    assert gpus(fleet) == {
        "a100-0": {"A100-SXM-80GB": 8},
        "a100-1": {"A100-SXM-80GB": 4},
        "h100-0": {"H100-SXM-80GB": 7},
        "l4-1": {"L4": 4},
        "mig-mixed": {"A100-SXM-40GB": 2},
        "mi300x": {"MI300X-192GB": 8},
        "g6e-0": {"L40S": 4},
        "gke-0": {"A100-SXM-40GB": 2},
        **{f"mig-single-1g.5gb-{i}": {"A100-SXM-40GB-1g.5gb": 1} for i in range(56)},
        **{f"mig-mixed-3g.20gb-{i}": {"A100-SXM-40GB-3g.20gb": 1} for i in range(4)},
    }
    assert {group.zone for group in fleet.cluster.node_groups if group.name != "h100-0"} == {"eu-west-1a"}
    assert fleet.cluster.network.zone_default is not None
    assert reason(fleet, "a100-1").endswith(
        "4 GPUs (NVIDIA-A100-SXM4-80GB): in use by serving/llama-0, serving/llama-1"
    )
    assert "not allocatable" in reason(fleet, "h100-0")
    assert reason(fleet, "h100-1") == "8 GPUs (NVIDIA-H100-80GB-HBM3): cordoned"
    assert "not ready (NodeStatusUnknown)" in reason(fleet, "l4-0")
    assert "mixed types" in reason(fleet, "mixed")
    assert "1 node without GPUs" in fleet.left_out


def test_shared_gpus_may_have_a_name_of_their_own(tmp_path: Path) -> None:
    """NVIDIA's device plugin renames the resource if its configuration says so, and keeps the product's name."""
    data = json.loads((INPUTS / "kubectl_nodes.json").read_text())
    node, other = (next(one for one in data["items"] if one["metadata"]["name"] == name) for name in ("l4-1", "a100-0"))
    for counts in (node["status"]["capacity"], node["status"]["allocatable"]):
        counts["nvidia.com/gpu.shared"], counts["nvidia.com/gpu"] = counts["nvidia.com/gpu"], "0"
    labels = node["metadata"]["labels"]
    labels["nvidia.com/gpu.product"] = "NVIDIA-L4"
    container = {"resources": {"limits": {"nvidia.com/gpu.shared": "1"}}}
    pod = {
        "kind": "Pod",
        "metadata": {"name": "chat", "namespace": "serving"},
        "spec": {"nodeName": "l4-1", "containers": [container]},
    }

    def fleet(*items: dict[str, Any]) -> Discovered:
        (tmp_path / "nodes.json").write_text(json.dumps({"kind": "List", "items": items}))
        return discovered(read_inventory([str(tmp_path / "nodes.json")]), name="t", said={})

    alone = fleet(node)
    assert gpus(alone) == {"l4-1": {"L4": 4}}
    assert [group.resource for group in alone.cluster.node_groups] == ["nvidia.com/gpu.shared"]
    assert "resource: nvidia.com/gpu.shared\n" in file_text(alone, sources=["nodes.json"])
    assert [group.resource for group in fleet(other).cluster.node_groups] == [""]
    in_use = fleet(node, pod)
    assert gpus(in_use) == {"l4-1": {"L4": 3}}
    assert reason(in_use, "l4-1") == "1 GPU (NVIDIA-L4): in use by serving/chat"
    for name in ("count", "replicas", "product", "memory"):
        del labels[f"nvidia.com/gpu.{name}"]
    unknown = fleet(node, other)
    assert "l4-1" not in gpus(unknown)
    assert "shared, and its labels do not say how many GPUs there are" in reason(unknown, "l4-1")


def test_gpus_that_a_plan_numbers_otherwise_than_the_driver_have_their_indices(tmp_path: Path) -> None:
    text = (INPUTS / "sxm.xml").read_text()
    first, *others = re.findall(r"<gpu id=.*?</gpu>", text, re.DOTALL)
    in_use = next(one for one in others if "python3.12" in one)
    (tmp_path / "host.xml").write_text(f"<nvidia_smi_log>{in_use}{first}{others[0]}</nvidia_smi_log>")
    inventory = read_inventory([str(tmp_path / "host.xml")], FleetSource.AUTO, with_busy=False)
    fleet = discovered(inventory, name="test", said={})
    assert gpus(fleet) == {"host": {"A100-SXM-80GB": 2}}
    assert [group.indices for group in fleet.cluster.node_groups] == [(1, 2)]
    assert "indices:\n  - 1\n  - 2\n" in file_text(fleet, sources=["host.xml"])
    assert [group.indices for group in found("sxm.xml").cluster.node_groups] == [()], "those left out come after"


def test_slices_tell_mixed_nodes_right_and_claims_who_uses_them() -> None:
    fleet = found("kubectl_slices.json")
    assert gpus(fleet) == {"dra-0": {"A100-SXM-40GB": 1, "V100-SXM2-32GB": 1}, "dra-1": {"H200-SXM-141GB": 1}}
    assert "1 GPU (NVIDIA A100-SXM4-40GB): in use by a resource claim" in reason(fleet, "dra-0")
    assert "1 GPU (Tesla V100-SXM2-32GB): tainted by the driver" in reason(fleet, "dra-0")
    assert "1 device (NVIDIA A100-SXM4-40GB): parts of GPUs (MIG)" in reason(fleet, "dra-0")


def test_nodes_with_taints_that_pods_do_not_tolerate_are_left_out(tmp_path: Path) -> None:
    data = json.loads((INPUTS / "kubectl_nodes.json").read_text())
    taints = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}, {"key": "node.kubernetes.io/x", "effect": "NoExecute"}
    for node in data["items"]:
        node["spec"].setdefault("taints", []).extend(taints)
    (tmp_path / "tolerated.json").write_text(json.dumps(data))
    before = gpus(found("kubectl_nodes.json"))
    assert (
        gpus(discovered(read_inventory([str(tmp_path / "tolerated.json")], FleetSource.AUTO), name="t", said={}))
        == before
    )
    [first] = [node for node in data["items"] if node["metadata"]["name"] == next(iter(before))]
    first["spec"]["taints"] += [
        {"key": "dedicated", "value": "team-x", "effect": "NoSchedule"}, {"key": "spot", "effect": "PreferNoSchedule"},
    ]  # fmt: skip
    (tmp_path / "dedicated.json").write_text(json.dumps(data))
    fleet = discovered(read_inventory([str(tmp_path / "dedicated.json")], FleetSource.AUTO), name="t", said={})
    assert gpus(fleet) == dict(list(before.items())[1:])
    assert reason(fleet, next(iter(before))).endswith(": tainted dedicated=team-x:NoSchedule")


def test_problems_of_kubernetes_come_all_at_once_with_their_places(tmp_path: Path) -> None:
    data = json.loads((INPUTS / "kubectl_nodes.json").read_text())
    data["items"][1]["status"]["capacity"]["nvidia.com/gpu"] = "eight"
    data["items"][2]["status"]["allocatable"]["nvidia.com/gpu"] = 100_000
    said = refused(tmp_path, "nodes.json", json.dumps(data, indent=1))
    assert "items[1].status.capacity.nvidia.com/gpu: is 'eight', must be a number of GPUs from 0 to 1024" in said
    assert "items[2].status.allocatable.nvidia.com/gpu: is 100000, must" in said
    assert len(said.splitlines()) == 2
    assert "has no Node and no ResourceSlice, but Pod" in refused(
        tmp_path, "pods.json", (INPUTS / "kubectl_pods.json").read_text()
    )


def test_a_fleet_without_a_usable_gpu_is_refused_with_the_reasons(tmp_path: Path) -> None:
    data = json.loads((INPUTS / "kubectl_nodes.json").read_text())
    data["items"] = [item for item in data["items"] if item["metadata"]["name"] in ("h100-1", "l4-0")]
    said = refused(tmp_path, "nodes.json", json.dumps(data))
    assert "has no GPU that a plan may use: h100-1: 8 GPUs (NVIDIA-H100-80GB-HBM3): cordoned; l4-0: 4" in said


@pytest.mark.parametrize(("parts", "said"), [(0, ""), (1, " (1 part)"), (7, " (7 parts)")])
def test_parts_of_a_gpu_are_counted(parts: int, said: str) -> None:
    assert DriverGpu(product="NVIDIA H100 80GB HBM3", num_parts=parts).reason(with_busy=False) == (
        f"MIG is on{said}; nvidia-smi -L names its slices"
    )
