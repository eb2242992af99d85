"""The verb ``traffic``: what a cluster's agents measure, as a table or as a workload to plan for."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import refuse
from hetis.planner.cli.outputs import write_out
from hetis.planner.cli.parameters.options import group, option
from hetis.planner.cli.server.server_verb import chosen_cluster, server_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client
    from hetis.planner.convert.traffic import ModelTraffic
    from hetis.planner.loop.speeds import Speed
    from hetis.v1.traffic_pb2 import ClusterTraffic, MeasuredSpeed

TRAFFIC_EXAMPLES = """Examples:\n
hetis-plan traffic prod\n
hetis-plan traffic prod --last 7d --out workload.yaml\n
hetis-plan traffic prod --mode automatic"""
_UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_LAST = re.compile(r"([1-9]\d{0,3})([mhd])")


Mode = Literal["off", "advisory", "automatic"]


@group
class TrafficOptions:
    mode: Mode | None = option(
        "--mode MODE: What follows changes of traffic from now on: off (nothing), advisory (plans are proposed), "
        "automatic (and activated)."
    )
    last: str = option("--last DURATION: Time before now of which --out makes a workload: 30m, 12h, 7d.", "1h")
    model: str | None = option("--model -m NAME: Model.", shown="the only one")
    out: str | None = option("--out FILE|-: Write a Workload file (YAML) for place; - is stdout.")


@server_verb()
def traffic(
    terminal: Terminal,
    client: Client,
    cluster: Annotated[
        str | None, typer.Argument(metavar="CLUSTER", help="Name of the cluster.", show_default="the only one")
    ] = None,
    *,
    given: TrafficOptions,
) -> ExitCode:
    """Show the traffic that agents measure, and how fast cards are beside their profiles.

    The planner keeps minutes for six hours, and hours for 15 days.
    """
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.planner.convert.traffic import TrafficWindow, models_of
    from hetis.v1.cluster_service_pb2 import GetClusterTrafficRequest

    if not (last := _LAST.fullmatch(given.last)) or (last_s := int(last[1]) * _UNITS_S[last[2]]) > 15 * _UNITS_S["d"]:
        raise typer.BadParameter(f"--last is {given.last[:40]!r}, must be a duration up to 15d, such as 30m, 12h or 7d")
    parent = chosen_cluster(client, cluster)
    name = f"{parent}/traffic"
    if given.mode is not None:
        _set_mode(client, parent, given.mode)
        terminal.say(f"{parent}: {given.mode} from now on")
    found = client.clusters.GetClusterTraffic(GetClusterTrafficRequest(name=name)).cluster_traffic
    models = models_of(map(TrafficWindow.from_proto, found.windows))
    known = ", ".join(one.name for one in models) or "none"
    if given.model is not None:
        models = [one for one in models if one.name == given.model]
        if not models:
            return refuse(terminal, ExitCode.CONFLICT, f"no traffic of {given.model} was measured; models: {known}")
    if given.out is None:
        terminal.emit(lambda: resource_data(found), lambda: _table(models, found))
        if not models:
            terminal.say("nothing was measured yet: agents read the /metrics of engines that they launch or observe")
        return ExitCode.OK
    if len(models) != 1:
        why = f"there is traffic of several models: give --model, one of {known}" if models else "nothing was measured"
        return refuse(terminal, ExitCode.CONFLICT, why)
    return _write(terminal, models[0], last_s, given)


def _set_mode(client: Client, cluster: str, mode: Mode) -> None:
    from google.protobuf.field_mask_pb2 import FieldMask

    from hetis.v1.cluster_pb2 import Cluster, ClusterPolicy, ReactionMode
    from hetis.v1.cluster_service_pb2 import UpdateClusterRequest

    policy = ClusterPolicy(traffic=ReactionMode.Value(f"REACTION_MODE_{mode.upper()}"))
    mask = FieldMask(paths=["policy.traffic"])
    client.clusters.UpdateCluster(UpdateClusterRequest(cluster=Cluster(name=cluster, policy=policy), update_mask=mask))


def _write(terminal: Terminal, model: ModelTraffic, last_s: float, given: TrafficOptions) -> ExitCode:
    from hetis.formats.documents import dump

    measured = model.last(last_s)
    if not (measured.prompt_tokens.count and measured.output_tokens.count):
        return refuse(terminal, ExitCode.CONFLICT, f"no request of {model.name} ended in the last {given.last}")
    text = dump(measured.workload(f"{model.name}, last {given.last}"))
    write_out(terminal, given.out or "-", text)
    terminal.say(
        f"{measured.prompt_tokens.count:.0f} requests in {measured.seconds / 3600:.3g} h, {measured.rate_per_s:.4g}/s, "
        f"{measured.prompt_tokens.mean:.0f}/{measured.output_tokens.mean:.0f} tokens on average; prompts and outputs "
        "are taken as independent"
    )
    return ExitCode.OK


def _table(models: list[ModelTraffic], found: ClusterTraffic) -> RenderableType:
    from rich.console import Group

    from hetis.planner.convert.traffic import SPEED_COLUMNS, TRAFFIC_COLUMNS, decision_lines, speed_cells, traffic_cells
    from hetis.planner.report.tables import section, table

    parts: list[RenderableType] = []
    for model in models:
        rows = (traffic_cells(name, one) for name, one in model.periods())
        parts.append(section(model.name, table(*TRAFFIC_COLUMNS, rows=rows)))
    if found.HasField("attainment"):
        parts.append(f"\n{found.attainment:.1%} of the first tokens of the last 15 min came within the plan's limit")
    if found.speeds:
        speeds = (speed_cells(_speed(one)) for one in found.speeds)
        parts.append(section("Speed beside profiles", table(*SPEED_COLUMNS, rows=speeds)))
    if found.decision.reason:
        parts.append(section("Decision", "\n".join(decision_lines(found.decision))))
    return Group(*parts)


def _speed(one: MeasuredSpeed) -> Speed:
    from hetis.planner.loop.speeds import Speed

    return Speed(
        replica=one.replica,
        gpus=tuple(one.gpu_types),
        tpot_s=one.tpot_s,
        expected_s=one.expected_tpot_s,
        correction=one.correction_ratio,
        error=one.error_ratio or math.inf,
        is_slow=one.is_slow,
        devices=tuple(one.devices),
    )
