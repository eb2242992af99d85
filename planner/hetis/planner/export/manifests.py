"""Names, addresses and metadata of an export's objects in Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.engines.kubernetes import FRONT_PORT
from hetis.planner.export.replicas import Launchable


def manifest(
    launchable: Launchable, api: str, kind: str, name: str, *, labels: Mapping[str, str] | None = None, **content: Any
) -> dict[str, Any]:
    """Return an object in the export's namespace; ``content`` is what it has besides its metadata."""
    metadata = {"name": name, **namespace(launchable), **({"labels": labels} if labels else {})}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def namespace(launchable: Launchable) -> dict[str, str]:
    """Return the namespace field of an object's metadata, or nothing for the default namespace of kubectl's user."""
    return {"namespace": launchable.settings.namespace} if launchable.settings.namespace else {}


def address(launchable: Launchable, service: str, port: int = FRONT_PORT) -> str:
    inside = f".{launchable.settings.namespace}.svc" if launchable.settings.namespace else ""
    return f"{service}{inside}:{port}"
