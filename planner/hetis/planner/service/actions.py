"""The actions of `hetis-planner` except those on a store, and its error messages."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from hetis.formats.documents import dump_data
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.planner.callers import CallerRole
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.identity.credentials import Tokens, create_token
from hetis.planner.service.settings import Given, PlannerConfig, load_config, mistaken_variables

if TYPE_CHECKING:
    from hetis.planner.service.running import OpenPlanner
    from hetis.planner.service.succession import Succession


_log = logging.getLogger("hetis.planner")


def serve(path: str | None, flags: Sequence[Given], *, ready_json: bool) -> None:
    """Serve until a signal requests the end."""

    async def open_planner(config: PlannerConfig) -> Succession:
        from hetis.planner.service.succession import end_overdue_terms
        from hetis.planner.service.succession import open_planner as open_all  # late: wrong settings are reported first

        planner = await open_all(config)
        end_overdue_terms(planner.lease)
        return planner

    serve_with(open_planner, path, flags, ready_json=ready_json)


def serve_with(open_planner: OpenPlanner, path: str | None, flags: Sequence[Given], *, ready_json: bool) -> None:
    from hetis.planner.service.limits import raise_descriptors
    from hetis.planner.service.observability.telemetry import set_up_logs
    from hetis.planner.service.running import problems_of_access, run_planner

    config = load_config(path, environment=os.environ, flags=flags, look_further=problems_of_access)
    set_up_logs(level=config.log.level, form=config.log.format)
    for hint in mistaken_variables(os.environ):
        _log.warning(hint)
    descriptors = raise_descriptors(config.solver.processes)  # before the event loop, which takes some
    running = run_planner(
        config, open_planner, version=version("hetis"), descriptors=descriptors, ready_json=ready_json
    )
    asyncio.run(running)


def check_config(path: str | None, flags: Sequence[Given]) -> None:
    """Report whether the planner could start and be reached with this configuration; opens no store and no port."""
    from hetis.planner.service.running import Access, problems_of_access, problems_of_names

    def look_further(config: PlannerConfig) -> Sequence[Problem]:
        return [*problems_of_access(config), *problems_of_names(config)]

    config = load_config(path, environment=os.environ, flags=flags, look_further=look_further)
    access = Access(config)
    for hint in (*mistaken_variables(os.environ), *access.warnings):
        print(f"warning: {hint}", file=sys.stderr)
    tokens = f", {len(access.tokens.value)} tokens" if access.tokens is not None else ""
    print(f"{path or 'configuration'}: ok{', certificate' if access.certificates else ''}{tokens}")


def print_effective(path: str | None, flags: Sequence[Given]) -> None:
    config: PlannerConfig = load_config(path, environment=os.environ, flags=flags)
    print(dump_data(config.to_data()), end="")


def make_token(
    path: str, *, role: CallerRole, name: str | None, node: str | None, cluster: str | None, valid_days: str
) -> None:
    """Print a new token on stdout, and everything else on stderr."""
    scope = _scope(role, node, cluster)
    expires = datetime.now(UTC) + _days(valid_days)
    chosen = name or "-".join([role, *((scope or "").split("/")[1::2])])
    show = partial(print, flush=True)  # a full disk is noticed at once, and the token not kept
    create_token(path, name=chosen, role=role, scope=scope, expires=expires, hand_over=show)
    ends = expires.isoformat(timespec="seconds")
    print(f"token {chosen}, role {role}, valid until {ends}; it is shown only once", file=sys.stderr)


def rotate_token(path: str, *, name: str, valid_days: str) -> None:
    """Print a further token of the same caller on stdout, and on stderr what to do with the earlier ones."""
    bearer, expires = Tokens.load(path).bearer(name), datetime.now(UTC) + _days(valid_days)
    if bearer is None:
        raise single_problem(path, f"has no token of the name {name}; hetis-planner token create makes one")
    role, show = CallerRole(bearer.role), partial(print, flush=True)
    create_token(path, name=name, role=role, scope=bearer.scope, expires=expires, hand_over=show, is_further=True)
    ends = expires.isoformat(timespec="seconds")
    print(
        f"a further token of {name}, valid until {ends}; it is shown only once. Give it to its bearer, then delete the"
        f" earlier entries of {name} from {path}",
        file=sys.stderr,
    )


def _scope(role: CallerRole, node: str | None, cluster: str | None) -> str | None:
    given = [scope for scope in (node, cluster) if scope is not None]
    if role is CallerRole.AGENT and len(given) != 1:
        raise single_problem("--role agent", "needs either --node or --cluster")
    if role is not CallerRole.AGENT and given:
        raise single_problem(f"--role {role}", "takes neither --node nor --cluster")
    if node is not None and "/nodes/" not in node:
        raise single_problem("--node", f"{node!r} does not have the form clusters/CLUSTER/nodes/NODE")
    if cluster is not None and "/nodes/" in cluster:
        raise single_problem("--cluster", f"{cluster!r} does not have the form clusters/CLUSTER")
    return given[0] if given else None


def _days(text: str) -> timedelta:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 < days <= 3650:
        raise single_problem("--valid", f"is {text}, must be a number of days above 0, at most 3650")
    return timedelta(days=days)


def report(error: Exception) -> ServiceExitCode:
    """Print the error on stderr, never a traceback, and return its exit code."""
    from hetis.planner.failures import ServiceError
    from hetis.planner.service.server import AddressError
    from hetis.planner.store.opening import StoreError

    match error:
        case DocumentError():
            code, lines = ServiceExitCode.INVALID, [str(problem) for problem in error.problems]
        case AddressError():
            code, lines = ServiceExitCode.ADDRESS, [str(error)]
        case ServiceError() | StoreError():
            code, lines = ServiceExitCode.STORE, [str(error)]
        case OSError():
            name = f"{error.filename}: " if error.filename else ""
            code, lines = ServiceExitCode.INTERNAL, [f"{name}{error.strerror or error}"]
        case _:
            lines = [
                f"internal error: {type(error).__name__}: {error}",
                "This is a bug in hetis. HETIS_DEBUG=1 shows the traceback.",
            ]
            code = ServiceExitCode.INTERNAL
    print("error: " + lines[0], *(f"       {line}" for line in lines[1:]), sep="\n", file=sys.stderr)
    return code
