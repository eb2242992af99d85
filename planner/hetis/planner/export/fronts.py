"""What is in front of a plan in Kubernetes: nginx with its weights, and routers where prefill and decode are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetis.engines.kubernetes import FRONT_PORT, RESTRICTED, USER, secret_variable
from hetis.engines.versions import Engine
from hetis.planner.export.manifests import address, manifest
from hetis.planner.export.pair_routers import (
    KEY_VARIABLE,
    PORT,
    balanced_sides,
    entry_points,
    pair_groups,
    router_words,
)
from hetis.planner.export.replicas import Launchable
from hetis.planner.export.routing import nginx_conf

NGINX_IMAGE = "nginxinc/nginx-unprivileged:1.29-alpine"
# The makers of vLLM's router publish no image of a release.
ROUTER_IMAGES: Mapping[bool, str] = {
    False: "vllm/vllm-router:nightly-20260710-b93cbcb",
    True: "lmsysorg/sgl-model-gateway:v0.3.2",
}
_NGINX_PORT, _METRICS_PORT = 8080, 29_000
_FRONTS = 2  # pods of each router
_NGINX_QUIT = "sleep 5; nginx -c /etc/hetis/nginx.conf -s quit"
_NGINX_MAIN = """\
worker_processes auto;
pid /tmp/nginx.pid;
events {{ worker_connections 16384; }}
http {{
client_body_temp_path /tmp/body;
proxy_temp_path /tmp/proxy;
fastcgi_temp_path /tmp/fastcgi;
uwsgi_temp_path /tmp/uwsgi;
scgi_temp_path /tmp/scgi;
{servers}}}
"""


def nginx_main(servers: str) -> str:
    """Return a whole configuration of nginx, which may write to /tmp alone."""
    return _NGINX_MAIN.format(servers=servers)


def front_objects(
    launchable: Launchable, endpoints: Mapping[int, str], direct: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return the objects of nginx and of the routers of pairs; none if all replicas are behind one Service.

    Args:
        launchable: the plan's replicas.
        endpoints: their Services, by position in the plan.
        direct: addresses of their front ends' pods, where all ports are open.
    """
    groups, name = pair_groups(launchable), launchable.settings.name
    routers = [address(launchable, f"{name}-{group.name}") for group in groups]
    if len(entry_points(launchable, endpoints, routers)) == 1 and not groups:
        return []
    is_sglang = launchable.engine is Engine.SGLANG
    # SGLang's decode replicas ask a prefill replica for KV at the host by which the router names it.
    prefill = {number for group in groups for number in group.prefill} if is_sglang else set[int]()
    own = {number: (direct if number in prefill else endpoints)[number] for number in endpoints}
    found = list[dict[str, Any]]()
    front_host = address(launchable, name).rpartition(":")[0]
    for group in groups:
        words = router_words(
            launchable, group, own, host="0.0.0.0", port=PORT, metrics_port=_METRICS_PORT, sides=front_host
        )
        container = {
            "image": ROUTER_IMAGES[is_sglang],
            "command": words,
            "ports": [{"name": "http", "containerPort": PORT}, {"name": "metrics", "containerPort": _METRICS_PORT}],
            "env": [] if is_sglang else secret_variable(KEY_VARIABLE, launchable.settings.api_key_secret, "api-key"),
            # It listens when the engines serve.
            "startupProbe": {"httpGet": _HEALTH, "periodSeconds": 10, "failureThreshold": 360},
            "livenessProbe": {"httpGet": _HEALTH, "periodSeconds": 10, "failureThreshold": 6},
            "readinessProbe": {"httpGet": _HEALTH, "periodSeconds": 5},
        }
        found += _deployment(launchable, f"{name}-{group.name}", container, [], ports={"http": PORT})
    conf = nginx_main(nginx_conf(launchable, endpoints, routers, sides_at="", fronts=_FRONTS))
    labels = _labels(f"{name}-front")
    config = manifest(launchable, "v1", "ConfigMap", f"{name}-front", labels=labels, data={"nginx.conf": conf})
    sides = balanced_sides(launchable)
    ports = {"http": _NGINX_PORT} | {f"side-{n}": group.side_port(role) for n, (group, role, _) in enumerate(sides)}
    container = {
        "image": NGINX_IMAGE,
        "command": ["nginx", "-c", "/etc/hetis/nginx.conf", "-g", "daemon off;"],
        "ports": [{"name": each, "containerPort": port} for each, port in ports.items()],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/hetis", "readOnly": True}],
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 10},
        "readinessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 5},
        # Endpoints are removed from Services before it stops to accept.
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", _NGINX_QUIT]}}},
    }
    volumes = [{"name": "config", "configMap": {"name": f"{name}-front"}}]
    return [config, *_deployment(launchable, name, container, volumes, ports=ports), *found]


_HEALTH = {"path": "/health", "port": "http"}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hetis-router", "app.kubernetes.io/instance": name}


def _deployment(
    launchable: Launchable, name: str, container: dict[str, Any], volumes: Sequence[dict[str, Any]],
    *, ports: Mapping[str, int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return two pods of a router, their Service, and what guards them."""
    labels = _labels(name)
    selector = {"matchLabels": labels}
    whole = {
        "name": "router",
        **container,
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"cpu": "4", "memory": "2Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*container.get("volumeMounts", []), {"name": "tmp", "mountPath": "/tmp"}],
    }
    whole["env"] = [*container.get("env", []), {"name": "HOME", "value": "/tmp"}]
    apart = {"labelSelector": selector, "topologyKey": "kubernetes.io/hostname"}
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {**RESTRICTED, "runAsUser": USER, "runAsGroup": USER},
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
            }
        },
        "containers": [whole],
        "volumes": [*volumes, {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    outside = [
        {"name": each, "port": FRONT_PORT if each == "http" else port, "targetPort": each}
        for each, port in ports.items()
    ]
    policy = {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": [{}]}
    return [
        manifest(launchable, api, kind, name, labels=labels, spec=spec)
        for api, kind, spec in (
            ("apps/v1", "Deployment", {"replicas": _FRONTS, "selector": selector, "template": template}),
            ("v1", "Service", {"selector": labels, "ports": outside}),
            ("policy/v1", "PodDisruptionBudget", {"maxUnavailable": 1, "selector": selector}),
            ("networking.k8s.io/v1", "NetworkPolicy", policy),
        )
    ]
