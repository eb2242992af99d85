"""Verbs that act on one node, each by a call of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.server_verb import InCluster, chosen_cluster, full_name, server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client


def _node_verb(method: str, doc: str, *, node_help: str, done: str, then: str = "") -> Callable[..., None]:
    """Return a verb that calls a method of a node: what it says is ``done``, with the name, and what to do ``then``."""

    def act(
        terminal: Terminal,
        client: Client,
        node: Annotated[str, typer.Argument(metavar="NODE", help=node_help)],
        *,
        where: InCluster,
    ) -> ExitCode:
        from hetis.planner.cli.server.resource_views import resource_data
        from hetis.v1 import cluster_service_pb2

        parent = None if node.startswith("clusters/") else chosen_cluster(client, where.cluster)
        name = full_name("nodes", node, parent)
        found = getattr(client.clusters, method)(getattr(cluster_service_pb2, f"{method}Request")(name=name)).node
        terminal.emit(lambda: resource_data(found), lambda: done.format(name))
        if then:
            terminal.say(then.format(name))
        return ExitCode.OK

    act.__name__, act.__doc__ = method.removesuffix("Node").lower(), doc
    act.__annotations__["node"] = Annotated[str, typer.Argument(metavar="NODE", help=node_help)]  # known here alone
    return server_verb()(act)


drain = _node_verb(
    "DrainNode",
    """Let no new work go to a node, as before its maintenance; requests that run there finish.

    Head groups move away from its attention workers. Replicas with a stage on the node go on serving: to stop them,
    activate a plan without it, which the planner proposes if the cluster's policy says so.
    """,
    node_help="The node to drain.",
    done="{} drains",
    then="what is on it: hetis-plan agents; plans without it: hetis-plan get plans; undo: hetis-plan undrain {}",
)
undrain = _node_verb(
    "UndrainNode",
    "Let work go to a node again that was drained.",
    node_help="The node that may take work again.",
    done="{} takes work again",
)
disconnect = _node_verb(
    "DisconnectNode",
    """Disconnect the agent that is connected as a node, so that another one can connect. Needs role admin.

    Use this if a node's credentials are misused: revoke them first, or the same agent will reconnect.
    """,
    node_help="The node whose agent to disconnect.",
    done="the agent of {} was disconnected",
)
