"""Why a replica is in its state: what is wanted, what its nodes report, what blocks it, what to do, what happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.server_verb import InCluster, chosen_cluster, fetched, full_name, server_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client
    from hetis.v1 import replica_pb2


@server_verb()
def why(
    terminal: Terminal,
    client: Client,
    replica: Annotated[
        str, typer.Argument(metavar="REPLICA", help="The replica: `r-3`, or `clusters/prod/replicas/r-3`.")
    ],
    *,
    where: InCluster,
) -> ExitCode:
    """Show why a replica serves or does not: what is wanted, what each node reports, what blocks it and what to do.

    What happened to it follows, the newest first; of an engine that ended, with the last lines of its log.
    """
    from hetis.planner.cli.server.resource_views import resource_data

    parent = None if replica.startswith("clusters/") else chosen_cluster(client, where.cluster)
    found = fetched(client, "replicas", full_name("replicas", replica, parent))
    blocks = [*blocks_of(found)]
    terminal.emit(lambda: _data(resource_data(found), blocks), lambda: _shown(found, blocks))
    return ExitCode.OK


class Block(NamedTuple):
    """A condition that keeps a replica from serving, and what to do about it."""

    condition: str
    remedy: str


def blocks_of(replica: replica_pb2.Replica) -> Iterator[Block]:
    """Yield what keeps a replica from serving with all its devices, the conditions of its nodes first."""
    from hetis.planner.convert.names import last_part
    from hetis.v1 import cluster_pb2, replica_pb2, report_pb2

    cluster = replica.name.partition("/replicas/")[0]
    if not replica.plan:
        yield Block("no plan contains it any more: it stops", f"hetis-plan get plans --cluster {last_part(cluster)}")
        return
    is_serving = replica.state == replica_pb2.REPLICA_STATE_SERVING
    for part in replica.parts:
        agent = f"hetis-agent --node {cluster}/nodes/{part.node}"
        match part.node_state:
            case cluster_pb2.NODE_STATE_EXPECTED:
                yield Block(f"no agent ever connected as node {part.node}", f"start it there: {agent}")
            case cluster_pb2.NODE_STATE_LOST:
                yield Block(
                    f"node {part.node} is lost: its agent was not heard for a lease",
                    f"see the agent's log there and start it again ({agent}); for a node that stays away, activate a "
                    f"plan without it: hetis-plan get plans --cluster {last_part(cluster)}",
                )
            case cluster_pb2.NODE_STATE_SUSPECT:
                yield Block(f"the agent of node {part.node} is late", "wait: its lease still runs")
            case cluster_pb2.NODE_STATE_UNDECLARED:
                yield Block(
                    f"the cluster's document does not name node {part.node}", "add it: hetis-plan apply cluster.yaml"
                )
            case _ if part.HasField("failure"):
                yield Block(f"node {part.node}: {part.failure.message}", "mend what it says; the agent tries again")
            case _ if replica.assigned_generation and part.held_generation < replica.assigned_generation:
                yield Block(
                    f"node {part.node} has not taken its last assignment", f"see the agent's log there: {agent}"
                )
            case _ if part.state == report_pb2.ASSIGNMENT_STATE_LOADING and not is_serving:
                yield Block(f"node {part.node} loads weights", "wait: hetis-plan watch " + cluster)
        if part.draining:
            yield Block(f"node {part.node} is being drained", f"hetis-plan undrain {cluster}/nodes/{part.node}")
    if replica.state == replica_pb2.REPLICA_STATE_STARTING and not replica.assigned_generation:
        for name in replica.waits_for:
            yield Block(f"{name} still holds GPUs of it", f"wait until it has drained: hetis-plan why {name}")


def _data(resource: dict[str, Any], blocks: list[Block]) -> dict[str, Any]:
    return {**resource, "blocks": [block._asdict() for block in blocks]}


def _shown(replica: replica_pb2.Replica, blocks: list[Block]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from hetis.planner.cli.server.resource_views import ago, state
    from hetis.planner.convert.names import word_of
    from hetis.planner.report.tables import facts, section, table_of
    from hetis.v1 import cluster_pb2, replica_pb2, report_pb2

    since = replica.events[-1].time if replica.events else replica.create_time
    goal = word_of(replica_pb2.AssignmentGoal, replica.events[-1].goal).lower() if replica.events else ""
    ordered = f"to {goal}, by generation {replica.assigned_generation}" if goal else "nothing yet"
    head = facts(
        [
            ("Replica", replica.name),
            ("State", Text.assemble(state(word_of(replica_pb2.ReplicaState, replica.state)), f" since {ago(since)}")),
            ("Plan", replica.plan or "none any more"),
            ("Ordered", ordered),
        ]
    )
    nodes = table_of(
        replica.parts,
        ("'node", lambda part: part.node),
        ("'agent", lambda part: state(word_of(cluster_pb2.NodeState, part.node_state))),
        ("generation", lambda part: str(part.held_generation or "-")),
        ("'reports", lambda part: state(word_of(report_pb2.AssignmentState, part.state)) if part.state else "-"),
    )
    blocked: list[RenderableType] = [facts([("✗", block.condition), ("→", block.remedy)]) for block in blocks]
    none = "nothing: it serves" if replica.state == replica_pb2.REPLICA_STATE_SERVING else "nothing that is known"
    happened = facts(
        (
            ago(event.time),
            Text.assemble(
                state(word_of(replica_pb2.ReplicaState, event.state)),
                f", to {word_of(replica_pb2.AssignmentGoal, event.goal).lower()}" if event.goal else "",
                f": {event.failure.message}" if event.HasField("failure") else "",
            ),
        )
        for event in reversed(replica.events)
    )
    parts: list[RenderableType] = [head, *([nodes] if replica.parts else ())]
    parts.append(section("What blocks it", Group(*blocked) if blocked else Text(none)))
    if replica.events:
        parts.append(section("What happened", happened))
    return Group(*parts)
