"""``hetis-plan watch``: follow a plan until it rests, or a cluster until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import WIDE, OutputFormat, Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client
    from hetis.v1 import cluster_service_pb2

AGAIN_S = 0.5  # between an interrupt that was lost and the next one


@server_verb()
def watch(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        str, typer.Argument(metavar="PLAN|CLUSTER", help="A plan, `plans/night` or `night`, or `clusters/paper`.")
    ],
) -> ExitCode:
    """Follow a plan until nothing changes by itself, or everything in a cluster until Ctrl-C.

    A plan is followed on stderr and printed at its end. A cluster is printed line by line as things happen, with
    `-o json` one JSON object per line. Both go on after a lost connection.
    """
    from hetis.planner.cli.resource_names import full_name

    if what.startswith("clusters/"):
        return _watch_cluster(terminal, client, what)
    return _watch_plan(terminal, client, full_name("plans", what))


def _watch_plan(terminal: Terminal, client: Client, name: str) -> ExitCode:
    from hetis.planner.cli.resource_data import resource_data
    from hetis.planner.cli.resource_tables import plan_summary
    from hetis.planner.cli.waiting import outcome, wait_for_plan
    from hetis.v1 import plan_pb2

    plan = wait_for_plan(terminal, client, name)
    terminal.emit(lambda: resource_data(plan), lambda: plan_summary(plan))
    return outcome(terminal, plan, activated=plan.activation != plan_pb2.ACTIVATION_STATE_INACTIVE)


def _watch_cluster(terminal: Terminal, client: Client, name: str) -> ExitCode:
    import json

    from rich.text import Text

    from hetis.planner.cli.resource_data import resource_data

    with interrupts_that_arrive():
        for event in client.watch_cluster(name):
            if terminal.output is OutputFormat.JSON:
                print(json.dumps(resource_data(event)), flush=True)
            elif terminal.output is OutputFormat.YAML:
                print("---", flush=True)
                terminal.emit(lambda event=event: resource_data(event), lambda: "")  # type: ignore[misc]
            elif said := line_of_event(event):
                terminal.emit(dict, lambda said=said: Text(said), width=WIDE)  # type: ignore[misc]
    return ExitCode.OK  # a watch of a cluster ends with Ctrl-C or an error


@contextmanager
def interrupts_that_arrive() -> Iterator[None]:
    """Raise KeyboardInterrupt again and again after Ctrl-C, until the context is left.

    Python drops an exception that is raised in a finaliser or in a callback of a weak reference, as the import system
    has them, so one Ctrl-C at the wrong moment would be lost and a watch would never end.
    """

    def handle(_number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        signal.default_int_handler(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def line_of_event(event: cluster_service_pb2.WatchClusterResponse) -> str:
    """Return what happened, in one line; empty if nothing did."""
    from hetis.planner.cli.resource_names import last, word
    from hetis.planner.cli.resource_tables import kv_ratio
    from hetis.planner.report.figures import percent, plural, seconds
    from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2

    if event.reset:
        return "--- everything anew, the token was too old"
    at = event.event_time.ToDatetime().strftime("%H:%M:%S")
    match event.WhichOneof("event"):
        case "cluster":
            cluster = event.cluster
            far = f"{cluster.num_connected_nodes:,} of {plural(cluster.num_nodes, 'node')} connected"
            return f"{at} cluster {last(cluster.name)}: {far}, active {last(cluster.active_plan) or 'no plan'}"
        case "node":
            node = event.node
            kv = kv_ratio(node.devices)
            state = word(cluster_pb2.NodeState, node.state) + (" draining" if node.draining else "")
            return f"{at} node {last(node.name)}: {state}" + (f", KV {percent(kv)}" if kv is not None else "")
        case "removed_node":
            return f"{at} node {last(event.removed_node)}: gone"
        case "replica":
            replica = event.replica
            report = replica.report
            load = f"{report.num_running} running, {report.num_waiting} waiting"
            state = word(replica_pb2.ReplicaState, replica.state)
            return f"{at} replica {last(replica.name)}: {state}, generation {replica.generation}, {load}"
        case "redispatch":
            moved = event.redispatch
            state = word(redispatch_pb2.RedispatchState, moved.state)
            gain = f"{seconds(moved.makespan_before_s)} → {seconds(moved.makespan_after_s)}"
            return f"{at} re-dispatch of {last(moved.replica)}: {state}, {plural(moved.num_moves, 'move')}, {gain}"
    return "--- now live" if event.caught_up else ""
