"""llm-d: values of the modelservice chart for single-pod replicas, LeaderWorkerSets for others, and router weights.

The chart makes all pods of a role from one template, in which stages on several nodes cannot be told apart. Such
replicas, and those with attention workers, are in a kustomization that the same InferencePool selects by its labels.
"""

from __future__ import annotations

from typing import Any

from hetis.engines.kubernetes import FRONT_PORT, MODEL_LABELS, ReplicaObjects, annotations_of, on_node
from hetis.planner.export.kubernetes import (
    check_cluster_options,
    deployment_of,
    mixed_nodes,
    written_for_cluster,
)
from hetis.planner.export.lws import groupable, replica_objects
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.export.routing import shares_of
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import documents, yaml_text
from hetis.solver.plan import Role

_REPLICA_LABEL = "app.kubernetes.io/instance"
_SIDECAR_PORT = 8200  # the engine's port behind the chart's routing proxy
_ROLES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "decode"}


def write_llm_d(launchable: Launchable) -> Written:
    """Return values for `helm`, manifests for `kubectl`, and the router's configuration.

    Raises:
        NotExportableError: no replica can be made of such pods, or options are missing.
    """
    check_cluster_options(launchable)
    launchable, left_out = groupable(launchable)
    values, manifests = dict[str, str](), dict[str, str]()
    for one in launchable.replicas.values():
        if len(one.layout.servers) == 1 and not one.layout.workers:
            values[f"values-{one.name}.yaml"] = yaml_text(values_of(launchable, one))
            manifests[f"{one.name}.yaml"] = documents([_front(launchable, one)])
        else:
            labels = {**MODEL_LABELS, "llm-d.ai/role": _ROLES[one.plan.role]}
            manifests[f"{one.name}.yaml"] = documents(replica_objects(launchable, one, labels))
    written = written_for_cluster(launchable, manifests, "", not_carried=mixed_nodes(launchable), left_out=left_out)
    files = {**values, **written.files}
    files["router/llm-d.yaml"] = yaml_text(picker_config(launchable))
    helm = "\n".join(
        f"helm install {launchable.settings.name}-{path[7:-5]} llm-d-modelservice/llm-d-modelservice --values {path}"
        for path in values
    )
    return Written(
        files=files,
        shown=(*values, *manifests),
        endpoints=written.endpoints,
        start=_HOW.format(helm=helm or "# none"),
        not_carried=written.not_carried,
        left_out=left_out,
    )


def values_of(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return the values of chart llm-d-modelservice 0.4.12 for a replica of one pod."""
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
    # The chart has no field for a pod's security context, only for its containers'.
    user = {name: value for name, value in pod["securityContext"].items() if name != "fsGroup"}
    container["securityContext"] = {**container["securityContext"], **user}
    role, other = ("prefill", "decode") if one.plan.role is Role.PREFILL else ("decode", "prefill")
    model = one.serving.model
    served = settings.served_name or model
    return {
        "fullnameOverride": f"{settings.name}-{one.name}",
        "modelArtifacts": {
            "name": served,
            # The engine gets the location of its model: the chart has nothing to fetch.
            "uri": f"pvc://{settings.model_claim}{model}" if settings.model_claim else f"hf://{served}",
            "labels": {**MODEL_LABELS, _REPLICA_LABEL: f"{settings.name}-{one.name}"},
        },
        "multinode": False,
        "routing": {"servicePort": FRONT_PORT, "proxy": {"enabled": is_decode_of_pair, "connector": "nixlv2"}},
        role: {
            "create": True,
            "replicas": 1,
            "nodeSelector": on_node(process.node),
            "podAnnotations": annotations_of(process),
            # What the chart counts GPUs by.
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


def _front(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return a Service for the pod that the chart makes; the chart itself leaves pods to an InferencePool."""
    name = f"{launchable.settings.name}-{one.name}"
    made = ReplicaObjects(one.layout, one.serving, deployment_of(launchable, one))
    spec = {"ports": [{"name": "http", "port": FRONT_PORT}], "selector": {_REPLICA_LABEL: name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": made.metadata(name), "spec": spec}


def picker_config(launchable: Launchable) -> dict[str, Any]:
    """Return the endpoint picker's configuration: endpoints are drawn with the plan's shares as weights."""
    shares = shares_of(launchable)

    def weights(*roles: Role) -> dict[str, float]:
        return {
            f"{launchable.settings.name}-{one.name}": round(shares[number], 6)
            for number, one in launchable.replicas.items()
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
        plugins += [{"type": "prefill-filter"}, {"type": "decode-filter"}, {"type": "disagg-profile-handler"}]
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


_HOW = """Replicas of one pod, by the chart (0.4.12):

```
{helm}
```

The others, where LeaderWorkerSet is installed, and a Service for each: `kubectl apply -k .`

All pods have the label `llm-d.ai/inference-serving: "true"`, which an InferencePool selects. `router/llm-d.yaml` is the
endpoint picker's configuration with the plan's shares (its weight scorer needs `--allow-experimental-plugins=true`)."""
