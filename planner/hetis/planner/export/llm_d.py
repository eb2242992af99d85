"""llm-d: values of its chart, InferencePools with their route, and configurations of endpoint pickers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hetis.engines.kubernetes import (
    FRONT_PORT,
    MODEL_LABELS,
    annotations_of,
    tolerations_of,
)
from hetis.engines.layout import Process
from hetis.formats.documents import yaml_text
from hetis.planner.export.kubernetes import (
    REPLICA_LABEL,
    check_cluster_options,
    objects_of,
    replica_objects,
    served_model,
    written_for_cluster,
)
from hetis.planner.export.manifests import manifest
from hetis.planner.export.pair_routers import pair_groups
from hetis.planner.export.pairs import pairs_beyond_the_plan
from hetis.planner.export.replicas import (
    Launchable,
    LaunchableReplica,
    NotExportableError,
    Written,
)
from hetis.planner.export.routing import shares_of
from hetis.simulator.routers import MOST_TOKENS, TOKENS_WEIGHT, weight
from hetis.solver.plan import Role

_POOL_LABEL = "hetis/pool"
_LENGTHS_LABEL = "llm-d.ai/context-length-range"  # of the plugin `context-length-aware`
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
    made = objects_of(launchable, one)
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
    return {
        "fullnameOverride": launchable.name_of(one),
        "modelArtifacts": {
            # The engine is passed the location of its model, so the chart has nothing to fetch.
            **served_model(launchable, one),
            "labels": {**labels, REPLICA_LABEL: launchable.name_of(one)},
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
    accelerator: dict[str, Any] = {} if kind == "nvidia" else {"type": kind}
    if process.resource:
        accelerator["resources"] = {kind: process.resource}
    return {"accelerator": accelerator} if accelerator else {}


def _front(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return a Service for the pod that the chart makes; the chart leaves the pods themselves to an InferencePool."""
    name = launchable.name_of(one)
    spec = {"ports": [{"name": "http", "port": FRONT_PORT}], "selector": {REPLICA_LABEL: name}}
    return objects_of(launchable, one).object("v1", "Service", name, spec=spec)


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
    return {
        number: {**MODEL_LABELS, _POOL_LABEL: pool.name, **_lengths_of(launchable, number)}
        for pool in _pools(launchable)
        for number in pool.members
    }


def _lengths_of(launchable: Launchable, number: int) -> dict[str, str]:
    """Return the label with the prompt lengths of a replica's class, both ends included; none if it serves all."""
    least = 0
    for one in launchable.plan.classes:
        most = one.max_prompt_tokens or launchable.model.max_position
        if one.name in launchable.plan.replicas[number].classes:
            return {_LENGTHS_LABEL: f"{least}-{most}"}
        least = most + 1
    return {}


def of_one_pool(launchable: Launchable) -> Launchable:
    """Return the plan. Raises NotExportableError if its classes of requests are in several InferencePools, among which
    a route divides requests whatever their length.
    """
    if launchable.plan.classes and len(_pools(launchable)) > 1:
        why = "its pools for classes of requests are in several InferencePools, among which a route knows no lengths"
        raise NotExportableError((why,))
    return launchable


def _gateway(launchable: Launchable) -> list[dict[str, Any]]:
    """Return the pools, and the route that divides requests among them with the plan's shares."""
    labels, objects, backends = {"app.kubernetes.io/name": "hetis"}, list[dict[str, Any]](), list[dict[str, Any]]()
    group = _POOL_API.partition("/")[0]
    for pool in _pools(launchable):
        spec = {
            "selector": {"matchLabels": {_POOL_LABEL: pool.name}},
            "targetPorts": [{"number": FRONT_PORT}],
            "endpointPickerRef": {"name": f"{pool.name}-epp", "port": {"number": 9002}},
        }
        objects.append(manifest(launchable, _POOL_API, "InferencePool", pool.name, labels=labels, spec=spec))
        backends.append({"group": group, "kind": "InferencePool", "name": pool.name, "weight": weight(pool.share)})
    rule = {"backendRefs": backends, "timeouts": {"request": "0s"}}
    route = {"parentRefs": [{"name": "inference-gateway"}], "rules": [rule]}
    api, name = "gateway.networking.k8s.io/v1", launchable.settings.name
    return [*objects, manifest(launchable, api, "HTTPRoute", name, labels=labels, spec=route)]


def picker_config(launchable: Launchable, members: Iterable[int]) -> dict[str, Any]:
    """Return the configuration of a pool's endpoint picker: it picks the endpoint with the highest score.

    `hetis.simulator.routers.EndpointPicker` describes the scores, with which plans are simulated: those of seats and of
    requests in flight are equal where all endpoints are equally full, and prompt tokens under way keep prompts apart.
    Where prefill and decode are apart, every request takes both: the decider says so, and the headers' handler tells
    the decode replica's sidecar which prefill replica was drawn.
    """
    shares, replicas = shares_of(launchable), {number: launchable.replicas[number] for number in members}

    def weights(*roles: Role) -> dict[str, float]:  # of each pod
        return {
            launchable.name_of(one): (
                round(shares[number] / one.copies, 6) if one.plan.role is Role.PREFILL else one.plan.planned_seats
            )
            for number, one in replicas.items()
            if one.plan.role in roles and shares[number] > 0
        }

    def plugin(kind: str, name: str = "", **parameters: Any) -> dict[str, Any]:
        named = {"name": name} if name else {}
        return {"type": kind, **named, **({"parameters": parameters} if parameters else {})}

    decode, prefill = weights(Role.UNIFIED, Role.DECODE), weights(Role.PREFILL)
    labels = [{"label": REPLICA_LABEL, "attributeKey": "replica"}]
    picker, tokens, active = "max-score-picker", "token-load-scorer", "active-request-scorer"
    plugins = [plugin("label-producer", "replicas", labels=labels)]
    plugins += [plugin("inflight-load-producer"), plugin(picker), plugin(tokens, queueThresholdTokens=MOST_TOKENS)]
    plugins += [plugin(active)] if decode else []
    filters, profiles = list[dict[str, Any]](), list[dict[str, Any]]()
    if launchable.plan.classes:  # it filters before scores, which are shares of the replicas for a request's class
        plugins.append(plugin("context-length-aware", enableFiltering=True))
        filters.append({"pluginRef": "context-length-aware", "weight": 0})
    if prefill:
        decider = "always-disagg-pd-decider"
        plugins += map(plugin, ("disagg-headers-handler", "prefill-filter", "decode-filter", decider))
        plugins.append(plugin("disagg-profile-handler", deciders={"prefill": decider}))
    for side, of_side in (("decode", decode), ("prefill", prefill)):
        if not of_side:
            continue
        scorer, by_replica = f"shares-{side}", {"attributeKey": "replica", "producer": "replicas"}
        plugins.append(plugin("endpoint-attribute-weight-scorer", scorer, **by_replica, weights=of_side))
        own = [{"pluginRef": f"{side}-filter"}] if prefill else []
        chosen = [*own, *filters, {"pluginRef": scorer}]
        chosen += [{"pluginRef": active}] if side == "decode" else []  # it counts at prefill until the answer's end
        chosen += [{"pluginRef": tokens, "weight": TOKENS_WEIGHT}] if side == "prefill" or not prefill else []
        chosen.append({"pluginRef": picker})
        profiles.append({"name": side if prefill else "default", "plugins": chosen})
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
join. `router/POOL.yaml` configures the endpoint picker of a pool, the Service `POOL-epp`, with the plan's seats and the
load of each endpoint (llm-d's chart starts it; the weight scorer needs `--allow-experimental-plugins=true`)."""
