"""Dynamo: graph deployments with one front end and a component for each replica."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hetis.engines.kubernetes import ReplicaObjects, annotations_of, on_node
from hetis.engines.serving import Meeting, arguments_of
from hetis.engines.versions import Engine
from hetis.planner.export.kubernetes import deployment_of, mixed_nodes, written_for_cluster
from hetis.planner.export.replicas import Launchable, LaunchableReplica, NotExportableError
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import documents
from hetis.solver.plan import Role

VERSION = "1.6.1"  # of Dynamo, whose images contain its front end and its workers
_MOST_COMPONENTS = 25  # per graph, including its front end
_PROGRAMS = {Engine.VLLM: ("python3", "-m", "dynamo.vllm"), Engine.SGLANG: ("python3", "-m", "dynamo.sglang")}
_TYPES = {Role.UNIFIED: "worker", Role.PREFILL: "prefill", Role.DECODE: "decode"}


def write_dynamo(launchable: Launchable) -> Written:
    """Return DynamoGraphDeployments: one with all replicas unless there are too many for a graph.

    Raises:
        NotExportableError: Dynamo does not support the engine, or no replica is a single pod.
    """
    if launchable.engine not in _PROGRAMS:
        raise NotExportableError(("Dynamo's images lack our plugin: use --to lws or kubernetes, or --engine vllm",))
    left_out = {
        number: (f"it is on {len(one.layout.servers)} nodes: Dynamo makes the pods of a component from one template",)
        for number, one in launchable.replicas.items()
        if len(one.layout.servers) > 1
    }
    launchable = launchable.without(left_out)
    components = [_component(launchable, one) for one in launchable.replicas.values()]
    most = _MOST_COMPONENTS - 1
    if launchable.has_roles and len(components) > most:
        raise NotExportableError((f"a graph holds {most} replicas, and prefill and decode must be in one graph",))
    graphs = [components[first : first + most] for first in range(0, len(components), most)]
    files = {f"graph-{i}.yaml": documents([_graph(launchable, i, graph)]) for i, graph in enumerate(graphs)}
    lost = [*mixed_nodes(launchable)]
    if len(launchable.replicas) > 1:
        lost.append("shares of replicas: Dynamo's front chooses by load, and takes no weights")
    written = written_for_cluster(launchable, files, _HOW, not_carried=lost, left_out=left_out)
    fronts = {
        number: f"{launchable.settings.name}-{place // most}-frontend:8000"
        for place, number in enumerate(launchable.replicas)
    }
    return replace(written, endpoints=fronts)


def _graph(launchable: Launchable, number: int, components: list[dict[str, Any]]) -> dict[str, Any]:
    settings = launchable.settings
    front = {
        "name": "Frontend",
        "type": "frontend",
        "replicas": 1,
        "podTemplate": {
            "spec": {
                "containers": [
                    {
                        "name": "main",
                        "image": image_of(launchable),
                        "command": ["python3", "-m", "dynamo.frontend"],
                        "args": ["--http-port", "8000"],
                    }
                ]
            }
        },
    }
    where = {"namespace": settings.namespace} if settings.namespace else {}
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": f"{settings.name}-{number}", **where},
        "spec": {"backendFramework": launchable.engine.value, "components": [front, *components]},
    }


def image_of(launchable: Launchable) -> str:
    return launchable.settings.image or f"nvcr.io/nvidia/ai-dynamo/{launchable.engine.value}-runtime:{VERSION}"


def _component(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return a component: a Dynamo worker with the engine's options, registered with the front end."""
    [process] = one.layout.servers
    serving = replace(one.serving, program=_PROGRAMS[launchable.engine])
    words = list(arguments_of(one.layout, serving, 0, Meeting(host="")))
    if launchable.engine is Engine.VLLM and one.plan.role is not Role.UNIFIED:
        words += ["--disaggregation-mode", one.plan.role.value]
    deployment = replace(deployment_of(launchable, one), image=image_of(launchable))
    pod = ReplicaObjects(one.layout, one.serving, deployment).server_pod(0, words)
    [container] = pod["containers"]
    # Dynamo's operator sets ports, probes and permissions of pods; its images have their own user.
    kept = {name: container[name] for name in ("env", "resources", "volumeMounts", "image")}
    kept["env"] = [each for each in kept["env"] if each["name"] not in ("HOME", "NUMBA_CACHE_DIR")]
    main = {"name": "main", "command": words[:3], "args": words[3:], **kept}
    template = {"nodeSelector": on_node(process.node), "containers": [main], "volumes": pod["volumes"]}
    return {
        "name": one.name,
        "type": _TYPES[one.plan.role],
        "replicas": 1,
        "podTemplate": {"metadata": {"annotations": annotations_of(process)}, "spec": template},
    }


_HOW = """`kubectl apply -k .` in this folder, where Dynamo's operator is installed (API v1beta1; options are those of
the workers of Dynamo 1.6.1). The replicas of a graph are behind one front, the Service `NAME-0-frontend`, port 8000."""
