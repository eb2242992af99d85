"""What production wants of an engine's pod: probes, requests and limits, shared memory, a cache of models, a drain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.engines.layout import Process

CACHE = "/cache"  # of downloaded models; the engines find it by HF_HOME
DRAIN_S = 120  # how long running requests may go on after a request to stop, unless an option of vLLM says otherwise
PRE_STOP_S = 10  # until Services and routers know that a pod stops
_STARTS_S, _PERIOD_S = 3600, 10  # weights of large models load for half an hour
# vLLM's front end and scheduler keep a CPU busy each, and so does every rank.
_CPUS, _MOST_CPUS = 4, 16  # for each GPU
_MEMORY_GIB, _MOST_MEMORY_GIB = 16, 64  # for each GPU; shared memory counts, the page cache of weights does not
_SHM_GIB = 4  # for each GPU, for NCCL and the ranks' messages
_DISK_GIB, _MOST_DISK_GIB = 20, 60  # compiled kernels and logs


def health_probe(port: str | int, *, tls: bool) -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": port, **({"scheme": "HTTPS"} if tls else {})}}


def probes_of(check: Mapping[str, Any], *, ready: bool) -> dict[str, Any]:
    """Return the probes of an engine by a check, which passes from its start on; ``ready``: Services route to it."""
    found: dict[str, Any] = {
        "startupProbe": {**check, "periodSeconds": _PERIOD_S, "failureThreshold": _STARTS_S // _PERIOD_S},
        "livenessProbe": {**check, "periodSeconds": _PERIOD_S, "timeoutSeconds": 5, "failureThreshold": 6},
    }
    if ready:
        found["readinessProbe"] = {**check, "periodSeconds": 5, "timeoutSeconds": 5}
    return found


def front_check(host: str, port: int, *, tls: bool) -> dict[str, Any]:
    """Return the check of a further stage: whether the front end of its engine, on another pod, is well.

    An engine does not survive the loss of a stage, and the others wait for it forever. Its front end then fails, so all
    of its stages are started again.
    """
    scheme, unverified = ("https", ", context=ssl._create_unverified_context()") if tls else ("http", "")
    script = f"import ssl, urllib.request as u; u.urlopen('{scheme}://{host}:{port}/health', timeout=5{unverified})"
    return {"exec": {"command": ["python3", "-c", script]}, "timeoutSeconds": 10}


def pre_stop() -> dict[str, Any]:
    return {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}}


def resources_of(resource: str, process: Process, *, model_bytes: float) -> dict[str, Any]:
    """Return the requests and limits of a pod; ``model_bytes``: what it downloads to its own disk."""
    count, disk = len(process.gpus), round(model_bytes / 2**30)

    def of(cpus: int, memory: int, gib: int) -> dict[str, Any]:
        sizes = {"cpu": str(cpus * count), "memory": f"{memory * count}Gi", "ephemeral-storage": f"{gib + disk}Gi"}
        return {resource: count, **sizes}

    return {
        "requests": of(_CPUS, _MEMORY_GIB, _DISK_GIB),
        "limits": of(_MOST_CPUS, _MOST_MEMORY_GIB, _MOST_DISK_GIB),
    }


def shared_memory(process: Process) -> dict[str, Any]:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHM_GIB * len(process.gpus)}Gi"}}


def cache_volume(cache: str) -> dict[str, Any]:
    """Return the volume of a cache: a folder of the nodes, or a claim."""
    if cache.startswith("/"):
        return {"name": "cache", "hostPath": {"path": cache, "type": "DirectoryOrCreate"}}
    return {"name": "cache", "persistentVolumeClaim": {"claimName": cache}}


def scraped(port: int, *, tls: bool) -> dict[str, str]:
    """Return the annotations by which Prometheus finds an engine's metrics."""
    scheme = {"prometheus.io/scheme": "https"} if tls else {}
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics", **scheme}
