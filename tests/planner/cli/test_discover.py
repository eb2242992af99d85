"""`hetis-plan cluster discover`: the file on stdout or in a file, messages on stderr, and errors as in all commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetis.formats.documents import load_cluster
from hetis.planner.cli.app import run as run_verb
from tests.planner.command_line import hetis_plan_here

INPUTS = Path(__file__).parents[2] / "formats" / "discovery" / "inputs"
NODES = str(INPUTS / "kubectl_nodes.json")


def test_the_file_is_data_and_reasons_are_news(tmp_path: Path) -> None:
    done = hetis_plan_here("cluster", "discover", NODES)
    assert done.returncode == 0
    assert "left out: h100-1: 8 GPUs (NVIDIA-H100-80GB-HBM3): cordoned" in done.stderr
    assert "assumed: network: 100 Gbps" in done.stderr
    out = tmp_path / "cluster.yaml"
    again = hetis_plan_here("cluster", "discover", NODES, "--out", str(out), "-q")
    assert (again.stdout, again.stderr) == ("", "")
    assert out.read_text() == done.stdout
    assert load_cluster(out).num_gpus() == 43 + 56 + 4, "MIG slices are devices"
    assert hetis_plan_here("validate", str(out)).returncode == 0
    out.write_text("name: edited")
    refused = hetis_plan_here("cluster", "discover", NODES, "--out", str(out))
    assert (refused.returncode, out.read_text()) == (2, "name: edited"), "as `init` does"
    assert f"{out}: already exists; --force overwrites it" in refused.stderr
    assert hetis_plan_here("cluster", "discover", NODES, "--out", str(out), "--force").returncode == 0
    assert out.read_text() == done.stdout


def test_nodes_whose_names_no_file_may_have_are_news(tmp_path: Path) -> None:
    (tmp_path / "nodes.csv").write_text("node,gpu,count\nrack 1/gpu 3,L4,2\n")
    done = hetis_plan_here("cluster", "discover", str(tmp_path / "nodes.csv"))
    assert "renamed: node 'rack 1/gpu 3' is 'rack-1-gpu-3'\n" in done.stderr
    assert "# - node 'rack 1/gpu 3' is 'rack-1-gpu-3'\n" in done.stdout


def test_the_next_command_is_whole(tmp_path: Path) -> None:
    done = hetis_plan_here("cluster", "discover", NODES, "--out", str(tmp_path / "cluster.yaml"))
    [words] = [line.split() for line in done.stderr.splitlines() if line.startswith("next: hetis-plan place")]
    planned = hetis_plan_here(*words[2:], "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "")


def test_what_is_said_of_links_and_names_is_in_the_file(tmp_path: Path) -> None:
    options = ("--bandwidth", "400Gbps", "--latency", "5us", "--name", "lab", "--gpu", "A100=A100-SXM-80GB")
    done = hetis_plan_here("cluster", "discover", "--from", "ray", str(INPUTS / "ray_list.json"), *options)
    (tmp_path / "c.yaml").write_text(done.stdout)
    cluster = load_cluster(tmp_path / "c.yaml")
    assert (cluster.name, cluster.network.default.bytes_per_s, cluster.network.default.latency_s) == ("lab", 50e9, 5e-6)
    assert "assumed: network" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((str(INPUTS / "ray_list.json"),), "could be A100-PCIe-80GB or A100-SXM-80GB; --gpu 'A100=TYPE' selects one"),
        ((NODES, "--gpu", "a=b"), "unknown GPU 'b'"),
        ((NODES, "--gpu", "h10=none"), "--gpu: no GPU is called 'h10'; names found: 'NVIDIA-A100-SXM4-80GB', "),
        ((NODES, "--name", ""), "--name: '' is not a name"),
        ((NODES, "--from", "slurm"), "kubectl_nodes.json: has no list of nodes, but apiVersion, kind"),
        (("nowhere.json",), "nowhere.json: no such file"),
        ((NODES, "--cluster", "night"), "--cluster needs --from agents"),
        ((NODES, "--server", "planner:1"), "--server needs --from agents"),
        ((NODES, "--token-file", "token"), "--token-file needs --from agents"),
    ],
)
def test_what_cannot_be_done_is_one_error(arguments: tuple[str, ...], said: str) -> None:
    done = hetis_plan_here("cluster", "discover", *arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""


def test_the_planner_of_the_environment_or_of_defaults_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HETIS_SERVER", "planner:8470")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hetis.toml").write_text('ca = "ca.pem"\n[cluster.discover]\ncluster = "night"\n')
    assert run_verb(["cluster", "discover", NODES]) == 0, capsys.readouterr().err


def test_a_name_for_gpus_that_are_left_out_or_of_another_fleet_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    nodes = json.loads(Path(NODES).read_text(encoding="utf-8"))
    nodes["items"] = [one for one in nodes["items"] if one["metadata"]["name"] in ("h100-1", "l4-1")]
    (tmp_path / "nodes.json").write_text(json.dumps(nodes), encoding="utf-8")
    given = ["--gpu", "NVIDIA-H100-80GB-HBM3=H100-SXM-80GB"]
    assert run_verb(["cluster", "discover", "nodes.json", *given]) == 0, capsys.readouterr().err
    (tmp_path / "hetis.toml").write_text('[cluster.discover]\ngpu = ["mi300=MI300X"]\n')
    assert run_verb(["cluster", "discover", "nodes.json"]) == 0, capsys.readouterr().err


def test_a_single_gpu_is_no_plural(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("node,gpu,count\na,L4,1\n")
    done = hetis_plan_here("cluster", "discover", "n.csv", "--out", "c.yaml", cwd=tmp_path)
    assert "c.yaml: 1 GPU in 1 node\n" in done.stderr


def test_defaults_of_verbs_in_groups_have_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hetis.toml").write_text('quiet = true\n[cluster.discover]\nname = "from-file"\n')
    assert run_verb(["cluster", "discover", NODES]) == 0
    shown = capsys.readouterr()
    assert "name: from-file" in shown.out
    assert shown.err == ""
    (tmp_path / "hetis.toml").write_text('[cluster]\nname = "x"\n[cluster.discover]\nnam = "y"\n')
    assert run_verb(["cluster", "discover", NODES]) == 2
    shown = capsys.readouterr()
    assert (
        "cluster has no option --name: set it in the table of one of its commands, such as [cluster.VERB]" in shown.err
    )
    assert "cluster.discover has no option --nam, did you mean name?" in shown.err
