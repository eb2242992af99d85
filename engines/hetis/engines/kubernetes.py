"""A replica as Kubernetes objects: a StatefulSet for each process, Services in front, and network policies.

Operators with their own kinds of objects (LeaderWorkerSet and those built on it) get the same pods from
`ReplicaObjects`.

Each process is a StatefulSet with one pod, not a Deployment: a StatefulSet never runs two pods of the same name
concurrently, and two engines of one replica would take its workers from each other. Nothing runs as root or with
privileges; the objects comply with the "restricted" Pod Security Standard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from hetis.engines.cluster import (
    CONFIG_FILE,
    CONFIG_FOLDER,
    HF_TOKEN,
    KEY_FILE,
    LONGEST_OBJECT_NAME,
    OBJECT,
    Deployment,
    secret_and_key,
)
from hetis.engines.commands import (
    ANY,
    KEY_VARIABLE,
    SERVER_STOPS_S,
    WORKER,
    WORKER_PORT,
    config_of,
    worker_settings,
)
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Layout, Process, ProcessKind
from hetis.engines.pods import (
    CACHE,
    DRAIN_S,
    PRE_STOP_S,
    cache_volume,
    front_check,
    health_probe,
    pre_stop,
    probes_of,
    resources_of,
    scraped,
    shared_memory,
)
from hetis.engines.serving import (
    CONFIG_VARIABLE,
    HOST_VARIABLE,
    KV_HOST_VARIABLE,
    KV_PORT,
    KV_PORT_VARIABLE,
    MASTER_PORT,
    Meeting,
    Serving,
    arguments_of,
    drain_s,
    serves_kv_addresses,
    variables_of,
)
from hetis.engines.versions import Engine
from hetis.solver.plan import Role

FRONT_PORT = 8000
_NAME_LABEL, _INSTANCE_LABEL = "app.kubernetes.io/name", "app.kubernetes.io/instance"
PRODUCT_LABEL = "nvidia.com/gpu.product"
PART_LABEL = "app.kubernetes.io/part-of"
MODEL_LABELS = {"llm-d.ai/inference-serving": "true"}
_SGLANG_KEY = "HETIS_API_KEY"
# A Secret mounted as a file is readable to the pod's group, if it has one. A key must not be: pass it in a variable.
_WITH_KEY = f'umask 077 && printf %s "${KEY_VARIABLE}" > {KEY_FILE} && unset {KEY_VARIABLE} && exec "$@"'
USER = 10001  # the same as in our images
RESTRICTED: Mapping[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
_RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu"}  # resource names of the vendors' device plugins
# From a request to stop until a pod is killed: an engine's own seconds, and a margin for what Kubernetes does in them.
# The engine's time-out for running requests is added.
_GRACE_S = round(SERVER_STOPS_S) + PRE_STOP_S + 15
_DRAIN = ("--shutdown-timeout", str(DRAIN_S))


def hf_token_variable(given: str) -> list[dict[str, Any]]:
    """Return the variable with the token for downloads, from ``SECRET`` or ``SECRET:KEY``, or none if it is empty."""
    return secret_variable(HF_TOKEN, *secret_and_key(given))


def secret_variable(variable: str, name: str, key: str) -> list[dict[str, Any]]:
    """Return the variable of a container that has the value of a key in a Secret, or none without a Secret."""
    return [{"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}] if name else []


def on_nodes(*nodes: str) -> dict[str, Any]:
    """Return the affinity to these nodes of the plan, by the name of the Node object, which `cluster discover` takes.

    The label ``kubernetes.io/hostname`` has another value on some clusters. Each node is a term of its own, because a
    requirement on a field has exactly one value; a node has to meet one of the terms.
    """
    terms = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]} for node in nodes]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def resource_of(process: Process) -> str:
    """Return the resource by which a pod requests the GPUs of a process."""
    return process.resource or _RESOURCES[process.vendor]


def tolerations_of(process: Process) -> list[dict[str, str]]:
    """Return the tolerations of the taint by which clusters keep other pods off GPU nodes: the vendor's resource."""
    return [{"key": _RESOURCES[process.vendor], "operator": "Exists", "effect": "NoSchedule"}]


def literal(serving: Serving) -> Serving:
    """Escape ``$`` in what users give, because Kubernetes expands ``$(NAME)`` and reads ``$$`` as ``$`` in commands."""
    return replace(
        serving,
        model=_literal(serving.model),
        served_name=_literal(serving.served_name),
        program=tuple(map(_literal, serving.program)),
        options=tuple(map(_literal, serving.options)),
    )


def _literal(text: str) -> str:
    return text.replace("$", "$$")


def annotations_of(process: Process) -> dict[str, str]:
    """Return the annotations that record a pod's place in the plan."""
    return {"hetis/process": process.name, "hetis/devices": ",".join(f"{process.node}/{gpu}" for gpu in process.gpus)}


def manifests_of(layout: Layout, serving: Serving, deployment: Deployment) -> list[dict[str, Any]]:
    """Return the objects of a replica, in an order in which they can be applied.

    Raises:
        LayoutError: no pods can run the replica (`impossible_pods`).
    """
    if impossible := list(impossible_pods(layout, device=serving.device)):
        raise LayoutError(*impossible)
    objects = ReplicaObjects(layout, serving, deployment)
    return [
        *objects.around(),
        *(made for number in range(len(layout.servers)) for made in objects.server(number)),
        *(made for process in layout.attention_workers for made in objects.worker(process)),
    ]


def impossible_pods(layout: Layout, *, device: str = "cuda") -> Iterator[str]:
    """Yield why no pods can run a replica: no Node object can have a node's name, or worker processes share GPUs."""
    for node in dict.fromkeys(process.node for process in layout.processes):
        if len(node) > LONGEST_OBJECT_NAME:
            yield f"node {node} has a name of {len(node)} characters, Kubernetes allows at most {LONGEST_OBJECT_NAME}"
        elif not OBJECT.fullmatch(node):
            yield f"node {node}: the name of a node in Kubernetes has only lower-case letters, digits, - and ."
    shared = dict.fromkeys(f"{p.node}/{gpu}" for p in layout.attention_workers if p.sharing > 1 for gpu in p.gpus)
    if shared and device == "cuda":
        yield (
            f"several ranks of vLLM have KV on {', '.join(shared)}, each in its own process, and pods cannot "
            "share a GPU: run them with `hetis-launch processes` (`hetis-plan export --to hetis-launch`)"
        )


class ReplicaObjects:
    def __init__(self, layout: Layout, serving: Serving, deployment: Deployment) -> None:
        self._layout, self._of = layout, deployment
        drain = () if layout.engine is Engine.SGLANG or drain_s(serving.options) else _DRAIN
        self._serving = replace(serving, options=(*drain, *serving.options)).at(ANY, FRONT_PORT)
        self.engine = layout.engine.program.lower()
        self._names = {p.name: f"{deployment.name}-{self.engine}-{i}" for i, p in enumerate(layout.servers)}
        self._names |= {p.name: f"{deployment.name}-worker-{i}" for i, p in enumerate(layout.attention_workers)}

    def around(self) -> list[dict[str, Any]]:
        """Return the objects around the pods: the plugin's file, the front end's Service and the network policies."""
        config = [self.config()] if self._layout.workers else []
        exchanges = self._layout.role is not Role.UNIFIED and self._of.kv_partners != ()
        exchange = [self.towards_kv()] if exchanges else []
        return [*config, self.front(), self.inside(), self.towards_front(), *exchange]

    def config(self) -> dict[str, Any]:
        """Return the ConfigMap of the plugin's file, in which workers are addressed by the names of their Services."""
        places = {p.name: (self._names[p.name], WORKER_PORT) for p in self._layout.attention_workers}
        content = config_of(self._layout, places, key_file=KEY_FILE, encrypts=self._serving.encrypts)
        data = {CONFIG_FILE: yaml.safe_dump(content, sort_keys=False)}
        return self.object("v1", "ConfigMap", f"{self._of.name}-workers", data=data)

    def front(self) -> dict[str, Any]:
        """Return the Service for clients, which routes to the engine once it is ready."""
        port = {"name": "http", "port": FRONT_PORT, "targetPort": "http"}
        return self._service(self._of.name, self.front_labels, {"ports": [port]})

    def inside(self) -> dict[str, Any]:
        """Return the policy that lets the replica's pods reach each other on any port: ranks choose their ports."""
        own = {"podSelector": {"matchLabels": self.labels()}}
        return self._policy(f"{self._of.name}-inside", self.labels(), {"from": [own]})

    def towards_front(self) -> dict[str, Any]:
        """Return the policy for the front end, whose port is open to all clients."""
        ports = [{"port": FRONT_PORT, "protocol": "TCP"}]
        return self._policy(f"{self._of.name}-front", self.front_labels, {"ports": ports})

    def towards_kv(self) -> dict[str, Any]:
        """Return the policy that lets replicas fetch each other's KV.

        Every stage must be reachable, since each rank sends the KV of its own layers, and on any port, since NIXL's
        transport chooses the ports. Access is therefore limited to the pods of the partners.
        """
        partners: dict[str, Any] = {"matchLabels": {_NAME_LABEL: "hetis"}}
        if self._of.kv_partners is not None:
            names = {"key": _INSTANCE_LABEL, "operator": "In", "values": list(self._of.kv_partners)}
            partners = {"matchExpressions": [names]}
        return self._policy(f"{self._of.name}-kv", self.labels(), {"from": [{"podSelector": partners}]})

    @property
    def front_labels(self) -> dict[str, str]:
        """The labels of the pod to which clients connect."""
        return self.labels(self.front_name)

    @property
    def front_name(self) -> str:
        """The name of the pod to which clients connect, and of the Service through which further stages reach it."""
        return self._names[self._layout.servers[0].name]

    def server(self, number: int) -> list[dict[str, Any]]:
        process = self._layout.servers[number]
        name = self._names[process.name]
        pod = self.server_pod(number, self.arguments(number))
        if number:
            check = front_check(self.front_name, FRONT_PORT, tls=self._serving.has_tls)
            pod["containers"][0] |= probes_of(check, ready=False)
        return [
            self._own_service(name, {"name": "master", "port": MASTER_PORT}),
            self._set(name, process, pod),
        ]

    def arguments(self, number: int, *, master: str = "") -> tuple[str, ...]:
        """Return the command line of a process. ``master`` is the first one's address; by default, its Service."""
        meeting = Meeting(host=master or self.front_name)
        return arguments_of(self._layout, literal(self._serving), number, meeting)

    def server_pod(self, number: int, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the pod of an engine process, without its node."""
        process, layout = self._layout.servers[number], self._layout
        env: list[dict[str, Any]] = [
            {"name": variable, "value": text} for variable, text in variables_of(layout).items()
        ]
        env += hf_token_variable(self._of.hf_token_secret)
        command = list(arguments)
        if layout.engine is Engine.SGLANG:
            if self._of.api_key_secret and number == 0:
                env += secret_variable(_SGLANG_KEY, self._of.api_key_secret, "api-key")
                command += ["--api-key", f"$({_SGLANG_KEY})"]
        else:
            env += secret_variable("VLLM_API_KEY", self._of.api_key_secret, "api-key")
            own = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
            env.append({"name": HOST_VARIABLE, **own})
            if number == 0 and serves_kv_addresses(layout):
                env += [{"name": KV_HOST_VARIABLE, **own}, {"name": KV_PORT_VARIABLE, "value": str(KV_PORT)}]
        container: dict[str, Any] = {
            "name": self.engine,
            "image": self._of.image,
            "command": command,
            "env": env,
            "ports": [{"name": "master", "containerPort": MASTER_PORT}],
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # used by the ranks of a pod to communicate
        }
        if process.kind is ProcessKind.SERVER:
            container["ports"].append({"name": "http", "containerPort": FRONT_PORT})
            container |= probes_of(health_probe("http", tls=self._serving.has_tls), ready=True)
            container["lifecycle"] = pre_stop()
        volumes = [shared_memory(process)]
        if cache := self._of.model_cache:
            container["volumeMounts"].append({"name": "cache", "mountPath": CACHE})
            env.append({"name": "HF_HOME", "value": CACHE})
            volumes.append(cache_volume(cache))
        if layout.workers:
            container["command"] = ["sh", "-c", _WITH_KEY, "hetis", *command]
            env += secret_variable(KEY_VARIABLE, self._of.worker_key_secret, "worker-key")
            env.append({"name": CONFIG_VARIABLE, "value": f"{CONFIG_FOLDER}/{CONFIG_FILE}"})
            container["volumeMounts"].append({"name": "workers", "mountPath": CONFIG_FOLDER, "readOnly": True})
            volumes.append({"name": "workers", "configMap": {"name": f"{self._of.name}-workers"}})
        if self._of.model_claim:
            parent = str(PurePosixPath(self._serving.model).parent)
            container["volumeMounts"].append({"name": "models", "mountPath": parent, "readOnly": True})
            claim = {"claimName": self._of.model_claim, "readOnly": True}
            volumes.append({"name": "models", "persistentVolumeClaim": claim})
        return self._pod(process, container, volumes)

    def worker(self, process: Process) -> list[dict[str, Any]]:
        name = self._names[process.name]
        settings = worker_settings(process, listen=f"{ANY}:{WORKER_PORT}", device=self._serving.device)
        container = {
            "name": "worker",
            "image": self._of.worker_image,
            "command": [*WORKER, *(word for setting in settings.items() for word in setting)],
            "env": secret_variable(KEY_VARIABLE, self._of.worker_key_secret, "worker-key"),
            "ports": [{"name": "frames", "containerPort": WORKER_PORT}],
            "volumeMounts": [],
        }
        return [
            self._own_service(name, {"name": "frames", "port": WORKER_PORT}),
            self._set(name, process, self._pod(process, container, [])),
        ]

    # --- inside

    def _pod(self, process: Process, container: dict[str, Any], volumes: list[dict[str, Any]]) -> dict[str, Any]:
        is_worker = process.kind is ProcessKind.ATTENTION_WORKER
        container |= {
            "resources": self._resources(process),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                # Hooks of NVIDIA's container toolkit write to the root of a container before it starts.
                "readOnlyRootFilesystem": not self._on_gpus,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        # Compiled and cached files go to a writable directory.
        writable = [{"name": "HOME", "value": "/tmp"}, {"name": "NUMBA_CACHE_DIR", "value": "/tmp/numba"}]
        # torch looks up its user's name when imported, and engines' own images do not know ours.
        container["env"] = [*container["env"], *writable, {"name": "USER", "value": "hetis"}]
        container["volumeMounts"] = [*container["volumeMounts"], {"name": "tmp", "mountPath": "/tmp"}]
        return {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # the variables of a Service named vllm are taken for settings of vLLM
            "terminationGracePeriodSeconds": _GRACE_S + (0 if is_worker else round(drain_s(self._serving.options))),
            "securityContext": {
                **RESTRICTED,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
            },
            **({"tolerations": tolerations_of(process)} if self._on_gpus else {}),
            "containers": [container],
            "volumes": [*volumes, {"name": "tmp", "emptyDir": {}}],
        }

    def affinity(self, process: Process) -> dict[str, Any]:
        """Return where the pods of a process may be."""
        if self._of.product:
            term = {"matchExpressions": [{"key": PRODUCT_LABEL, "operator": "In", "values": [self._of.product]}]}
            return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
        return on_nodes(*(self._of.nodes or (process.node,)))

    def _set(self, name: str, process: Process, pod: dict[str, Any]) -> dict[str, Any]:
        """Return a StatefulSet of one pod, or of the copies of a replica of one."""
        labels = self.labels(name)
        metadata = {"labels": labels, "annotations": self.annotations(process)}
        spec = {
            "replicas": self._of.copies,
            "podManagementPolicy": "Parallel",
            "serviceName": name,
            "selector": {"matchLabels": dict(labels)},
            "template": {"metadata": metadata, "spec": {"affinity": self.affinity(process), **pod}},
        }
        return self.object("apps/v1", "StatefulSet", name, spec=spec)

    def annotations(self, process: Process) -> dict[str, str]:
        """Return the annotations of a process's pod: its place in the plan, and where it serves metrics."""
        serves = process.kind is ProcessKind.SERVER
        return annotations_of(process) | (scraped(FRONT_PORT, tls=self._serving.has_tls) if serves else {})

    @property
    def _on_gpus(self) -> bool:
        return self._serving.device == "cuda"

    def _resources(self, process: Process) -> dict[str, Any]:
        if self._on_gpus:
            is_worker = process.kind is ProcessKind.ATTENTION_WORKER
            at_path = self._serving.model.startswith("/") or bool(self._of.model_cache) or is_worker
            return resources_of(resource_of(process), process, model_bytes=0.0 if at_path else self._of.model_bytes)
        return {"requests": {"memory": str(process.kv_bytes * len(process.gpus))}}

    def _own_service(self, name: str, port: dict[str, Any]) -> dict[str, Any]:
        """Return a pod's Service, which routes to it before it is ready: vLLM serves once all processes connected."""
        spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": [port]}
        return self._service(name, self.labels(name), spec)

    def _service(self, name: str, selected: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
        return self.object("v1", "Service", name, spec=spec | {"selector": selected})

    def _policy(self, name: str, selected: dict[str, str], ingress: dict[str, Any]) -> dict[str, Any]:
        spec = {"podSelector": {"matchLabels": selected}, "policyTypes": ["Ingress"], "ingress": [ingress]}
        return self.object("networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)

    def object(self, api: str, kind: str, name: str, **content: Any) -> dict[str, Any]:
        """Return an object of the replica; ``content`` is what it has besides its metadata."""
        return {"apiVersion": api, "kind": kind, "metadata": self.metadata(name), **content}

    def metadata(self, name: str) -> dict[str, Any]:
        where = {"namespace": self._of.namespace} if self._of.namespace else {}
        return {"name": name, **where, "labels": self.labels()}

    def labels(self, part: str = "") -> dict[str, str]:
        """Return the labels of the replica's objects; with ``part``, those that select one pod."""
        labels = {_NAME_LABEL: "hetis", _INSTANCE_LABEL: self._of.name}
        if self._of.part_of:
            labels[PART_LABEL] = self._of.part_of
        return labels | ({"app.kubernetes.io/component": part} if part else {})
