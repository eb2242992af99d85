"""What the status page counts in the store, without reading what is large in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.planner.service.observability.overview import _read
from hetis.planner.store import Transaction
from hetis.planner.store.tables import TableView
from hetis.v1 import plan_pb2
from tests.planner.store import samples
from tests.planner.store.conftest import Stores


async def test_plans_are_counted_and_clusters_read_only_when_they_have_changed(
    monkeypatch: pytest.MonkeyPatch, url: str, stores: Stores
) -> None:
    store = await stores.leading(url)

    def insert(tx: Transaction) -> None:
        for name, num_nodes in (("clusters/a", 3), ("clusters/b", 5)):
            record = samples.cluster(name)
            record.body.num_nodes = num_nodes
            tx.clusters.insert(record)
        for name, state in (("plans/x", "QUEUED"), ("plans/y", "READY"), ("plans/z", "READY")):
            tx.plans.insert(replace(samples.plan(name), state=plan_pb2.PlanState.Value(f"PLAN_STATE_{state}")))

    read = list[str]()
    whole = TableView._from_row

    def from_row(view: TableView[object], row: object) -> object:
        found = whole(view, row)  # type: ignore[arg-type]
        read.append(found.name)  # type: ignore[attr-defined]
        return found

    await store.write(insert)
    monkeypatch.setattr(TableView, "_from_row", from_row)
    first = await store.read(lambda tx: _read(tx, {}))
    assert first.num_plans == {"QUEUED": 1, "READY": 2}
    assert {name: one.num_nodes for name, one in first.clusters.items()} == {"clusters/a": 3, "clusters/b": 5}
    assert sorted(read) == ["clusters/a", "clusters/b"]

    def change(tx: Transaction) -> None:
        tx.clusters.delete("clusters/a")
        tx.clusters.update(replace(tx.clusters.require("clusters/b"), active_plan="plans/y"))

    await store.write(change)
    read.clear()
    second = await store.read(lambda tx: _read(tx, first.clusters))
    assert read == ["clusters/b"]
    assert {name: one.active_plan for name, one in second.clusters.items()} == {"clusters/b": "plans/y"}
    read.clear()
    assert await store.read(lambda tx: _read(tx, second.clusters)) == second
    assert not read
