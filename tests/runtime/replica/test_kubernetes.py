"""Objects of Kubernetes: who reaches whom, what runs where, and nothing with more rights than it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.replica.asking import Asked, checked_replica_names
from hetis.runtime.replica.kubernetes import MOST_PLAN_BYTES, Deployment, manifests_of
from hetis.runtime.replica.processes import ProcessKind
from hetis.runtime.replica.roles import PromptSite, PromptSites
from hetis.runtime.server.errors import ServeError
from hetis.runtime.stages.options import read_options as stage_options
from hetis.runtime.worker.options import read_options
from tests.command_line import command_of, run_command
from tests.runtime.replica.replicas import PAGE_BYTES, PAGES, asked_for

DEPLOYMENT = Deployment(
    name="chat", image="registry.example/hetis:1", model_path="/models/tiny", model_claim="models", key_secret="key"
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked_for(tmp_path_factory.mktemp("replica"), "--seats", "4", kv_tokens=1000)


def objects(asked: Asked, deployment: Deployment = DEPLOYMENT) -> dict[tuple[str, str], Any]:
    """By kind and name, as `kubectl` would read them."""
    made = manifests_of(asked, deployment, plan_text=asked.plan.read_text(encoding="utf-8"))
    read = list(yaml.safe_load_all(yaml.safe_dump_all(made)))
    assert read == made
    return {(one["kind"], one["metadata"]["name"]): one for one in read}


def pod_of(one: dict[str, Any]) -> Any:
    assert one["spec"]["replicas"] == 1
    template = one["spec"]["template"]
    assert one["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    return template["spec"]


def container_of(one: dict[str, Any]) -> Any:
    (container,) = pod_of(one)["containers"]
    return container


def test_there_is_a_set_for_each_process_and_every_way_between_them(asked: Asked) -> None:
    assert list(objects(asked)) == [
        ("ConfigMap", "chat-plan"),
        ("Service", "chat"),
        ("Service", "chat-store"),
        ("NetworkPolicy", "chat-inside"),
        ("NetworkPolicy", "chat-front"),
        ("StatefulSet", "chat-engine"),
        ("StatefulSet", "chat-worker-0"),
        ("StatefulSet", "chat-worker-1"),
    ]
    for one in objects(asked, replace(DEPLOYMENT, namespace="serving")).values():
        assert one["metadata"]["namespace"] == "serving"


def test_pods_run_on_the_plans_nodes_with_a_gpu_each_or_memory_for_kv(asked: Asked) -> None:
    sets = [one for (kind, _), one in objects(asked).items() if kind == "StatefulSet"]
    hosts = [pod_of(one)["nodeSelector"]["kubernetes.io/hostname"] for one in sets]
    assert hosts == ["a", "b", "b"]
    assert [container_of(one)["resources"] for one in sets] == [{"limits": {"nvidia.com/gpu": 1}}] * 3
    on_cpus = objects(asked, replace(DEPLOYMENT, gpus=False))
    worker = container_of(on_cpus["StatefulSet", "chat-worker-0"])
    assert worker["resources"] == {"requests": {"memory": str(3 * PAGES * PAGE_BYTES)}}


def test_no_pod_has_rights(asked: Asked) -> None:
    for (kind, _), one in objects(asked).items():
        if kind == "StatefulSet":
            pod, container = pod_of(one), container_of(one)
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
            assert not any("hostPath" in volume for volume in pod["volumes"])
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_engine_is_told_of_its_plan_model_and_workers(asked: Asked) -> None:
    found = objects(asked)
    container = container_of(found["StatefulSet", "chat-engine"])
    assert [*container["command"], *container["args"]] == [
        *("hetis-serve", "--model", "/models/tiny", "--plan", "/etc/hetis/plan.json", "--replica", "0"),
        *("--compute", "cuda"),
        *("--store", "0.0.0.0:8500", "--worker", "b/0", "--worker", "b/1"),
        *("--host", "0.0.0.0", "--port", "8000", "--start-timeout", "600", "--kv-tokens", "1000", "--seats", "4"),
    ]
    where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert (where["plan"], where["models"]) == ("/etc/hetis", "/models")
    plan = found["ConfigMap", "chat-plan"]["data"]["plan.json"]
    assert json.loads(plan) == json.loads(asked.plan.read_text(encoding="utf-8"))
    secret = {"secretKeyRef": {"name": "key", "key": "api-key"}}
    assert {"name": "HETIS_API_KEY", "valueFrom": secret} in container["env"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for name, by in (("chat", "http"), ("chat-store", "store")):
        (port,) = found["Service", name]["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (ports[by], by)
    opened = container_of(
        objects(asked, replace(DEPLOYMENT, key_secret="", is_open=True))["StatefulSet", "chat-engine"]
    )
    assert "--insecure" in opened["args"]
    assert "HETIS_API_KEY" not in {variable["name"] for variable in opened["env"]}


def test_a_worker_is_told_by_its_environment(asked: Asked) -> None:
    found = objects(asked)
    for number, process in enumerate(asked.processes[1:]):
        container = container_of(found["StatefulSet", f"chat-worker-{number}"])
        env = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
        assert env["HETIS_WORKER_ADVERTISE"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        options = read_options([], env | {"HETIS_WORKER_ADVERTISE": "10.1.2.3"})
        assert (options.name, options.kv_bytes, options.device) == (process.name, process.kv_bytes, "cuda")
        assert options.store == ("chat-store", 8500)
        assert options.listen[1] == container["ports"][0]["containerPort"]


def test_a_stage_has_the_model_and_as_many_gpus_as_ranks(asked: Asked) -> None:
    stage = replace(asked.processes[1], kind=ProcessKind.STAGE, stage=1, gpus=(0, 1))
    found = objects(replace(asked, processes=(asked.processes[0], stage, asked.processes[2])))
    container = container_of(found["StatefulSet", "chat-stage-1"])
    assert container["command"] == ["python", "-m", "hetis.runtime.stages"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    env = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
    options = stage_options([], env | {"HETIS_STAGE_ADVERTISE": "10.1.2.3"})
    assert (options.name, options.store, options.model) == ("b/0", ("chat-store", 8500), Path("/models/tiny"))
    assert "/models" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "--stage" in container_of(found["StatefulSet", "chat-engine"])["args"]
    worker = container_of(found["StatefulSet", "chat-worker-0"])
    assert [mount["mountPath"] for mount in worker["volumeMounts"]] == ["/tmp"]


def test_services_and_policies_meet_the_pods_they_mean(asked: Asked) -> None:
    found = objects(asked)
    labels = {
        name: found["StatefulSet", name]["spec"]["template"]["metadata"]["labels"]
        for name in ("chat-engine", "chat-worker-0", "chat-worker-1")
    }

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name, own in labels.items() if selector.items() <= own.items()]

    assert selected(found["Service", "chat"]["spec"]["selector"]) == ["chat-engine"]
    store = found["Service", "chat-store"]["spec"]
    assert selected(store["selector"]) == ["chat-engine"]
    assert store["publishNotReadyAddresses"] is True  # the engine is ready when its workers have come
    for name in labels:
        assert selected(found["StatefulSet", name]["spec"]["selector"]["matchLabels"]) == [name]
    inside = found["NetworkPolicy", "chat-inside"]["spec"]
    assert selected(inside["podSelector"]["matchLabels"]) == list(labels)
    (rule,) = inside["ingress"]
    assert [selected(one["podSelector"]["matchLabels"]) for one in rule["from"]] == [list(labels)]
    assert {port["port"] for port in rule["ports"]} == {8500, 8600}
    front = found["NetworkPolicy", "chat-front"]["spec"]
    assert selected(front["podSelector"]["matchLabels"]) == ["chat-engine"]
    assert front["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]


def test_a_plan_too_large_for_a_config_map_is_refused(asked: Asked) -> None:
    with pytest.raises(LayoutError) as caught:
        manifests_of(asked, DEPLOYMENT, plan_text="x" * (MOST_PLAN_BYTES + 1))
    assert caught.value.messages == ("the plan has 1044481 bytes, must be <= 1044480 for a ConfigMap",)


def test_all_that_is_wrong_is_said_at_once() -> None:
    done = run_command(
        command_of("hetis.runtime.replica.main"),
        *("kubernetes", "--name", "A_", "--namespace", "-", "--model-path", "models", "--", "--port", "1"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "hetis-launch: --name is 'A_', must be 1 to 40 small letters, digits and -, a letter first",
        "hetis-launch: --namespace is '-', must be 1 to 63 small letters, digits and -",
        "hetis-launch: --image is missing: an image that has hetis[runtime]",
        "hetis-launch: --model-path is 'models', must be like /models/NAME",
        "hetis-launch: give one of --api-key-secret and --insecure: who may call?",
        "hetis-launch: --model is missing: the folder of a model (config.json, safetensors, tokenizer)",
        "hetis-launch: --plan is missing: a plan of hetis-plan place",
        "hetis-launch: --port stands after --: it is hetis-launch that sets it",
    ]


def test_pods_cannot_share_a_gpu(asked: Asked) -> None:
    processes = tuple(replace(p, sharing=2) if p.name == "b/1" else p for p in asked.processes)
    shared = replace(asked, processes=processes)
    with pytest.raises(LayoutError) as caught:
        objects(shared)
    assert caught.value.messages == ("stages share b/1, and pods cannot share a GPU: use processes or ray",)
    assert objects(shared, replace(DEPLOYMENT, gpus=False))


def test_replicas_with_roles_meet_at_a_service_that_only_engines_reach(asked: Asked) -> None:
    site = PromptSite(replica=0, node="a", is_near=True)
    made = objects(replace(asked, prompts=PromptSites(own=site)))
    engine = container_of(made["StatefulSet", "chat-engine"])
    assert " ".join(engine["args"]).count("--kv-listen 0.0.0.0:8700") == 1
    service = made["Service", "chat-prompts"]["spec"]
    assert (service["ports"][0]["port"], service["ports"][0]["targetPort"]) == (8700, "prompts")
    assert {"name": "prompts", "containerPort": 8700} in engine["ports"]
    (rule,) = made["NetworkPolicy", "chat-prompts"]["spec"]["ingress"]
    assert rule["from"] == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/component": "engine"}}}
    ]
    decoding = replace(asked, prompts=PromptSites(others=(site,)))
    made = objects(decoding, replace(DEPLOYMENT, replica_names={0: "chat-p"}))
    assert "--prefill chat-p-prompts:8700" in " ".join(container_of(made["StatefulSet", "chat-engine"])["args"])
    assert ("Service", "chat-prompts") not in made
    with pytest.raises(ServeError) as caught:
        objects(decoding)
    assert caught.value.messages == ("--replica-name 0=NAME is missing: replica 0 prefills for this one",)
    assert replace(DEPLOYMENT, replica_names={0: "X"}).wrong() == [
        "--replica-name 0=X: the name must be 1 to 40 small letters, digits and -, a letter first"
    ]
    with pytest.raises(ServeError) as caught:
        checked_replica_names(["0=a", "0=b", "x=c", "1="])
    assert caught.value.messages == (
        "--replica-name: 0 comes twice",
        "--replica-name is 'x=c', must be NUMBER=NAME, such as 0=chat-prefill",
        "--replica-name is '1=', must be NUMBER=NAME, such as 0=chat-prefill",
    )
