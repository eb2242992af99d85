"""Verbs that write for other programs: ``export`` writes a plan's files, ``upstreams`` the endpoints for routers."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.outputs import refuse_unwritable, write_out
from hetis.planner.cli.parameters.options import PlanArgument, group, option, spelled, verb
from hetis.planner.cli.server.server_verb import chosen_cluster, cluster_name_option, fetched, server_verb
from hetis.planner.export import ExportTarget
from hetis.planner.export.settings import ExportOptions, ExportSettings

if TYPE_CHECKING:
    from hetis.planner.client import Client

T = TypeVar("T")

EXPORT_EXAMPLES = """Examples:\n
hetis-plan export plan.json --to vllm --model /models/llama --node-address gpu1=10.0.0.1 --out exported\n
hetis-plan export plan.json --to kubernetes --insecure --out - | kubectl apply -f -\n
hetis-plan export plan.json --to sglang --strict -- --context-length 8192"""

HEARD_WITHIN_S = 30.0  # agents find a new leader in half the time, and it counts others as lost after 20 s
LISTED_AGAIN_S = 1.0

CHECKED_AGAINST = {"cluster", "model", "workload", "profiles"}  # documents in a plan


@group
class OutputOptions:
    to: ExportTarget = option("--to: System that will run the plan.", ...)
    out: str = option("--out DIR|-: A new or empty folder; - writes the main file to stdout.", "-")
    strict: bool = option("--strict: Exit 5 and write nothing if any part of the plan cannot be exported.", False)
    partial: bool = option("--partial: Export also if only a part of the planned traffic can be served.", False)
    force: bool = option("--force: Write to a folder even if it is not empty.", False)
    node_address: list[str] | None = option(
        "--node-address NODE=HOST: Address of a node outside Kubernetes; repeatable. Default: the node's name."
    )


@verb(prints_data=False)
def export(
    terminal: Terminal,
    plan: PlanArgument,
    engine_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTION", help="Options passed to the engine.")
    ] = None,
    *,
    requested: OutputOptions,
    options: ExportOptions,
) -> ExitCode:
    """Export a plan as files for an engine or orchestrator, with router weights and a list of what is not exported."""
    from hetis.formats.discovery.found import some_of
    from hetis.formats.documents import load_plan
    from hetis.planner.cli.plans import warn_if_wrong
    from hetis.planner.export.options import unguarded
    from hetis.planner.export.targets import export_wanted, folder_refusals, write_export
    from hetis.planner.use_cases.record.parts import MadeFrom
    from hetis.planner.use_cases.saved_plans import problem_of_plan

    hosts, wrong = _hosts(requested.node_address or ())
    folder = None if requested.out == "-" else Path(requested.out)
    if folder is not None:
        wrong += folder_refusals(folder, force=requested.force)
    settings = ExportSettings.of(options, engine_options=tuple(engine_options or ()), hosts=hosts)
    found = load_plan(plan)
    made = export_wanted(found, requested.to, settings, file=plan, spelled=spelled, more_wrong=wrong)
    if MadeFrom.of(found).documents.keys() >= CHECKED_AGAINST:
        warn_if_wrong(terminal, plan, problem_of_plan(found, plan))
    if requested.strict and made.lost:
        lost = [f"- {line}" for line in made.lost]
        terminal.error(f"--strict: {requested.to.value} cannot export the whole plan, so nothing was written", lost)
        return ExitCode.MISSED
    if made.rate < made.planned * (1 - 1e-9):
        served = f"what is exported serves {made.rate:.3g} of {made.planned:.3g} requests/s"
        if not requested.partial:
            lost = [f"- {line}" for line in made.lost]
            terminal.error(f"{served}, so nothing was written; --partial exports it", lost)
            return ExitCode.MISSED
        terminal.warn(served)
    for line in made.lost:
        terminal.warn(line)
    if line := unguarded(requested.to, settings):
        terminal.warn(line)
    if folder is None:
        terminal.write("".join(_on_stdout(path, made.files[path]) for path in made.shown))
        return ExitCode.OK
    if left := write_export(folder, made).left:
        terminal.warn(f"{folder} still has files that are not of this export: {some_of(left)}")
    terminal.say(f"wrote {len(made.files)} files to {folder}: begin with README.md")
    return ExitCode.OK


def _on_stdout(path: str, text: str) -> str:
    """Return a file as one document in a stream of manifests, or as a script preceded by its path."""
    head = "---\n" if path.endswith(".yaml") else ""
    return f"{head}# {path}\n{text}"


def _hosts(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the addresses by node, and an error for every node with two addresses."""
    hosts, wrong = dict[str, str](), list[str]()
    for text in texts:
        node, _, host = text.rpartition("=")
        if node and node in hosts:
            wrong.append(f"--node-address: {node} is given twice")
        hosts[node] = host
    return hosts, wrong


UPSTREAMS_EXAMPLES = """Examples:\n
hetis-plan upstreams --to nginx --out /etc/nginx/hetis.conf --follow --run "nginx -s reload"\n
hetis-plan upstreams --to litellm --model Llama-3.1-70B"""


RouterFormat = Literal["nginx", "envoy", "litellm"]


@group
class UpstreamOptions:
    to: RouterFormat = option("--to: The router to write the list for.", "nginx")
    cluster: str | None = cluster_name_option()
    out: str = option("--out FILE|-: File to write; - writes to stdout.", "-")
    follow: bool = option("--follow: Rewrite the list after each change, until Ctrl-C.", False)
    run: str = option("--run COMMAND: Command to run after each write.", "")
    model: str = option("--model -m: Model name that clients use; required for LiteLLM.", "")


class _Upstreams(NamedTuple):
    """The serving replicas for a router: endpoints with weights, and the names of those that a router cannot use."""

    servers: list[tuple[str, int]]
    most: dict[str, int]  # requests with which each is full
    without_address: list[str]
    with_half_a_role: list[str]  # they only prefill, or only decode
    unreported: list[str]  # the planner knows that they serve, but their agents have not reported to it yet

    def left_out(self) -> Iterator[str]:
        """Yield a sentence for each reason why a serving replica is left out."""
        if self.without_address:
            yield f"only agents with --engine launch:FILE report an address: {', '.join(self.without_address)}"
        if self.unreported:
            yield f"their agents have not reported to the planner: {', '.join(self.unreported)}"
        if self.with_half_a_role:
            yield f"a router sends each request to one replica, and these do half: {', '.join(self.with_half_a_role)}"

    def why_none(self) -> str:
        """Return why there are no servers, although there may be serving replicas."""
        from hetis.planner.export.routing import NOTHING_SERVES

        why = [f"{', '.join(self.without_address)} without an address"] if self.without_address else []
        why += [f"{', '.join(self.with_half_a_role)} only for prefill or decode"] if self.with_half_a_role else []
        return f"what serves: {'; '.join(why)}" if why else NOTHING_SERVES


@server_verb(prints_data=False, is_endless=True)
def upstreams(terminal: Terminal, client: Client, *, requested: UpstreamOptions) -> ExitCode:
    """Write the serving replicas for a router, with weights from the plan's rates.

    Agents that start engines themselves say where these listen. Replicas that only prefill or decode are left out: a
    router would have to send a request to both.

    A planner that has just taken the lead does not know yet where engines listen: the verb waits up to 30 s for the
    agents. If none has reported by then, no list is written, and the exit code is 6. If some have, those are listed,
    unless --out has a list already: it is kept, and the exit code is 6. With --follow it is kept until all have, and
    the verb waits for a planner however long, also when it starts.
    """
    if requested.to == "litellm" and not requested.model:
        raise typer.BadParameter("--to litellm needs --model, the name that clients use")
    try:
        command = shlex.split(requested.run)
    except ValueError as error:
        raise typer.BadParameter(f"--run is {requested.run!r}: {error}") from None
    refuse_unwritable(Path(requested.out))
    before, said, code = None, list[str](), ExitCode.OK
    for found in _changes(terminal, client, requested.cluster, follow=requested.follow):
        for why in (left_out := list(found.left_out())):
            if why not in said:
                terminal.warn(f"left out, because {why}")
        said = left_out
        if found.unreported and (not found.servers or (before is None and _has_list(requested))):
            code = _keep(terminal, requested, found)
            continue
        text = _list_of(requested.to, found, requested.model)
        if text == before:
            continue
        before = text
        write_out(terminal, requested.out, text, said=f"wrote {len(found.servers)} servers to {requested.out}")
        if command:
            _run(terminal, command)
    return code


def _has_list(requested: UpstreamOptions) -> bool:
    """Return whether there is a list already, which one of a part of the replicas must not replace."""
    return requested.out != "-" and Path(requested.out).is_file() and Path(requested.out).stat().st_size > 0


def _keep(terminal: Terminal, requested: UpstreamOptions, found: _Upstreams) -> ExitCode:
    """Say that no list is written, because the planner does not know yet where all replicas serve, or any."""
    kept = "nothing was written" if requested.out == "-" else f"{requested.out} was not written"
    where = f"these serve: {', '.join(found.unreported)}" if found.servers else "anything serves"
    if requested.follow:
        terminal.warn(f"{kept}: the planner does not know yet where {where}")
        return ExitCode.OK
    terminal.error(f"{kept}: the planner does not know yet where {where}", ["retry in a moment"])
    return ExitCode.UNREACHABLE


def _list_of(to: RouterFormat, found: _Upstreams, model: str) -> str:
    from hetis.planner.export.routing import envoy_list, litellm_list, nginx_list

    if to == "litellm":
        return litellm_list(found.servers, model)
    return nginx_list(found.servers, found.why_none(), most=found.most) if to == "nginx" else envoy_list(found.servers)


def _changes(terminal: Terminal, client: Client, given: str | None, *, follow: bool) -> Iterator[_Upstreams]:
    """Yield what serves: now and, with ``follow``, after every change of a replica, however long no planner answers."""

    def read() -> _Upstreams:
        return _servers(client, cluster, known, endpoints)

    def read_in_the_end() -> _Upstreams:
        return _in_the_end(terminal, client, read)

    known, endpoints = dict[tuple[str, str], tuple[float, int]](), dict[str, str]()
    if not follow:
        cluster = chosen_cluster(client, given)
        yield _once_reported(terminal, read)
        return
    cluster = _in_the_end(terminal, client, lambda: chosen_cluster(client, given))
    yield _once_reported(terminal, read_in_the_end)
    seen = dict[str, tuple[int, str]]()
    is_live = False
    for event in client.watch_cluster(cluster):
        is_live = (is_live or event.caught_up) and not event.reset
        is_news = event.caught_up
        if event.WhichOneof("event") == "replica":
            now = (event.replica.state, event.replica.report.endpoint)
            is_news = is_news or seen.get(event.replica.name) != now
            seen[event.replica.name] = now
        elif event.WhichOneof("event") == "removed_replica":
            is_news = seen.pop(event.removed_replica, None) is not None or is_news
        if is_live and is_news:
            yield read_in_the_end()


def _once_reported(terminal: Terminal, read: Callable[[], _Upstreams]) -> _Upstreams:
    """Return what serves once all agents have reported, or what is known after `HEARD_WITHIN_S`."""
    found = read()
    end_s = time.monotonic() + HEARD_WITHIN_S  # from now on, since with --follow the first answer may take hours
    if found.unreported:
        terminal.say(
            f"waiting up to {HEARD_WITHIN_S:g} s for agents to report to the planner where engines listen: "
            + ", ".join(found.unreported)
        )
    while found.unreported and time.monotonic() < end_s:
        time.sleep(LISTED_AGAIN_S)
        found = read()
    return found


def _in_the_end(terminal: Terminal, client: Client, read: Callable[[], T]) -> T:
    """Return the result of ``read``, retrying while the planner cannot be reached, and saying why it cannot."""
    import grpc

    from hetis.planner.client import CallError

    retries, said = client.retries(), ""
    while True:
        retries.attempt()
        try:
            found = read()
        except CallError as error:
            if not error.is_unreachable:
                raise
            if str(error) != said:
                said = str(error)
                terminal.warn(said)
            time.sleep(retries.next_wait_s(CallError(str(error), code=grpc.StatusCode.UNAVAILABLE)))
        else:
            retries.answered()
            return found


def _servers(
    client: Client, cluster: str, known: dict[tuple[str, str], tuple[float, int]], endpoints: dict[str, str]
) -> _Upstreams:
    """Return the serving replicas, with weights for those that both prefill and decode and have an endpoint.

    Args:
        client: of the planner.
        cluster: its name.
        known: rates, and the requests with which each is full, by replica and plan; missing ones are fetched.
        endpoints: the known endpoints by replica, to which new ones are added. A planner that has just taken the lead,
            or that stands by, knows which replicas serve, but not where until their agents have reported.
    """
    from hetis.planner.convert.plans import replica_from_proto
    from hetis.planner.export.routing import weighted
    from hetis.v1 import replica_pb2

    up = (replica_pb2.REPLICA_STATE_SERVING, replica_pb2.REPLICA_STATE_DEGRADED)
    apart = (replica_pb2.REPLICA_ROLE_PREFILL, replica_pb2.REPLICA_ROLE_DECODE)
    serving, silent, halves, unreported = dict[str, tuple[float, int]](), list[str](), list[str](), list[str]()
    for basic in client.list_replicas(cluster):
        name = basic.name.rpartition("/")[2]
        if basic.state not in up:
            continue
        has_report = basic.HasField("report")
        endpoint = basic.report.endpoint if has_report else endpoints.get(basic.name, "")
        if basic.role in apart:
            halves.append(name)
        elif not endpoint:
            (silent if has_report else unreported).append(name)
        else:
            one = basic.name, basic.plan
            if one not in known:
                shape = fetched(client, "replicas", basic.name).shape  # lists leave it out
                known[one] = shape.rate_rps, replica_from_proto(shape).most_held
            endpoints[basic.name] = endpoint
            serving[endpoint] = known[one]
    found = sorted(serving.items())
    rates, most = {at: rate for at, (rate, _) in found}, {at: most for at, (_, most) in found}
    return _Upstreams(weighted(rates), most, silent, halves, unreported)


def _run(terminal: Terminal, command: list[str]) -> None:
    """Run the user's command; a failure is reported and otherwise ignored."""
    import subprocess

    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        terminal.warn(f"--run: {command[0]}: {error.strerror}")
        return
    if done.returncode:
        terminal.warn(f"--run: {command[0]} ended with {done.returncode}")
