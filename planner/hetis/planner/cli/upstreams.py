"""``hetis-plan upstreams``: the list of a router, nginx, Envoy or LiteLLM, of the replicas that serve now."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.get import ClusterNameOption
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client

UPSTREAMS_EXAMPLES = """Examples:

hetis-plan upstreams --to nginx --out /etc/nginx/hetis.conf --follow --run "nginx -s reload"

hetis-plan upstreams --to litellm --model Llama-3.1-70B
"""


class RouterFormat(StrEnum):
    """Routers whose list can be written."""

    NGINX = "nginx"
    ENVOY = "envoy"
    LITELLM = "litellm"


@server_verb(prints_data=False)
def upstreams(
    terminal: Terminal,
    client: Client,
    *,
    to: Annotated[RouterFormat, typer.Option("--to", help="The router that reads the list.")] = RouterFormat.NGINX,
    cluster: ClusterNameOption = None,
    out: Annotated[str, typer.Option("--out", metavar="FILE|-", help="Where the list goes; -: to stdout.")] = "-",
    follow: Annotated[bool, typer.Option("--follow", help="Write it again at every change, until Ctrl-C.")] = False,
    run: Annotated[str, typer.Option("--run", metavar="COMMAND", help="Run this after every time.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="What clients call the model; LiteLLM must know.")] = "",
) -> ExitCode:
    """Write where requests go: replicas that serve, with weights by the plan's rates.

    Agents that start engines themselves say where these listen. Replicas that only prefill or decode are left out: a
    router would have to send a request to both.
    """
    from hetis.planner.cli.resource_names import chosen_cluster

    if to is RouterFormat.LITELLM and not model:
        raise typer.BadParameter("--to litellm needs --model: what clients call it")
    try:
        command = shlex.split(run)
    except ValueError as error:
        raise typer.BadParameter(f"--run is {run!r}: {error}") from None
    before = None
    for servers in _changes(client, chosen_cluster(client, cluster), follow=follow):
        text = _list_of(to, servers, model)
        if text == before:
            continue
        before = text
        if out == "-":
            terminal.write(text)
        else:
            _write(Path(out), text)
            terminal.say(f"wrote {len(servers)} servers to {out}")
        if command:
            _run(terminal, command)
    return ExitCode.OK


def _list_of(to: RouterFormat, servers: list[tuple[str, int]], model: str) -> str:
    from hetis.planner.export.routing import envoy_list, litellm_list, nginx_list

    match to:
        case RouterFormat.NGINX:
            return nginx_list(servers)
        case RouterFormat.ENVOY:
            return envoy_list(servers)
        case RouterFormat.LITELLM:
            return litellm_list(servers, model)


def _changes(client: Client, cluster: str, *, follow: bool) -> Iterator[list[tuple[str, int]]]:
    """Yield endpoints with weights: now and, with ``follow``, after every change of a replica."""
    rates = dict[tuple[str, str], float]()
    yield _servers(client, cluster, rates)
    if not follow:
        return
    seen = dict[str, tuple[int, str]]()
    is_live = False
    for event in client.watch_cluster(cluster):
        is_live = (is_live or event.caught_up) and not event.reset
        is_news = event.caught_up
        if event.WhichOneof("event") == "replica":
            now = (event.replica.state, event.replica.report.endpoint)
            is_news = is_news or seen.get(event.replica.name) != now
            seen[event.replica.name] = now
        if is_live and is_news:
            yield _servers(client, cluster, rates)


def _servers(client: Client, cluster: str, rates: dict[tuple[str, str], float]) -> list[tuple[str, int]]:
    """Return the endpoints of whole replicas that serve, with their weights.

    ``rates`` are the planned rates by replica and plan that are known; missing ones are fetched and added.
    """
    from hetis.planner.export.routing import weighted
    from hetis.v1 import cluster_service_pb2, replica_pb2

    up = (replica_pb2.REPLICA_STATE_SERVING, replica_pb2.REPLICA_STATE_DEGRADED)
    apart = (replica_pb2.REPLICA_ROLE_PREFILL, replica_pb2.REPLICA_ROLE_DECODE)
    serving = dict[str, float]()
    for basic in client.list_replicas(cluster):
        if basic.state in up and basic.role not in apart and basic.report.endpoint:
            one = basic.name, basic.plan
            if one not in rates:
                request = cluster_service_pb2.GetReplicaRequest(name=basic.name)  # the lists leave out the shape
                rates[one] = client.clusters.GetReplica(request).replica.shape.rate_rps
            serving[basic.report.endpoint] = rates[one]
    return weighted(dict(sorted(serving.items())))


def _write(path: Path, text: str) -> None:
    from hetis.formats.files import write_atomically

    write_atomically(path, text)


def _run(terminal: Terminal, command: list[str]) -> None:
    """Run the user's command; a failure is only reported."""
    import subprocess

    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        terminal.warn(f"--run: {command[0]}: {error.strerror}")
        return
    if done.returncode:
        terminal.warn(f"--run: {command[0]} ended with {done.returncode}")
