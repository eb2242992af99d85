"""An export carries everything of a plan that its target supports, and reports the rest."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetis.engines.versions import Engine
from hetis.formats.errors import DocumentError
from hetis.planner.export import ExportTarget
from hetis.planner.export.ray_serve import engine_arguments
from hetis.planner.export.replicas import ExportSettings, NotExportableError, launchable
from hetis.planner.export.targets import ENGINES, Export, export_plan, export_wanted, not_carried_by_target
from hetis.solver.model import DraftShape
from hetis.solver.plan import ClassShare, KvRoute, Plan
from tests.engines.plans import MODEL
from tests.planner.export import reading
from tests.planner.export.plans import (
    CARDS_SHARED,
    DECODES,
    PLANS,
    PREFILL,
    STAGE_COPIES,
    THREE,
    WITH_WORKERS,
    apart,
    made_of,
    model_of,
    on,
    replica,
)

DOCKER = Path(__file__).parents[3] / "docker"
SETTINGS = ExportSettings(
    model="/models/tiny",
    served_name="tiny",
    hosts={node: f"10.0.0.{i}" for i, node in enumerate("abcdef", 1)},
    image="registry.example/engine:1",
    worker_image="registry.example/worker:1",
    worker_key_secret="worker",
    insecure=True,
)
READERS: Mapping[ExportTarget, Callable[[Mapping[str, str]], dict[str, reading.Read]]] = {
    ExportTarget.VLLM: reading.read_shell,
    ExportTarget.SGLANG: reading.read_shell,
    ExportTarget.COMPOSE: reading.read_compose,
    ExportTarget.KUBERNETES: reading.read_kubernetes,
    ExportTarget.LWS: reading.read_lws,
    ExportTarget.LLM_D: reading.read_llm_d,
    ExportTarget.KSERVE: reading.read_kserve,
    ExportTarget.DYNAMO: reading.read_dynamo,
    ExportTarget.RAY: reading.read_ray,
    ExportTarget.SLURM: reading.read_slurm,
}


def exported(plan: Plan, target: ExportTarget, **changes: Any) -> Export:
    engines = ENGINES.get(target, ())
    engine = engines[0] if len(engines) == 1 else None
    return export_plan(plan, model_of(plan), target, replace(SETTINGS, **{"engine": engine, **changes}))


# The parts of these plans that targets cannot carry: an excerpt of the reason, and the replicas.
LOST: Mapping[tuple[ExportTarget, str], tuple[str, tuple[str, ...]]] = {
    **{(ExportTarget.SGLANG, name): ("which SGLang does not support", ("r0",)) for name in WITH_WORKERS},
    **{(ExportTarget.RAY, name): ("Ray Serve cannot start attention workers", ("r0",)) for name in WITH_WORKERS},
    (ExportTarget.RAY, "copies that share experts"): ("deploys copies that share experts differently", ("r0",)),
    **{(ExportTarget.DYNAMO, name): ("Dynamo's images lack the hetis plugin", ("r0",)) for name in WITH_WORKERS},
    **{
        (target, "workers of stages"): ("pods cannot share a GPU", ("r0",))
        for target in (ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE)
    },
    (ExportTarget.SLURM, "workers of stages"): ("several ranks have KV on b/0, c/4", ("r0",)),
    (ExportTarget.DYNAMO, "stages of two nodes"): ("it is 2 pods", ("r0",)),
    (ExportTarget.DYNAMO, "three nodes twice"): ("it is 3 pods", ("r0", "r1")),
    (ExportTarget.DYNAMO, "prefill and decode"): (
        "it is 2 pods",
        ("r0", "r1", "r2"),
    ),  # without it no replica prefills
    (ExportTarget.KSERVE, "prefill and decode"): ("no partner is left", ("r2",)),
    (ExportTarget.KSERVE, "prefill in one stage"): ("no partner is left", ("r2",)),
    (ExportTarget.RAY, "prefill in one stage"): ("no partner is left", ("r2",)),
    (ExportTarget.RAY, "prefill and decode"): ("needs vLLM's NixlPushConnector", ("r0", "r1", "r2")),
}
IN_CLUSTERS = {ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE, ExportTarget.DYNAMO}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("target", READERS)
def test_layers_and_gpus_are_read_back_as_planned(target: ExportTarget, name: str) -> None:
    expected = {f"r{i}": reading.planned(one) for i, one in enumerate(PLANS[name].replicas)}
    why, lost = LOST.get((target, name), ("", ()))
    if expected.keys() == set(lost):
        with pytest.raises(NotExportableError, match=why):
            exported(PLANS[name], target)
        return
    made = exported(PLANS[name], target)
    kept = {key: one for key, one in expected.items() if key not in lost}
    if target in (ExportTarget.KSERVE, ExportTarget.RAY) and "prefill" in name:
        kept["r0's decode"] = kept.pop("r1")
    assert READERS[target](made.files) == kept
    assert {"README.md", "router/weights.json", *made.shown} <= made.files.keys()
    assert ("10.0.0." in "".join(made.files.values())) == (target not in {*IN_CLUSTERS, ExportTarget.RAY})
    if lost:
        assert any(why in line for line in made.lost)
        assert made.rate < made.planned
    else:
        assert made.rate == pytest.approx(PLANS[name].served_rate())


def test_the_readme_of_a_large_fleet_has_rates_without_an_exponent() -> None:
    fast = replace(PLANS["unlike replicas"].replicas[0], rate=21_432.6)
    readme = exported(made_of(fast), ExportTarget.VLLM).files["README.md"]
    assert "serves 21,433 requests/s saturated, what is exported 21,433." in readme


def test_the_readme_lists_each_gpu_once_and_says_which_are_attention_workers() -> None:
    """A worker's GPU serves both ranks of its stage, with a process for each."""
    readme = exported(PLANS["workers of stages"], ExportTarget.VLLM).files["README.md"]
    assert "| a/0,1; c/2,3; attention workers: b/0; c/4 |" in readme
    readme = exported(PLANS["attention workers"], ExportTarget.VLLM).files["README.md"]
    assert "| a/0; attention workers: b/0,1 |" in readme


@pytest.mark.parametrize("name", PLANS)
def test_hetis_launch_understands_what_it_is_told(name: str, tmp_path: Path) -> None:
    made = exported(PLANS[name], ExportTarget.HETIS_LAUNCH)
    found = reading.read_hetis_launch(made.files, tmp_path)
    assert found == {f"r{i}": reading.planned(one) for i, one in enumerate(PLANS[name].replicas)}


@pytest.mark.parametrize("name", ["--config=/tmp/evil.yaml", "--trust-remote-code", " x"])
def test_a_plan_file_gives_engines_no_options_by_the_name_of_its_model(name: str) -> None:
    plan = PLANS["one GPU"]
    documents = plan.inputs["documents"]
    hostile = replace(plan, inputs={"documents": {**documents, "model": {**documents["model"], "name": name}}})
    with pytest.raises(DocumentError, match=f"plan.json: inputs.documents.model.name is '{name}', must be a name"):
        export_wanted(hostile, ExportTarget.VLLM, ExportSettings(), file="plan.json")


def test_only_the_engine_that_listens_is_asked_for_its_health() -> None:
    made = exported(PLANS["three nodes twice"], ExportTarget.COMPOSE)
    services = [one for path in made.files if path.endswith("compose.yaml") for one in
                yaml.safe_load(made.files[path])["services"].values()]  # fmt: skip
    headless = [one for one in services if "--headless" in one["command"]]
    assert headless
    assert all(one["healthcheck"] == {"disable": True} for one in headless)
    assert all("test" in one["healthcheck"] for one in services if one not in headless)


def test_services_of_compose_share_the_hosts_network_and_run_the_image_of_their_process() -> None:
    files = exported(PLANS["attention workers"], ExportTarget.COMPOSE).files
    services = [
        one
        for path in files
        if path.endswith("compose.yaml")
        for one in yaml.safe_load(files[path])["services"].values()
    ]
    images = {SETTINGS.image: "/models/tiny", SETTINGS.worker_image: "--listen"}
    assert {one["image"] for one in services} == images.keys()
    for one in services:
        assert images[one["image"]] in (*one["entrypoint"], *one["command"])
        assert (one["network_mode"], one["ipc"], one["restart"]) == ("host", "host", "unless-stopped")
        is_engine = one["image"] == SETTINGS.image
        mount = {"type": "bind", "source": "/models/tiny", "target": "/models/tiny", "read_only": True}
        assert (mount in one.get("volumes", [])) == is_engine
        if is_engine:
            assert one["healthcheck"]["start_period"] == "30m", "weights take long to load"


def test_the_front_of_hetis_launch_listens_at_its_nodes_address() -> None:
    files = exported(PLANS["unlike replicas"], ExportTarget.HETIS_LAUNCH, port=9000).files
    told = [line for path in ("a.sh", "b.sh") for line in files[path].splitlines() if "hetis-launch processes" in line]
    assert [reading.option(line.split(), "--host") for line in told] == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    assert [reading.option(line.split(), "--port") for line in told] == ["9000", "9001", "9000"]


def test_pods_of_several_further_stages_learn_which_node_they_are_on() -> None:
    made = exported(made_of(replica(*THREE, in_flight=3)), ExportTarget.LWS)
    found = [one for each in reading.manifests(made.files) for one in containers_in(each) if "$HETIS_NODE" in str(one)]
    assert found
    for one in found:
        variables = {each["name"]: each for each in one["env"]}
        assert variables["HETIS_NODE"]["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


@pytest.mark.parametrize(("namespace", "inside"), [("", ""), ("serving", ".serving.svc")])
def test_endpoints_in_a_cluster_are_in_the_namespace(namespace: str, inside: str) -> None:
    made = exported(PLANS["one GPU"], ExportTarget.KUBERNETES, namespace=namespace)
    [one] = json.loads(made.files["router/weights.json"])["endpoints"]
    assert one["endpoint"] == f"hetis-r0{inside}:8000"


@pytest.mark.parametrize(("served", "name"), [("tiny", "tiny"), ("", "/models/tiny")])
def test_routers_know_the_model_by_the_name_that_clients_use(served: str, name: str) -> None:
    files = exported(PLANS["one GPU"], ExportTarget.VLLM, served_name=served).files
    [model] = yaml.safe_load(files["router/litellm.yaml"])["model_list"]
    assert (model["model_name"], model["litellm_params"]["model"]) == (name, f"hosted_vllm/{name}")
    assert json.loads(files["router/weights.json"])["model"] == name


def test_ray_serves_at_the_port_and_on_one_type_of_accelerator_if_there_is_one() -> None:
    unlike = made_of(replica(on("a/0", layers=3, gpu="H100"), on("a/1", first=3, layers=1), in_flight=2))
    for plan, types in ((PLANS["one GPU"], {"accelerator_type": "L4"}), (unlike, {})):
        whole = yaml.safe_load(exported(plan, ExportTarget.RAY, port=9000).files["serve.yaml"])
        assert whole["http_options"] == {"host": "0.0.0.0", "port": 9000}
        [config] = whole["applications"][0]["args"]["llm_configs"]
        assert {name: text for name, text in config.items() if name == "accelerator_type"} == types
    two = replica(on("a/0", "a/1", copies=2), in_flight=2, expert_parallel=True, kv_tokens=4096)
    with pytest.raises(NotExportableError, match="deploys copies that share experts differently"):
        exported(made_of(two), ExportTarget.RAY)


def test_dynamos_workers_are_started_for_their_role_in_graphs_of_25_components() -> None:
    sides = exported(apart("H100", "L4"), ExportTarget.DYNAMO, engine=Engine.VLLM).files
    [graph] = [one for one in reading.manifests(sides) if one["kind"] == "DynamoGraphDeployment"]
    for one in graph["spec"]["components"][1:]:
        [container] = one["podTemplate"]["spec"]["containers"]
        assert container["command"] == ["python3", "-m", "dynamo.vllm"]
        assert reading.option(container["args"], "--disaggregation-mode") == one["type"]
    sglang = exported(apart("H100", "L4"), ExportTarget.DYNAMO, engine=Engine.SGLANG).files
    assert all(text.count("--disaggregation-mode") in (0, 2) for text in sglang.values()), "once for each"
    many = made_of(*(replica(on(f"a/{i}"), rate=1.0 + i) for i in range(25)))
    files = exported(many, ExportTarget.DYNAMO, hosts={}).files
    graphs = [one for one in reading.manifests(files) if one["kind"] == "DynamoGraphDeployment"]
    assert [len(one["spec"]["components"]) for one in graphs] == [25, 2], "with a front each"


def test_the_picker_of_llm_d_has_a_profile_for_each_side_or_one_for_all() -> None:
    def profiles(plan: Plan) -> list[str]:
        found = [text for text in exported(plan, ExportTarget.LLM_D).files.values() if "EndpointPickerConfig" in text]
        return re.findall(r"name: (decode|prefill|default)$", found[0], re.MULTILINE)

    assert profiles(PLANS["prefill and decode"]) == ["decode", "prefill"]
    assert profiles(PLANS["unlike replicas"]) == ["default"]


def of_classes() -> Plan:
    """Return a plan with a pool for each of two classes, and one for all requests."""
    served = [(("short",), 4.0), ((), 2.0), (("long",), 1.0)]
    replicas = [replica(on(f"a/{i}"), rate=rate, classes=classes) for i, (classes, rate) in enumerate(served)]
    shares = (ClassShare(name="short", share=0.8, max_prompt_tokens=2_000), ClassShare(name="long", share=0.2))
    return replace(made_of(*replicas), classes=shares)


def test_litellm_has_a_group_of_deployments_for_each_class() -> None:
    files = exported(of_classes(), ExportTarget.VLLM).files
    lists = yaml.safe_load(files["router/litellm.yaml"])
    groups: dict[str, list[tuple[int, int]]] = {}
    for one in lists["model_list"]:
        of_group = groups.setdefault(one["model_name"], [])
        of_group.append((one["litellm_params"]["weight"], one["model_info"]["max_input_tokens"]))
    [(first, short), (other, long)] = groups.items()
    assert lists["router_settings"]["context_window_fallbacks"] == [{first: [other]}]
    assert lists["router_settings"]["enable_pre_call_checks"] is True
    # 4/s of short requests are those of 5/s in all, 1/s of long ones those of 5/s; 2/s are of all.
    assert short == [(714, 2_000), (286, 2_000)]
    assert long == [(286, model_of(of_classes()).max_position), (714, model_of(of_classes()).max_position)]
    assert "router/nginx.conf" not in files
    assert "router/envoy.yaml" not in files


def test_llm_d_filters_pods_by_the_lengths_of_their_class() -> None:
    files = exported(of_classes(), ExportTarget.LLM_D).files
    longest = model_of(of_classes()).max_position
    for lengths in ("0-2000", f"2001-{longest}"):
        assert any(f"llm-d.ai/context-length-range: {lengths}" in text for text in files.values())
    [picker] = [yaml.safe_load(text) for text in files.values() if "EndpointPickerConfig" in text]
    assert {"type": "context-length-aware", "parameters": {"enableFiltering": True}} in picker["plugins"]
    [profile] = picker["schedulingProfiles"]
    assert profile["plugins"][0] == {"pluginRef": "context-length-aware", "weight": 0}


@pytest.mark.parametrize(
    "target", [ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.KSERVE, ExportTarget.DYNAMO]
)
def test_a_target_whose_router_knows_no_lengths_refuses_classes(target: ExportTarget) -> None:
    with pytest.raises(NotExportableError, match="does not know the lengths of prompts"):
        exported(of_classes(), target)
    reasons = not_carried_by_target(of_classes(), model_of(of_classes()))
    assert "does not know the lengths of prompts" in " ".join(reasons[target])
    assert reasons[ExportTarget.LLM_D] == ()
    assert exported(of_classes(), ExportTarget.LLM_D).rate == pytest.approx(7.0)


def test_services_of_kserve_have_labels_of_their_own() -> None:
    made = exported(PLANS["prefill and decode"], ExportTarget.KSERVE)
    services = [one for one in reading.manifests(made.files) if one["kind"] == "LLMInferenceService"]
    assert services
    assert all(one["metadata"]["labels"]["app.kubernetes.io/instance"] == one["metadata"]["name"] for one in services)


def test_ray_gets_a_commit_as_text() -> None:
    found, _ = engine_arguments(("--revision", "12345678", "--tokenizer-revision=1e5", "--max-num-seqs", "7"))
    assert found == {"revision": "12345678", "tokenizer_revision": "1e5", "max_num_seqs": 7}


@pytest.mark.parametrize("device", ["a..b/0", "a-/0", "-a/0", "a/٣"])
def test_nodes_and_indices_that_cannot_be_are_refused(device: str) -> None:
    with pytest.raises(NotExportableError):
        exported(made_of(replica(on(device))), ExportTarget.VLLM)


def test_replicas_with_room_for_shorter_requests_are_named() -> None:
    few, many = replica(on("a/0"), kv_tokens=640), replica(on("b/0"), kv_tokens=6400)
    assert exported(made_of(many, many), ExportTarget.VLLM).lost == ()
    assert exported(made_of(many, few, few), ExportTarget.VLLM).lost == (
        "replicas have room for requests of different lengths, which routers do not know: "
        "r1, r2 up to 560 tokens, the others up to 4,096",
    )


def test_what_no_engine_runs_is_left_out_with_the_reason_and_what_it_costs() -> None:
    plan = made_of(*PLANS["unlike replicas"].replicas, STAGE_COPIES)
    made = exported(plan, ExportTarget.VLLM)
    assert made.lost == ("replica 3: stage 2: it has 2 copies, vLLM has one of each stage",)
    assert (made.planned, made.rate) == (15.0, 10.0)
    assert sorted(reading.read_shell(made.files)) == ["r0", "r1", "r2"]
    assert "it has 2 copies" in made.files["README.md"]
    with pytest.raises(NotExportableError) as caught:
        exported(made_of(STAGE_COPIES), ExportTarget.VLLM)
    assert caught.value.reasons == ("replica 0: stage 2: it has 2 copies, vLLM has one of each stage",)


@pytest.mark.parametrize("node", ["a b", "$(reboot)", "a\nreboot", "*", "-x", "a;b", "n" * 254])
def test_names_that_no_host_has_reach_no_file(node: str) -> None:
    good, bad = PLANS["one GPU"].replicas[0], replace(PLANS["one GPU"].replicas[0].stages[0], devices=(f"{node}/0",))
    plan = made_of(good, replace(good, stages=(bad,)))
    for target in ExportTarget:
        made = exported(plan, target)
        assert made.lost[0].startswith("replica 1: ")
        assert repr(node)[1:-1] in made.lost[0]
        assert all(node not in text for path, text in made.files.items() if path.endswith((".sh", ".sbatch")))


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_nodes_that_no_cluster_can_have_get_no_pods(target: ExportTarget) -> None:
    """Nodes are named by the name of their object, which may be longer than the value of a label."""
    good, longest, wrong = PLANS["one GPU"].replicas[0], ".".join(["n" * 63] * 3 + ["n" * 61]), ("Gpu1", "gpu_1")
    plan = made_of(good, *(replace(good, stages=(on(f"{node}/0"),)) for node in (longest, *wrong)))
    made = exported(plan, target)
    assert made.lost[:2] == tuple(
        f"replica {number}: node {node}: the name of a node in Kubernetes has only lower-case letters, digits, - and ."
        for number, node in enumerate(wrong, 2)
    )
    assert all(node not in text for path, text in made.files.items() if path != "README.md" for node in wrong)
    assert any(f"- {longest}\n" in text for text in made.files.values())


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_pods_tolerate_the_taint_of_gpu_nodes(target: ExportTarget) -> None:
    files = exported(PLANS["one GPU"], target).files
    assert sum(text.count("tolerations:\n") for text in files.values()) == 1
    [toleration] = re.findall(r"tolerations:\n *- (.*\n.*\n.*\n)", "".join(files.values()))
    assert yaml.safe_load(re.sub(r"(?m)^ +", "", toleration)) == {
        "key": "nvidia.com/gpu",
        "operator": "Exists",
        "effect": "NoSchedule",
    }


def test_a_prefill_replica_without_those_that_decode_serves_nothing() -> None:
    split = PLANS["prefill and decode"]
    staged = replace(split.replicas[1], stages=PLANS["stages of two nodes"].replicas[0].stages)
    made = exported(replace(split, replicas=(split.replicas[0], staged, split.replicas[2])), ExportTarget.VLLM)
    assert made.rate == 1.0
    [pair] = json.loads(made.files["router/weights.json"])["pairs"]
    assert (pair["prefill"], pair["decode"], pair["share"]) == ("r0", "r2", 1.0)


def test_replicas_of_a_node_have_ports_of_their_own() -> None:
    for name, plan in PLANS.items():
        found, taken = launchable(plan, model_of(plan), SETTINGS), list[tuple[str, int]]()
        for one in found.replicas.values():
            taken.append((one.front_node, one.port))
            copies = one.layout.data_parallel
            taken += [(one.front_node, one.addresses.kv_port + copy) for copy in range(copies)]
            if len(one.layout.servers) > 1 or copies > 1:
                taken.append((one.front_node, one.addresses.master_port))
            for process, command in zip(one.layout.processes, one.commands, strict=True):
                if listen := reading.option(list(command.shown), "--listen"):
                    taken.append((process.node, int(listen.rpartition(":")[2])))
        assert len(set(taken)) == len(taken), name


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
    if target is ExportTarget.RAY:  # its replicas are reached by paths, which the other routers do not support
        assert not {"router/nginx.conf", "router/envoy.yaml"} & made.files.keys()
        return
    nginx = re.findall(r"server (\S+) weight=(\d+);", made.files["router/nginx.conf"])
    assert nginx == list(zip(endpoints, map(str, weights), strict=True))
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
            r"server (\S+) weight=(\d+);",
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


@pytest.mark.parametrize("target", [ExportTarget.LLM_D, ExportTarget.KSERVE])
def test_a_stack_finds_the_model_where_the_engine_does_whatever_clients_call_it(target: ExportTarget) -> None:
    """The served name is for clients; nothing of that name is at Hugging Face."""
    files = exported(PLANS["one GPU"], target, model="meta-llama/Llama-2-7b", served_name="chat").files
    assert re.findall(r"uri: (\S+)", "".join(files.values())) == ["hf://meta-llama/Llama-2-7b"]


@pytest.mark.parametrize("model", ["tiny", "/models/tiny", "org/tiny", "meta-llama/Llama-2-7b-hf"])
def test_the_name_of_a_file_is_not_taken_for_a_checkpoint(model: str) -> None:
    """A plan for ``tiny/config.json`` has the folder's name, of which there is no checkpoint."""
    made = exported(PLANS["one GPU"], ExportTarget.VLLM, model=model)
    why = "engines are started with tiny, the name in the plan, which they may not find: set --model to"
    assert (why in "".join(made.lost)) == (why in made.files["README.md"]) == (model == "tiny")


def labels_of_pods(files: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the labels of the pods that objects of Kubernetes and LeaderWorkerSets make, and those of the chart."""
    found = [yaml.safe_load(text)["modelArtifacts"]["labels"] for path, text in files.items() if "values-" in path]
    for one in reading.manifests({path: text for path, text in files.items() if "values-" not in path}):
        specs = [role["spec"] for role in one["spec"]["roles"]] if one["kind"] == "DisaggregatedSet" else []
        specs += [one["spec"]] if one["kind"] == "LeaderWorkerSet" else []
        templates = [one["spec"]["template"]] if one["kind"] == "StatefulSet" else []
        for group in (spec["leaderWorkerTemplate"] for spec in specs):
            templates += [group[key] for key in ("leaderTemplate", "workerTemplate") if key in group]
        found += [template["metadata"]["labels"] for template in templates]
    return found


def is_selected(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """Return whether a pod's labels meet a selector of Kubernetes."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    assert selector, "it would select every pod"
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(labels.get(term["key"]) in term["values"] for term in terms)


def ports_from(source: Mapping[str, str], to: Mapping[str, str], policies: list[Any]) -> list[Any]:
    """Return what a pod may reach of another: a list of ports for every policy that allows it; None: any port."""
    return [
        [port["port"] for port in rule["ports"]] if "ports" in rule else None
        for policy in policies
        if is_selected(to, policy["spec"]["podSelector"])
        for rule in policy["spec"]["ingress"]
        if "from" not in rule or any(is_selected(source, each["podSelector"]) for each in rule["from"])
    ]


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


def test_gpus_of_a_mixed_node_are_chosen_by_others() -> None:
    chooses = {
        **dict.fromkeys(IN_CLUSTERS, "which of them a pod gets, the device plugin decides"),
        ExportTarget.SLURM: "which of them a step gets, Slurm decides",
        ExportTarget.RAY: "which of them a rank gets, Ray decides",
    }
    for target in ExportTarget:
        if target is not ExportTarget.SGLANG:
            said = (f"node a has A100 and L4: {chooses[target]}",) if target in chooses else ()
            assert exported(PLANS["stages of a node"], target).lost == said
    assert exported(PLANS["one GPU"], ExportTarget.KUBERNETES).lost == ()


@pytest.mark.parametrize("target", list(ExportTarget))
def test_options_after_two_dashes_are_written_or_told_as_lost(target: ExportTarget) -> None:
    made = exported(PLANS["one GPU"], target, engine_options=("--seed", "4711"))
    carried = any("4711" in text for name, text in made.files.items() if name != "README.md")
    assert carried != any("--seed 4711" in lost for lost in made.lost)


def test_options_for_ray_are_arguments_of_the_engine_or_told_as_lost() -> None:
    """Ray takes the fields of vLLM's engine and front end, refuses unknown ones, and serves HTTP itself."""
    given = "--max-num-seqs 7 --seed=-1 --enforce-eager --no-enable-prefix-caching --gpu-memory-utilization 0.5"
    given += ' --tool-call-parser hermes --hf-overrides {"a":{"b":[1]}} --api-key k -O3 --max-model-len 8k'
    made = exported(PLANS["one GPU"], ExportTarget.RAY, engine_options=tuple(given.split()), program="my vllm")
    (application,) = yaml.safe_load(made.files["serve.yaml"])["applications"]
    arguments = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert arguments.items() >= {
        "max_num_seqs": 7, "seed": -1, "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5, "tool_call_parser": "hermes", "hf_overrides": {"a": {"b": [1]}},
    }.items()  # fmt: skip
    assert not arguments.keys() & {"api_key", "max_model_len", "O3"}
    command_line = "Ray does not read command lines, set engine_kwargs in serve.yaml"
    assert made.lost == (
        "--program my vllm: Ray Serve LLM starts the engine itself",
        "--api-key k: Ray Serve LLM replaces vLLM's HTTP server",
        f"-O3: {command_line}",
        f"--max-model-len 8k: {command_line}",
    )


def test_a_value_without_an_option_is_told_as_lost_by_ray() -> None:
    """What the plan decides is left out before, here the option that stood before the value."""
    assert engine_arguments(["--kv-cache-dtype", "fp8", "extra"]) == (
        {},
        ["extra: Ray does not read command lines, set engine_kwargs in serve.yaml"],
    )


def test_a_draft_is_a_mapping_for_ray() -> None:
    plan = PLANS["one GPU"]
    model = replace(model_of(plan), draft=DraftShape(tokens=1, acceptance=0.8))
    made = export_plan(plan, model, ExportTarget.RAY, SETTINGS)
    (application,) = yaml.safe_load(made.files["serve.yaml"])["applications"]
    arguments = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert arguments["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 1}


# No target carries these with the same engine.
NOWHERE = ("which SGLang does not support", "no partner is left")


@pytest.mark.parametrize(
    ("target", "name"), sorted(case for case, (why, _) in LOST.items() if not any(part in why for part in NOWHERE))
)
def test_reasons_name_a_target_that_carries_what_this_one_does_not(target: ExportTarget, name: str) -> None:
    try:
        reasons = exported(PLANS[name], target).lost
    except NotExportableError as error:
        reasons = error.reasons
    lists = re.findall(r"--to ([a-z][a-z-]+(?:(?:, | or )(?!or)[a-z][a-z-]+)*)", " ".join(reasons))
    named = [ExportTarget(other) for names in lists for other in re.split(", | or ", names)]
    assert named
    assert all(exported(PLANS[name], other).rate == pytest.approx(PLANS[name].served_rate()) for other in named)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("target", ExportTarget)
def test_a_target_says_before_an_export_whether_it_carries_a_plan(target: ExportTarget, name: str) -> None:
    plan = PLANS[name]
    reasons = not_carried_by_target(plan, model_of(plan), next(iter(ENGINES.get(target, ())), None))[target]
    why, lost = LOST.get((target, name), ("", ()))
    if (target, name) == (ExportTarget.RAY, "three nodes twice"):  # the order of its addresses is unknown
        why, lost = "give --node-address", ("r0", "r1")
    assert bool(reasons) == bool(lost)
    assert why in " ".join(reasons)


def test_further_stages_of_one_node_are_pods_of_their_own_or_left_out() -> None:
    """Pods of one template are distinguished by node; vLLM on Ray numbers the ranks of a node consecutively.

    LeaderWorkerSet and llm-d get StatefulSets instead, of which the front end's alone is in llm-d's pool.
    """
    stages = (on("a/0", layers=2), on("b/0", first=2, layers=1), on("b/1", first=3, layers=1))
    plan = made_of(replica(*stages, in_flight=3))
    with pytest.raises(NotExportableError, match="several further stages are on b"):
        exported(plan, ExportTarget.KSERVE)
    objects = reading.manifests(exported(plan, ExportTarget.LLM_D).files)
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects if one["kind"] == "StatefulSet"]
    assert ["hetis/pool" in each for each in labels] == [True, False, False]
    with pytest.raises(NotExportableError, match="it is 3 pods: Dynamo makes those of a component from one template"):
        exported(plan, ExportTarget.DYNAMO)
    for target in (
        ExportTarget.VLLM,
        ExportTarget.COMPOSE,
        ExportTarget.KUBERNETES,
        ExportTarget.LWS,
        ExportTarget.LLM_D,
        ExportTarget.SLURM,
        ExportTarget.RAY,
    ):
        assert READERS[target](exported(plan, target).files) == {"r0": reading.planned(plan.replicas[0])}
    back = made_of(replica(stages[0], on("b/0", first=2, layers=1), on("a/1", first=3, layers=1), in_flight=3))
    with pytest.raises(NotExportableError, match="stages of a node are not next to each other"):
        exported(back, ExportTarget.RAY)
    order = made_of(replica(stages[0], on("c/0", first=2, layers=1), on("b/0", first=3, layers=1)))
    with pytest.raises(NotExportableError, match="stages would be on a, b, c"):
        exported(order, ExportTarget.RAY)


def test_only_serve_starts_stages_on_several_nodes() -> None:
    with pytest.raises(NotExportableError, match="only `vllm serve` and `sglang serve` start stages on several nodes"):
        exported(PLANS["stages of two nodes"], ExportTarget.VLLM, program="python -m front")


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


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.COMPOSE, ExportTarget.SLURM])
def test_addresses_of_ipv6_have_brackets_before_a_port(target: ExportTarget) -> None:
    made = exported(PLANS["one GPU"], target, hosts={"a": "fd00::1"})
    assert "server [fd00::1]:8000 weight=1000;" in made.files["router/nginx.conf"]
    [model] = yaml.safe_load(made.files["router/litellm.yaml"])["model_list"]
    assert model["litellm_params"]["api_base"] == "http://[fd00::1]:8000/v1"
    assert "address: fd00::1\n" in made.files["router/envoy.yaml"]
    assert json.loads(made.files["router/weights.json"])["endpoints"][0]["endpoint"] == "[fd00::1]:8000"
    assert "| [fd00::1]:8000 |" in made.files["README.md"]
    rest = "".join(text for path, text in made.files.items() if path != "router/envoy.yaml")
    assert "fd00::1:" not in rest
    assert ("http://[fd00::1]:8000/health" in rest) == (target is ExportTarget.COMPOSE)
    ray = exported(PLANS["one GPU"], ExportTarget.RAY, hosts={"ray-head": "fd00::9"})
    assert json.loads(ray.files["router/weights.json"])["endpoints"][0]["endpoint"].startswith("[fd00::9]:8000/")
    apart_there = exported(apart("H100", "T4"), target, hosts={"a": "fd00::1", "d": "fd00::2"})
    assert not any("NIXL" in lost for lost in apart_there.lost), "it listens on such an address"


@pytest.mark.parametrize("name", ["attention workers", "stages of two nodes", "unlike replicas"])
def test_all_steps_of_a_slurm_job_start_and_share_its_memory(name: str) -> None:
    """A step inherits from the job whatever it does not request: all GPUs of the node, all memory, one CPU."""
    made = exported(PLANS[name], ExportTarget.SLURM)
    for path in made.shown:
        head, _, body = made.files[path].partition("set -euo pipefail")
        components = [dict(re.findall(r"#SBATCH --(\S+?)=(\S+)", part)) for part in head.split("#SBATCH hetjob\n")]
        steps = [line for line in body.splitlines() if line.startswith("srun ")]
        groups = [int((re.findall(r"--het-group=(\d+)", step) or ["0"])[0]) for step in steps]
        assert [int(one["ntasks"]) for one in components] == [groups.count(i) for i in range(len(components))]
        assert {one["cpus-per-gpu"] for one in components} == {"4"}
        for step in steps:
            assert re.search(r" --ntasks=1 --exact --gpus-per-node=(\d) --gpus-per-task=\1 --mem=0 ", step)
        assert "/" not in components[0]["output"], "a folder that is missing fails the job without a word"
        assert body.index("mkdir -p logs") < body.index("srun ")


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.SGLANG, ExportTarget.HETIS_LAUNCH])
def test_scripts_are_shell(target: ExportTarget, tmp_path: Path) -> None:
    for name in ("unlike replicas", "stages of two nodes", "prefill and decode"):
        for path, text in exported(PLANS[name], target).files.items():
            if path.endswith(".sh"):
                (tmp_path / "script.sh").write_text(text, encoding="utf-8")
                subprocess.run(["bash", "-n", tmp_path / "script.sh"], check=True)


def test_a_script_ends_with_its_processes_and_they_with_it(tmp_path: Path) -> None:
    """Stand-ins for vLLM are used: one ends with a code, the other waits for SIGTERM."""
    made = exported(PLANS["stages of two nodes"], ExportTarget.VLLM, hosts={"a": "127.0.0.1", "c": "127.0.0.1"})
    text = made.files["a/r0.sh"]
    [line] = [line for line in text.splitlines() if line.startswith("env ")]
    script = f'trap "echo told > {tmp_path}/told; exit 0" TERM; echo up > {tmp_path}/up; sleep 100 & wait'
    waits = f"bash -c '{script}' &\npids+=($!)"
    ends = f"bash -c 'until test -s {tmp_path}/up; do :; done; exit 7' &"
    (tmp_path / "r0.sh").write_text(text.replace(line, f"{waits}\n{ends}"), encoding="utf-8")
    done = subprocess.run(["bash", tmp_path / "r0.sh"], check=False, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "told").read_text() == "told\n"


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.HETIS_LAUNCH])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_supervisor_of_a_whole_node_hears_of_the_replica_that_ends(
    target: ExportTarget, failing: int, tmp_path: Path
) -> None:
    """Stand-ins for the two replicas of a node are used: one ends with a code, the other waits for SIGTERM."""
    made = exported(PLANS["unlike replicas"], target)
    text = made.files["a/start.sh" if target is ExportTarget.VLLM else "a.sh"]
    lines = [line for line in text.splitlines() if line.startswith(("./r", "hetis-launch "))]
    assert len(lines) == 2
    waits = f'sleep 100 & trap "echo told > {tmp_path}/told; kill $!; exit 0" TERM; echo up > {tmp_path}/up; wait'
    stand_ins = [waits, waits]
    stand_ins[failing] = f"until test -s {tmp_path}/up; do sleep 0.01; done; exit 7"
    for line, stand_in in zip(lines, stand_ins, strict=True):
        text = text.replace(f"{line}\n", f"bash -c '{stand_in}' &\n")
    (tmp_path / "node.sh").write_text(text, encoding="utf-8")
    done = subprocess.run(["bash", tmp_path / "node.sh"], check=False, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "told").read_text() == "told\n"


def test_compose_refuses_what_it_has_no_image_for() -> None:
    with pytest.raises(DocumentError) as caught:
        exported(PLANS["attention workers"], ExportTarget.COMPOSE, image="", worker_image="")
    assert [problem.message.partition(":")[0] for problem in caught.value.problems] == [
        "--image is missing",
        "--worker-image is missing",
    ]
    made = exported(PLANS["one GPU"], ExportTarget.COMPOSE, image="")
    [service] = yaml.safe_load(made.files["a/compose.yaml"])["services"].values()
    assert service["image"] == "vllm/vllm-openai:v0.32.0"


def test_a_plan_without_replicas_is_refused_with_the_reason() -> None:
    with pytest.raises(NotExportableError, match=r"^the plan has no replicas$"):
        exported(replace(PLANS["one GPU"], replicas=()), ExportTarget.VLLM)


def test_compose_says_who_must_own_the_key() -> None:
    """The key is mounted with its owner and mode, and read by the user of our images."""
    readme = exported(PLANS["attention workers"], ExportTarget.COMPOSE).files["README.md"]
    [user] = re.findall(r"chown (\d+) worker.key", readme)
    for image in ("vllm", "worker"):
        assert f"USER {user}:{user}" in (DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(WITH_WORKERS))
def test_every_key_and_file_of_compose_is_mounted_where_it_is_read(name: str) -> None:
    files, num_keys = exported(PLANS[name], ExportTarget.COMPOSE).files, 0
    for path in (path for path in files if path.endswith("/compose.yaml")):
        whole = yaml.safe_load(files[path])
        for service in whole["services"].values():
            secrets = {f"/run/secrets/{name}": whole["secrets"][name]["file"] for name in service.get("secrets", ())}
            assert set(secrets.values()) == {"./worker.key"}, "which the README tells users to put there"
            mounted = {each["target"]: each["source"] for each in service.get("volumes", ())}
            keys = [reading.option(service["command"], "--key-file")]
            if place := service["environment"].get("HETIS_VLLM_CONFIG"):
                config = yaml.safe_load(files[path.replace("compose.yaml", mounted[place].removeprefix("./"))])
                keys = [worker["keyFile"] for worker in config["workers"]]
            assert keys
            assert set(keys) <= secrets.keys()
            num_keys += len(keys)
    assert num_keys > 1


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.SLURM])
def test_the_key_of_scripts_is_the_file_beside_them(target: ExportTarget) -> None:
    """Scripts change to their own folder, and jobs run in that of `submit.sh`."""
    files = exported(PLANS["attention workers"], target).files
    configs = [yaml.safe_load(text) for path, text in files.items() if path.endswith("workers.yaml")]
    assert configs
    assert {worker["keyFile"] for one in configs for worker in one["workers"]} == {"worker.key"}
    assert "`worker.key`" in files["README.md"]


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS - {ExportTarget.DYNAMO}))
def test_pods_write_their_key_to_the_file_that_the_plugin_reads(target: ExportTarget) -> None:
    objects = reading.manifests(exported(PLANS["attention workers"], target).files)
    [config] = [one for one in objects if one["kind"] == "ConfigMap"]
    [engine] = [each for one in objects for each in containers_in(one) if each["name"] in ("vllm", "main")]
    [text] = [word for word in engine["command"] if "HETIS_WORKER_KEY" in word]
    for worker in yaml.safe_load(config["data"]["workers.yaml"])["workers"]:
        assert f"> {worker['keyFile']} " in text
    assert any(each["mountPath"] == "/tmp" and not each.get("readOnly") for each in engine["volumeMounts"])


def test_compose_puts_no_variables_in_place_of_dollars_and_mounts_paths_with_colons() -> None:
    given = {"model": "/models/$HOME/tiny:v1", "served_name": "ti$ny", "engine_options": ("--api-key", "pa$s1")}
    made = exported(PLANS["attention workers"], ExportTarget.COMPOSE, **given)
    for path in made.shown:
        text = made.files[path]
        assert set(re.findall(r"\$.*", text.replace("$$", ""))) <= {"${VLLM_API_KEY:-}"}
    service = yaml.safe_load(made.files["a/compose.yaml"])["services"]["r0-vllm"]
    words = [word.replace("$$", "$") for word in service["command"]]
    assert words[:2] == ["serve", "/models/$HOME/tiny:v1"]
    assert reading.option(words, "--api-key") == "pa$s1"
    model = "/models/$$HOME/tiny:v1"
    assert {"type": "bind", "source": model, "target": model, "read_only": True} in service["volumes"]
    assert service["environment"]["VLLM_API_KEY"] == "${VLLM_API_KEY:-}"
    assert service["environment"]["HF_TOKEN"] is None, "passed on if it is set"


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.SGLANG])
@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_kubernetes_puts_no_variables_in_place_of_dollars(target: ExportTarget, engine: Engine) -> None:
    texts = ("/models/$(HOME)/tiny", "ti$$ny", "$(HOME)$")
    given = {"model": texts[0], "served_name": texts[1], "engine_options": ("--chat-template", texts[2])}
    name = "one GPU" if target is ExportTarget.DYNAMO else "three nodes twice"
    num_commands = 0
    for one in reading.manifests(exported(PLANS[name], target, engine=engine, **given).files):
        for container in containers_in(one) if one["kind"] != "Deployment" else ():
            text = " ".join(reading.expanded(word, {"HOME": "/tmp"}) for word in reading.words_of(container))
            if "dynamo.frontend" not in text:
                assert all(each in text for each in texts)
                num_commands += 1
    assert num_commands >= (1 if target is ExportTarget.DYNAMO else 4)


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_every_engine_gets_the_token_by_which_it_downloads_its_model(target: ExportTarget) -> None:
    name = "one GPU" if target is ExportTarget.DYNAMO else "stages of two nodes"
    for given, key in (("hub", "HF_TOKEN"), ("hub:token", "token")):
        made = exported(PLANS[name], target, hf_token_secret=given)
        found = [each for one in reading.manifests(made.files) for each in containers_in(one)]
        wanted = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": key}}}
        assert len(found) == 2, "the engine's, and Dynamo's front end"
        assert all([each for each in one["env"] if each["name"] == "HF_TOKEN"] == [wanted] for one in found)
    assert "HF_TOKEN" not in str(exported(PLANS[name], target).files)


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS - {ExportTarget.DYNAMO}))
def test_probes_speak_https_to_engines_that_do(target: ExportTarget) -> None:
    def schemes(*options: str) -> tuple[set[str], set[str]]:
        made = exported(PLANS["one GPU"], target, engine_options=options)
        [container] = [each for one in reading.manifests(made.files) for each in containers_in(one)]
        found = {name: probe["httpGet"].get("scheme", "") for name, probe in container.items() if "Probe" in name}
        assert any("its lists connect by HTTP" in line for line in made.lost) == bool(options)
        return set(found), set(found.values())

    of_kserve = target is ExportTarget.KSERVE  # whose presets have a scheme of their own
    certificate = ("--ssl-certfile=/tls/tls.crt", "--ssl-keyfile", "/tls/tls.key")
    every = {"startupProbe", "livenessProbe", "readinessProbe"}
    assert schemes() == (every - ({"livenessProbe"} if of_kserve else set()), {""})
    assert schemes(*certificate) == (every, {"HTTPS"})
    assert schemes("--ssl-certf", "/tls/tls.crt") == schemes(*certificate), "vLLM's parser takes abbreviations"


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_pods_are_not_killed_while_the_engine_drains_as_told(target: ExportTarget) -> None:
    def grace(name: str, *options: str) -> set[int]:
        made = exported(PLANS[name], target, engine_options=options)
        found = [pod for one in reading.manifests(made.files) for pod in pods_in(one)]
        return {pod["terminationGracePeriodSeconds"] for pod in found if "terminationGracePeriodSeconds" in pod}

    by_operator = target is ExportTarget.DYNAMO  # whose own 60 seconds stay as they are
    assert grace("one GPU", "--shutdown-timeout", "0") == (set() if by_operator else {55})
    assert grace("one GPU") == (set() if by_operator else {175}), "two minutes, unless an option says otherwise"
    assert grace("one GPU", "--shutdown-timeout=300") == {355}, "the 30 seconds of other targets, and a margin"
    assert grace("one GPU", "--shutdown_time", "60", "--shutdown-time=90") == {145}, "shortened, the last of two"
    if not by_operator:
        assert grace("stages of two nodes", "--shutdown-timeout", "300") == {355}
        assert grace("attention workers", "--shutdown-timeout", "300") == {355, 55}, "workers drain nothing"


def test_dynamo_says_which_options_its_own_front_end_and_workers_replace() -> None:
    server = ("--ssl-keyfile", "/tls/tls.key", "--allowed-origins=[]")
    kept = ("--max-num-seqs", "7", "--seed=-1")
    made = exported(PLANS["one GPU"], ExportTarget.DYNAMO, engine_options=(*server, *kept), program="my serve")
    [graph] = reading.manifests(made.files)
    [_, component] = graph["spec"]["components"]
    words = component["podTemplate"]["spec"]["containers"][0]["args"]
    assert set(kept) <= set(words)
    assert not set(server) & set(words)
    assert [line for line in made.lost if line.startswith("--")] == [
        "--program my serve: Dynamo starts the engine by a worker of its own",
        "--ssl-keyfile /tls/tls.key: Dynamo's front end replaces the engine's HTTP server",
        "--allowed-origins=[]: Dynamo's front end replaces the engine's HTTP server",
    ]


@pytest.mark.parametrize("name", ["one GPU", "stages of two nodes", "prefill and decode"])
def test_options_mean_themselves_after_kserve_has_executed_its_templates(name: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{{{x}}}{% endfor %}"
    made = exported(PLANS[name], ExportTarget.KSERVE, engine_options=("--chat-template", template))
    services = [one for one in reading.manifests(made.files) if one["kind"] == "LLMInferenceService"]
    commands = [one["command"] for service in services for one in containers_in(service["spec"])]
    assert commands
    for command in commands:
        [found] = [word for word in command if "messages" in word]
        # An action of Go's templates that is a raw string yields the string.
        assert template in re.sub(r"\{\{`([^`]*)`\}\}", r"\1", found)
        assert "{{" not in re.sub(r"\{\{`[^`]*`\}\}", "", found)


def test_compose_checks_the_health_of_an_engine_with_tls() -> None:
    made = exported(PLANS["one GPU"], ExportTarget.COMPOSE, engine_options=("--ssl-keyfile", "/tls/tls.key"))
    [service] = yaml.safe_load(made.files["a/compose.yaml"])["services"].values()
    script = service["healthcheck"]["test"][-1]
    assert "https://10.0.0.1:8000/health" in script
    compile(script, "health", "exec")


def test_releases_of_llm_d_are_installed_where_their_services_are() -> None:
    made = exported(PLANS["unlike replicas"], ExportTarget.LLM_D, namespace="serving")
    releases = re.findall(
        r"(?m)^helm upgrade --install (\S+) .* --namespace serving --values (\S+)$", made.files["README.md"]
    )
    assert releases == [(f"hetis-r{i}", f"values-r{i}.yaml") for i in range(3)]
    assert {values for _, values in releases} <= made.files.keys()


ZONES = {"a": "east", "b": "west", "c": "east", "d": "west"}
NODES = [{"name": name, "zone": zone, "gpus": [{"type": "L4"}]} for name, zone in ZONES.items()]
SLOW = {"between": ["a", "d"], "bandwidth": "1Gbps", "latency": "20us"}


def two_pairs(
    nodes: list[dict[str, Any]], network: Mapping[str, Any], *, gpu: str = "L4", keeps_zones: bool = False
) -> Plan:
    """Return a plan of two prefill replicas, on a and b, that each send to one decode replica, on c and d."""
    zones = {node: (ZONES[node],) if keeps_zones else () for node in "ab"}
    stage = {node: on(f"{node}/0", gpu=gpu if node in "bd" else "L4") for node in "abcd"}
    senders = [replace(PREFILL, stages=(stage[node],), in_flight=1, kv_zones=zones[node]) for node in "ab"]
    receivers = [replace(DECODES[0], stages=(stage[node],)) for node in "cd"]
    routes = tuple(KvRoute(prefill=i, decode=2 + i, rate=2.0) for i in range(2))
    plan = made_of(*senders, *receivers, routes=routes)
    fleet = {"apiVersion": "hetis/v1", "kind": "Cluster", "name": "four", "nodes": nodes}
    network = {"bandwidth": "100Gbps", "latency": "20us", **network}
    return replace(plan, inputs={"documents": {**plan.inputs["documents"], "cluster": {**fleet, "network": network}}})


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


def test_dynamos_operator_alone_gives_pods_shared_memory() -> None:
    made = exported(PLANS["one GPU"], ExportTarget.DYNAMO, model_claim="models")
    [_, one] = reading.manifests(made.files)[0]["spec"]["components"]
    pod = one["podTemplate"]["spec"]
    assert pod["enableServiceLinks"] is False
    mounts = {each["name"]: each["mountPath"] for each in reading.container_of(pod)["volumeMounts"]}
    assert mounts == {"models": "/models", "tmp": "/tmp"}
    assert [each["name"] for each in pod["volumes"]] == ["models", "tmp"]


@pytest.mark.parametrize("target", sorted(set(ExportTarget) - {ExportTarget.DYNAMO}))
def test_stages_that_are_not_restarted_together_are_told(target: ExportTarget) -> None:
    """Groups of pods, jobs and Ray's applications end as a whole, pods of stages by probes; scripts restart nothing."""

    def told(name: str) -> list[str]:
        return [line for line in exported(PLANS[name], target).lost if "only that one is started again" in line]

    is_alone = target is ExportTarget.COMPOSE
    assert not told("one GPU")
    assert not told("stages of a node")
    assert [line.partition(":")[0] for line in told("three nodes twice")] == ["replica 0", "replica 1"] * is_alone
    if is_alone:
        [line] = told("stages of two nodes")
        assert "one of its 2 stages" in line
        assert line in exported(PLANS["stages of two nodes"], target).files["README.md"]


def test_workers_get_no_token() -> None:
    made = exported(PLANS["attention workers"], ExportTarget.KUBERNETES, hf_token_secret="hub")
    found = [each for one in reading.manifests(made.files) for each in containers_in(one)]
    assert {(each["name"], "HF_TOKEN" in str(each["env"])) for each in found} == {("vllm", True), ("worker", False)}


def pods_in(value: Any) -> list[dict[str, Any]]:
    """Return the specs of all pods in an object, and in the values of llm-d's chart the part that is like one."""
    if isinstance(value, list):
        return [found for each in value for found in pods_in(each)]
    if not isinstance(value, dict):
        return []
    return [*([value] if "containers" in value else []), *(found for each in value.values() for found in pods_in(each))]


def containers_in(value: Any) -> list[dict[str, Any]]:
    """Return all containers in an object."""
    if isinstance(value, list):
        return [found for each in value for found in containers_in(each)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for each in value.values() for found in containers_in(each))]


def test_cards_that_serve_several_ranks_are_processes_side_by_side() -> None:
    found = reading.read_shell(exported(CARDS_SHARED, ExportTarget.VLLM).files)
    assert found["r0"].workers == {"b/0", "b/1"}


def test_the_engine_is_the_one_that_the_plan_needs_unless_told() -> None:
    assert launchable(PLANS["one GPU"], MODEL, SETTINGS).engine is Engine.VLLM
    assert launchable(PLANS["attention workers"], MODEL, SETTINGS).engine is Engine.VLLM_HETIS
    with pytest.raises(NotExportableError, match="which vLLM only supports with hetis' plugin"):
        launchable(PLANS["attention workers"], MODEL, replace(SETTINGS, engine=Engine.VLLM))


@pytest.mark.parametrize("target", [ExportTarget.COMPOSE, ExportTarget.KUBERNETES])
def test_text_that_other_readers_of_yaml_take_for_a_number_is_quoted(target: ExportTarget) -> None:
    files = exported(next(iter(PLANS.values())), target, served_name="1e5").files
    assert any("'1e5'" in text for text in files.values())


@pytest.mark.parametrize("target", READERS)
def test_every_target_tells_its_engine_of_kv_once(target: ExportTarget) -> None:
    """The dtype of 16-bit KV is among the engine's options, and passed for each replica as its own."""
    plan = PLANS["one GPU"]
    settings = replace(SETTINGS, engine=next(iter(ENGINES.get(target, ())), None))
    settings = replace(settings, engine_options=("--kv-cache-dtype=bfloat16",))
    for kv_bytes, told in ((2.0, "bfloat16"), (1.0, "fp8")):
        made = export_plan(plan, replace(model_of(plan), kv_bytes=kv_bytes), target, settings)
        [found] = re.findall(r"kv[-_]cache[-_]dtype\W+(\w+)", "".join(made.files.values()))
        assert found.removesuffix("_e4m3") == told
        assert not made.lost
