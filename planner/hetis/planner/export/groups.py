"""Pods of a replica for operators that make them from two templates: a leader, and identical workers.

A plan's stages differ: each belongs to the node whose GPUs its layers were chosen for. So the workers' template
names the nodes of all further stages, lets no two pods share one, and each pod derives its rank from its node.
"""

from __future__ import annotations

import shlex
from typing import Any

from hetis.engines.kubernetes import NODE_LABEL, ReplicaObjects, annotations_of, on_node
from hetis.engines.layout import Process
from hetis.planner.export.kubernetes import deployment_of
from hetis.planner.export.replicas import Launchable, LaunchableReplica

_NODE, _RANK = "HETIS_NODE", "HETIS_RANK"


class PodGroup:
    """Templates of a replica's pods.

    Args:
        leader: the address of the leader, in the operator's notation.
        container: the operator's name for the engine's container; empty: the engine's own.
        worker_labels: labels that the operator gives only to workers; None: our own labels.
    """

    def __init__(
        self,
        launchable: Launchable,
        one: LaunchableReplica,
        *,
        leader: str,
        container: str = "",
        worker_labels: dict[str, str] | None = None,
    ) -> None:
        self._own_worker_labels = worker_labels
        self.objects = ReplicaObjects(one.layout, one.serving, deployment_of(launchable, one))
        self._layout, self._leader, self._container = one.layout, leader, container
        self._further = one.layout.servers[1:]

    @property
    def size(self) -> int:
        return 1 + len(self._further)

    def why_not(self) -> tuple[str, ...]:
        """Return why workers of one template cannot be told apart; empty if they can."""
        nodes = [process.node for process in self._further]
        twice = sorted({node for node in nodes if nodes.count(node) > 1})
        return tuple(
            f"several further stages are on {node}: pods of one template are told apart by their nodes"
            for node in twice
        )

    def leader(self, labels: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the pod of the first stage."""
        [first, *_] = self._layout.servers
        pod = self.objects.server_pod(0, self.objects.arguments(0, master=self._leader))
        return self._template({"nodeSelector": on_node(first.node), **pod}, [first], labels)

    def workers(self, labels: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the pods of all further stages."""
        arguments = list(self.objects.arguments(1, master=self._leader))
        if len(self._further) == 1:
            pod = self.objects.server_pod(1, arguments)
            return self._template({"nodeSelector": on_node(self._further[0].node), **pod}, self._further, labels)
        ranks = " ".join(f"{process.node}) {_RANK}={rank};;" for rank, process in enumerate(self._further, 1))
        arguments[arguments.index("--node-rank") + 1] = _MARK
        line = shlex.join(arguments).replace(_MARK, f'"${_RANK}"')
        stranger = f'*) echo "${_NODE} is no node of this replica" >&2; exit 2;;'
        script = f'case "${_NODE}" in {ranks} {stranger} esac; exec {line}'
        # The leader's address, $(...), is expanded by Kubernetes before the shell sees its quotes.
        pod = self.objects.server_pod(1, ["sh", "-c", script])
        container = pod["containers"][0]
        node = {"name": _NODE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
        container["env"] = [node, *container["env"]]
        return self._template({"affinity": self._apart(), **pod}, self._further, labels)

    def _apart(self) -> dict[str, Any]:
        """Return an affinity for the nodes of the further stages, with never two pods on one."""
        there = {"key": NODE_LABEL, "operator": "In", "values": [process.node for process in self._further]}
        others = {"matchLabels": self._worker_labels()}
        return {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [there]}]}
            },
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [{"labelSelector": others, "topologyKey": NODE_LABEL}]
            },
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
        annotations = [annotations_of(process) for process in processes]
        said = {name: ",".join(each[name] for each in annotations) for name in annotations[0]}
        return {"metadata": {"labels": {**own, **(labels or {})}, "annotations": said}, "spec": pod}


_MARK = "HETIS-RANK-MARK"
