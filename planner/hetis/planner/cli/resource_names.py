"""Names of resources on the command line and in the contract, and of enum values as people read them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hetis.planner.client import Client
# Collections, as they appear in names. Those of a cluster are inside it.
COLLECTIONS = ("clusters", "nodes", "plans", "replicas", "redispatches", "profiles")
IN_CLUSTER = ("nodes", "replicas", "redispatches")
_SINGULAR = {"cluster": "clusters", "node": "nodes", "plan": "plans", "replica": "replicas"} | {
    "redispatch": "redispatches",
    "profile": "profiles",
}
_MAX_ID = 63


def collection(text: str) -> str:
    """Return ``plans`` for ``plans``, ``plan`` and ``plans/night``; ``nodes`` for ``clusters/c/nodes/n``."""
    last = text.split("/")[-2] if "/" in text.strip("/") else text
    found = _SINGULAR.get(last, last)
    if found not in COLLECTIONS:
        raise typer.BadParameter(f"{text!r} is no kind of resource, expected one of {', '.join(COLLECTIONS)}")
    return found


def full_name(kind: str, text: str, cluster: str | None = None) -> str:
    """Return the full name of a resource of this kind, given its last part or its full name."""
    if kind in IN_CLUSTER and text.startswith("clusters/"):
        return text
    first, slash, rest = text.partition("/")
    own = rest if slash and _SINGULAR.get(first, first) == kind else text  # `nodes/x` and `node/x` mean x
    if kind not in IN_CLUSTER:
        return f"{kind}/{own}"
    assert cluster is not None
    return f"{cluster}/{kind}/{own}"


def chosen_cluster(client: Client, given: str | None) -> str:
    """Return the cluster that was given, or the only one there is."""
    if given:
        return full_name("clusters", given)
    names = [cluster.name for cluster in client.list_clusters()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise typer.BadParameter("the planner has no cluster yet: hetis-plan apply CLUSTER_FILE")
    raise typer.BadParameter(f"which cluster? --cluster {' | '.join(last(name) for name in names[:5])}")


def last(name: str) -> str:
    """Return the last part of a name."""
    return name.rpartition("/")[2]


def id_of(text: str) -> str:
    """Return an id for a name chosen by people: ``a100-sxm-80gb`` for ``A100-SXM-80GB``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_MAX_ID].strip("-")


def word(kind: Any, value: int) -> str:
    """Return the value's name without the enum's prefix, or the number of a value newer than this program.

    Args:
        kind: the enum; stubs give it another type than it has.
        value: its number.
    """
    by_number = kind.DESCRIPTOR.values_by_number
    prefix = str(by_number[0].name).removesuffix("UNSPECIFIED")
    return str(by_number[value].name).removeprefix(prefix) if value in by_number else str(value)
