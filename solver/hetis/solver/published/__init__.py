"""Published heuristics of other planners, under our cost model: for comparison, not for planning.

A published heuristic returns a plan like any other, which the same checker accepts; only its bound is weak. Whatever a
paper leaves open is reconstructed, as stated in `docs/strategies.md`.
"""

from __future__ import annotations

from collections.abc import Mapping

from hetis.solver.published.hetis_paper import search_hetis_paper
from hetis.solver.published.heuristic import Published
from hetis.solver.published.hexgen import search_hexgen
from hetis.solver.published.hexgen2 import search_hexgen2
from hetis.solver.published.splitwise import search_splitwise

PUBLISHED: Mapping[str, Published] = {
    published.name: published
    for published in (
        Published(
            name="splitwise-paper",
            summary="Splitwise's provisioning: machines of one kind prefill, machines of one kind decode, "
            "the rest is mixed",
            search=search_splitwise,
            max_gpus=1024,
            does="sends from every machine to every other",
            finds="pools that serve a request within the limits",
            splits_roles=True,
            notes="Splitwise reconstructed: machines cut from nodes, a mixed pool that keeps its size "
            "(docs/strategies.md)",
        ),
        Published(
            name="hexgen-paper",
            summary="HexGen's genetic search over groups of GPUs: moves, splits and merges",
            search=search_hexgen,
            max_gpus=1024,
            does="mutates GPU by GPU",
            finds="groups that serve a request within the limits",
            notes="HexGen reconstructed: fitness is the rate under the cost model, groups inside zones, more merges "
            "than in its code (docs/strategies.md)",
        ),
        Published(
            name="hexgen2-paper",
            summary="HexGen-2's heuristic: spectral partition, Kernighan-Lin, maximum flow, guided swaps",
            search=search_hexgen2,
            max_gpus=1024,
            does="partitions GPU by GPU",
            finds="prefill and decode groups that serve a request within the limits",
            splits_roles=True,
            notes="HexGen-2 reconstructed: recursive Fiedler bisection by memory, changes of sides among the guided "
            "swaps, groups inside zones, one TP degree per GPU type of a group (docs/strategies.md)",
        ),
        Published(
            name="hetis-paper",
            summary="Hetis's heuristic: hierarchical DP/PP/TP, 5% rule, attention workers shared by a replica",
            search=search_hetis_paper,
            max_gpus=4096,
            does="deals out GPU by GPU",
            finds="replica that keeps memory and limits",
            notes="Hetis reconstructed: the cost's terms, whole types leaving the dense path, one share of head groups "
            "for all stages (docs/strategies.md)",
        ),
    )
}
