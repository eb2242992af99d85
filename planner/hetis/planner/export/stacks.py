"""Serving stacks on Kubernetes: llm-d, KServe and Dynamo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hetis.engines.kubernetes import (
    FRONT_PORT,
    MODEL_LABELS,
    ReplicaObjects,
    annotations_of,
    hf_token_variable,
    impossible_pods,
    literal,
    tolerations_of,
)
from hetis.engines.layout import Process
from hetis.engines.serving import Meeting, arguments_of, drain_s, is_of_http_server, option_groups
from hetis.engines.versions import Engine
from hetis.formats.documents import yaml_text
from hetis.planner.export.kubernetes import (
    PodGroup,
    address,
    check_cluster_options,
    deployment_of,
    namespace,
    replica_objects,
    written_for_cluster,
)
from hetis.planner.export.pair_routers import pair_groups
from hetis.planner.export.pairs import pairs_beyond_the_plan
from hetis.planner.export.replicas import (
    PUSHED,
    Launchable,
    LaunchableReplica,
    Written,
    image_in,
    pairs_of,
)
from hetis.planner.export.routing import shares_of, weight
from hetis.solver.plan import Role

# --- llm-d


_REPLICA_LABEL, _POOL_LABEL = "app.kubernetes.io/instance", "hetis/pool"
_POOL_API = "inference.networking.k8s.io/v1"
_CHART = "llm-d-modelservice --repo https://llm-d-incubation.github.io/llm-d-modelservice"
_SIDECAR_PORT = 8200  # the engine's port, behind the routing proxy of the chart
_ROLES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "decode"}


def write_llm_d(launchable: Launchable) -> Written:
    """Return values for `helm`, manifests for `kubectl`, and the configuration of the router."""
    check_cluster_options(launchable)
    values, manifests, in_pools = dict[str, str](), dict[str, str](), _pool_labels(launchable)
    for number, one in launchable.replicas.items():
        if len(one.layout.servers) == 1 and not one.layout.workers:
            values[f"values-{one.name}.yaml"] = yaml_text(values_of(launchable, one, in_pools[number]))
            manifests[f"{one.name}.yaml"] = yaml_text(_front(launchable, one))
        else:
            labels = {**in_pools[number], "llm-d.ai/role": _ROLES[one.plan.role]}
            manifests[f"{one.name}.yaml"] = yaml_text(*replica_objects(launchable, one, labels))
    manifests["gateway.yaml"] = yaml_text(*_gateway(launchable))
    start = _HOW_LLM_D.format(helm=_helm(launchable, values) or "# none")
    lost = (*_behind_sidecar(launchable), *pairs_beyond_the_plan(launchable, "llm-d's endpoint picker", in_groups=True))
    written = written_for_cluster(launchable, manifests, start, not_carried=lost)
    pickers = {
        f"router/{pool.name}.yaml": yaml_text(picker_config(launchable, pool.members)) for pool in _pools(launchable)
    }
    files = {**values, **written.files, **pickers}
    return replace(written, files=files, shown=(*values, *manifests), listed=not launchable.has_roles)


def _behind_sidecar(launchable: Launchable) -> Iterator[str]:
    """Yield a sentence for each prefill or decode replica that serves HTTPS, which llm-d's proxy does not speak."""
    for number, one in launchable.replicas.items():
        if one.plan.role is not Role.UNIFIED and one.serving.has_tls:
            yield f"replica {number}: llm-d's routing proxy asks prefill and decode by HTTP, the engine serves HTTPS"


def _helm(launchable: Launchable, files: Iterable[str]) -> str:
    """Return the commands that install a release for each file of values."""
    namespace = f" --namespace {launchable.settings.namespace}" if launchable.settings.namespace else ""
    return "\n".join(
        f"helm upgrade --install {launchable.settings.name}-{path.removeprefix('values-').removesuffix('.yaml')} "
        f"{_CHART} --version v0.4.12{namespace} --values {path}"
        for path in files
    )


def values_of(launchable: Launchable, one: LaunchableReplica, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the chart llm-d-modelservice 0.4.12 for a replica that is one pod."""
    settings = launchable.settings
    made = ReplicaObjects(one.layout, one.serving, deployment_of(launchable, one))
    is_decode_of_pair = one.plan.role is Role.DECODE
    port = _SIDECAR_PORT if is_decode_of_pair else FRONT_PORT
    arguments = list(made.arguments(0))
    arguments[arguments.index("--port") + 1] = str(port)
    [process] = one.layout.servers
    pod = made.server_pod(0, arguments)
    [container] = pod["containers"]
    container["ports"] = [{"name": "http", "containerPort": port}]
    container |= {"modelCommand": "custom", "command": arguments, "mountModelVolume": False}
    # The pod's security context would also apply to the routing proxy, whose image has a user of its own.
    user = {name: value for name, value in pod["securityContext"].items() if name != "fsGroup"}
    container["securityContext"] = {**container["securityContext"], **user}
    role, other = ("prefill", "decode") if one.plan.role is Role.PREFILL else ("decode", "prefill")
    model = one.serving.model
    served = settings.served_name or model
    return {
        "fullnameOverride": launchable.name_of(one),
        "modelArtifacts": {
            "name": served,
            # The engine is passed the location of its model, so the chart has nothing to fetch.
            "uri": f"pvc://{settings.model_claim}{model}" if settings.model_claim else f"hf://{model}",
            "labels": {**labels, _REPLICA_LABEL: launchable.name_of(one)},
        },
        **_accelerator(process),
        "multinode": False,
        "routing": {"servicePort": FRONT_PORT, "proxy": {"enabled": is_decode_of_pair, "connector": "nixlv2"}},
        role: {
            "create": True,
            "replicas": one.copies,
            "podAnnotations": annotations_of(process),
            "extraConfig": {"affinity": made.affinity(process)},  # merged into the pod
            "tolerations": tolerations_of(process),
            "enableServiceLinks": pod["enableServiceLinks"],
            # A Deployment otherwise waits for GPUs that its former pod still has.
            "strategy": {"type": "Recreate"},
            # The chart counts the GPUs from this.
            "parallelism": {
                "tensor": one.layout.tensor_parallel * len(one.layout.layers) * one.layout.data_parallel,
                "workers": 1,
            },
            "containers": [container],
            "volumes": pod["volumes"],
            "terminationGracePeriodSeconds": pod["terminationGracePeriodSeconds"],
        },
        other: {"create": False, "replicas": 0},
    }


def _accelerator(process: Process) -> dict[str, Any]:
    """Return the chart's field, without which it adds ``nvidia.com/gpu`` to the container's own resources."""
    kind = process.vendor.lower()
    told: dict[str, Any] = {} if kind == "nvidia" else {"type": kind}
    if process.resource:
        told["resources"] = {kind: process.resource}
    return {"accelerator": told} if told else {}


def _front(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return a Service for the pod that the chart makes; the chart leaves the pods themselves to an InferencePool."""
    name = launchable.name_of(one)
    made = ReplicaObjects(one.layout, one.serving, deployment_of(launchable, one))
    spec = {"ports": [{"name": "http", "port": FRONT_PORT}], "selector": {_REPLICA_LABEL: name}}
    return made.object("v1", "Service", name, spec=spec)


class _Pool(NamedTuple):
    """The replicas of an InferencePool, and its share of all requests."""

    name: str
    members: tuple[int, ...]
    share: float


def _pools(launchable: Launchable) -> list[_Pool]:
    """Return a pool for the unified replicas, and one for each group of replicas that the plan's routes join."""
    shares, name, found = shares_of(launchable), launchable.settings.name, list[_Pool]()
    unified = tuple(number for number, one in launchable.replicas.items() if one.plan.role is Role.UNIFIED)
    if unified:
        found.append(_Pool(f"{name}-unified", unified, sum(shares[number] for number in unified)))
    for group in pair_groups(launchable):
        share = sum(shares[number] for number in group.prefill)
        found.append(_Pool(f"{name}-{group.name}", (*group.prefill, *group.decode), share))
    return found


def _pool_labels(launchable: Launchable) -> dict[int, dict[str, str]]:
    """Return the labels by which pools select the pods of each replica."""
    return {number: {**MODEL_LABELS, _POOL_LABEL: pool.name} for pool in _pools(launchable) for number in pool.members}


def _gateway(launchable: Launchable) -> list[dict[str, Any]]:
    """Return the pools, and the route that divides requests among them with the plan's shares."""

    def metadata(name: str) -> dict[str, Any]:
        return {"name": name, **namespace(launchable), "labels": {"app.kubernetes.io/name": "hetis"}}

    pools = _pools(launchable)
    backends = [
        {"group": _POOL_API.partition("/")[0], "kind": "InferencePool", "name": pool.name, "weight": weight(pool.share)}
        for pool in pools
    ]
    rule = {"backendRefs": backends, "timeouts": {"request": "0s"}}
    route = {"parentRefs": [{"name": "inference-gateway"}], "rules": [rule]}
    return [
        *(
            {
                "apiVersion": _POOL_API,
                "kind": "InferencePool",
                "metadata": metadata(pool.name),
                "spec": {
                    "selector": {"matchLabels": {_POOL_LABEL: pool.name}},
                    "targetPorts": [{"number": FRONT_PORT}],
                    "endpointPickerRef": {"name": f"{pool.name}-epp", "port": {"number": 9002}},
                },
            }
            for pool in pools
        ),
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": metadata(launchable.settings.name),
            "spec": route,
        },
    ]


def picker_config(launchable: Launchable, members: Iterable[int]) -> dict[str, Any]:
    """Return the configuration of a pool's endpoint picker: it draws endpoints with the plan's shares as weights.

    Where prefill and decode are apart, every request takes both: the decider says so, and the headers' handler tells
    the decode replica's sidecar which prefill replica was drawn.
    """
    shares, replicas = shares_of(launchable), {number: launchable.replicas[number] for number in members}

    def weights(*roles: Role) -> dict[str, float]:
        return {
            launchable.name_of(one): round(shares[number] / one.copies, 6)  # of each pod
            for number, one in replicas.items()
            if one.plan.role in roles and shares[number] > 0
        }

    sides = {"decode": weights(Role.UNIFIED, Role.DECODE), "prefill": weights(Role.PREFILL)}
    plugins: list[dict[str, Any]] = [
        {
            "type": "label-producer",
            "name": "replicas",
            "parameters": {"labels": [{"label": _REPLICA_LABEL, "attributeKey": "replica"}]},
        },
        {"type": "weighted-random-picker"},
    ]
    profiles = []
    if sides["prefill"]:
        decider = "always-disagg-pd-decider"
        plugins += [{"type": name} for name in ("disagg-headers-handler", "prefill-filter", "decode-filter", decider)]
        plugins.append({"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": decider}}})
    for side, of_side in sides.items():
        if not of_side:
            continue
        scorer = f"shares-{side}"
        parameters = {"attributeKey": "replica", "producer": "replicas", "weights": of_side}
        plugins.append({"type": "endpoint-attribute-weight-scorer", "name": scorer, "parameters": parameters})
        chosen = [{"pluginRef": f"{side}-filter"}] if sides["prefill"] else []
        chosen += [{"pluginRef": scorer}, {"pluginRef": "weighted-random-picker"}]
        profiles.append({"name": side if sides["prefill"] else "default", "plugins": chosen})
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": plugins,
        "schedulingProfiles": profiles,
    }


_HOW_LLM_D = """\
Replicas of one pod, by the chart (0.4.12):

```
{helm}
```

The others, where LeaderWorkerSet is installed, and a Service for each: `kubectl apply -k .`

Requests go to the gateway `inference-gateway`, whose route divides them among the InferencePools of `gateway.yaml` with
the plan's shares: one of the unified replicas, one for each group of prefill and decode replicas that the plan's routes
join. `router/POOL.yaml` configures the endpoint picker of a pool, the Service `POOL-epp`, with the plan's shares in the
pool (llm-d's chart starts it; the weight scorer needs `--allow-experimental-plugins=true`)."""


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
                presets[name] = _preset(launchable, name)
    if presets:
        files["presets.yaml"] = yaml_text(*presets.values())
    fronts = {decode: prefill for prefill, decode in pairs.items()}
    services = {n: launchable.name_of(launchable.replicas[fronts.get(n, n)]) for n in launchable.replicas}
    endpoints = {n: address(launchable, f"{name}-kserve-workload-svc", 8000) for n, name in services.items()}
    return written_for_cluster(launchable, files, _HOW_KSERVE, endpoints=endpoints)


def _objects(launchable: Launchable, number: int, pairs: dict[int, int]) -> list[dict[str, Any]]:
    """Return the service, its attention workers, and the file that configures the plugin."""
    one, settings = launchable.replicas[number], launchable.settings
    name, model = launchable.name_of(one), one.serving.model
    served = settings.served_name or model
    main = launchable.replicas[pairs[number]] if one.plan.role is Role.PREFILL else one
    uri = f"pvc://{settings.model_claim}{model}" if settings.model_claim else f"hf://{model}"
    spec: dict[str, Any] = {
        "model": {"name": served, "uri": uri},
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
    whole["metadata"]["labels"][_REPLICA_LABEL] = name  # of a pair, the group is that of its decode replica
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


def _preset(launchable: Launchable, name: str) -> dict[str, Any]:
    metadata = {"name": name, **namespace(launchable)}
    return {"apiVersion": _API, "kind": "LLMInferenceServiceConfig", "metadata": metadata, "spec": {}}


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
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": f"{settings.name}-{number}", **namespace(launchable)},
        "spec": {"backendFramework": launchable.engine.value, "components": [front, *components]},
    }


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
