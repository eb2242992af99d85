"""Code shared by verbs that talk to a planner: its address, credentials, and resource names."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hetis.commands.terminal import Terminal, in_use
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_call_failure
from hetis.planner.cli.parameters.options import group, option, panel, verb

if TYPE_CHECKING:
    from hetis.planner.client import Client, Connection

DEFAULT_SERVER = "127.0.0.1:8470"  # where hetis-planner listens by default
LONGEST_SILENCE_S = 60.0  # how long a watched or awaited planner may be unreachable
_planner = panel("Planner")

cluster_name_option = partial(option, "--cluster -c NAME: Name of the cluster.", shown="the only one")


@group
class InCluster:
    cluster: str | None = cluster_name_option()


@group
class PlannerOptions:
    server: str = _planner(
        "--server HOST:PORT: Address of the planner; separate several by commas.", DEFAULT_SERVER, envvar="HETIS_SERVER"
    )
    ca: Path | None = _planner(
        "--ca FILE: CA of the planner's certificate. Default: the system's CAs; a planner on this machine "
        "needs no TLS.",
        envvar="HETIS_CA",
    )
    cert: Path | None = _planner("--cert FILE: Client certificate.", envvar="HETIS_CERT")
    key: Path | None = _planner("--key FILE: Key of the client certificate.", envvar="HETIS_KEY")
    token_file: Path | None = _planner("--token-file FILE: File with the bearer token.", envvar="HETIS_TOKEN_FILE")

    def use(self, terminal: Terminal, use: Callable[[Client], ExitCode], *, is_endless: bool = False) -> ExitCode:
        """Call ``use`` with a client and return its exit code, or report a failed call and return its exit code.

        ``is_endless``: a watch waits indefinitely for a planner that does not answer.
        """
        from hetis.planner.client import CallError, Client, Retries

        place = self._connection()
        limit_s = math.inf if is_endless else LONGEST_SILENCE_S
        trying = "until it is" if is_endless else f"for up to {limit_s:g} s"

        def tell(is_reached: bool) -> None:
            if is_reached:
                terminal.say(f"the planner at {place.address} is reachable again")
            else:
                terminal.warn(f"the planner at {place.address} is unreachable; retrying {trying}")

        waited_for = list[list[str]]()

        def tell_slow(addresses: list[str]) -> None:
            if is_endless and addresses in waited_for:
                return  # `tell` says every minute that retries go on
            waited_for.append(addresses)
            tried, *others = addresses
            then = f"; then {', '.join(others)}" if others else ""
            terminal.say(f"waiting for an answer from the planner at {tried}{then}")

        try:
            retries = partial(Retries, limit_s=limit_s, report=tell)
            with Client(place, retries=retries, on_slow=tell_slow) as client:
                code = use(client)
                if client.has_standby_answered:
                    terminal.warn(
                        "no leader answered: this is what a standby has saved, without the state of agents and engines"
                        " and the progress of searches"
                    )
                return code
        except CallError as error:
            # A verb with output formats of its own has chosen one by now.
            return report_call_failure(in_use.get() or terminal, error, place.address, is_plain=place.is_plain)

    def _connection(self) -> Connection:
        from hetis.planner.client import Connection

        try:
            place = Connection(
                address=self.server, ca=self.ca, cert=self.cert, key=self.key, token_file=self.token_file
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            for path in (place.ca, place.cert, place.key):
                if path is not None:
                    path.read_bytes()
            place.metadata()
        except OSError as error:
            raise typer.BadParameter(f"{error.filename}: {error.strerror or error}") from None
        return place


def server_verb(
    *, prints_data: bool = True, is_endless: bool = False
) -> Callable[[Callable[..., ExitCode]], Callable[..., None]]:
    """Turn ``f(terminal, client, ...) -> ExitCode`` into a typer command, as `verb` does for those without a client.

    ``is_endless``: the verb's watches wait indefinitely for a planner that does not answer.
    """

    def decorate(function: Callable[..., ExitCode]) -> Callable[..., None]:
        @functools.wraps(function)
        def with_client(terminal: Terminal, *args: Any, planner: PlannerOptions, **given: Any) -> ExitCode:
            return planner.use(
                terminal, lambda client: function(terminal, client, *args, **given), is_endless=is_endless
            )

        terminal, _client, *own = inspect.signature(function).parameters.values()
        planner = inspect.Parameter("planner", inspect.Parameter.KEYWORD_ONLY, annotation=PlannerOptions)
        parameters = [terminal, *own, planner]
        with_client.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_client.__annotations__ = {one.name: one.annotation for one in parameters}
        return verb(prints_data=prints_data)(with_client)

    return decorate


# --- names

# Collections, as they appear in resource names, and the kind in each. Those of `IN_CLUSTER` belong to a cluster.
KINDS = {
    "clusters": "Cluster",
    "nodes": "Node",
    "plans": "Plan",
    "replicas": "Replica",
    "redispatches": "Redispatch",
    "profiles": "Profile",
}
IN_CLUSTER = ("nodes", "replicas", "redispatches")
_SINGULAR = {kind.lower(): collection for collection, kind in KINDS.items()}
_MAX_ID = 63


def collection(text: str) -> str:
    """Return ``plans`` for ``plans``, ``plan`` and ``plans/night``; ``nodes`` for ``clusters/c/nodes/n``."""
    last = text.split("/")[-2] if "/" in text.strip("/") else text
    found = _SINGULAR.get(last, last)
    if found not in KINDS:
        raise typer.BadParameter(f"{text!r} is not a kind of resource, expected one of {', '.join(KINDS)}")
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
    """Return the specified cluster, or the only one if none is specified."""
    from hetis.planner.convert.names import last_part

    if given:
        return full_name("clusters", given)
    names = [cluster.name for cluster in client.list_clusters()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise typer.BadParameter("the planner has no cluster yet: create one with hetis-plan apply CLUSTER_FILE")
    raise typer.BadParameter(
        f"there are several clusters: give --cluster {' | '.join(last_part(name) for name in names[:5])}"
    )


def id_of(text: str) -> str:
    """Return an id for a human-readable name: ``a100-sxm-80gb`` for ``A100-SXM-80GB``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_MAX_ID].strip("-")


def called(client: Client, verb: str, what: str, **fields: Any) -> Any:
    """Call the method of a collection, such as ``GetPlan`` for ``Get`` and ``plans``, and return its response."""
    from hetis.v1 import cluster_service_pb2, plan_service_pb2, profile_service_pb2

    plans, profiles = (client.plans, plan_service_pb2), (client.profiles, profile_service_pb2)
    own: dict[str, Any] = {"plans": plans, "profiles": profiles}
    service, requests = own.get(what, (client.clusters, cluster_service_pb2))
    method = f"{verb}{KINDS[what]}"
    return getattr(service, method)(getattr(requests, f"{method}Request")(**fields))


def fetched(client: Client, what: str, name: str, *, basic: bool = False) -> Any:
    """Read one resource of a collection; ``basic`` leaves out documents."""
    from hetis.v1 import view_pb2

    view = {"view": view_pb2.VIEW_BASIC} if basic else {}
    return getattr(called(client, "Get", what, name=name, **view), KINDS[what].lower())
