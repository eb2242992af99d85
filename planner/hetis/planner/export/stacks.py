"""Serving stacks on Kubernetes with kinds of objects of their own: KServe and Dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hetis.engines.kubernetes import (
    FRONT_PORT,
    ReplicaObjects,
    annotations_of,
    hf_token_variable,
    impossible_pods,
    literal,
)
from hetis.engines.serving import Meeting, arguments_of, drain_s, is_of_http_server, option_groups
from hetis.engines.versions import Engine
from hetis.formats.documents import yaml_text
from hetis.planner.export.kubernetes import (
    REPLICA_LABEL,
    PodGroup,
    check_cluster_options,
    deployment_of,
    served_model,
    written_for_cluster,
)
from hetis.planner.export.manifests import address, manifest
from hetis.planner.export.pairs import pairs_beyond_the_plan
from hetis.planner.export.replicas import (
    PUSHED,
    Launchable,
    LaunchableReplica,
    Written,
    image_in,
    pairs_of,
)
from hetis.planner.export.routing import shares_of
from hetis.simulator.routers import weight
from hetis.solver.plan import Role

# --- KServe: an LLMInferenceService for each replica or pair of prefill and decode, with its weight in the route


_API = "serving.kserve.io/v1alpha2"
_COMPONENT, _NAME = "app.kubernetes.io/component", "app.kubernetes.io/name"
_WORKER, _PREFILL_WORKER = "llminferenceservice-workload-worker", "llminferenceservice-workload-worker-prefill"
# The preset for decode replicas on one node (kserve-config-llm-decode-template) runs llm-d's sidecar on port 8000. It
# passes requests on to the engine on this port, which is also the one that is probed.
_PORT_BEHIND_SIDECAR = 8001
# A service whose stages form a pipeline over several nodes needs a preset that KServe does not ship.
_PRESETS = {Role.UNIFIED: "worker", Role.DECODE: "decode-worker", Role.PREFILL: "prefill-worker"}


def write_kserve(launchable: Launchable) -> Written:
    """Return a file for each LLMInferenceService."""
    check_cluster_options(launchable)
    pairs = pairs_of(launchable)
    files, presets = dict[str, str](), dict[str, Any]()
    for number, one in launchable.replicas.items():
        if one.plan.role is Role.DECODE:
            continue
        files[f"{one.name}.yaml"] = yaml_text(*_objects(launchable, number, pairs))
        for each in (one, launchable.replicas.get(pairs.get(number, -1))):
            if each is not None and len(each.layout.servers) > 1:
                name = f"kserve-config-llm-{_PRESETS[each.plan.role]}-pipeline-parallel"
                presets[name] = manifest(launchable, _API, "LLMInferenceServiceConfig", name, spec={})
    if presets:
        files["presets.yaml"] = yaml_text(*presets.values())
    fronts = {decode: prefill for prefill, decode in pairs.items()}
    services = {n: launchable.name_of(launchable.replicas[fronts.get(n, n)]) for n in launchable.replicas}
    endpoints = {n: address(launchable, f"{name}-kserve-workload-svc", 8000) for n, name in services.items()}
    return written_for_cluster(launchable, files, _HOW_KSERVE, endpoints=endpoints)


def _objects(launchable: Launchable, number: int, pairs: dict[int, int]) -> list[dict[str, Any]]:
    """Return the service, its attention workers, and the file that configures the plugin."""
    one, settings = launchable.replicas[number], launchable.settings
    name = launchable.name_of(one)
    main = launchable.replicas[pairs[number]] if one.plan.role is Role.PREFILL else one
    spec: dict[str, Any] = {
        "model": served_model(launchable, one),
        # The engine is passed the location of its model.
        "storageInitializer": {"enabled": False},
        "replicas": main.copies,
        **_workload(launchable, main, name, _WORKER),
        "router": {
            "gateway": {},
            "route": {"group": settings.name, "weight": weight(shares_of(launchable)[number])},
            "scheduler": {},
        },
    }
    if one.plan.role is Role.PREFILL:
        spec["prefill"] = {"replicas": 1, **_workload(launchable, one, name, _PREFILL_WORKER)}
    group = PodGroup(launchable, main, container="main")
    workers = [made for process in main.layout.attention_workers for made in group.objects.worker(process)]
    config = [group.objects.config()] if main.layout.workers else []
    whole = group.objects.object(_API, "LLMInferenceService", name, spec=spec)
    whole["metadata"]["labels"][REPLICA_LABEL] = name  # of a pair, the group is that of its decode replica
    return [*config, *workers, whole]


def _workload(launchable: Launchable, one: LaunchableReplica, name: str, component: str) -> dict[str, Any]:
    """Return the parallelism and pods of a replica; annotations that KServe copies to all pods name its GPUs."""
    workers = {_NAME: name, _COMPONENT: component}
    group = PodGroup(launchable, one, container="main", worker_labels=workers)
    leader = group.leader()
    _without_templates(leader["spec"])
    is_behind_sidecar = one.plan.role is Role.DECODE and group.size == 1
    _listen(leader["spec"]["containers"][0], _PORT_BEHIND_SIDECAR if is_behind_sidecar else FRONT_PORT)
    if is_behind_sidecar:  # it watches the pool through the API, with the ServiceAccount that KServe sets
        del leader["spec"]["automountServiceAccountToken"]
    whole: dict[str, Any] = {
        "parallelism": {"tensor": one.layout.tensor_parallel, "pipeline": len(one.layout.servers)},
        "annotations": {"hetis/leader": leader["metadata"]["annotations"]["hetis/devices"]},
        "template": leader["spec"],
    }
    if group.size > 1:
        further = group.workers()
        _without_templates(further["spec"])
        whole["worker"] = further["spec"]
        whole["annotations"]["hetis/workers"] = further["metadata"]["annotations"]["hetis/devices"]
    else:  # KServe assumes that a pipeline spans several nodes
        del whole["parallelism"]["pipeline"]
    if one.layout.data_parallel > 1:
        copies = one.layout.data_parallel
        whole["parallelism"] |= {"data": copies, "dataLocal": copies, "expert": True}
    return whole


def _without_templates(pod: dict[str, Any]) -> None:
    """Escape ``{{`` in commands, such as that of a chat template: KServe executes its specs as templates of Go."""
    for container in pod["containers"]:
        container["command"] = [word.replace("{{", "{{`{{`}}") for word in container["command"]]


def _listen(container: dict[str, Any], port: int) -> None:
    """Set the port that KServe's preset probes."""
    words = container["command"]
    words[words.index("--port") + 1] = str(port)
    [http] = [each for each in container["ports"] if each["name"] == "http"]
    http["containerPort"] = port
    if "scheme" not in container["readinessProbe"]["httpGet"]:  # the preset's has that of KServe's configuration
        del container["livenessProbe"]


_HOW_KSERVE = """\
`kubectl apply -k .` in this folder, where LLMInferenceService is installed. A replica, or a pair of a
prefill and a decode replica, is a service; all are one group of KServe's route, with the plan's shares as weights. For
replicas on several nodes KServe wants presets that it does not ship: `presets.yaml` has them, empty. The decode replica
of a pair listens at port 8001, behind the sidecar that KServe's own preset adds.

Where KServe is configured with `enableLLMInferenceServiceTLS`, its gateway and its probes speak HTTPS to the engines:
export with `-- --ssl-certfile /var/run/kserve/tls/tls.crt --ssl-keyfile /var/run/kserve/tls/tls.key`. Its presets mount
these files, those in `presets.yaml` do not."""


# --- Dynamo: graph deployments with one front end, and a component for each replica


VERSION = "1.6.1"  # version of Dynamo, whose images contain its front end and its workers
_MOST_COMPONENTS = 25  # components in a graph, including the front end
_PROGRAMS = {Engine.VLLM: ("python3", "-m", "dynamo.vllm"), Engine.SGLANG: ("python3", "-m", "dynamo.sglang")}
_TYPES = {Role.UNIFIED: "worker", Role.PREFILL: "prefill", Role.DECODE: "decode"}


def write_dynamo(launchable: Launchable) -> Written:
    """Return DynamoGraphDeployments: a single one for all replicas unless there are too many for one graph."""
    check_cluster_options(launchable, has_own_front=True)
    components = [_component(launchable, one) for one in launchable.replicas.values()]
    most = _MOST_COMPONENTS - 1
    graphs = [components[first : first + most] for first in range(0, len(components), most)]
    files = {f"graph-{i}.yaml": yaml_text(_graph(launchable, i, graph)) for i, graph in enumerate(graphs)}
    shares = "shares of replicas: Dynamo's front end balances by load and does not support weights"
    lost = [shares] if len(launchable.replicas) > 1 else []
    lost += pairs_beyond_the_plan(launchable, "Dynamo's front end")
    if secret := launchable.settings.api_key_secret:
        lost.append(f"--api-key-secret {secret}: clients reach Dynamo's front end, which asks for no key")
    if program := launchable.settings.program:
        lost.append(f"--program {program}: Dynamo starts the engine by a worker of its own")
    _, of_server = _options(launchable)
    lost += [f"{' '.join(words)}: Dynamo's front end replaces the engine's HTTP server" for words in of_server]
    fronts = {
        number: f"{launchable.settings.name}-{place // most}-frontend:8000"
        for place, number in enumerate(launchable.replicas)
    }
    return written_for_cluster(launchable, files, _HOW_DYNAMO, endpoints=fronts, not_carried=lost)


def _options(launchable: Launchable) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the words of the engine's options for Dynamo's workers, and the options that these do not have."""
    groups = option_groups(launchable.settings.engine_options)
    kept = tuple(word for words in groups if not is_of_http_server(words[0]) for word in words)
    return kept, [words for words in groups if is_of_http_server(words[0])]


def why_not_on_dynamo(launchable: Launchable, one: LaunchableReplica) -> Iterator[str]:
    """Yield why a replica cannot be a component of a graph."""
    layout = one.layout
    if launchable.engine not in _PROGRAMS:
        yield "Dynamo's images lack the hetis plugin"
    if launchable.has_roles and len(launchable.replicas) >= _MOST_COMPONENTS:
        yield f"a graph holds {_MOST_COMPONENTS - 1} replicas, and prefill and decode must be in one graph"
    yield from impossible_pods(layout)
    if len(layout.servers) > 1:
        yield f"it is {len(layout.servers)} pods: Dynamo makes those of a component from one template"
    if layout.pushes_kv:
        yield f"{PUSHED}, which Dynamo's workers do not know"
    if layout.vendor != "NVIDIA":
        yield f"it has GPUs of {layout.vendor}: Dynamo's images are for NVIDIA's"


def _graph(launchable: Launchable, number: int, components: list[dict[str, Any]]) -> dict[str, Any]:
    settings = launchable.settings
    container: dict[str, Any] = {
        "name": "main",
        "image": image_of(launchable),
        "command": ["python3", "-m", "dynamo.frontend"],
        "args": ["--http-port", "8000"],
    }
    if token := hf_token_variable(settings.hf_token_secret):  # it loads the model's tokenizer
        container["env"] = token
    template = {"spec": {"containers": [container]}}
    front = {"name": "Frontend", "type": "frontend", "replicas": 1, "podTemplate": template}
    spec = {"backendFramework": launchable.engine.value, "components": [front, *components]}
    name = f"{settings.name}-{number}"
    return manifest(launchable, "nvidia.com/v1beta1", "DynamoGraphDeployment", name, spec=spec)


def image_of(launchable: Launchable) -> str:
    published = f"nvcr.io/nvidia/ai-dynamo/{launchable.engine.value}-runtime:{VERSION}"
    return image_in(launchable.settings.image, "NVIDIA") or published


def _component(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return a component: a Dynamo worker with the engine's options, which registers with the front end."""
    [process] = one.layout.servers
    options, _ = _options(launchable)
    serving = replace(one.serving, program=_PROGRAMS[launchable.engine], options=options)
    words = list(arguments_of(one.layout, literal(serving), 0, Meeting(host="")))
    if launchable.engine is Engine.VLLM and one.plan.role is not Role.UNIFIED:
        words += ["--disaggregation-mode", one.plan.role.value]
    deployment = replace(deployment_of(launchable, one), image=image_of(launchable))
    made = ReplicaObjects(one.layout, one.serving, deployment)
    pod = made.server_pod(0, words)
    [container] = pod["containers"]
    # Dynamo's operator sets ports, probes, permissions and shared memory of pods; it drops other mounts at /dev/shm.
    # Its images have a user of their own.
    kept = {name: container[name] for name in ("env", "resources", "volumeMounts", "image")}
    kept["env"] = [each for each in kept["env"] if each["name"] not in ("HOME", "NUMBA_CACHE_DIR", "USER")]
    kept["volumeMounts"] = [each for each in kept["volumeMounts"] if each["name"] != "shm"]
    main = {"name": "main", "command": words[:3], "args": words[3:], **kept}
    template: dict[str, Any] = {
        "affinity": made.affinity(process),
        "tolerations": pod["tolerations"],
        "enableServiceLinks": pod["enableServiceLinks"],
        "containers": [main],
        "volumes": [each for each in pod["volumes"] if each["name"] != "shm"],
    }
    if drain_s(one.serving.options):  # otherwise the operator's own 60 s
        template["terminationGracePeriodSeconds"] = pod["terminationGracePeriodSeconds"]
    return {
        "name": one.name,
        "type": _TYPES[one.plan.role],
        "replicas": one.copies,
        "podTemplate": {"metadata": {"annotations": annotations_of(process)}, "spec": template},
    }


_HOW_DYNAMO = """\
`kubectl apply -k .` in this folder, where Dynamo's operator is installed (API v1beta1; options are those of
the workers of Dynamo 1.6.1). The replicas of a graph are behind one front, the Service `NAME-0-frontend`, port 8000."""
