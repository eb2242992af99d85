"""A replica as objects of Kubernetes: a StatefulSet for each process, Services in front, and who may talk to whom.

A StatefulSet of one, not a Deployment: it never runs two pods of a name at a time, and two engines of one replica would
take its workers from each other. Nothing runs as root or with privileges; the objects fit the Pod Security Standard
"restricted".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.replica.asking import Asked
from hetis.runtime.replica.commands import (
    ANY,
    KV_PORT,
    PROGRAMS,
    STORE_PORT,
    EngineArguments,
    engine_arguments,
    settings_of,
)
from hetis.runtime.replica.processes import PlannedProcess, ProcessKind
from hetis.runtime.server.errors import ServeError
from hetis.runtime.stages.options import VARIABLES as STAGE_VARIABLES
from hetis.runtime.worker.options import VARIABLES as WORKER_VARIABLES

FRONT_PORT, PART_PORT = 8000, 8600
MOST_PLAN_BYTES = 2**20 - 2**12  # of a ConfigMap, less what the object around the plan takes
_PLAN_FOLDER, _PLAN_FILE = "/etc/hetis", "plan.json"
_START_S = 600  # for images to come and workers to start
_USER = 10001  # as in our images
_GRACE_S = 45  # the engine drains for 30
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SET_HERE = ("--host", "--port", "--insecure", "--api-key-file", "--start-timeout")  # options of hetis-serve
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # a pod's name, which is longer, must fit into 63 characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the cluster must be told beside the plan.

    Attributes:
        name: of the replica; names of objects begin with it.
        image: that has `hetis[runtime]`.
        model_path: folder of the model in the engine's pod.
        model_claim: a PersistentVolumeClaim with the models, mounted read-only at the parent of ``model_path``; empty:
            the image has the model.
        key_secret: a Secret whose ``api-key`` clients must say.
        is_open: no key is needed; either this or a secret.
        gpus: pods get a GPU each; else they compute on CPUs.
        replica_names: of replicas that compute prompts for this one, the ``name`` of their deployment by their number.
    """

    name: str
    image: str
    model_path: str
    model_claim: str = ""
    key_secret: str = ""
    is_open: bool = False
    namespace: str = ""
    gpus: bool = True
    replica_names: Mapping[int, str] = field(default_factory=dict)

    def wrong(self) -> list[str]:
        """What is wrong with it, in terms of the options."""
        wrong = []
        if not _NAME.fullmatch(self.name):
            wrong.append(f"--name is {self.name!r}, must be 1 to 40 small letters, digits and -, a letter first")
        wrong += [
            f"--replica-name {number}={name}: the name must be 1 to 40 small letters, digits and -, a letter first"
            for number, name in self.replica_names.items()
            if not _NAME.fullmatch(name)
        ]
        if self.namespace and not _NAMESPACE.fullmatch(self.namespace):
            wrong.append(f"--namespace is {self.namespace!r}, must be 1 to 63 small letters, digits and -")
        if not self.image:
            wrong.append("--image is missing: an image that has hetis[runtime]")
        if not PurePosixPath(self.model_path).is_absolute() or len(PurePosixPath(self.model_path).parts) < 3:
            wrong.append(f"--model-path is {self.model_path!r}, must be like /models/NAME")
        if bool(self.key_secret) == self.is_open:
            wrong.append("give one of --api-key-secret and --insecure: who may call?")
        return wrong


def manifests_of(asked: Asked, deployment: Deployment, *, plan_text: str) -> list[dict[str, Any]]:
    """The objects of a replica, in an order in which they can be applied; ``plan_text`` is the plan's file.

    Raises:
        LayoutError: the plan is too large for a ConfigMap, or its stages share cards, which pods cannot.
        ServeError: a replica that computes prompts for this one has no name.
    """
    unnamed = [site.replica for site in asked.prompts.others if site.replica not in deployment.replica_names]
    if unnamed:
        raise ServeError(*(f"--replica-name {n}=NAME is missing: replica {n} prefills for this one" for n in unnamed))
    shared = list(dict.fromkeys(f"{p.node}/{gpu}" for p in asked.processes if p.sharing > 1 for gpu in p.gpus))
    if shared and deployment.gpus:
        raise LayoutError(f"stages share {', '.join(shared)}, and pods cannot share a GPU: use processes or ray")
    size = len(plan_text.encode())
    if size > MOST_PLAN_BYTES:
        raise LayoutError(f"the plan has {size} bytes, must be <= {MOST_PLAN_BYTES} for a ConfigMap")
    objects = _Objects(deployment)
    told = EngineArguments(
        plan=f"{_PLAN_FOLDER}/{_PLAN_FILE}",
        replica=asked.replica,
        model=deployment.model_path,
        options=(
            *("--host", ANY, "--port", str(FRONT_PORT), "--start-timeout", str(_START_S)),
            *(("--insecure",) if deployment.is_open else ()),
            *(("--kv-listen", f"{ANY}:{KV_PORT}") if asked.prompts.own else ()),
            *(
                text
                for site in asked.prompts.others
                for text in ("--prefill", f"{deployment.replica_names[site.replica]}-prompts:{KV_PORT}")
            ),
            *asked.own_options,
            *asked.serve_options,
        ),
    )
    return [
        objects.plan(plan_text),
        objects.front(),
        objects.store(),
        objects.inside(),
        objects.towards_front(),
        *(objects.prompts() if asked.prompts.own else ()),
        objects.engine(told, asked.processes),
        *(objects.part(name, process) for name, process in _names(asked.processes).items()),
    ]


def _names(processes: Sequence[PlannedProcess]) -> dict[str, PlannedProcess]:
    """The processes beside the engine: stages by their number, workers counted."""
    stages = {f"stage-{p.stage}": p for p in processes if p.kind is ProcessKind.STAGE}
    workers = [process for process in processes if process.kind is ProcessKind.ATTENTION_WORKER]
    return stages | {f"worker-{number}": worker for number, worker in enumerate(workers)}


class _Objects:
    """Makes the objects of one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._of = deployment
        self._engine, self._store = f"{deployment.name}-engine", f"{deployment.name}-store"

    def plan(self, text: str) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self._metadata(f"{self._of.name}-plan"),
            "data": {_PLAN_FILE: text},
        }

    def front(self) -> dict[str, Any]:
        """Where clients go: the engine, once it serves."""
        port = {"name": "http", "port": FRONT_PORT, "targetPort": "http"}
        return self._service(self._of.name, {"ports": [port]})

    def store(self) -> dict[str, Any]:
        """Where workers go: the engine from its first second, since it serves only when they have come."""
        port = {"name": "store", "port": STORE_PORT, "targetPort": "store"}
        return self._service(self._store, {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": [port]})

    def inside(self) -> dict[str, Any]:
        """Whoever reaches the store can pose as a worker: only the replica's own pods do."""
        own = {"podSelector": {"matchLabels": self._labels()}}
        ports = [{"port": port, "protocol": "TCP"} for port in (STORE_PORT, PART_PORT)]
        return self._policy(f"{self._of.name}-inside", self._labels(), {"from": [own], "ports": ports})

    def towards_front(self) -> dict[str, Any]:
        ports = [{"port": FRONT_PORT, "protocol": "TCP"}]
        return self._policy(f"{self._of.name}-front", self._labels("engine"), {"ports": ports})

    def prompts(self) -> Sequence[dict[str, Any]]:
        """Where engines of decode replicas go, and nobody else."""
        port = {"name": "prompts", "port": KV_PORT, "targetPort": "prompts"}
        name = f"{self._of.name}-prompts"
        others = {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/component": "engine"}
        allowed = {"from": [{"podSelector": {"matchLabels": others}}], "ports": [{"port": KV_PORT, "protocol": "TCP"}]}
        return self._service(name, {"ports": [port]}), self._policy(name, self._labels("engine"), allowed)

    def engine(self, told: EngineArguments, processes: Sequence[PlannedProcess]) -> dict[str, Any]:
        mounts = [{"name": "plan", "mountPath": _PLAN_FOLDER, "readOnly": True}]
        volumes: list[dict[str, Any]] = [{"name": "plan", "configMap": {"name": f"{self._of.name}-plan"}}]
        container = {
            "name": "engine",
            "command": list(PROGRAMS[ProcessKind.ENGINE]),
            "args": list(engine_arguments(told, processes, f"{ANY}:{STORE_PORT}", device=self._device)),
            "env": self._key(),
            "ports": [
                {"name": name, "containerPort": port}
                for name, port in (("http", FRONT_PORT), ("store", STORE_PORT), ("prompts", KV_PORT))
            ],
            "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
            "volumeMounts": mounts,
        }
        return self._set(self._engine, "engine", processes[0], container, volumes)

    def part(self, name: str, process: PlannedProcess) -> dict[str, Any]:
        """A stage or a worker."""
        variables = STAGE_VARIABLES if process.kind is ProcessKind.STAGE else WORKER_VARIABLES
        told = settings_of(
            process,
            f"{self._store}:{STORE_PORT}",
            device=self._device,
            model=self._of.model_path,
        )
        told |= {"--listen": f"{ANY}:{PART_PORT}"}
        env: list[dict[str, Any]] = [{"name": variables[option], "value": text} for option, text in told.items()]
        env.append({"name": variables["--advertise"], "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
        container = {
            "name": process.kind.value,
            "command": list(PROGRAMS[process.kind]),
            "env": env,
            "ports": [{"name": "frames", "containerPort": PART_PORT}],
            "volumeMounts": [],
        }
        return self._set(f"{self._of.name}-{name}", process.kind.value, process, container, [])

    # --- inside

    def _set(
        self,
        name: str,
        part: str,
        process: PlannedProcess,
        container: dict[str, Any],
        volumes: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """One pod on the node of the plan, that of the label every kubelet sets."""
        labels = self._labels(part) | ({"hetis/process": name} if part != "engine" else {})
        container |= {
            "image": self._of.image,
            "resources": self._resources(process),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        # What is compiled or cached goes where a file may be written.
        writable = [{"name": "HOME", "value": "/tmp"}, {"name": "NUMBA_CACHE_DIR", "value": "/tmp/numba"}]
        container["env"] = [*container["env"], *writable]
        container["volumeMounts"] = [*container["volumeMounts"], {"name": "tmp", "mountPath": "/tmp"}]
        if self._of.model_claim and process.kind is not ProcessKind.ATTENTION_WORKER:
            parent = str(PurePosixPath(self._of.model_path).parent)
            container["volumeMounts"].append({"name": "models", "mountPath": parent, "readOnly": True})
            claim = {"claimName": self._of.model_claim, "readOnly": True}
            volumes = [*volumes, {"name": "models", "persistentVolumeClaim": claim}]
        pod = {
            "nodeSelector": {"kubernetes.io/hostname": process.node},
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": _GRACE_S,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [*volumes, {"name": "tmp", "emptyDir": {}}],
        }
        metadata = {"labels": labels, "annotations": {"hetis/device": process.name}}
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": self._metadata(name),
            "spec": {
                "replicas": 1,
                "serviceName": self._store,
                "selector": {"matchLabels": dict(labels)},
                "template": {"metadata": metadata, "spec": pod},
            },
        }

    @property
    def _device(self) -> str:
        return "cuda" if self._of.gpus else "cpu"

    def _resources(self, process: PlannedProcess) -> dict[str, Any]:
        if self._of.gpus:
            return {"limits": {"nvidia.com/gpu": len(process.gpus)}}
        return {"requests": {"memory": str(process.kv_bytes)}}

    def _key(self) -> list[dict[str, Any]]:
        if not self._of.key_secret:
            return []
        source = {"secretKeyRef": {"name": self._of.key_secret, "key": "api-key"}}
        return [{"name": "HETIS_API_KEY", "valueFrom": source}]

    def _service(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        selected = spec | {"selector": self._labels("engine")}
        return {"apiVersion": "v1", "kind": "Service", "metadata": self._metadata(name), "spec": selected}

    def _policy(self, name: str, selected: dict[str, str], ingress: dict[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": self._metadata(name),
            "spec": {"podSelector": {"matchLabels": selected}, "policyTypes": ["Ingress"], "ingress": [ingress]},
        }

    def _metadata(self, name: str) -> dict[str, Any]:
        where = {"namespace": self._of.namespace} if self._of.namespace else {}
        return {"name": name, **where, "labels": self._labels()}

    def _labels(self, part: str = "") -> dict[str, str]:
        labels = {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/instance": self._of.name}
        return labels | ({"app.kubernetes.io/component": part} if part else {})
