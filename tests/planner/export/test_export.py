"""An export carries everything of a plan that its target supports, and reports the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import yaml

from hetis.engines.versions import Engine
from hetis.planner.export import ExportTarget
from hetis.planner.export.ray_serve import engine_arguments
from hetis.planner.export.replicas import NotExportableError, launchable
from hetis.planner.export.targets import ENGINES, not_carried_by_target
from hetis.planner.use_cases.record.forms import KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes
from tests.engines.plans import MODEL
from tests.planner.export import reading
from tests.planner.export.exporting import IN_CLUSTERS, READERS, SETTINGS, containers_in, exported, of_classes, pods_in
from tests.planner.export.plans import (
    PLANS,
    STAGE_COPIES,
    THREE,
    WITH_WORKERS,
    apart,
    made_of,
    model_of,
    on,
    replica,
)

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


def test_litellm_sends_each_class_to_a_port_of_nginx_that_divides_it() -> None:
    files = exported(of_classes(), ExportTarget.VLLM).files
    lists = yaml.safe_load(files["router/litellm.yaml"])
    found = [(one["model_name"], one["litellm_params"]["api_base"], one["model_info"]) for one in lists["model_list"]]
    (first, short, short_info), (other, long, long_info) = found
    assert lists["router_settings"]["context_window_fallbacks"] == [{first: [other]}]
    assert lists["router_settings"]["enable_pre_call_checks"] is True
    assert (short_info["max_input_tokens"], long_info["max_input_tokens"]) == (
        2_000,
        model_of(of_classes()).max_position,
    )
    conf = files["router/nginx.conf"]
    for number, (at, weights) in enumerate(((short, [714, 286]), (long, [286, 714]))):
        # 4/s of short requests are those of 5/s in all, 1/s of long ones those of 5/s; 2/s are of all.
        assert f"listen {at.removeprefix('http://').removesuffix('/v1')};\n    location / {{\n" in conf
        upstream = conf.partition(f"upstream hetis-{number} {{")[2].partition("}")[0]
        assert [int(one) for one in re.findall(r"weight=(\d+) max_conns", upstream)] == weights
    assert "listen 8080" not in conf
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
    kept = (KeptWithClasses(traffic="as planned", without_rps=5.5, with_rps=6.75),)
    told = f"does not know the lengths of prompts(?s:.)*--classes none --for {target} .* keeps 5.5 .* them 6.75"
    with pytest.raises(NotExportableError, match=told):
        exported(Classes(cut="p90", kept=kept).on(of_classes()), target)
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


def test_a_plan_without_replicas_is_refused_with_the_reason() -> None:
    with pytest.raises(NotExportableError, match=r"^the plan has no replicas$"):
        exported(replace(PLANS["one GPU"], replicas=()), ExportTarget.VLLM)


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


def test_the_engine_is_the_one_that_the_plan_needs_unless_told() -> None:
    assert launchable(PLANS["one GPU"], MODEL, SETTINGS).engine is Engine.VLLM
    assert launchable(PLANS["attention workers"], MODEL, SETTINGS).engine is Engine.VLLM_HETIS
    with pytest.raises(NotExportableError, match="which vLLM only supports with hetis' plugin"):
        launchable(PLANS["attention workers"], MODEL, replace(SETTINGS, engine=Engine.VLLM))
