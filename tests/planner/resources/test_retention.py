"""What is older than the configuration says is deleted, unless it is in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from hetis.planner.resources import retention
from hetis.planner.resources.retention import Retention
from hetis.planner.store import AuditedChange, Store, Transaction
from hetis.v1 import plan_pb2
from tests.planner.store import samples

NOW_S, DAY_S = 1e9, 86_400.0


class Placements:
    """Records which plans are withdrawn."""

    def __init__(self) -> None:
        self.withdrawn = list[str]()

    async def withdraw(self, plan: str) -> None:
        self.withdrawn.append(plan)


def fill(tx: Transaction) -> None:
    """Store a cluster with plans that are old but for one, and three lines of the audit log."""
    cluster = replace(samples.cluster("clusters/a"), active_plan="plans/active", earlier_plan="plans/earlier")
    tx.clusters.insert(cluster)
    ready, active = plan_pb2.PLAN_STATE_READY, plan_pb2.ACTIVATION_STATE_ACTIVE
    for name, fields in {
        "ready": {"state": ready},
        "infeasible": {"state": plan_pb2.PLAN_STATE_INFEASIBLE},
        "searched": {},
        "active": {"state": ready, "activation": active},
        "earlier": {"state": ready},
        "new": {"state": ready, "create_time_s": NOW_S - DAY_S},
    }.items():
        tx.plans.insert(replace(samples.plan(f"plans/{name}"), **cast(Any, fields)))
    for days in (9, 3, 1):
        change = AuditedChange(caller="c", role="admin", method="CreatePlan")
        tx.audit.append(change, time_s=NOW_S - days * DAY_S)


@pytest.mark.parametrize("page", [1, 500])
async def test_only_what_is_old_and_not_in_use_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(retention, "_PAGE", page)
    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db", clock=lambda: NOW_S)
    await store.leadership.grant("test")
    await store.write(fill)
    placements = Placements()

    async def numbers() -> list[int]:
        return await store.read(lambda reader: [line.number for line in reader.audit.lines()])

    await Retention(store, cast(Any, placements), None, None).step()
    assert (placements.withdrawn, await numbers()) == ([], [1, 2, 3])
    await Retention(store, cast(Any, placements), 2 * DAY_S, 4 * DAY_S).step()
    assert sorted(placements.withdrawn) == ["plans/infeasible", "plans/ready"]
    assert await numbers() == [2, 3, 4]
    await store.close()
