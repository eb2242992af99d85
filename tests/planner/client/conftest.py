"""A planner that a test scripts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hetis.v1 import cluster_pb2, plan_pb2
from tests.planner.client.fake_planner import FakePlanner, ready, searching, serving


@pytest.fixture
def planner() -> Iterator[FakePlanner]:
    with serving(FakePlanner()) as running:
        for number in range(7):
            name = f"clusters/c{number}"
            running.clusters[name] = cluster_pb2.Cluster(name=name, etag="v1")
        running.plans["plans/night"] = plan_pb2.Plan(
            name="plans/night", cluster="clusters/c0", state=plan_pb2.PLAN_STATE_QUEUED
        )
        running.searches = [(0.0, searching(1.2, 1.7)), (0.0, searching(1.5, 1.65)), (0.0, ready())]
        yield running
