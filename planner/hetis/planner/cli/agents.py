"""``hetis-plan agents``: the nodes of a cluster, what their agents report, and how full their KV is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.get import ClusterNameOption
from hetis.planner.cli.resource_names import chosen_cluster
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client
    from hetis.v1 import cluster_pb2


MAX_DIFFERENCES = 20  # shown one by one; a fleet that is not there yet has thousands
_BAR_WIDTH = 8


@server_verb()
def agents(terminal: Terminal, client: Client, *, cluster: ClusterNameOption = None) -> ExitCode:
    """Show nodes with their agents: state, when last heard, every GPU's KV, clock and health."""
    from hetis.planner.cli.resource_data import list_data
    from hetis.planner.cli.resource_names import last
    from hetis.v1 import cluster_service_pb2

    parent = chosen_cluster(client, cluster)
    nodes = list(client.list_nodes(parent))
    request = cluster_service_pb2.GetInventoryRequest(name=f"{parent}/inventory")
    differences = client.clusters.GetInventory(request).inventory.differences
    terminal.emit(lambda: list_data("NodeList", nodes), lambda: _table(nodes))
    for difference in differences[:MAX_DIFFERENCES]:
        terminal.warn(f"{difference.device or difference.node or last(parent)}: {difference.message}")
    if len(differences) > MAX_DIFFERENCES:
        terminal.warn(f"... and {len(differences) - MAX_DIFFERENCES:,} more differences")
    return ExitCode.OK


def _table(nodes: Sequence[cluster_pb2.Node]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from hetis.planner.cli.resource_names import last, word
    from hetis.planner.cli.resource_tables import ago, kv_bar, state
    from hetis.planner.report.figures import percent
    from hetis.v1 import cluster_pb2, report_pb2

    if not nodes:
        return Text("no nodes", style="dim")
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for head in ("node", "state", "heard", "GPU", "KV in use", "busy", "GHz", "°C", "remark"):
        right = head in ("heard", "GPU", "busy", "GHz", "°C")
        fixed = right or head == "KV in use"
        table.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=fixed)

    def remark(device: report_pb2.DeviceReport) -> Text:
        if device.unhealthy:
            return Text(device.unhealthy, style="red")
        slowed = [
            word(report_pb2.ThrottleReason, reason).lower()
            for reason in device.throttle_reasons
            if reason != report_pb2.THROTTLE_REASON_IDLE
        ]
        return Text(f"throttled: {', '.join(slowed)}" if slowed else "", style="yellow")

    for node in nodes:
        name = word(cluster_pb2.NodeState, node.state) + (" draining" if node.draining else "")
        first = (last(node.name), state(name), ago(node.heard_time))
        for device in node.devices:
            table.add_row(
                *first,
                str(device.index),
                kv_bar([device], _BAR_WIDTH),
                percent(device.busy_ratio) if device.busy_ratio else "",
                f"{device.clock_hz / 1e9:.2f}" if device.clock_hz else "",
                f"{device.temperature_c:.0f}" if device.HasField("temperature_c") else "",
                remark(device),
            )
            first = ("", Text(""), "")
        if not node.devices:
            table.add_row(*first, "", Text(""), "", "", "", Text(""))
    return table
