"""Conversions for the comparison with Helix: files, placements and flows. Its simulator is not installed here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.helix import SINK, SOURCE, Cluster, flow_dict, quantity, read_layout, rising, usable_links
from hetis.solver.layers.solve import solve_layers

LAYERS = 4


class Profiles:
    """Two types of machines in the interface of Helix's profiles; B holds all layers at once, A three of four."""

    machine_num_dict = {"A": 2, "B": 1}  # noqa: RUF012 - as in Helix

    def get_num_layers(self) -> int:
        return LAYERS

    def get_max_num_layers(self, kind: str) -> int:
        return {"A": 3, "B": 4}[kind]

    def get_typical_token_throughput(self, kind: str, held: int) -> float:
        return 1000.0 / held

    def get_kv_cache_capacity(self, kind: str, held: int) -> int:
        return 400_000 - 10_000 * held

    def get_model_activation_size(self) -> float:
        return 16384.0

    def get_profiling_results(self, kind: str) -> Any:
        decode = {0: 0.0, 2: 0.004, 4: 0.003, 100: 0.01}
        return SimpleNamespace(prompt_bs2time={0: 0.0, 1000: 0.1}, decode_bs2time=decode)


def cluster() -> Cluster:
    kinds = {"0": "A", "1": "B", "2": "A"}
    ends = [(a, b) for a in (*kinds, SOURCE) for b in (*kinds, SINK) if a != b]
    return Cluster(kinds=kinds, links=dict.fromkeys(ends, (1e9, 0.001)), model="M", manager=Profiles())


def test_quantities_are_read_in_helix_units() -> None:
    assert quantity("1000.0 * mbps") == 1e9
    assert quantity("1 * MilliSec") == 0.001
    assert quantity("12") == 12
    with pytest.raises(KeyError):
        quantity("1 * parsec")


def test_measured_times_never_fall_and_leave_out_empty_batches() -> None:
    table = rising({0: 0.0, 4: 0.003, 2: 0.004, 100: 0.01})
    assert table.sizes == (2.0, 4.0, 100.0)
    assert table.seconds == (0.004, 0.004, 0.01)


def test_a_layout_names_nodes_from_its_offset_and_skips_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "layout.ini"
    path.write_text("[Settings]\noffset=2\n[Solution]\ncompute_node_2=[1, 2, 3]\ncompute_node_3=[]\n")
    assert read_layout(path) == {"0": (1, 3)}


def test_links_lead_to_the_next_layer_and_with_partial_inference_into_ranges() -> None:
    places = {"0": (0, 2), "1": (2, 2), "2": (1, 3)}
    full = {(SOURCE, "0"), ("1", SINK), ("2", SINK), ("0", "1")}
    assert set(usable_links(places, LAYERS, partial=False)) == full
    assert set(usable_links(places, LAYERS, partial=True)) == full | {("0", "2")}


def test_a_plan_of_a_cluster_uses_its_nodes_and_links() -> None:
    here = cluster()
    problem = here.problem()
    assert problem.links.bandwidth == 1e9
    assert [(kind.name, kind.count, len(kind.tokens_per_s)) for kind in problem.node_types] == [
        ("A", 2, 3),
        ("B", 1, 4),
    ]
    plan = solve_layers(problem)
    places, shares = here.assigned(plan)
    assert sorted((here.kinds[name], *place) for name, place in places.items()) == sorted(
        (node.kind, node.first_layer, node.num_layers) for node in plan.nodes
    )
    assert set(shares) <= set(usable_links(places, LAYERS, partial=True))
    assert sum(share for (begin, _), share in shares.items() if begin == SOURCE) == pytest.approx(1)


def test_shares_become_a_flow_over_cards_and_gpus() -> None:
    edges = {
        "source": {"1_out": 0.0},
        "1_out": {"3_in": 9.0, "4_in": 9.0},
        "3_in": {"3_start": 9.0},
        "3_start": {"3_end": 9.0},
        "3_end": {"3_out": 9.0},
        "3_out": {"4_in": 9.0, "2_in": 0.0},
        "4_in": {"4_start": 9.0},
        "4_start": {"4_end": 9.0},
        "4_end": {"4_out": 9.0},
        "4_out": {"2_in": 9.0},
        "2_in": {"sink": 9.0},
        "sink": {},
    }
    flow = {(1, 3): 6.0, (3, 4): 6.0, (1, 4): 2.0, (4, 2): 8.0}
    assert flow_dict(edges, flow) == {
        "source": {"1_out": 8.0},
        "1_out": {"3_in": 6.0, "4_in": 2.0},
        "3_in": {"3_start": 6.0},
        "3_start": {"3_end": 6.0},
        "3_end": {"3_out": 6.0},
        "3_out": {"4_in": 6.0, "2_in": 0.0},
        "4_in": {"4_start": 8.0},
        "4_start": {"4_end": 8.0},
        "4_end": {"4_out": 8.0},
        "4_out": {"2_in": 8.0},
        "2_in": {"sink": 8.0},
        "sink": {},
    }
