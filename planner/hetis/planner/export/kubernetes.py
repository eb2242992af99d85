"""Core Kubernetes and LeaderWorkerSet: the pods of a replica on the nodes of the plan."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from hetis.engines.cluster import ClusterSettings, Deployment
from hetis.engines.kubernetes import (
    PART_LABEL,
    ReplicaObjects,
    annotations_of,
    impossible_pods,
    manifests_of,
    on_nodes,
    resource_of,
)
from hetis.engines.layout import Process
from hetis.engines.versions import Engine
from hetis.formats.documents import yaml_text
from hetis.formats.errors import DocumentError, Problem
from hetis.planner.export.fronts import front_objects
from hetis.planner.export.manifests import address, manifest, namespace
from hetis.planner.export.pair_routers import pair_groups, unweighted
from hetis.planner.export.pairs import pairs_beyond_the_plan
from hetis.planner.export.replicas import (
    Launchable,
    LaunchableReplica,
    Written,
    engine_image,
    missing_images,
    worker_image,
)
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role


def why_no_pods(_: Launchable, one: LaunchableReplica) -> Iterator[str]:
    """Yield why a replica cannot be pods."""
    yield from impossible_pods(one.layout)


def write_kubernetes(launchable: Launchable) -> Written:
    """Return a file for each replica, and a kustomization of all of them."""
    check_cluster_options(launchable)
    files = {
        f"{one.name}.yaml": yaml_text(*manifests_of(one.layout, one.serving, deployment_of(launchable, one)))
        for one in launchable.replicas.values()
    }
    direct = {n: objects_of(launchable, one).front_name for n, one in launchable.replicas.items()}
    return _behind_front(launchable, files, _HOW_CORE, direct)


def _behind_front(launchable: Launchable, files: Mapping[str, str], start: str, direct: Mapping[int, str]) -> Written:
    """Return manifests with what stands in front of several replicas; ``direct``: names of their front ends' pods."""
    name, groups = launchable.settings.name, pair_groups(launchable)
    pods = {number: address(launchable, host) for number, host in direct.items()}
    if front := front_objects(launchable, service_endpoints(launchable), pods):
        files = {**files, "router.yaml": yaml_text(*front)}
        start = f"{start} {_HOW_FRONT.format(name=name)}"
    not_carried = (
        *unweighted(launchable),
        *pairs_beyond_the_plan(launchable, "the router of pairs", in_groups=True),
    )
    # A drain of nodes takes one pod of the plan at a time.
    selector = {"matchLabels": {PART_LABEL: name}}
    spec = {"maxUnavailable": 1, "selector": selector}
    budget = manifest(launchable, "policy/v1", "PodDisruptionBudget", f"{name}-replicas", spec=spec)
    files = {**files, "disruptions.yaml": yaml_text(budget)}
    written = written_for_cluster(launchable, files, start, not_carried=not_carried)
    # Prometheus's operator reads this; without it, Prometheus finds pods by their annotations.
    scheme = {"scheme": "https"} if any(one.serving.has_tls for one in launchable.replicas.values()) else {}
    metrics = {"port": "http", "path": "/metrics", **scheme}
    spec = {"selector": selector, "podMetricsEndpoints": [metrics]}
    monitor = manifest(launchable, "monitoring.coreos.com/v1", "PodMonitor", name, spec=spec)
    return replace(
        written,
        files={**written.files, "monitoring/podmonitor.yaml": yaml_text(monitor)},
        routers=tuple(address(launchable, f"{name}-{group.name}") for group in groups),
    )


_HOW_FRONT = """\
Clients use the Service `{name}`, port 8000: nginx, which sends requests to all of them with the plan's shares
(`router.yaml`), by a router of pairs where prefill and decode are apart."""


def deployment_of(launchable: Launchable, one: LaunchableReplica) -> Deployment:
    # Not only the partners in the plan's routes: routers choose the two replicas of a request one after the other.
    partner = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(one.plan.role)
    return Deployment(
        name=launchable.name_of(one),
        image=engine_image(launchable, one),
        worker_image=worker_image(launchable, one),
        kv_partners=() if partner is None else launchable.names_by_role.get(partner, ()),
        part_of=launchable.settings.name,
        copies=one.copies,
        nodes=one.nodes if one.equals else (),
        product=one.product,
        model_bytes=_download_bytes(launchable.model.on(one.plan.stages[0].gpu)),
        **{field.name: getattr(launchable.settings, field.name) for field in fields(ClusterSettings)},
    )


def objects_of(launchable: Launchable, one: LaunchableReplica) -> ReplicaObjects:
    return ReplicaObjects(one.layout, one.serving, deployment_of(launchable, one))


def served_model(launchable: Launchable, one: LaunchableReplica) -> dict[str, str]:
    """Return the name that clients use for a replica's model, and where it is."""
    settings, model = launchable.settings, one.serving.model
    uri = f"pvc://{settings.model_claim}{model}" if settings.model_claim else f"hf://{model}"
    return {"name": settings.served_name or model, "uri": uri}


def _download_bytes(model: ModelSpec) -> float:
    """Return the room that a download of a model takes at most: its layers, and both embeddings in 16 bits."""
    layers = model.num_layers * model.layer_params() * model.weight_bytes
    return 1.2 * (layers + 2 * (2 * model.vocab * model.hidden + model.vision_params))


def check_cluster_options(launchable: Launchable, *, has_own_front: bool = False) -> None:
    """Raise DocumentError with every missing or wrong option for Kubernetes objects.

    ``has_own_front``: the target has images and a front end of its own, so that neither images nor keys must be given.
    """
    one = next(iter(launchable.replicas.values()))
    deployment = replace(deployment_of(launchable, one), image="-", worker_image="-")  # checked for each vendor
    if has_own_front:
        deployment = replace(deployment, insecure=deployment.insecure or not deployment.api_key_secret)
    wrong = deployment.wrong(one.serving.model, has_workers=launchable.has_workers)
    missing = [] if has_own_front else missing_images(launchable)
    if wrong := [*missing, *wrong]:
        raise DocumentError(Problem(file="export", message=message) for message in wrong)


def service_endpoints(launchable: Launchable) -> dict[int, str]:
    """Return where replicas are reached that have Services of their own names, by position in the plan."""
    return {number: address(launchable, launchable.name_of(one)) for number, one in launchable.replicas.items()}


def written_for_cluster(
    launchable: Launchable,
    files: Mapping[str, str],
    start: str,
    *,
    endpoints: Mapping[int, str] | None = None,
    not_carried: Iterable[str] = (),
) -> Written:
    """Return manifests with a kustomization; if no ``endpoints`` are given, replicas have Services of their names."""
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **namespace(launchable)}
    # A pod requests a number of GPUs, and cannot choose among a node's GPU types.
    mixed = launchable.mixed_nodes("which of them a pod gets, the device plugin decides", everywhere=True)
    processes = [process for one in launchable.replicas.values() for process in one.layout.processes]
    usual = dict.fromkeys(resource_of(process) for process in processes if not process.resource)
    return Written(
        files={**files, "kustomization.yaml": yaml_text(kustomization | {"resources": list(files)})},
        shown=tuple(files),
        endpoints=endpoints or service_endpoints(launchable),
        start=f"{start}\n\n{_HOW_REQUESTED.format(resources=' or '.join(usual))}" if usual else start,
        not_carried=(*mixed, *_turns(launchable), *_downloads(launchable), *not_carried),
    )


def _downloads(launchable: Launchable) -> Iterator[str]:
    """Yield a sentence if pods download their models at every start."""
    settings = launchable.settings
    models = dict.fromkeys(one.serving.model for one in launchable.replicas.values())
    if not settings.model_cache and any(not model.startswith("/") for model in models):
        yield f"every pod downloads {', '.join(models)} at each start: give --model-cache CLAIM or /PATH"


def _turns(launchable: Launchable) -> Iterator[str]:
    """Yield a sentence for each pod that requests several shared GPUs: NVIDIA's device plugin counts turns on them."""
    for number, one in launchable.replicas.items():
        for process in one.layout.processes:
            if process.resource.endswith(_SHARED) and (count := len(process.gpus)) > 1:
                pod = f"replica {number}: its pod on {process.node} requests {count} {process.resource}"
                yield f"{pod}, which may be turns on one GPU, or refused (failRequestsGreaterThanOne)"


_SHARED = ".shared"  # what the plugin appends to the names of resources that pods share
_HOW_REQUESTED = """\
Pods request {resources}. Where `kubectl describe node` shows GPUs under another name (`nvidia.com/gpu.shared`, if pods
share them), set `resource` of the node in the cluster file, as `hetis-plan cluster discover` does, and plan again."""


_HOW_CORE = """\
`kubectl apply -k .` in this folder. Each process is a pod on the node of the plan, by its name in `kubectl get nodes`,
or, if it need not be there, on any with such GPUs; the front of a replica is a Service of its name at port 8000. The
namespace, and Secrets and claims that options name, must be there."""


# --- pods from two templates


REPLICA_LABEL = "app.kubernetes.io/instance"
_NODE, _RANK = "HETIS_NODE", "HETIS_RANK"
_LEADER = "$(LWS_LEADER_ADDRESS)"  # which the operator sets
_NODE_LABEL = "kubernetes.io/hostname"  # its value differs between nodes, but is not always their name


class PodGroup:
    """The pod templates of one replica.

    Args:
        container: the operator's name for the engine's container; empty: the container's own name.
        worker_labels: labels that the operator gives only to workers; None: use our own labels.
    """

    def __init__(
        self,
        launchable: Launchable,
        one: LaunchableReplica,
        *,
        container: str = "",
        worker_labels: dict[str, str] | None = None,
    ) -> None:
        self._own_worker_labels = worker_labels
        self.objects = objects_of(launchable, one)
        self._layout, self._container = one.layout, container
        self._further = one.layout.servers[1:]

    @property
    def size(self) -> int:
        return 1 + len(self._further)

    def why_not(self) -> tuple[str, ...]:
        """Return why workers made from one template cannot be distinguished; empty if they can."""
        nodes = [process.node for process in self._further]
        twice = sorted({node for node in nodes if nodes.count(node) > 1})
        return tuple(
            f"several further stages are on {node}: pods of one template are distinguished by their nodes"
            for node in twice
        ) + _unlike_resources(self._further)

    def leader(self, labels: dict[str, str] | None = None) -> dict[str, Any]:
        [first, *_] = self._layout.servers
        pod = self.objects.server_pod(0, self.objects.arguments(0, master=_LEADER))
        return self._template({"affinity": self.objects.affinity(first), **pod}, [first], labels)

    def workers(self, labels: dict[str, str] | None = None) -> dict[str, Any]:
        arguments = list(self.objects.arguments(1, master=_LEADER))
        if len(self._further) == 1:
            pod = self.objects.server_pod(1, arguments)
            return self._template({"affinity": on_nodes(self._further[0].node), **pod}, self._further, labels)
        ranks = " ".join(f"{process.node}) {_RANK}={rank};;" for rank, process in enumerate(self._further, 1))
        arguments[arguments.index("--node-rank") + 1] = _MARK
        line = shlex.join(arguments).replace(_MARK, f'"${_RANK}"')
        stranger = f'*) echo "${_NODE} is not a node of this replica" >&2; exit 2;;'
        script = f'case "${_NODE}" in {ranks} {stranger} esac; exec {line}'
        # Kubernetes expands the leader's address, $(...), before the shell sees the quotes around it.
        pod = self.objects.server_pod(1, ["sh", "-c", script])
        container = pod["containers"][0]
        node = {"name": _NODE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
        container["env"] = [node, *container["env"]]
        return self._template({"affinity": self._apart(), **pod}, self._further, labels)

    def _apart(self) -> dict[str, Any]:
        """Return an affinity to the nodes of the further stages, with at most one of their pods on each."""
        others = {"labelSelector": {"matchLabels": self._worker_labels()}, "topologyKey": _NODE_LABEL}
        return {
            **on_nodes(*(process.node for process in self._further)),
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [others]},
        }

    def _worker_labels(self) -> dict[str, str]:
        return self._own_worker_labels or self.objects.labels("further-stages")

    def _template(
        self, pod: dict[str, Any], processes: list[Process] | tuple[Process, ...], labels: dict[str, str] | None
    ) -> dict[str, Any]:
        if self._container:
            pod["containers"][0]["name"] = self._container
        is_leader = processes[0] is self._layout.servers[0]
        own = self.objects.front_labels if is_leader else self._worker_labels()
        placed = [annotations_of(process) for process in processes]
        said = {name: ",".join(each[name] for each in placed) for name in placed[0]}
        said = self.objects.annotations(processes[0]) | said
        return {"metadata": {"labels": {**own, **(labels or {})}, "annotations": said}, "spec": pod}


def _unlike_resources(processes: Iterable[Process]) -> tuple[str, ...]:
    """Return why pods of one template cannot request the GPUs of all these processes; empty if they can."""
    names = dict.fromkeys(map(resource_of, processes))
    why = f"further stages request {' and '.join(names)}: pods of one template request the same"
    return (why,) if len(names) > 1 else ()


_MARK = "HETIS-RANK-MARK"


# --- LeaderWorkerSet v1 for each replica, and DisaggregatedSet v1 if no replica is unified


_MOST_ROLES = 10  # roles in a DisaggregatedSet


def write_lws(launchable: Launchable) -> Written:
    """Return a file for each replica: a LeaderWorkerSet, its attention workers, and related objects."""
    check_cluster_options(launchable)
    grouped = not any(any(PodGroup(launchable, one).why_not()) for one in launchable.replicas.values())
    split = (
        grouped
        and launchable.has_roles
        and all(one.plan.role is not Role.UNIFIED for one in launchable.replicas.values())
    )
    # SGLang's router needs names of pods, which a DisaggregatedSet makes up.
    if split and launchable.engine is not Engine.SGLANG and 2 <= len(launchable.replicas) <= _MOST_ROLES:
        files = {"replicas.yaml": yaml_text(*_disaggregated(launchable))}
    else:
        files = {
            f"{one.name}.yaml": yaml_text(*replica_objects(launchable, one)) for one in launchable.replicas.values()
        }
    direct = {number: _pod_of(PodGroup(launchable, one)) for number, one in launchable.replicas.items()}
    return _behind_front(launchable, files, _HOW_LWS, direct)


def _pod_of(group: PodGroup) -> str:
    """Return the host name of the pod of a replica's front end."""
    name = group.objects.metadata("")["labels"][REPLICA_LABEL]
    return group.objects.front_name if any(group.why_not()) else f"{name}-pods-0.{name}-pods"


def why_no_group(launchable: Launchable, one: LaunchableReplica) -> Iterator[str]:
    """Yield why the pods of a replica cannot be made from two templates."""
    yield from impossible_pods(one.layout)
    yield from PodGroup(launchable, one).why_not()


def replica_objects(
    launchable: Launchable, one: LaunchableReplica, labels: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return all objects of one replica, in an order in which they can be applied.

    Pods of a group are distinguished by their nodes; where that is impossible, each has a StatefulSet, as in plain
    Kubernetes, whose probes start all of them again when one is lost.
    """
    group = PodGroup(launchable, one)
    if any(group.why_not()):
        objects = manifests_of(one.layout, one.serving, deployment_of(launchable, one))
        front = group.objects.front_name
        [pod] = [each["spec"]["template"] for each in objects if is_set(each) and each["metadata"]["name"] == front]
        pod["metadata"]["labels"] |= labels or {}
        return objects
    workers = [made for process in one.layout.attention_workers for made in group.objects.worker(process)]
    # Its operator makes a headless Service of its name, by which workers find their leader, unless there is one.
    name, spec = f"{launchable.name_of(one)}-pods", _spec(group, labels) | {"replicas": one.copies}
    whole = group.objects.object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", name, spec=spec)
    return [*group.objects.around(), *workers, whole]


def is_set(one: Mapping[str, Any]) -> bool:
    return bool(one["kind"] == "StatefulSet")


def _spec(group: PodGroup, labels: dict[str, str] | None = None) -> dict[str, Any]:
    if group.size > 1:
        templates = {"leaderTemplate": group.leader(labels), "workerTemplate": group.workers()}
    else:  # without a leader template, the leader is made from that of the workers, of which there are none
        templates = {"workerTemplate": group.leader(labels)}
    return {
        "replicas": 1,
        "leaderWorkerTemplate": {
            "size": group.size,
            "restartPolicy": "RecreateGroupOnPodRestart",  # an engine cannot continue without one of its stages
            **templates,
        },
    }


def _disaggregated(launchable: Launchable) -> list[dict[str, Any]]:
    around, roles = list[dict[str, Any]](), list[dict[str, Any]]()
    for one in launchable.replicas.values():
        group = PodGroup(launchable, one)
        around += group.objects.around()
        roles.append({"name": f"{one.plan.role.value}-{one.name}", "spec": _spec(group)})
    name = launchable.settings.name
    labels, spec = {"app.kubernetes.io/name": "hetis", REPLICA_LABEL: name}, {"roles": roles}
    api = "disaggregatedset.x-k8s.io/v1"
    return [*around, manifest(launchable, api, "DisaggregatedSet", name, labels=labels, spec=spec)]


_HOW_LWS = """\
`kubectl apply -k .` in this folder, where LeaderWorkerSet is installed. A replica is a group of pods, one for
each process, that is restarted as a whole; each is on the node of the plan, and takes its rank from it. The front of a
replica is a Service of its name at port 8000."""
