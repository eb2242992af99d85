"""Kubernetes objects: which pods reach which, what runs where, and no more rights than needed."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetis.engines.cluster import Deployment
from hetis.engines.errors import LayoutError
from hetis.engines.kubernetes import manifests_of
from hetis.engines.layout import Layout, layout_of
from hetis.engines.serving import Serving
from hetis.runtime.transport.keys import VARIABLE as KEY_VARIABLE
from hetis.runtime.vllm.settings import load_settings
from hetis.runtime.worker.main import read_options
from hetis.solver.plan import Role
from tests.engines.plans import MODEL, POOL, plan_of, sharing, stage_of
from tests.planner.export.reading import nodes_of

ONE = layout_of(plan_of(stage_of(), pools=(POOL,)), 0, MODEL)
# Two stages, each with a GPU that holds its other heads, so that every rank has its own GPU.
STAGES = layout_of(
    plan_of(
        stage_of(num_layers=3),
        stage_of(first_layer=3, num_layers=1, devices=("c/0",)),
        pools=(replace(POOL, devices=("b/0",)), replace(POOL, stage=1, devices=("b/1",))),
    ),
    0,
    MODEL,
)
SERVING = Serving(model="/models/tiny", options=("--max-model-len", "512"))
DEPLOYMENT = Deployment(
    name="chat",
    image="registry.example/hetis-vllm:1",
    worker_image="registry.example/hetis-worker:1",
    worker_key_secret="worker",
    model_claim="models",
    api_key_secret="key",
)


def objects(
    layout: Layout = ONE, serving: Serving = SERVING, deployment: Deployment = DEPLOYMENT
) -> dict[tuple[str, str], Any]:
    """Return the objects by kind and name, as `kubectl` would read them."""
    made = manifests_of(layout, serving, deployment)
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


def environment_of(one: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container_of(one)["env"]}


def test_there_is_a_set_for_each_process_and_every_way_between_them() -> None:
    pods = ("chat-vllm-0", "chat-worker-0", "chat-worker-1")
    assert list(objects()) == [
        ("ConfigMap", "chat-workers"),
        ("Service", "chat"),
        ("NetworkPolicy", "chat-inside"),
        ("NetworkPolicy", "chat-front"),
        *((kind, pod) for pod in pods for kind in ("Service", "StatefulSet")),
    ]
    for one in objects(deployment=replace(DEPLOYMENT, namespace="serving")).values():
        assert one["metadata"]["namespace"] == "serving"


SIZES = ("cpu", "memory", "ephemeral-storage")


def test_pods_run_on_the_plans_nodes_with_a_gpu_each_or_memory_for_kv() -> None:
    sets = [one for (kind, _), one in objects().items() if kind == "StatefulSet"]
    assert [nodes_of(pod_of(one)) for one in sets] == [["a"], ["b"], ["b"]]
    for one in sets:
        of_pod = container_of(one)["resources"]
        assert of_pod["requests"]["nvidia.com/gpu"] == of_pod["limits"]["nvidia.com/gpu"] == 1
        assert of_pod["requests"].keys() == of_pod["limits"].keys() == {"nvidia.com/gpu", *SIZES}
    worker = objects(serving=replace(SERVING, device="cpu"))["StatefulSet", "chat-worker-0"]
    assert container_of(worker)["resources"] == {"requests": {"memory": str(ONE.attention_workers[0].kv_bytes)}}


@pytest.mark.parametrize("layout", [ONE, STAGES])
def test_no_pod_has_rights(layout: Layout) -> None:
    for (kind, _), one in objects(layout).items():
        if kind == "StatefulSet":
            pod, container = pod_of(one), container_of(one)
            assert pod["automountServiceAccountToken"] is False
            assert pod["enableServiceLinks"] is False, "a Service named vllm would set VLLM_PORT"
            assert environment_of(one)["USER"], "torch fails when imported by a user without a name"
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": False,  # GPU hooks write to it
                "capabilities": {"drop": ["ALL"]},
            }
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
            assert not any("hostPath" in volume for volume in pod["volumes"])
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_is_probed_drained_and_scraped() -> None:
    first, second = (objects(STAGES)["StatefulSet", f"chat-vllm-{i}"] for i in range(2))
    container = container_of(first)
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[name]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 3600
    assert container["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "10"]}}}
    assert pod_of(first)["terminationGracePeriodSeconds"] > 120 + 10
    [shm] = [volume for volume in pod_of(first)["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == f"{4 * len(STAGES.servers[0].gpus)}Gi"
    scraped = first["spec"]["template"]["metadata"]["annotations"]
    assert (scraped["prometheus.io/port"], scraped["prometheus.io/path"]) == ("8000", "/metrics")
    further = container_of(second)
    assert "readinessProbe" not in further
    for name in ("startupProbe", "livenessProbe"):  # it is started again when the front end of its engine fails
        assert "http://chat-vllm-0:8000/health" in further[name]["exec"]["command"][-1]


@pytest.mark.parametrize(
    ("given", "volume"),
    [
        ("cache", {"persistentVolumeClaim": {"claimName": "cache"}}),
        ("/var/cache/hf", {"hostPath": {"path": "/var/cache/hf", "type": "DirectoryOrCreate"}}),
    ],
)
def test_downloaded_models_are_kept_where_told(given: str, volume: dict[str, Any]) -> None:
    one = objects(deployment=replace(DEPLOYMENT, model_cache=given))["StatefulSet", "chat-vllm-0"]
    assert {"name": "cache", **volume} in pod_of(one)["volumes"]
    assert {"name": "cache", "mountPath": "/cache"} in container_of(one)["volumeMounts"]
    assert environment_of(one)["HF_HOME"] == "/cache"


def test_vllm_is_told_of_its_model_key_and_workers() -> None:
    found = objects()
    one = found["StatefulSet", "chat-vllm-0"]
    container, environment = container_of(one), environment_of(one)
    assert container["image"] == DEPLOYMENT.image
    words = container["command"]
    assert words[words.index("vllm") :][:3] == ["vllm", "serve", "/models/tiny"]
    assert words[-8:-2] == ["--host", "0.0.0.0", "--port", "8000", "--shutdown-timeout", "120"]
    assert words[-2:] == ["--max-model-len", "512"]
    where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert (where["workers"], where["models"], where["shm"]) == ("/etc/hetis", "/models", "/dev/shm")
    assert environment["HETIS_VLLM_CONFIG"] == "/etc/hetis/workers.yaml"
    assert environment["VLLM_API_KEY"] == {"secretKeyRef": {"name": "key", "key": "api-key"}}
    assert environment["HETIS_WORKER_KEY"] == {"secretKeyRef": {"name": "worker", "key": "worker-key"}}
    assert "HF_TOKEN" not in environment
    token = objects(deployment=replace(DEPLOYMENT, hf_token_secret="hub:token"))["StatefulSet", "chat-vllm-0"]
    assert environment_of(token)["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (port,) = found["Service", "chat"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (ports["http"], "http")
    opened = objects(deployment=replace(DEPLOYMENT, api_key_secret="", insecure=True))["StatefulSet", "chat-vllm-0"]
    assert "VLLM_API_KEY" not in environment_of(opened)


def test_the_key_is_a_file_that_only_its_user_may_read_and_no_variable_of_vllm(tmp_path: Path) -> None:
    words = container_of(objects()["StatefulSet", "chat-vllm-0"])["command"]
    assert words[:2] == ["sh", "-c"]
    key = tmp_path / "key"
    script = words[2].replace("/tmp/hetis-worker.key", str(key))
    show = [*words[:2], script, words[3], "sh", "-c", f'stat -c %a {key}; cat {key}; echo "${{HETIS_WORKER_KEY-none}}"']
    done = subprocess.run(
        show, env={"PATH": "/usr/bin:/bin", "HETIS_WORKER_KEY": "a % key"}, text=True, capture_output=True, check=True
    )
    assert done.stdout == "600\na % keynone\n"


def test_the_plugin_reaches_every_worker_by_its_service(tmp_path: Path) -> None:
    found = objects(STAGES)
    (tmp_path / "workers.yaml").write_text(found["ConfigMap", "chat-workers"]["data"]["workers.yaml"], encoding="utf-8")
    [worker] = load_settings(tmp_path / "workers.yaml").workers
    assert worker.addresses == ("chat-worker-0:7070", "chat-worker-1:7070")
    for address, process in zip(worker.addresses, STAGES.attention_workers, strict=True):
        name = address.partition(":")[0]
        service, one = found["Service", name]["spec"], found["StatefulSet", name]
        assert service["selector"] == one["spec"]["selector"]["matchLabels"]
        assert service["publishNotReadyAddresses"] is True, "vLLM serves only once it has met its workers"
        assert KEY_VARIABLE in environment_of(one)
        options = read_options(container_of(one)["command"][1:], {KEY_VARIABLE: "sixteen letters or more"})
        assert (options.name, options.kv_bytes, options.device) == (process.name, process.kv_bytes, "cuda")
        assert options.listen == ("0.0.0.0", service["ports"][0]["port"])
        assert container_of(one)["image"] == DEPLOYMENT.worker_image


def test_stages_meet_at_the_service_of_the_first() -> None:
    found = objects(STAGES)
    for number in (0, 1):
        one = found["StatefulSet", f"chat-vllm-{number}"]
        words = container_of(one)["command"]
        place = words.index("--nnodes")
        master = ["--master-addr", "chat-vllm-0", "--master-port", "29501"]
        assert words[place : place + 8] == ["--nnodes", "2", "--node-rank", str(number), *master]
        assert environment_of(one)["VLLM_PP_LAYER_PARTITION"] == "3,1"
        assert environment_of(one)["VLLM_HOST_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert ("readinessProbe" in container_of(one)) == (number == 0)
        service = found["Service", f"chat-vllm-{number}"]["spec"]
        assert (service["clusterIP"], service["ports"][0]["port"]) == ("None", 29501)
    assert found["Service", "chat"]["spec"]["selector"] == found["Service", "chat-vllm-0"]["spec"]["selector"]


def test_only_the_replicas_own_pods_reach_workers_and_everybody_the_front() -> None:
    found = objects()
    inside, front = (found["NetworkPolicy", f"chat-{name}"]["spec"] for name in ("inside", "front"))
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"]
        for (kind, name), one in found.items()
        if kind == "StatefulSet"
    }

    def selected(wanted: dict[str, str]) -> list[str]:
        return [name for name, own in labels.items() if wanted.items() <= own.items()]

    assert selected(inside["podSelector"]["matchLabels"]) == list(labels)
    (rule,) = inside["ingress"]
    assert selected(rule["from"][0]["podSelector"]["matchLabels"]) == list(labels)
    assert selected(front["podSelector"]["matchLabels"]) == ["chat-vllm-0"]
    assert front["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]


def test_replicas_of_hetis_exchange_kv_where_partners_are_not_named() -> None:
    prefill = layout_of(
        plan_of(stage_of(kv_head_groups_kept=8), role=Role.PREFILL, micro_batch=0, tpot_s=0.0), 0, MODEL
    )
    found = objects(prefill)
    policy, pod = found["NetworkPolicy", "chat-kv"]["spec"], found["StatefulSet", "chat-vllm-0"]["spec"]["template"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "hetis"}}}]}]
    assert found["NetworkPolicy", "chat-front"]["spec"]["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]


def test_a_replica_without_workers_has_no_plugin() -> None:
    found = objects(layout_of(plan_of(stage_of(kv_head_groups_kept=8)), 0, MODEL))
    assert ("ConfigMap", "chat-workers") not in found
    one = found["StatefulSet", "chat-vllm-0"]
    assert container_of(one)["command"][:2] == ["vllm", "serve"]
    assert not {"HETIS_VLLM_CONFIG", "HETIS_WORKER_KEY"} & set(environment_of(one))


def test_pods_cannot_share_a_gpu() -> None:
    layout = layout_of(sharing(), 0, MODEL)
    with pytest.raises(LayoutError) as caught:
        objects(layout)
    assert caught.value.messages == (
        "several ranks of vLLM have KV on b/0, b/1, each in its own process, and pods cannot share a GPU: run them "
        "with `hetis-launch processes` (`hetis-plan export --to hetis-launch`)",
    )
    assert objects(layout, replace(SERVING, device="cpu"))


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = Deployment(name="A_", namespace="-", model_claim="m", image="", worker_image="")
    assert wrong.wrong("models", has_workers=True) == [
        "--name is 'A_', must be 1 to 40 lower-case letters, digits and -, starting with a letter",
        "--namespace is '-', must be 1 to 63 lower-case letters, digits and -",
        "--image is missing: vLLM with the plugin, as docker/vllm.Dockerfile makes it",
        "--worker-image is missing: as docker/worker.Dockerfile makes it",
        "--worker-key-secret is missing: the key of vLLM and its workers",
        "--model is 'models', must be like /models/NAME",
        "give --api-key-secret, or --insecure to serve without a key",
    ]
