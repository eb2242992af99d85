"""Prefill and decode apart: routers, pairs, and who may ask whom for KV."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import yaml

from hetis.engines.versions import Engine
from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import NotExportableError, launchable
from hetis.simulator.routers import TOKENS_WEIGHT
from hetis.solver.plan import KvRoute, Plan
from tests.planner.export import reading
from tests.planner.export.exporting import (
    NODES,
    READERS,
    SETTINGS,
    SLOW,
    exported,
    labels_of_pods,
    ports_from,
    two_pairs,
)
from tests.planner.export.plans import (
    DECODES,
    PLANS,
    PREFILL,
    apart,
    made_of,
    model_of,
    on,
    replica,
)


def test_the_picker_of_llm_d_has_a_profile_for_each_side_or_one_for_all() -> None:
    def profiles(plan: Plan) -> list[str]:
        found = [text for text in exported(plan, ExportTarget.LLM_D).files.values() if "EndpointPickerConfig" in text]
        return re.findall(r"name: (decode|prefill|default)$", found[0], re.MULTILINE)

    assert profiles(PLANS["prefill and decode"]) == ["decode", "prefill"]
    assert profiles(PLANS["unlike replicas"]) == ["default"]


def test_the_picker_of_llm_d_scores_as_it_is_simulated() -> None:
    """`hetis.simulator.routers.EndpointPicker`: seats or rates, requests in flight but at prefill, prompt tokens."""

    def scorers(name: str) -> list[list[tuple[str, int]]]:
        made = exported(PLANS[name], ExportTarget.LLM_D).files
        [picker] = [yaml.safe_load(text) for text in made.values() if "EndpointPickerConfig" in text]
        for each in picker["plugins"]:
            if each["type"] == "endpoint-attribute-weight-scorer":
                weights.append([*each["parameters"]["weights"].values()])
        return [
            [(one["pluginRef"], one.get("weight", 1)) for one in each["plugins"] if "filter" not in one["pluginRef"]]
            for each in picker["schedulingProfiles"]
        ]

    weights = list[list[float]]()
    active, tokens, best = ("active-request-scorer", 1), ("token-load-scorer", TOKENS_WEIGHT), ("max-score-picker", 1)
    assert scorers("unlike replicas") == [[("shares-decode", 1), active, tokens, best]]
    assert weights == [[one.planned_seats for one in PLANS["unlike replicas"].replicas]]
    assert scorers("prefill and decode") == [
        [("shares-decode", 1), active, best],
        [("shares-prefill", 1), tokens, best],
    ]
    assert weights[1:] == [[one.planned_seats for one in PLANS["prefill and decode"].replicas[1:]], [1.0]]


def test_a_prefill_replica_without_those_that_decode_serves_nothing() -> None:
    split = PLANS["prefill and decode"]
    staged = replace(split.replicas[1], stages=PLANS["stages of two nodes"].replicas[0].stages)
    made = exported(replace(split, replicas=(split.replicas[0], staged, split.replicas[2])), ExportTarget.VLLM)
    assert made.rate == 1.0
    [pair] = json.loads(made.files["router/weights.json"])["pairs"]
    assert (pair["prefill"], pair["decode"], pair["share"]) == ("r0", "r2", 1.0)


@pytest.mark.parametrize("target", READERS)
def test_router_weights_are_the_plans_rates(target: ExportTarget) -> None:
    made = exported(PLANS["unlike replicas"], target)
    found = json.loads(made.files["router/weights.json"])
    assert [(one["share"], one["weight"]) for one in found["endpoints"]] == [(0.6, 600), (0.15, 150), (0.25, 250)]
    endpoints = list(dict.fromkeys(one["endpoint"] for one in found["endpoints"]))
    weights = [600, 150, 250] if target is not ExportTarget.DYNAMO else [1000]  # its frontend stands for all replicas
    assert len(endpoints) == len(weights)
    litellm = yaml.safe_load(made.files["router/litellm.yaml"])["model_list"]
    assert [one["litellm_params"]["api_base"] for one in litellm] == [f"http://{e}/v1" for e in endpoints]
    assert [one["litellm_params"]["weight"] for one in litellm] == weights
    if target is ExportTarget.RAY:  # its replicas are reached by paths, to which nginx has a server of its own each
        assert "router/envoy.yaml" not in made.files
        paths = re.findall(
            r"listen (\S+);\n    location / {\n        proxy_pass http://(\S+)/;", made.files["router/nginx.conf"]
        )
        assert [at for _, at in paths] == endpoints
        endpoints = [own for own, _ in paths]
    nginx = re.findall(r"server (\S+) weight=(\d+)(?: max_conns=\d+)?;", made.files["router/nginx.conf"])
    assert nginx == list(zip(endpoints, map(str, weights), strict=True))
    full = re.findall(r" max_conns=(\d+);", made.files["router/nginx.conf"])
    assert full == ([str(one.most_held) for one in PLANS["unlike replicas"].replicas] if len(weights) > 1 else [])
    if target is ExportTarget.RAY:
        return
    envoy = yaml.safe_load(made.files["router/envoy.yaml"])["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [one["load_balancing_weight"] for one in envoy] == weights


def test_pairs_of_prefill_and_decode_have_the_shares_of_their_routes() -> None:
    made = exported(PLANS["prefill and decode"], ExportTarget.VLLM)
    found = json.loads(made.files["router/weights.json"])
    assert [(one["role"], one["share"]) for one in found["endpoints"]] == [
        ("prefill", 1.0),
        ("decode", 0.666667),
        ("decode", 0.333333),
    ]
    assert [(one["prefill"], one["decode"], one["requests_per_s"]) for one in found["pairs"]] == [
        ("r0", "r1", 2.0),
        ("r0", "r2", 1.0),
    ]
    front = re.findall(r"upstream hetis \{\n    server (\S+) weight=1000;\n\}", made.files["router/nginx.conf"])
    assert front == ["127.0.0.1:30000"], "the router of pairs"


def test_equal_prefill_replicas_are_chosen_by_nginx_which_counts_their_prompts() -> None:
    """vLLM's router has turns only; SGLang's has to know the prefill replica."""
    senders = [replace(PREFILL, stages=(on(f"{node}/0"),)) for node in "ab"]
    routes = tuple(KvRoute(prefill=n, decode=2, rate=1.0) for n in range(2))
    plan = made_of(*senders, replace(DECODES[0], rate=2.0), routes=routes)
    files = exported(plan, ExportTarget.VLLM).files
    assert "--prefill http://127.0.0.1:31000 --decode http://" in files["router/start.sh"]
    [side] = re.findall(r"upstream pairs-0-prefill \{\n([^}]+)}", files["router/nginx.conf"])
    servers = [f"    server 10.0.0.{n}:8000 weight=500;" for n in (1, 2)]
    assert side.splitlines() == ["    zone pairs-0-prefill 1m;", "    least_conn;", *servers]
    others = exported(plan, ExportTarget.SGLANG, engine=Engine.SGLANG).files
    assert "least_conn" not in others["router/nginx.conf"]


@pytest.mark.parametrize("target", sorted(set(READERS) - {ExportTarget.SGLANG}))
def test_routers_carry_all_traffic_of_prefill_and_decode_apart(target: ExportTarget) -> None:
    """A unified replica of 6 requests/s, a pair of 2, and a prefill replica with two decode replicas of 2 and 1."""
    pairs = PLANS["prefill in one stage"]
    sender = replace(pairs.replicas[0], stages=(on("c/0", "c/1", tp=2),), rate=2.0)
    receiver = replace(DECODES[0], stages=(on("d/2"),))
    unified = replace(PLANS["one GPU"].replicas[0], stages=(on("b/0"),), rate=6.0)
    routes = (*pairs.kv_routes, KvRoute(prefill=3, decode=4, rate=2.0))
    plan = made_of(*pairs.replicas, sender, receiver, unified, routes=routes)
    made = exported(plan, target)
    if target in (ExportTarget.KSERVE, ExportTarget.RAY):
        assert made.rate < made.planned
        assert any("pairs of one prefill and one decode" in line for line in made.lost)
        return
    assert made.rate == made.planned == 11.0
    if target is ExportTarget.LLM_D:
        [route] = [one for one in yaml.safe_load_all(made.files["gateway.yaml"]) if one["kind"] == "HTTPRoute"]
        weights = {one["name"]: one["weight"] for one in route["spec"]["rules"][0]["backendRefs"]}
        assert weights == {"hetis-unified": 545, "hetis-pairs-0": 273, "hetis-pairs-1": 182}
        return
    weights = dict(
        re.findall(
            r"server (\S+) weight=(\d+)(?: max_conns=\d+)?;",
            made.files["router/nginx.conf"].partition("upstream hetis {")[2].partition("}")[0],
        )
    )
    assert sum(map(int, weights.values())) == 1000
    if target is not ExportTarget.DYNAMO:  # its front end stands for all
        assert sorted(weights.values()) == ["182", "273", "545"]
    assert not made.lost or target is ExportTarget.DYNAMO


def test_a_decode_replica_listens_behind_kserves_sidecar_and_all_others_at_the_front() -> None:
    """KServe's preset for decode replicas has a sidecar at port 8000, and probes ``main`` at 8001."""

    def heard(of_side: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        container = reading.container_of(of_side["template"], "main")
        assert {container[f"{probe}Probe"]["httpGet"]["port"] for probe in ("readiness", "startup")} == {"http"}
        ports = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
        return reading.option(reading.words_of(container), "--port"), ports

    [pair] = reading.manifests(exported(apart("H100", "T4"), ExportTarget.KSERVE).files)
    assert heard(pair["spec"]) == ("8001", [8001])
    assert heard(pair["spec"]["prefill"]) == ("8000", [8000])
    [alone] = reading.manifests(exported(PLANS["one GPU"], ExportTarget.KSERVE).files)
    assert heard(alone["spec"]) == ("8000", [8000])
    # The sidecar reads the pool by the API.
    assert "automountServiceAccountToken" not in pair["spec"]["template"]
    assert pair["spec"]["prefill"]["template"]["automountServiceAccountToken"] is False
    assert alone["spec"]["template"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("target", [ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.LLM_D])
def test_every_stage_of_a_prefill_replica_can_be_asked_for_kv_by_decode_replicas_alone(target: ExportTarget) -> None:
    """NIXL reads from each rank of the replica that prefills, so also from pods of further stages."""
    files = exported(PLANS["prefill and decode"], target).files
    pods, stranger = labels_of_pods(files), {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/instance": "chat-r1"}
    named = [(labels["app.kubernetes.io/instance"], labels) for labels in pods]
    prefill = [labels for name, labels in named if name == "hetis-r0"]
    decode = [labels for name, labels in named if name in ("hetis-r1", "hetis-r2")]
    assert (len(prefill), len(decode)) == (2, 2)
    others = {path: text for path, text in files.items() if "values-" not in path}
    policies = [one for one in reading.manifests(others) if one["kind"] == "NetworkPolicy"]
    for one in prefill:
        assert all(None in ports_from(source, one, policies) for source in (*decode, *prefill))
        assert ports_from(stranger, one, policies) in ([], [[8000]])
    assert [ports_from(stranger, one, policies) for one in prefill].count([[8000]]) == 1, "the front"


@pytest.mark.parametrize("target", [ExportTarget.KUBERNETES, ExportTarget.LWS])
def test_nobody_is_asked_for_kv_if_all_who_would_ask_are_left_out(target: ExportTarget) -> None:
    left_out = replace(DECODES[0], stages=(on("Node/0"),))  # no node of Kubernetes has capital letters
    plan = made_of(PREFILL, left_out, replica(on("f/0")), routes=(KvRoute(prefill=0, decode=1, rate=2.0),))
    files = exported(plan, target, hosts={}).files
    policies = [one for one in reading.manifests(files) if one["kind"] == "NetworkPolicy"]
    of_others = {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/instance": "hetis-r2"}
    prefill = [labels for labels in labels_of_pods(files) if labels["app.kubernetes.io/instance"] == "hetis-r0"]
    assert len(prefill) == 2
    assert all(None not in ports_from(of_others, one, policies) for one in prefill)


def test_decode_replicas_of_a_node_listen_at_nixl_ports_of_their_own() -> None:
    """NIXL of a decode replica listens, too, at 5600 unless told, and vLLM hangs at its start if the port is taken."""
    plan = PLANS["prefill and decode"]
    _, *decodes = launchable(plan, model_of(plan), SETTINGS).replicas.values()
    ports = [one.commands[0].environment.get("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600") for one in decodes]
    assert {one.front_node for one in decodes} == {"d"}
    assert ports == ["5600", "5601"]


def test_nixl_without_an_address_is_told() -> None:
    made = exported(PLANS["prefill in one stage"], ExportTarget.VLLM, hosts={})
    assert made.lost == ("r0: NIXL needs an address to listen on, but a has none: give --node-address",)
    pushed = exported(PLANS["prefill and decode"], ExportTarget.VLLM, hosts={})
    asked = [line.partition(":")[0] for line in pushed.lost if "--node-address" in line]
    assert asked == ["r0", "r1", "r2"], "decode replicas are asked, too"


def test_only_targets_that_know_the_push_connector_get_prompts_of_several_stages() -> None:
    sender = replace(PREFILL, stages=(on("a/0", layers=3), on("a/1", first=3, layers=1)))
    plan = made_of(sender, DECODES[0], routes=(KvRoute(prefill=0, decode=1, rate=2.0),))
    for target in (ExportTarget.DYNAMO, ExportTarget.RAY):
        with pytest.raises(NotExportableError, match="from several stages, which needs vLLM's NixlPushConnector"):
            exported(plan, target)
    text = "".join(exported(plan, ExportTarget.KUBERNETES).files.values())
    assert (text.count('"NixlPushConnector"'), text.count('"NixlConnector"')) == (2, 0)
    assert text.count("VLLM_NIXL_SIDE_CHANNEL_HOST") == 2


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.KUBERNETES, ExportTarget.LLM_D])
def test_a_router_for_each_group_makes_no_pairs_across_groups(target: ExportTarget) -> None:
    alike = [{**node, "zone": "east"} for node in NODES]
    slow = two_pairs(alike, {"nodes": {"links": [{**SLOW, "between": ["b", "c"]}]}})
    assert not exported(slow, target).lost
    joined = replace(slow, kv_routes=(*slow.kv_routes, KvRoute(prefill=0, decode=3, rate=1.0)))
    [told] = exported(joined, target).lost
    assert "separately, also r1 → r2, which exchange KV over slower links than planned" in told


@pytest.mark.parametrize("target", [ExportTarget.DYNAMO])
def test_pairs_that_routers_make_and_the_plan_rules_out_are_told(target: ExportTarget) -> None:
    """Its router chooses the two replicas of a request separately; KServe's and Ray's take the plan's pairs."""

    def told(plan: Plan, target: ExportTarget = target) -> list[str]:
        lost = exported(plan, target).lost
        return [line.partition("separately, also ")[2] for line in lost if line.startswith("pairs of prefill and")]

    alike = [{**node, "zone": "east"} for node in NODES]
    advice = ": a router of its own for each of r0+r2, r1+r3 keeps to the plan"
    slow = f"which exchange KV over slower links than planned{advice}"
    assert not told(two_pairs(alike, {}))
    assert told(two_pairs(alike, {"nodes": {"links": [SLOW]}})) == [f"r0 → r3, {slow}"]
    assert not told(two_pairs(alike, {"nodes": {"links": [{**SLOW, "between": ["a", "c"]}]}}))
    zones = {"zones": {"links": [{"between": ["east", "west"], "bandwidth": "100Gbps", "latency": "1ms"}]}}
    assert told(two_pairs(NODES, zones, keeps_zones=True)) == [f"r0 → r3, r1 → r2, {slow}"]
    assert told(replace(two_pairs(alike, {}), inputs=made_of(PREFILL).inputs)) == []
    kept = two_pairs(NODES, zones, keeps_zones=True)
    everywhere = tuple(replace(one, kv_zones=("east", "west") if one.kv_zones else ()) for one in kept.replicas)
    assert not told(replace(kept, replicas=everywhere)), "planned for links between the zones"
    documents = kept.inputs["documents"]
    fewer = {**documents["cluster"], "nodes": [node for node in NODES if node["name"] in "ac"]}
    fewer["network"] = {"bandwidth": "100Gbps", "latency": "20us"}
    assert not told(replace(kept, inputs={"documents": {**documents, "cluster": fewer}})), "their nodes are gone"
    planned_slow = [{**SLOW, "between": [*ends]} for ends in ("ac", "bd", "ad")]
    assert not told(two_pairs(alike, {"nodes": {"links": planned_slow}}))
    for half in (planned_slow[0], planned_slow[1]):  # only one of the two was planned for as slow a link
        assert told(two_pairs(alike, {"nodes": {"links": [half, planned_slow[2]]}})) == [f"r0 → r3, {slow}"]
    joined = two_pairs(alike, {"nodes": {"links": [{**SLOW, "between": ["b", "c"]}]}})
    joined = replace(joined, kv_routes=(*joined.kv_routes, KvRoute(prefill=0, decode=3, rate=1.0)))
    assert told(joined) == ["r1 → r2, which exchange KV over slower links than planned"], "no router can keep to it"
    for paired in (ExportTarget.KSERVE, ExportTarget.RAY):
        assert not told(two_pairs(alike, {"nodes": {"links": [SLOW]}}), paired)
