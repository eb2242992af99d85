"""The output of kubectl, nvidia-smi, Slurm and Ray becomes the right fleet, and omissions have reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.cluster import parse_cluster
from hetis.formats.discovery import FleetSource
from hetis.formats.discovery.fleet import Discovered, UnclearBoardError, board_of, discovered, file_text, said_types
from hetis.formats.discovery.found import FoundGpus, FoundNode, Inventory
from hetis.formats.discovery.nvidia import parse_xml, read_nvidia_smi
from hetis.formats.discovery.reading import read_inventory, read_slurm
from hetis.formats.documents import load_cluster
from hetis.formats.errors import DocumentError
from hetis.formats.positions import Text, parse_text
from hetis.solver.cluster import Link
from tests.formats.discovery.fleets import INPUTS, PROBLEM, found, gpus, reason, refused

# --- names of boards


@pytest.mark.parametrize(
    ("product", "mebibytes", "board"),
    [
        ("NVIDIA-A100-SXM4-80GB", 81920, "A100-SXM-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-PCIe-40GB"),
        ("NVIDIA-A100-SXM4-80GB-SHARED", 81920, "A100-SXM-80GB"),
        ("NVIDIA-H100-80GB-HBM3", 81559, "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe-80GB"),
        ("NVIDIA H100 NVL", 95830, "H100-NVL-94GB"),
        ("NVIDIA H200", 143771, "H200-SXM-141GB"),
        ("NVIDIA H200 NVL", 143771, "H200-NVL-141GB"),
        ("NVIDIA B200", 183359, "B200-SXM-180GB"),
        ("NVIDIA B300 SXM6 AC", 275040, "B300-SXM-288GB"),
        ("NVIDIA GB200", 189471, "GB200-per-GPU"),
        ("NVIDIA GH200 480GB", 97871, "GH200-96GB"),
        ("Tesla-V100-SXM2-32GB", 32768, "V100-SXM2-32GB"),
        ("Tesla V100-PCIE-16GB", 16384, "V100-PCIe-16GB"),
        ("Tesla P100-PCIE-12GB", 12288, "P100-PCIe-12GB"),
        ("Tesla-T4", 15360, "T4"),
        ("NVIDIA L4", 23034, "L4"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA-A10G", 23028, "A10G"),
        ("NVIDIA A16", 15356, "A16-per-GPU"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX-PRO-6000-Server-96GB"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX-6000-Ada"),
        ("NVIDIA RTX A6000", 49140, "RTX-A6000"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX-4090"),
        ("Quadro RTX 6000", 24576, "Quadro-RTX-6000"),
        ("AMD_Instinct_MI300X_OAM", 196592, "MI300X-192GB"),
        ("v100", 32510, None),  # PCIe or SXM2
    ],
)
def test_products_as_drivers_spell_them_are_boards(product: str, mebibytes: int, board: str | None) -> None:
    asked = FoundGpus(product=product, count=1, memory_bytes=mebibytes * 2**20)
    if board is None:
        with pytest.raises(UnclearBoardError, match="could be V100-PCIe-32GB or V100-SXM2-32GB"):
            board_of(asked, {})
    else:
        assert board_of(asked, {}) == board


def test_a_board_of_the_name_but_other_memory_is_another_board() -> None:
    with pytest.raises(
        UnclearBoardError, match=r"'NVIDIA H20' has 120 GiB; the catalogue knows H20 with 96 GiB; --gpu"
    ):
        board_of(FoundGpus(product="NVIDIA H20", count=1, memory_bytes=120 * 2**30), {})


@pytest.mark.parametrize(
    ("product", "gib", "board"),
    [
        ("NVIDIA GeForce RTX 3080", 20, "RTX-3080-20GB"),
        ("NVIDIA GeForce RTX 3080", 10, "RTX-3080-10GB"),
        ("NVIDIA GeForce RTX 4090", 48, "RTX-4090-48GB"),
        ("NVIDIA GeForce RTX 2080 Ti", 22, "RTX-2080Ti-22GB"),
    ],
)
def test_boards_of_one_name_are_told_apart_by_their_memory(product: str, gib: int, board: str) -> None:
    assert board_of(FoundGpus(product=product, count=1, memory_bytes=gib * 2**30), {}) == board


def test_hints_choose_among_boards_of_one_name_and_never_others() -> None:
    asked = FoundGpus(product="a100", count=1, hints=("ib", "epyc", "a100_80gb", "t4", "sxm4"))
    assert board_of(asked, {}) == "A100-SXM-80GB"
    with pytest.raises(UnclearBoardError):
        board_of(FoundGpus(product="a100", count=1, hints=("l4", "80gb")), {})


def test_what_the_user_says_of_a_name_goes_first() -> None:
    said, wrong = said_types(["Weird Card=h100-sxm-80gb", "a100=none"])
    assert not wrong
    assert board_of(FoundGpus(product="weird card", count=1, memory_bytes=1), said) == "H100-SXM-80GB"
    assert board_of(FoundGpus(product="A100", count=1), said) == "none"
    _, wrong = said_types(["a100", "b=H10O"])
    assert len(wrong) == 2
    assert "expected PRODUCT=TYPE" in wrong[0]
    assert "H100-SXM-80GB" in wrong[1]


# --- Kubernetes


@pytest.mark.parametrize(
    ("said", "types", "indices"),
    [
        ({}, {"RTX-A6000": 2, "L40S": 1}, (0, 2, 1)),
        ({"nvidia l40s": "none"}, {"RTX-A6000": 2}, (0, 2)),
        ({"nvidia rtx a6000": "none"}, {"L40S": 1}, (1,)),
    ],
)
def test_a_type_that_comes_again_is_one_type_with_the_indices_of_the_driver(
    tmp_path: Path, said: dict[str, str], types: dict[str, int], indices: tuple[int, ...]
) -> None:
    """A cluster file may list a type once per node."""
    gpu, *_ = re.findall(r"<gpu id=.*?</gpu>", (INPUTS / "bridge.xml").read_text(), re.DOTALL)
    other = gpu.replace("NVIDIA RTX A6000", "NVIDIA L40S").replace("49140 MiB", "46068 MiB")
    (tmp_path / "host.xml").write_text(f"<nvidia_smi_log>{gpu}{other}{gpu}</nvidia_smi_log>")
    inventory = read_inventory([str(tmp_path / "host.xml")], FleetSource.AUTO, with_busy=False)
    fleet = discovered(inventory, name="test", said=said)
    assert gpus(fleet) == {"host": types}
    assert [group.indices for group in fleet.cluster.node_groups] == [indices]
    text = file_text(fleet, sources=["host.xml"])
    assert f"1 node with {', '.join(f'{count} {gpu}' for gpu, count in types.items())}." in text
    (tmp_path / "cluster.yaml").write_text(text)
    assert load_cluster(tmp_path / "cluster.yaml") == fleet.cluster


def test_gpus_in_use_are_part_of_the_fleet_where_that_is_asked_for() -> None:
    assert gpus(found("kubectl_nodes.json", "kubectl_pods.json", with_busy=True))["a100-1"] == {"A100-SXM-80GB": 8}
    assert gpus(found("sxm.xml", with_busy=True)) == {"sxm": {"A100-SXM-80GB": 4}}


# --- nvidia-smi


def test_hosts_of_nvidia_smi_are_called_as_their_files() -> None:
    fleet = found("sxm.xml", "mixed.xml", "bridge.xml", "bridge.topo.txt")
    assert gpus(fleet) == {
        "sxm": {"A100-SXM-80GB": 2},
        "mixed": {"RTX-PRO-6000-Server-96GB": 2, "L40S": 1},
        "bridge": {"RTX-A6000": 2},
    }
    links = {group.name: group.intra_link for group in fleet.cluster.node_groups}
    assert links == {"sxm": None, "mixed": None, "bridge": Link(bytes_per_s=56.25e9, latency_s=0.0)}
    why = reason(fleet, "sxm")
    assert "(index 2; NVIDIA A100-SXM4-80GB): in use by python3.12" in why
    assert "(index 3; NVIDIA A100-SXM4-80GB): MIG is on (2 parts)" in why
    assert "(index 4; NVIDIA A100-SXM4-80GB): 59 of 80 GiB in use, but not by a visible process" in why
    assert "(index 5; NVIDIA A100-SXM4-80GB): the driver asks for a reset" in why
    assert "Xorg" not in why, "a desktop does not compute"


@pytest.mark.parametrize(
    ("cells", "link", "note"),
    [
        ("SYS", Link(bytes_per_s=32e9, latency_s=0.0), "no NVLink"),
        ("NV12", None, ""),
    ],
)
def test_a_topology_without_nvlink_makes_switched_boards_use_pcie(
    tmp_path: Path, cells: str, link: Link | None, note: str
) -> None:
    smi = (INPUTS / "bridge.xml").read_text().replace("NVIDIA RTX A6000", "NVIDIA A100-SXM4-40GB")
    (tmp_path / "vm.xml").write_text(smi.replace("49140", "40960"))
    (tmp_path / "vm.txt").write_text((INPUTS / "bridge.topo.txt").read_text().replace("NV4", cells))
    fleet = discovered(read_inventory([str(tmp_path / "vm.xml"), str(tmp_path / "vm.txt")]), name="test", said={})
    assert fleet.cluster.node_groups[0].intra_link == link
    assert any(note in line for line in fleet.assumed)


def test_bridges_between_pairs_are_told_and_not_written(tmp_path: Path) -> None:
    node = FoundNode(name="n", gpus=(FoundGpus(product="RTX 3090", count=4),), nvlinks=0, bridged=True, where=PROBLEM)
    fleet = discovered(Inventory(nodes=(node,)), name="test", said={})
    assert fleet.cluster.node_groups[0].intra_link is None
    assert any("only some pairs of GPUs have NVLinks" in line for line in fleet.assumed)


def test_a_topology_of_no_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="topology of the host 'bridge', but the files are of mixed, sxm"):
        found("sxm.xml", "mixed.xml", "bridge.topo.txt")
    with pytest.raises(DocumentError, match="is only a topology"):
        found("bridge.topo.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<html><body>no</body></html>", "x.xml:1: is XML of 'html', expected 'nvidia_smi_log': nvidia-smi -q -x"),
        ("<nvidia_smi_log>\n<gpu></nvidia_smi_log>", "x.xml:2: is not XML: mismatched tag"),
        ('<!DOCTYPE a [<!ENTITY b "cc">]>\n<nvidia_smi_log>&b;</nvidia_smi_log>', "x.xml:1: declares the entity 'b'"),
        ("<nvidia_smi_log>" + "<gpu>" * 100, "x.xml:1: has more than 64 levels"),
        ("<nvidia_smi_log></nvidia_smi_log>", "x.xml: has no GPUs in its 1 node"),
        ("<", "x.xml:1: is not XML"),
    ],
)
def test_xml_that_no_nvidia_smi_prints_is_refused(tmp_path: Path, content: str, said: str) -> None:
    assert said in refused(tmp_path, "x.xml", content)


def test_entities_from_outside_are_never_loaded(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    said = refused(tmp_path, "x.xml", f'<!DOCTYPE a [<!ENTITY b SYSTEM "file://{secret}">]><a>&b;</a>')
    assert "declares the entity 'b'" in said
    root, _line = parse_xml(f'<!DOCTYPE a SYSTEM "file://{secret}"><a><b> text </b></a>', "x.xml")
    assert root.findtext("b") == " text "


# --- Slurm and Ray


def test_nodes_of_slurm_have_what_jobs_and_states_leave() -> None:
    fleet = found("scontrol.json")
    assert gpus(fleet) == {
        "gpu-0": {"A100-SXM-80GB": 4},
        "gpu-1": {"A100-SXM-80GB": 2},
        "gpu-4": {"L40S": 3, "A40": 2},
        **{f"gpu-5-3g.20gb-{i}": {"A100-SXM-40GB-3g.20gb": 1} for i in range(2)},
        **{f"gpu-5-1g.5gb-{i}": {"A100-SXM-40GB-1g.5gb": 1} for i in range(4)},
    }
    assert reason(fleet, "gpu-1") == "2 GPUs (a100): in use by jobs"
    assert reason(fleet, "gpu-2") == "4 GPUs (a100): DRAIN (bad cable)"
    assert reason(fleet, "gpu-3") == "8 GPUs (h100): DOWN, NOT_RESPONDING (Not responding)"
    assert "ALLOCATED" in reason(fleet, "gpu-6")


def test_old_slurm_writes_states_and_features_as_text() -> None:
    fleet = found("scontrol_22.json", rtx8000="none")
    assert gpus(fleet) == {"old-0": {"Quadro-RTX-6000": 2}}
    assert reason(fleet, "old-1") == "2 GPUs (t4): DRAIN (Sanity Check Failed)"
    assert reason(fleet, "old-0") == "1 GPU (rtx8000): excluded by --gpu"


def slurm(**fields: Any) -> Discovered:
    node = {"name": "n", "state": ["IDLE"], "features": [], **fields}
    inventory = read_slurm({"nodes": [node]}, Text(file="slurm", text=None))
    return discovered(inventory, name="test", said={"gpu": "L4"})


def test_jobs_that_asked_for_any_type_use_the_type_of_their_node() -> None:
    assert gpus(slurm(gres="gpu:t4:4", gres_used="gpu:3")) == {"n": {"T4": 1}}
    assert gpus(slurm(gres="gpu:4", gres_used="gpu:(null):0")) == {"n": {"L4": 4}}
    with pytest.raises(DocumentError, match="3 are in use, but not reported by type"):
        slurm(gres="gpu:t4:4,gpu:l4:4", gres_used="gpu:3")
    with pytest.raises(DocumentError, match=r"nodes\[0\].gres: is 'gpu:t4:x:y', expected gpu:TYPE:COUNT"):
        slurm(gres="gpu:t4:x:y")


def test_nodes_of_ray_are_those_alive_with_one_type() -> None:
    with pytest.raises(DocumentError, match=r"'A100' could be A100-PCIe-80GB or A100-SXM-80GB; --gpu 'A100=TYPE'"):
        found("ray_list.json", H200="H200-SXM-141GB")
    fleet = found("ray_list.json", A100="A100-SXM-80GB")
    assert gpus(fleet) == {"10.0.0.2": {"A100-SXM-80GB": 8}, "10.0.0.3": {"H200-SXM-141GB": 8}}
    assert reason(fleet, "10.0.0.4") == "4 GPUs (L4): not alive"
    assert "of several types (L4, T4)" in reason(fleet, "10.0.0.5")
    assert {group.zone for group in fleet.cluster.node_groups} == {"us-east1-b"}
    assert gpus(found("ray_nodes.json")) == {"ray-worker-0": {"A10G": 1}, "ray-worker-1": {"A10G": 1}}


def test_a_list_of_rays_nodes_without_resources_says_how_to_have_them(tmp_path: Path) -> None:
    nodes = json.loads((INPUTS / "ray_list.json").read_text())
    for node in nodes:
        del node["resources_total"]
    assert "ray list nodes --detail --format json has them" in refused(tmp_path, "r.json", json.dumps(nodes))


# --- tables, and files of no tool


def test_a_table_of_nodes_is_a_fleet(tmp_path: Path) -> None:
    assert gpus(found("nodes.csv")) == {"rack1": {"H100-SXM-80GB": 8}, "rack2": {"L4": 4, "T4": 2}}
    said = refused(tmp_path, "n.csv", "node,gpu,count\na,L4,0\nb,,2\nc,L4,2,x\n", FleetSource.FILE)
    assert said.splitlines() == ["/n.csv:2: count: is '0', must be 1 to 1024", "/n.csv:3: gpu: is missing"]
    assert "column count is missing; the file has node, gpu, number" in refused(tmp_path, "m.csv", "node,gpu,number\n")


@pytest.mark.parametrize("blank", ["\n", "\r\n", "  \n\n"])
def test_blank_lines_before_a_table_are_no_header(tmp_path: Path, blank: str) -> None:
    (tmp_path / "n.csv").write_text(f"{blank}node,gpu,count\n\na,L4,2\n")
    assert gpus(discovered(read_inventory([str(tmp_path / "n.csv")]), name="t", said={})) == {"a": {"L4": 2}}
    line = 1 + blank.count("\n")
    assert f"n.csv:{line + 1}: count: is '0'" in refused(tmp_path, "n.csv", f"{blank}node,gpu,count\na,L4,0\n")
    assert f"n.csv:{line}: column count" in refused(tmp_path, "n.csv", f"{blank}node,gpu,number\n", FleetSource.FILE)


@pytest.mark.parametrize("content", ["", "{}", "[]", "apiVersion: hetis/v1\nkind: Cluster\n", "hello", "[1, 2]", "{"])
@pytest.mark.parametrize("source", list(FleetSource))
def test_what_is_of_no_tool_is_one_problem(tmp_path: Path, content: str, source: FleetSource) -> None:
    said = refused(tmp_path, "x.json", content, source)
    assert said.startswith("/x.json")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "+-----+\n| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4 |\n|---+---+---|\n",
        "===== ROCm System Management Interface =====\nDevice  Node  IDs\n0       2     0x74a1\n",
    ],
    ids=["nvidia-smi", "rocm-smi"],
)
def test_what_tools_print_for_people_is_of_no_tool_rather_than_bad_yaml(tmp_path: Path, content: str) -> None:
    told = refused(tmp_path, "gpus.txt", content)
    assert "gpus.txt: is not the output of a known tool: it begins with" in told
    assert "nvidia-smi -q -x" in told


def test_files_of_two_tools_and_second_files_are_refused() -> None:
    for names, said in (
        (("sxm.xml", "scontrol.json"), "is of slurm, and .*sxm.xml of nvidia-smi: one tool at a time"),
        (("scontrol.json", "scontrol_22.json"), "is one file too many"),
        (("sxm.xml", "sxm.xml"), "is given twice"),
        (("sxm.xml", "nowhere.xml"), "no such file"),
    ):
        with pytest.raises(DocumentError, match=said):
            found(*names)


# --- the file


@pytest.mark.parametrize(
    "names", [("kubectl_nodes.json",), ("sxm.xml", "bridge.xml", "bridge.topo.txt"), ("scontrol.json",), ("nodes.csv",)]
)
def test_the_file_reads_as_the_fleet_that_was_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    fleet = found(*names)
    path = tmp_path / "cluster.yaml"
    path.write_text(file_text(fleet, sources=names))
    assert load_cluster(path) == fleet.cluster
    assert all(line in path.read_text() for line in fleet.left_out)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8), st.text(max_size=9))
def test_names_of_any_signs_make_a_file_that_reads(names: list[str], zone: str) -> None:
    nodes = tuple(
        FoundNode(
            name=f"{i}{name}", zone=zone, gpus=(FoundGpus(product="L4", count=1),), left_out=(name,), where=PROBLEM
        )
        for i, name in enumerate(names)
    )
    fleet = discovered(Inventory(nodes=nodes), name="test", said={})
    assert parse_cluster(*parse_text(file_text(fleet, sources=names), "file")) == fleet.cluster


def nodes_named(*names: tuple[str, str]) -> Inventory:
    """Return nodes with a GPU each, of these names and zones."""
    gpu = FoundGpus(product="L4", count=1)
    return Inventory(nodes=tuple(FoundNode(name=a, zone=zone, gpus=(gpu,), where=PROBLEM) for a, zone in names))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("a:b", "two nodes are named 'a-b', of here"),
        ("a/b", "'a:b' of here and 'a/b' would both be named 'a-b': rename one of them"),
    ],
)
def test_two_nodes_of_one_name_are_refused(other: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        discovered(nodes_named(("a:b", "z"), (other, "z")), name="test", said={})


def test_nodes_without_a_zone_are_told_where_others_have_one() -> None:
    """They count as a zone of their own, which few plans may span."""
    some = discovered(nodes_named(("a", "west"), ("b", "default"), ("c", "default")), name="f", said={})
    assert "zones: none is reported for b, c: taken to be apart from all others; set `zone` there" in some.assumed
    for zones in (("west", "east"), ("default", "default")):
        fleet = discovered(nodes_named(*zip("ab", zones, strict=True)), name="f", said={})
        assert not any("none is reported" in assumed for assumed in fleet.assumed)


def test_nodes_and_zones_that_get_other_names_are_told() -> None:
    fleet = discovered(
        nodes_named(("gpu 1", "west 1"), ("gpu-2", "west 1"), ("_3", "west-1"), ("n-4", "é/1"), ("n-5", "default")),
        name="test",
        said={},
    )
    assert fleet.renamed == (
        "node 'gpu 1' is 'gpu-1'",
        "node '_3' is 'n_3'",
        "zones 'west 1' and 'west-1' are one, 'west-1'",
        "zone 'é/1' is 'é-1'",
    )
    text = file_text(fleet, sources=["x"])
    assert (
        "# Renamed, because names have only letters, digits, '.', '_' and '-':\n# - node 'gpu 1' is 'gpu-1'\n" in text
    )
    assert "Renamed" not in file_text(found("kubectl_nodes.json"), sources=["x"])


def test_a_host_on_standard_input_has_no_name() -> None:
    said = "the host is named host, because standard input does not name it: give a file HOST.xml"
    assert said in read_nvidia_smi([("stdin", (INPUTS / "sxm.xml").read_text())]).notes
    assert said not in read_nvidia_smi([("host.xml", (INPUTS / "sxm.xml").read_text())]).notes


@given(st.sets(st.integers(0, 5), min_size=1), st.integers(0, 5))
def test_equal_numbered_nodes_are_one_group_only_where_no_name_changes(numbers: set[int], other: int) -> None:
    nodes = tuple(
        FoundNode(name=f"n-{i}", gpus=(FoundGpus(product="L4", count=2 if i == other else 1),), where=PROBLEM)
        for i in sorted(numbers)
    )
    fleet = discovered(Inventory(nodes=nodes), name="test", said={})
    assert gpus(fleet) == {f"n-{i}": {"L4": 2 if i == other else 1} for i in numbers}
    equal = len(numbers) > 1 and numbers == set(range(len(numbers))) and other not in numbers
    assert len(fleet.cluster.node_groups) == (1 if equal else len(numbers))
