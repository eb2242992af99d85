"""LeaderWorkerSet v1 for each replica, and DisaggregatedSet v1 if no replica is unified."""

from __future__ import annotations

from typing import Any

from hetis.engines.errors import LayoutError
from hetis.engines.kubernetes import refuse_shared_cards
from hetis.planner.export.groups import PodGroup
from hetis.planner.export.kubernetes import check_cluster_options, mixed_nodes, written_for_cluster
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import documents
from hetis.solver.plan import Role

LEADER = "$(LWS_LEADER_ADDRESS)"
_MOST_ROLES = 10  # in a DisaggregatedSet


def write_lws(launchable: Launchable) -> Written:
    """Return a file for each replica: a LeaderWorkerSet, its attention workers, and related objects.

    Raises:
        NotExportableError: no replica can be made of such pods, or options are missing.
    """
    check_cluster_options(launchable)
    launchable, left_out = groupable(launchable)
    split = launchable.has_roles and all(one.plan.role is not Role.UNIFIED for one in launchable.replicas.values())
    if split and 2 <= len(launchable.replicas) <= _MOST_ROLES:
        files = {"replicas.yaml": documents(_disaggregated(launchable))}
    else:
        files = {
            f"{one.name}.yaml": documents(replica_objects(launchable, one)) for one in launchable.replicas.values()
        }
    return written_for_cluster(launchable, files, _HOW, not_carried=mixed_nodes(launchable), left_out=left_out)


def groupable(launchable: Launchable) -> tuple[Launchable, dict[int, tuple[str, ...]]]:
    """Return the replicas whose pods can be made from two templates, and why the others cannot.

    Raises:
        NotExportableError: none is left.
    """
    left_out = dict[int, tuple[str, ...]]()
    for number, one in launchable.replicas.items():
        if why := PodGroup(launchable, one, leader=LEADER).why_not():
            left_out[number] = why
            continue
        try:
            refuse_shared_cards(one.layout)
        except LayoutError as error:
            left_out[number] = error.messages
    return launchable.without(left_out), left_out


def replica_objects(
    launchable: Launchable, one: LaunchableReplica, labels: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return all objects of one replica, in an order in which they can be applied."""
    group = PodGroup(launchable, one, leader=LEADER)
    workers = [made for process in one.layout.attention_workers for made in group.objects.worker(process)]
    whole = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": group.objects.metadata(f"{launchable.settings.name}-{one.name}"),
        "spec": _spec(group, labels),
    }
    return [*group.objects.around(), *workers, whole]


def _spec(group: PodGroup, labels: dict[str, str] | None = None) -> dict[str, Any]:
    if group.size > 1:
        templates = {"leaderTemplate": group.leader(labels), "workerTemplate": group.workers(labels)}
    else:  # without a template of its own, the leader is made from that of the workers, of which there are none
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
    metadata: dict[str, Any] = {}
    for one in launchable.replicas.values():
        group = PodGroup(launchable, one, leader=LEADER)
        around += group.objects.around()
        roles.append({"name": f"{one.plan.role.value}-{one.name}", "spec": _spec(group)})
        metadata = group.objects.metadata(launchable.settings.name)
    metadata["labels"] = {"app.kubernetes.io/name": "hetis", "app.kubernetes.io/instance": launchable.settings.name}
    whole = {
        "apiVersion": "disaggregatedset.x-k8s.io/v1",
        "kind": "DisaggregatedSet",
        "metadata": metadata,
        "spec": {"roles": roles},
    }
    return [*around, whole]


_HOW = """`kubectl apply -k .` in this folder, where LeaderWorkerSet is installed. A replica is a group of pods, one for
each process, that is restarted as a whole; each is on the node of the plan, and takes its rank from it. The front of a
replica is a Service of its name at port 8000."""
