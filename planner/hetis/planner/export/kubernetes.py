"""Core Kubernetes: a StatefulSet for each process of a replica, as made by `hetis-launch kubernetes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hetis.engines.errors import LayoutError
from hetis.engines.kubernetes import FRONT_PORT, Deployment, manifests_of
from hetis.planner.export.replicas import Launchable, LaunchableReplica, NotExportableError, published_image
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import documents, yaml_text
from hetis.solver.cluster import node_of
from hetis.solver.plan import Plan


def write_kubernetes(launchable: Launchable) -> Written:
    """Return a file for each replica, and a kustomization of them all.

    Raises:
        NotExportableError: pods cannot do what the replicas need, or options are missing.
    """
    check_cluster_options(launchable)
    made, left_out = dict[int, list[dict[str, Any]]](), dict[int, tuple[str, ...]]()
    for number, one in launchable.replicas.items():
        try:
            made[number] = manifests_of(one.layout, one.serving, deployment_of(launchable, one))
        except LayoutError as error:
            left_out[number] = error.messages
    launchable = launchable.without(left_out)
    files = {f"{one.name}.yaml": documents(made[number]) for number, one in launchable.replicas.items()}
    return written_for_cluster(launchable, files, _HOW, not_carried=mixed_nodes(launchable), left_out=left_out)


def deployment_of(launchable: Launchable, one: LaunchableReplica) -> Deployment:
    settings = launchable.settings
    return Deployment(
        name=f"{settings.name}-{one.name}",
        image=settings.image or published_image(launchable.engine),
        worker_image=settings.worker_image,
        worker_secret=settings.worker_secret,
        model_claim=settings.model_claim,
        key_secret=settings.key_secret,
        is_open=settings.is_open,
        namespace=settings.namespace,
    )


def check_cluster_options(launchable: Launchable) -> None:
    """Check that the options for Kubernetes objects are complete.

    Raises:
        NotExportableError: with every missing option.
    """
    one = next(iter(launchable.replicas.values()))
    wrong = deployment_of(launchable, one).wrong(one.serving.model, has_workers=launchable.has_workers)
    if wrong:
        raise NotExportableError(tuple(wrong))


def written_for_cluster(
    launchable: Launchable,
    files: Mapping[str, str],
    start: str,
    *,
    not_carried: Iterable[str] = (),
    left_out: Mapping[int, tuple[str, ...]] | None = None,
) -> Written:
    """Return manifests with a kustomization; the replicas' front ends are Services named after them."""
    namespace = launchable.settings.namespace
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    whole = {**kustomization, **({"namespace": namespace} if namespace else {}), "resources": list(files)}
    inside = f".{namespace}.svc" if namespace else ""
    return Written(
        files={**files, "kustomization.yaml": yaml_text(whole)},
        shown=tuple(files),
        endpoints={
            number: f"{launchable.settings.name}-{one.name}{inside}:{FRONT_PORT}"
            for number, one in launchable.replicas.items()
        },
        start=start,
        not_carried=tuple(not_carried),
        left_out=left_out or {},
    )


def types_of_nodes(plan: Plan) -> dict[str, set[str]]:
    """Return the GPU types that a plan uses on each node."""
    types = dict[str, set[str]]()
    for replica in plan.replicas:
        placed = [(stage.gpu, stage.devices) for stage in replica.stages]
        placed += [(pool.gpu, pool.devices) for pool in replica.attention_workers]
        for gpu, devices in placed:
            for device in devices:
                types.setdefault(node_of(device), set()).add(gpu)
    return types


def mixed_nodes(launchable: Launchable) -> list[str]:
    """Return a sentence per node with several GPU types, among which a pod, given a number, cannot choose."""
    return [
        f"node {node} has {' and '.join(sorted(found))}: which of them a pod gets, the device plugin says"
        for node, found in types_of_nodes(launchable.plan).items()
        if len(found) > 1
    ]


_HOW = """`kubectl apply -k .` in this folder. Each process is a pod on the node of the plan (`kubernetes.io/hostname`),
and the front of a replica a Service of its name at port 8000. Secrets and claims that options name must be there."""
