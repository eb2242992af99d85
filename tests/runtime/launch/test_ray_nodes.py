"""Nodes of a plan are found in a Ray cluster by label, address or host name; those that are not found are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hetis.engines.commands import Addresses
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Process, ProcessKind
from hetis.runtime.launch.ray_nodes import bundle_of, nodes_of


def process(node: str, *, gpus: tuple[int, ...] = (0,)) -> Process:
    return Process(name=f"{node}/0", kind=ProcessKind.ATTENTION_WORKER, stage=0, node=node, gpus=gpus, kv_bytes=1)


def node(number: int, *, host: str = "", alive: bool = True, **labels: str) -> dict[str, Any]:
    return {
        "NodeID": str(number),
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{number}",
        "NodeManagerHostname": host or f"host{number}.example",
        "Labels": {name.replace("_", "-"): value for name, value in labels.items()},
    }


def found(names: str, addresses: Addresses, *nodes: dict[str, Any]) -> dict[str, str]:
    return {name: n["NodeID"] for name, n in nodes_of([process(name) for name in names], addresses, nodes).items()}


def test_a_label_counts_before_an_address_and_that_before_a_host_name() -> None:
    nodes = [node(1, host="a"), node(2, host="b.example"), node(3, hetis_node="b"), node(4)]
    assert found("ab", Addresses(), *nodes) == {"a": "1", "b": "3"}
    assert found("ab", Addresses(hosts={"a": "10.0.0.4", "b": "10.0.0.2"}), *nodes) == {"a": "4", "b": "3"}
    assert found("ab", Addresses(), *nodes[:2]) == {"a": "1", "b": "2"}  # up to the first dot


def test_all_here_takes_one_node_for_all() -> None:
    assert found("ab", Addresses(all_here=True), node(7, alive=False), node(8), node(9)) == {"a": "8", "b": "8"}


def test_nodes_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(LayoutError) as caught:
        found("abc", Addresses(hosts={"b": "10.9.9.9"}), node(1, host="a"), node(2, host="c", alive=False))
    there = "is not in the Ray cluster, whose nodes are a (10.0.0.1)"
    assert caught.value.messages == (f"node b of the plan {there}", f"node c of the plan {there}")
    with pytest.raises(LayoutError, match="whose nodes are none"):
        found("a", Addresses(all_here=True))


def test_a_process_gets_a_cpu_and_its_gpus() -> None:
    assert bundle_of(process("a", gpus=(2, 3)), gpus=True) == {"CPU": 1.0, "GPU": 2.0}
    assert bundle_of(process("a"), gpus=False) == {"CPU": 1.0}
    assert bundle_of(replace(process("a", gpus=(2,)), sharing=2), gpus=True) == {"CPU": 1.0, "GPU": 0.5}
