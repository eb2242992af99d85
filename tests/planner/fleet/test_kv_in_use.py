"""How full devices are, by the last reports of their nodes and replicas."""

from __future__ import annotations

import pytest

from hetis.planner.fleet.views import kv_in_use
from hetis.v1 import report_pb2
from tests.planner.fleet.driven import DrivenPlanner
from tests.planner.fleet.samples import REPLICA, SETTINGS, store_with_plan


def test_a_device_counts_once_and_none_of_a_lost_node() -> None:
    """The node's report comes first, then the fullest stage of its engine; unknown blocks are ignored."""
    cluster = DrivenPlanner(store_with_plan(), 1, lambda _node, _message: None, now_s=0.0).cluster
    for node in ("a", "b"):
        cluster.leases.connect(node, now_s=0.0)
    cluster.ensure_link("a").devices = (
        report_pb2.DeviceReport(index=0, total_blocks=100, used_blocks=25),
        report_pb2.DeviceReport(index=1),
    )
    cluster.ensure_link("c").devices = (report_pb2.DeviceReport(index=0, total_blocks=100, used_blocks=99),)
    loads = [("a/0", 90), ("b/0", 40), ("b/0", 60), ("c/0", 80), ("b/1", 0)]
    cluster.replicas[REPLICA].report = report_pb2.ReplicaReport(
        stages=[
            report_pb2.StageLoad(
                devices=[report_pb2.DeviceLoad(device=device, total_blocks=100 if used else 0, used_blocks=used)]
            )
            for device, used in loads
        ]
    )
    assert dict(kv_in_use(cluster)) == pytest.approx({"a/0": 0.25, "b/0": 0.6})
    cluster.leases.disconnect("b")
    cluster.leases.expire(SETTINGS.lease_s + 1.0)
    assert dict(kv_in_use(cluster)) == pytest.approx({}), "their leases ran out"
