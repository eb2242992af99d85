"""The meaning of the fields of a cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats.cluster import cluster_to_data, load_cluster
from hetis.formats.errors import DocumentError
from hetis.solver.cluster import Cluster, Link

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
HEAD = "apiVersion: hetis/v1\nkind: Cluster\nname: test\n"
NETWORK = "network: {bandwidth: 100Gbps, latency: 20us}\n"


def cluster_of(folder: Path, nodes: str, network: str = NETWORK, more: str = "") -> Cluster:
    path = folder / "cluster.yaml"
    path.write_text(HEAD + nodes + network + more)
    return load_cluster(path)


def test_aliases_become_catalogue_names(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "nodes: [{name: a, gpus: [{type: a100_80gb_sxm, count: 8}, {type: '3090'}]}]\n")
    assert [(slots.gpu, slots.count) for slots in cluster.node_groups[0].gpus] == [
        ("A100-SXM-80GB", 8),
        ("RTX-3090", 1),
    ]


def test_a_count_numbers_even_a_single_node(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "nodes: [{name: a, count: 1, gpus: [{type: L4}]}, {name: b, gpus: [{type: L4}]}]\n")
    assert [device.name for device in cluster.devices()] == ["a-0/0", "b/0"]


def test_links_may_name_the_only_node_of_a_counted_group_either_way(tmp_path: Path) -> None:
    nodes = "nodes: [{name: a, count: 1, gpus: [{type: L4}]}, {name: b, gpus: [{type: L4}]}]\n"
    network = "network: {{bandwidth: 25Gbps, latency: 50us, nodes: {{links: [{links}]}}}}\n"
    link = "{{between: [{a}, b], bandwidth: 1Gbps, latency: 1ms}}"
    known = [
        cluster_of(tmp_path, nodes, network.format(links=link.format(a=name))).network.between_nodes
        for name in ("a", "a-0")
    ]
    assert known[0] == known[1] == {("a-0", "b"): Link(bytes_per_s=125e6, latency_s=1e-3)}
    twice = ", ".join(link.format(a=name) for name in ("a", "a-0"))
    with pytest.raises(DocumentError, match="duplicate link"):
        cluster_of(tmp_path, nodes, network.format(links=twice))


def test_the_price_of_a_node_is_split_over_its_gpus(tmp_path: Path) -> None:
    nodes = "nodes: [{name: a, usd_per_hour: 6, gpus: [{type: L4, count: 2}, {type: T4, count: 1}]}]\n"
    cluster = cluster_of(tmp_path, nodes)
    assert [slots.usd_per_hour for slots in cluster.node_groups[0].gpus] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("said", "vendor", "kept"),
    [
        ("", "NVIDIA", None),
        (", architecture: CDNA3", "AMD", None),
        (", vendor: amd", "AMD", "AMD"),
        (", architecture: CDNA3, vendor: Huawei", "Huawei", "Huawei"),
    ],
)
def test_a_gpu_type_has_the_vendor_of_its_architecture_unless_it_says_another(
    tmp_path: Path, said: str, vendor: str, kept: str | None
) -> None:
    own = f"gpu_types:\n  X1: {{memory: 48GiB, memory_bandwidth: 1TB/s, fp16: 300TFLOPS{said}}}\n"
    cluster = cluster_of(tmp_path, "nodes: [{name: a, gpus: [{type: X1}]}]\n", more=own)
    assert cluster.gpu_types["X1"].vendor == vendor
    assert cluster_to_data(cluster)["gpu_types"]["X1"].get("vendor") == kept


@pytest.mark.parametrize(
    ("name", "architecture", "meant"),
    [
        ("RTX-5080", "Blackwell", "RTX Blackwell"),
        ("B100", "Blackwell", "Blackwell"),
        ("RTX-5080", "Ada", "Ada"),
        ("X1", "hopper", "Hopper"),
        ("X1", "ADA GEFORCE", "Ada GeForce"),
        ("X1", "Rubin", "Rubin"),
    ],
)
def test_an_architecture_is_that_of_the_catalogue_and_rtx_blackwell_is_not_that_of_b200(
    tmp_path: Path, name: str, architecture: str, meant: str
) -> None:
    peaks = "memory: 16GiB, memory_bandwidth: 1TB/s, fp16: 100TFLOPS"
    own = f"gpu_types:\n  {name}: {{{peaks}, architecture: {architecture}}}\n"
    cluster = cluster_of(tmp_path, f"nodes: [{{name: a, gpus: [{{type: {name}}}]}}]\n", more=own)
    assert cluster.gpu_types[name].architecture == meant


def test_links_of_a_node_and_gpu_types_of_its_own(tmp_path: Path) -> None:
    nodes = """nodes:
  - name: a
    nic: {bandwidth: 25Gbps, latency: 50us}
    link: {bandwidth: 10GB/s, latency: 0}
    gpus: [{type: X1, count: 2}]
"""
    own = "gpu_types:\n  X1: {memory: 48GiB, memory_bandwidth: 1TB/s, fp16: 300TFLOPS, nvlink: 100GB/s}\n"
    cluster = cluster_of(tmp_path, nodes, more=own)
    group, gpu = cluster.node_groups[0], cluster.gpu_types["X1"]
    assert group.nic == Link(bytes_per_s=25e9 / 8, latency_s=50e-6)
    assert group.intra_link == Link(bytes_per_s=10e9, latency_s=0)
    assert (gpu.memory_bytes, gpu.fp16_flops, gpu.nvlink_bytes_per_s) == (48 * 2**30, 300e12, 100e9)


@pytest.mark.parametrize(
    ("written", "bytes_per_s"),
    [("400Gbps", 50e9), ("400Gbit/s", 50e9), ("50GB/s", 50e9), ("50GiB/s", 50 * 2**30), ("{bandwidth: 1bps}", 0.125)],
)
def test_a_bandwidth_alone_is_a_link_with_the_latency_that_is_due(
    tmp_path: Path, written: str, bytes_per_s: float
) -> None:
    group = cluster_of(
        tmp_path, f"nodes: [{{name: a, nic: {written}, link: {written}, gpus: [{{type: L4, count: 2}}]}}]\n"
    ).node_groups[0]
    assert group.nic == Link(bytes_per_s=bytes_per_s, latency_s=20e-6)
    assert group.intra_link == Link(bytes_per_s=bytes_per_s, latency_s=0)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("400", "400 has no unit: write it like 100Gbps or 64GB/s"),
        ("0Gbps", "is 0Gbps, must be 1bps to 1000PB/s"),
        ("400Gb/s", "did you mean 400Gbps, which is bits, or 400GB/s, bytes?"),
        ("fast", "'fast' is not a bandwidth: expected a number and one of bps, Kbps, Mbps, Gbps"),
        ("[400Gbps]", "a list is not a mapping"),
        ("{bandwith: 1Gbps}", "unknown field, did you mean bandwidth?"),
    ],
)
def test_a_link_that_is_none_is_one_problem_of_its_place(tmp_path: Path, written: str, said: str) -> None:
    with pytest.raises(DocumentError) as error:
        cluster_of(tmp_path, f"nodes: [{{name: a, nic: {written}, gpus: [{{type: L4}}]}}]\n")
    assert "nodes[0].nic" in str(error.value)
    assert said in str(error.value)


def test_an_own_type_goes_before_the_catalogue(tmp_path: Path) -> None:
    own = "gpu_types:\n  L4: {memory: 23GiB, memory_bandwidth: 1TB/s, fp16: 300TFLOPS}\n"
    cluster = cluster_of(tmp_path, "nodes: [{name: a, gpus: [{type: L4}]}]\n", more=own)
    assert cluster.gpu_types["L4"].memory_bytes == 23 * 2**30
    assert cluster_to_data(cluster)["gpu_types"]["L4"]["memory"] == "23GiB"


ZONES = """nodes:
  - {name: a, zone: east, gpus: [{type: L4}]}
  - {name: b, zone: west, gpus: [{type: L4}]}
  - {name: c, zone: north, gpus: [{type: L4}]}
"""


def test_links_between_zones(tmp_path: Path) -> None:
    network = """network:
  bandwidth: 100Gbps
  latency: 20us
  zones:
    bandwidth: 8Gbps
    latency: 5ms
    links: [{between: [east, west], bandwidth: 16Gbps, latency: 2ms}]
"""
    zone_link = cluster_of(tmp_path, ZONES, network).network.zone_link
    assert zone_link("east", "east") == Link(bytes_per_s=12.5e9, latency_s=20e-6)
    assert zone_link("west", "east") == Link(bytes_per_s=2e9, latency_s=2e-3)
    assert zone_link("north", "east") == Link(bytes_per_s=1e9, latency_s=5e-3)


def test_a_matrix_between_zones_with_gaps(tmp_path: Path) -> None:
    network = """network:
  bandwidth: 100Gbps
  latency: 20us
  zones:
    bandwidth: 8Gbps
    latency: 5ms
    matrix:
      names: [east, west, north]
      bandwidth:
        - [200Gbps, 16Gbps, null]
        - [16Gbps, null, 24Gbps]
        - [null, 24Gbps, null]
      latency:
        - [10us, 2ms, null]
        - [2ms, null, null]
        - [null, null, null]
"""
    zone_link = cluster_of(tmp_path, ZONES, network).network.zone_link
    assert zone_link("east", "east") == Link(bytes_per_s=25e9, latency_s=10e-6)
    assert zone_link("west", "west") == Link(bytes_per_s=12.5e9, latency_s=20e-6)
    assert zone_link("west", "east") == Link(bytes_per_s=2e9, latency_s=2e-3)
    assert zone_link("north", "west") == Link(bytes_per_s=3e9, latency_s=5e-3)
    assert zone_link("north", "east") == Link(bytes_per_s=1e9, latency_s=5e-3)


def test_a_matrix_between_nodes(tmp_path: Path) -> None:
    network = """network:
  bandwidth: 100Gbps
  latency: 20us
  nodes:
    matrix: {names: [a-0, a-1], bandwidth: [[null, 8Gbps], [8Gbps, null]]}
"""
    cluster = cluster_of(tmp_path, "nodes: [{name: a, count: 2, gpus: [{type: L4}]}]\n", network)
    assert cluster.network.node_link("a-1", "a-0") == Link(bytes_per_s=1e9, latency_s=20e-6)


def test_two_aliases_of_one_type_in_a_node_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="'rtx3090' is listed twice in one node"):
        cluster_of(tmp_path, "nodes: [{name: a, gpus: [{type: RTX-3090}, {type: rtx3090}]}]\n")


def test_memory_that_others_hold_is_bytes_or_a_share(tmp_path: Path) -> None:
    written = ("reserved: 2GiB", "reserved: 10%", "reserved: 0", "count: 2")
    nodes = "nodes:\n" + "".join(f"  - {{name: n{i}, gpus: [{{type: L4, {one}}}]}}\n" for i, one in enumerate(written))
    cluster = cluster_of(tmp_path, nodes)
    assert [group.reserved_bytes("L4") for group in cluster.node_groups] == [2 * 2**30, round(2.4 * 2**30), 0, 0]
    assert [node["gpus"][0].get("reserved") for node in cluster_to_data(cluster)["nodes"]][0::2] == ["2GiB", None]


def test_wrong_memory_that_others_hold_is_refused_at_its_lines(tmp_path: Path) -> None:
    written = "24GiB", "100%", "0.1", "-1GiB", "true", "1GiBit"
    types = ("X", "L4", "L4", "L4", "L4", "L4")
    nodes = "nodes:\n" + "".join(
        f"  - {{name: n{i}, gpus: [{{type: {gpu}, reserved: {one}}}]}}\n"
        for i, (gpu, one) in enumerate(zip(types, written, strict=True))
    )
    own = "gpu_types: {X: {memory: 16GiB, memory_bandwidth: 300GB/s, fp16: 65TFLOPS, architecture: Turing}}\n"
    with pytest.raises(DocumentError) as caught:
        cluster_of(tmp_path, nodes + own)
    assert [problem.line for problem in caught.value.problems] == list(range(5, 11))
    said = str(caught.value)
    assert "nodes[0].gpus[0].reserved: is '24GiB', a X has 16GiB" in said
    assert "nodes[1].gpus[0].reserved: is '100%', a L4 has 24GiB" in said
    assert "nodes[2].gpus[0].reserved: 0.1 has no unit: write it like 2GiB or 10%" in said


def test_problems_are_listed_in_the_order_of_the_file_and_capped(tmp_path: Path) -> None:
    nodes = "nodes:\n" + "".join(f"  - {{name: n{i}, gpus: [{{type: L4, count: 0}}]}}\n" for i in range(150))
    with pytest.raises(DocumentError) as caught:
        cluster_of(tmp_path, nodes)
    lines = str(caught.value).splitlines()
    assert [problem.line for problem in caught.value.problems] == list(range(5, 105))
    assert lines[100:] == ["... and more problems; only the first 100 are reported"]
