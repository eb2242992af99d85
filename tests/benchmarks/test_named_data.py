"""A table goes stale with the data of the fleets, models and lengths that its benchmark names, and with no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring import instances
from benchmarks.measuring.named_data import data_named_in
from benchmarks.staleness import ROOT, SOURCES

CATALOGUE, PROFILER = "formats/hetis/formats/catalogue/data", "profiler/hetis/profiler"
MODULE = """
from benchmarks.fleets import FLEET

MODEL, LENGTHS = "Llama-2-70B", "azure_conv_2023"
"""
FLEET = """
FLEET = "two"
STRONG = "H100-SXM-80GB"
PROFILE = {profile}(STRONG)
"""
TWO = "nodes: [{gpus: [{type: T4, count: 2}]}]  # two\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a benchmark of modelled profiles: an H100, and a fleet of T4."""
    made = tmp_path / "root"
    for folder in (CATALOGUE, PROFILER):
        shutil.copytree(ROOT / folder, made / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for folder in ("benchmarks", "examples"):
        (made / folder).mkdir()
    (made / "benchmarks/one.py").write_text(MODULE, encoding="utf-8")
    (made / "benchmarks/fleets.py").write_text(FLEET.format(profile="modelled_profile"), encoding="utf-8")
    (made / "examples/two.yaml").write_text(TWO, encoding="utf-8")
    return made


def _pieces(root: Path, name: str) -> list[str]:
    """Return the data of a copy, because data are read once per path."""
    return sorted(data_named_in("benchmarks/one.py", shutil.copytree(root, root.parent / name)))


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _faster(gpu: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        (found,) = (entry["gpu"] for entry in data["gpus"] if entry["gpu"]["name"] == gpu)
        found["mem_bytes_per_s"] *= 2

    return change


def _layers(model: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        (found,) = (entry["model"] for entry in data["models"] if entry["model"]["name"] == model)
        found["num_layers"] += 1

    return change


@pytest.mark.parametrize(
    ("file", "change", "counts"),
    [
        (f"{CATALOGUE}/gpus.json", _faster("H100-SXM-80GB"), True),
        (f"{CATALOGUE}/gpus.json", _faster("T4"), True),  # of the fleet in examples/
        (f"{CATALOGUE}/gpus.json", _faster("L4"), False),
        (f"{CATALOGUE}/gpus.json", lambda data: data["gpus"][0].update(note="other"), False),
        (f"{CATALOGUE}/models.json", _layers("meta-llama/Llama-2-70b-hf"), True),
        (f"{CATALOGUE}/models.json", _layers("meta-llama/Llama-2-13b-hf"), False),
        (f"{CATALOGUE}/workloads/azure_conv_2023.json", lambda data: data.update(rate_rps=1.0), True),
        (f"{CATALOGUE}/workloads/longbench_lengths.json", lambda data: data.update(rate_rps=1.0), False),
        (f"{PROFILER}/efficiency.json", lambda data: data["architectures"]["Hopper"].update(ops=[]), True),
        (f"{PROFILER}/efficiency.json", lambda data: data["architectures"]["Turing"].update(reason=""), True),
        (f"{PROFILER}/efficiency.json", lambda data: data["architectures"]["Ampere"].update(ops=[]), True),  # Turing's
        (f"{PROFILER}/efficiency.json", lambda data: data["architectures"]["Blackwell"].update(ops=[]), False),
        (f"{PROFILER}/efficiency.json", lambda data: data["memory"].update(usable_ratio=0.8), True),
        (f"{PROFILER}/profiles/H100-SXM-80GB.json", lambda data: data.update(name="other"), False),  # not used
    ],
)  # fmt: skip
def test_what_counts_is_what_is_named(root: Path, file: str, change: Callable[[Any], None], *, counts: bool) -> None:
    before = _pieces(root, "before")
    _edit(root / file, change)
    assert (_pieces(root, "after") != before) == counts


def test_shipped_profiles_and_kernels_count_where_they_are_used(root: Path) -> None:
    before = _pieces(root, "before")
    (root / "benchmarks/fleets.py").write_text(FLEET.format(profile="default_profile"), encoding="utf-8")
    more = [piece.partition(":")[0] for piece in set(_pieces(root, "after")).difference(before)]
    assert {"profile of H100-SXM-80GB", "experts", "latent", "linear"} <= {*more}
    assert not {"profile of T4", "profile of L40S"}.intersection(more)


def test_a_comment_in_a_fleet_does_not_count(root: Path) -> None:
    before = _pieces(root, "before")
    (root / "examples/two.yaml").write_text(TWO.replace("# two", "# L4, Llama-2-13B"), encoding="utf-8")
    assert _pieces(root, "same") == before
    (root / "examples/two.yaml").write_text(TWO.replace("count: 2", "count: 3"), encoding="utf-8")
    assert _pieces(root, "after") != before


def test_searches_name_the_fleets_they_are_measured_on() -> None:
    """The names are found in whatever module of the benchmarks has them."""
    names = {piece.partition(":")[0] for piece in data_named_in(SOURCES["placement"][0], ROOT)}
    assert {f"GPU {gpu}" for gpu in instances.NODE_SIZES} <= names
    assert {"paper.yaml", "fleet-160.yaml", "GPU P100-PCIe-12GB", "efficiency of Pascal"} <= names
    assert {"model meta-llama/Llama-2-70b-hf", "lengths azure_conv_2023"} <= names
    assert "efficiency of RTX Blackwell" not in names
    assert "gpus.json" not in names
    assert "gpus.json" in {piece.partition(":")[0] for piece in data_named_in(SOURCES["silicon"][0], ROOT)}
