"""Slices of cards, shared cards, and cards named only by their PCI devices are counted as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError
from hetis.solver.cluster import Cluster


def cluster_in(folder: Path, content: str, name: str = "host.txt") -> Cluster:
    (folder / name).write_text(content)
    return discovered(read_inventory([str(folder / name)]), name="c", said={}).cluster


def gpus_of(cluster: Cluster) -> dict[str, int]:
    return {group.gpus[0].gpu: group.count * group.gpus[0].count for group in cluster.node_groups}


def node(labels: dict[str, str], count: int = 8, resource: str = "nvidia.com/gpu") -> str:
    status = {each: {resource: str(count)} for each in ("capacity", "allocatable")}
    return json.dumps(
        {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n", "labels": labels}, "status": status}
    )


PLATFORMS = (Path(__file__).parents[3] / "benchmarks" / "known" / "nodes.jsonl").read_text().splitlines()


@pytest.mark.parametrize("line", PLATFORMS)
def test_labels_of_a_platform_name_its_gpus(tmp_path: Path, line: str) -> None:
    known = json.loads(line)
    assert gpus_of(cluster_in(tmp_path, node(known["labels"], 4, known["resource"]))) == {known["gpu_type"]: 4}


GKE = {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100", "node.kubernetes.io/instance-type": "a2-highgpu-1g"}


def test_gke_advertises_slices_and_shares_as_gpus(tmp_path: Path) -> None:
    sliced = GKE | {"cloud.google.com/gke-gpu-partition-size": "1g.5gb"}
    assert gpus_of(cluster_in(tmp_path, node(sliced, 7))) == {"A100-SXM-40GB-1g.5gb": 7}
    shared = {"cloud.google.com/gke-max-shared-clients-per-gpu": "3"}
    assert gpus_of(cluster_in(tmp_path, node(GKE | shared, 3))) == {"A100-SXM-40GB": 1}
    assert gpus_of(cluster_in(tmp_path, node(sliced | shared, 21))) == {"A100-SXM-40GB-1g.5gb": 7}


@pytest.mark.parametrize(
    ("gres", "gpu"),
    [
        ("gpu:a100_3g.20gb:2", "A100-PCIe-40GB-3g.20gb"),  # a slice of 3g has half a card's memory
        ("gpu:a100_4g.40gb:2", "A100-PCIe-80GB-4g.40gb"),
        ("gpu:nvidia_h100_80gb_hbm3_1g.10gb:2", "H100-SXM-80GB-1g.10gb"),
        ("gpu:h100_3g.47gb:2", "H100-NVL-94GB-3g.47gb"),
    ],
)
def test_the_profile_of_a_slice_tells_its_card(tmp_path: Path, gres: str, gpu: str) -> None:
    assert gpus_of(cluster_in(tmp_path, f"NodeName=n1\n   Gres={gres}\n   State=IDLE\n")) == {gpu: 2}


@pytest.mark.parametrize("gres", ["gpu:a100_1g.10gb:7", "gpu:h100_3g.40gb:2"])
def test_a_slice_of_one_of_several_unlike_cards_is_refused(tmp_path: Path, gres: str) -> None:
    with pytest.raises(DocumentError, match=r"could be .*--gpu"):
        cluster_in(tmp_path, f"NodeName=n1\n   Gres={gres}\n   State=IDLE\n")


def test_some_cards_have_four_slices(tmp_path: Path) -> None:
    cluster = cluster_in(tmp_path, "NodeName=n1\n   Gres=gpu:nvidia_a30_1g.6gb:4\n   State=IDLE\n")
    [slice_of] = cluster.gpu_types.values()
    assert slice_of.fp16_flops == pytest.approx(165e12 / 4)
    assert slice_of.memory_bytes == 6 * 2**30


FEATURE = "feature.node.kubernetes.io/pci-"


@pytest.mark.parametrize(
    ("labels", "resource", "gpu"),
    [
        ({f"{FEATURE}0302_10de_2330.present": "true"}, "nvidia.com/gpu", "H100-SXM-80GB"),
        ({f"{FEATURE}10de_26b9.present": "true"}, "nvidia.com/gpu", "L40S"),
        ({f"{FEATURE}1200_1002_74a1.present": "true"}, "amd.com/gpu", "MI300X-192GB"),
    ],
)
def test_labels_of_features_name_cards_by_their_devices(
    tmp_path: Path, labels: dict[str, str], resource: str, gpu: str
) -> None:
    nvswitch = {f"{FEATURE}0680_10de_22a3.present": "true"}
    assert gpus_of(cluster_in(tmp_path, node(labels | nvswitch, resource=resource))) == {gpu: 8}


@pytest.mark.parametrize(
    "labels",
    [
        {f"{FEATURE}10de.present": "true"},
        {f"{FEATURE}0302_10de.present": "true", "accelerator": "nvidia"},
        {f"{FEATURE}0302_10de_2330.present": "true", f"{FEATURE}0302_10de_2331.present": "true"},
    ],
)
def test_a_node_whose_labels_name_no_card_is_refused_with_the_label_that_does(
    tmp_path: Path, labels: dict[str, str]
) -> None:
    with pytest.raises(
        DocumentError, match=r"no label of the node says what nvidia.com/gpu is, which nvidia.com/gpu.p"
    ):
        cluster_in(tmp_path, node(labels))


def test_lspci_without_names_is_read_by_devices(tmp_path: Path) -> None:
    line = "17:00.0 3D controller [0302]: NVIDIA Corporation Device [10de:2330] (rev a1)\n"
    assert gpus_of(cluster_in(tmp_path, line + line.replace("17", "3d"))) == {"H100-SXM-80GB": 2}
    assert gpus_of(cluster_in(tmp_path, "05:00.0 3D controller: NVIDIA Corporation Device 26b9 (rev a1)\n")) == {
        "L40S": 1
    }
    with pytest.raises(DocumentError, match="'Device 2b99' is not in the catalogue"):
        cluster_in(tmp_path, "05:00.0 3D controller: NVIDIA Corporation Device 2b99 (rev a1)\n")


@pytest.mark.parametrize("label", ["amd.com/compute-memory-partition", "amd.com/gpu.compute-memory-partition"])
def test_parts_of_amds_gpus_are_told_by_their_label(tmp_path: Path, label: str) -> None:
    product = {"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}
    whole = node(product | {label: "spx_nps1"}, resource="amd.com/spx_nps1")  # as the device plugin may name whole GPUs
    cluster = cluster_in(tmp_path, whole)
    assert gpus_of(cluster) == {"MI300X-192GB": 8}
    assert cluster.node_groups[0].resource == "amd.com/spx_nps1"
    with pytest.raises(DocumentError, match=r"64 devices .*parts of GPUs \(cpx_nps4\)"):
        cluster_in(tmp_path, node(product | {label: "cpx_nps4"}, 64, "amd.com/gpu"))


@pytest.mark.parametrize("resource", ["aws.amazon.com/neuron", "nvidia.com/GA102GL_A10", "volcano.sh/vgpu-number"])
def test_a_node_of_other_accelerators_is_not_said_to_have_none(tmp_path: Path, resource: str) -> None:
    with pytest.raises(DocumentError, match=f"{resource}: a resource that is not read"):
        cluster_in(tmp_path, node({}, resource=resource))


def test_memory_tells_boards_whose_nominal_size_is_larger(tmp_path: Path) -> None:
    labels = {"nvidia.com/gpu.product": "NVIDIA-H20", "nvidia.com/gpu.memory": "143771"}
    assert gpus_of(cluster_in(tmp_path, node(labels))) == {"H20-3e-141GB": 8}


def test_a_device_of_another_vendor_says_nothing_of_a_resource(tmp_path: Path) -> None:
    """A node with an Arc for its displays has GPUs of NVIDIA that no label describes."""
    one = node({"gpu.intel.com/device-id.0300-e211.present": "true"})
    with pytest.raises(DocumentError, match=r"no label of the node says what nvidia.com/gpu is, which nvidia.com/gpu."):
        cluster_in(tmp_path, one)


def test_an_accelerator_without_labels_of_its_own_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"says what habana.ai/gaudi is; --gpu 'habana.ai/gaudi=TYPE' selects one"):
        cluster_in(tmp_path, node({}, 8, "habana.ai/gaudi"))
    with pytest.raises(DocumentError, match=r"huawei.com/Ascend310P: a resource that is not read"):
        cluster_in(tmp_path, node({}, 8, "huawei.com/Ascend310P"))
