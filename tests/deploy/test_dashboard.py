"""Every panel of the dashboard has data in what a planner and an agent that serve say to Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from examples.processes import free_ports
from hetis.planner.client import Client
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2, plan_pb2, plan_service_pb2, replica_pb2
from tests.planner.service.process import REAL, ROOT, Process

DASHBOARD: Any = json.loads((ROOT / "deploy/grafana/hetis.json").read_text(encoding="utf-8"))
TARGETS = [(panel["title"], one) for panel in DASHBOARD["panels"] for one in panel.get("targets", ())]
SELECTOR = r"\b(?:hetis|process)_\w+\{[^}]*\}"
ADDED = {"job", "instance", "namespace", "le"}  # labels by Prometheus, and of buckets
# What does not happen where all is well: the family is there, without a sample.
RARE = {
    "hetis_planner_quota_exceeded_total",
    "hetis_planner_deltas_refused_total",
    "hetis_planner_handshakes_failed_total",
    "hetis_planner_redispatches_ended_total",
    "hetis_planner_certificate_expiry_seconds",
    "hetis_planner_streams_ended_total",
    "hetis_planner_caller_searches",
}
WAIT_S = 60.0  # for the first reports of engine and agent, on a busy machine
CLUSTER = b"""
apiVersion: hetis/v1
kind: Cluster
name: small
nodes:
- {name: a, gpus: [{type: L4, count: 2}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""


@contextmanager
def running(module: str, folder: Path, *options: str) -> Iterator[None]:
    with (folder / f"{module}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", module, *options], cwd=ROOT, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def scraped(url: str) -> dict[str, Metric]:
    """Return the families of a page, by the names of their samples and by that of a counter without one."""
    with urllib.request.urlopen(url, timeout=30) as page:
        found = {}
        for family in text_string_to_metric_families(page.read().decode()):
            names = {sample.name for sample in family.samples}
            found |= dict.fromkeys({family.name, f"{family.name}_total", *names}, family)
        return found


def serve(client: Client) -> None:
    """Create a cluster and a plan for it, and activate that; one call fails."""
    cluster = cluster_pb2.Cluster(document=document_pb2.Document(content=CLUSTER))
    client.clusters.CreateCluster(cluster_service_pb2.CreateClusterRequest(cluster_id="small", cluster=cluster))
    spec = plan_pb2.PlanSpec(
        model_name="Llama-2-7B",
        workload_name="1000/200",
        objective=plan_pb2.Objective(ttft_unlimited=True),
        strategy="uniform",
        roles=[replica_pb2.REPLICA_ROLE_UNIFIED],
        skip_verification=True,
    )
    plan = plan_pb2.Plan(cluster="clusters/small", spec=spec)
    client.plans.CreatePlan(plan_service_pb2.CreatePlanRequest(plan_id="p", plan=plan))
    client.wait("plans/p")
    client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name="plans/p"))
    client.wait("plans/p")
    with pytest.raises(Exception, match="no-such"):
        client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name="plans/no-such"))


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metric]:
    folder, port = tmp_path_factory.mktemp("d"), free_ports()
    options = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json")
    options += ("--store", f"sqlite:///{folder}/planner.db", "--set", "solver.processes=1")
    common = ("--node", "clusters/small/nodes/a", "--simulated-devices", "L4:2")
    with (
        Process(options, folder=folder, module=REAL) as planner,
        running("examples.simulated_engine", folder, *common, "--socket", f"{folder}/e.sock"),
    ):
        ready = planner.ready()
        (address,) = ready["listen"]
        agent = ("--server", address, "--engine", f"unix://{folder}/e.sock", "--metrics", f"127.0.0.1:{port}")
        agent += ("--state-dir", str(folder / "state"), "--insecure")
        with running("hetis.runtime.agent", folder, *common, *agent), Client(address) as client:
            serve(client)
            end_s = time.monotonic() + WAIT_S
            while True:  # until reports have come from engine and agent, and counts of the store are fresh
                found = scraped(f"{ready['status_page']}metrics") | scraped(f"http://127.0.0.1:{port}/metrics")
                if not any(_lacking(found, one["expr"]) for _, one in TARGETS) or time.monotonic() > end_s:
                    return found
                time.sleep(0.5)


def _lacking(metrics: dict[str, Metric], text: str) -> list[str]:
    """Return the selectors of an expression that should have samples and have none."""
    found = [] if text.endswith(" or vector(0)") else re.findall(SELECTOR, text)
    names = {one: one.partition("{")[0] for one in found}
    return [
        one for one, name in names.items() if name not in metrics or (name not in RARE and not _holds(metrics, one))
    ]


def _holds(metrics: dict[str, Metric], selector: str) -> list[Sample]:
    """Return the samples of a selector. Its instance and job are Prometheus' own, and every series has them."""
    name, _, inside = selector.rstrip("}").partition("{")
    found = []
    for sample in metrics[name].samples:
        for label, kind, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', inside):
            if label in ADDED:
                continue
            had = sample.labels[label]
            if not {"=": had == value, "!=": had != value, "=~": re.fullmatch(value, had) is not None}[kind]:
                break
        else:
            if sample.name == name:
                found.append(sample)
    return found


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{title}-{one['refId']}" for title, one in TARGETS])
def test_a_panel_shows_what_a_fleet_that_serves_says(
    title: str, target: dict[str, str], metrics: dict[str, Metric]
) -> None:
    text = target["expr"]
    selectors = re.findall(SELECTOR, text)
    assert selectors
    assert not _lacking(metrics, text), title
    labels = set(ADDED)
    for selector in selectors:
        name, found = selector.partition("{")[0], _holds(metrics, selector)
        labels |= {label for sample in found for label in sample.labels}
        if not found:
            page = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
            labels |= set(re.findall(rf"`{name}(?:\{{([^}}]*)\}})?`", page)[0].split(","))
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(", ")}
    shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
    assert grouped | shown <= labels, f"{title} has no {(grouped | shown) - labels}"
    assert not grouped or shown <= grouped, f"{title}: the legend names what the sum has dropped"


def test_every_panel_has_a_place_of_its_own() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
