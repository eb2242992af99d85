"""Whether an agent may open a stream: credentials are valid for any node of a cluster, even for made-up names."""

from __future__ import annotations

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.leases import Leases
from hetis.planner.fleet.link import NodeLink

MOST_UNDECLARED = 64  # connected nodes of a cluster that its document does not name


def require_room(cluster: str, node: str, leases: Leases, *, has_replicas: bool) -> None:
    """Raise TOO_MANY_STREAMS if the cluster does not need the node, and too many such nodes are connected."""
    if node in leases or has_replicas or leases.num_undeclared < MOST_UNDECLARED:
        return
    message = (
        f"{cluster} does not declare node {node}, and {MOST_UNDECLARED} undeclared nodes are connected"
        " already: declare it, or disconnect others"
    )
    raise ServiceError(Reason.ERROR_REASON_TOO_MANY_STREAMS, message, metadata={"max_streams": MOST_UNDECLARED})


def require_same_agent(
    node: str, link: NodeLink, boot_id: str, *, heard_s: float | None, now_s: float, suspect_s: float
) -> None:
    """Raise NODE_IN_USE while another agent is connected: the node's credentials must not suffice to replace it.

    ``heard_s``: when the connected agent was heard last; None: never.
    """
    is_gone = not link.session or heard_s is None or now_s - heard_s >= suspect_s
    if not is_gone and boot_id != link.boot_id:
        message = f"another agent is connected as node {node}, and sent a message recently"
        raise ServiceError(Reason.ERROR_REASON_NODE_IN_USE, message, metadata={"node": link.node})


def taken_over(message: str, node: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_NODE_TAKEN_OVER, message, metadata={"node": node})
