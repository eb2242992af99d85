"""The actions of `hetis-planner`: serving, tokens, an operator's work on a store, and error messages."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from hetis.formats.documents import dump_data
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.planner.service.access import CallerRole
from hetis.planner.service.credentials import create_token
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.settings import Given, PlannerConfig, load_config, mistaken_variables
from hetis.planner.store import Lease, Reader
from hetis.planner.store.audit import AuditFilter, AuditLine
from hetis.planner.store.copying import back_up, migrate_to, read_store, restore
from hetis.planner.store.opening import revisions

if TYPE_CHECKING:
    from hetis.planner.service.running import OpenPlanner, Planner


TICK_S = 0.5
TICKS = 4  # in a row: a process that was suspended as a whole finds its lease expired, too, but then steps down


class OverdueTerm:
    """Detects a term that has been over for a while without the loop noticing."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ticks = 0

    def tick(self) -> bool:
        """Return whether the term has been overdue for `TICKS` ticks; to be called every `TICK_S` seconds."""
        self._ticks = self._ticks + 1 if self._lease.is_overdue else 0
        return self._ticks >= TICKS


def end_process() -> None:
    """Dump the stacks of all threads and exit without cleanup, since any other way of ending needs the loop."""
    os.write(2, b"the lease is over and the event loop hangs: this planner ends, so that its agents find the leader\n")
    faulthandler.dump_traceback(2)
    os._exit(ServiceExitCode.INTERNAL)


def watch(lease: Lease) -> None:
    """End the process of a leader whose event loop hangs after its lease has expired; a file's lock never does.

    The loop is what dismisses agents and watchers when a term is over. If it hangs, gRPC's own threads still answer
    pings, so its agents would stay with it for as long as it hangs, and their nodes would be LOST to the next leader. A
    separate thread checks the lease, which depends on the machine's clock and not on the loop.
    """
    if not lease.lease_s:
        return
    term = OverdueTerm(lease)

    def go_on() -> None:
        while not term.tick():
            time.sleep(TICK_S)
        end_process()

    threading.Thread(target=go_on, name="the guard of the lease", daemon=True).start()


_log = logging.getLogger("hetis.planner")


def serve(path: str | None, flags: Sequence[Given], *, ready_json: bool) -> None:
    """Serve until a signal asks to stop."""

    async def open_planner(config: PlannerConfig) -> Planner:
        from hetis.planner.service.assembly import open_planner as open_all  # late: a wrong setting is told at once

        planner = await open_all(config)
        watch(planner.lease)
        return planner

    serve_with(open_planner, path, flags, ready_json=ready_json)


def serve_with(open_planner: OpenPlanner, path: str | None, flags: Sequence[Given], *, ready_json: bool) -> None:
    from hetis.planner.service.running import problems_of_access, run_planner
    from hetis.planner.service.telemetry import set_up_logs

    config = load_config(path, environment=os.environ, flags=flags, look_further=problems_of_access)
    set_up_logs(level=config.log.level, form=config.log.format)
    for hint in mistaken_variables(os.environ):
        _log.warning(hint)
    asyncio.run(run_planner(config, open_planner, version=version("hetis"), ready_json=ready_json))


def check_config(path: str | None, flags: Sequence[Given]) -> None:
    """Report whether the planner could start with this configuration; opens neither the store nor a port."""
    from hetis.planner.service.running import Access, problems_of_access

    config = load_config(path, environment=os.environ, flags=flags, look_further=problems_of_access)
    access = Access(config)
    for hint in mistaken_variables(os.environ):
        print(f"warning: {hint}", file=sys.stderr)
    tokens = f", {len(access.tokens.value)} tokens" if access.tokens is not None else ""
    print(f"{path or 'configuration'}: ok{', certificate' if access.certificates else ''}{tokens}")


def print_effective(path: str | None, flags: Sequence[Given]) -> None:
    config: PlannerConfig = load_config(path, environment=os.environ, flags=flags)
    print(dump_data(config.to_data()), end="")


def make_token(
    path: str, *, role: str, name: str | None, node: str | None, cluster: str | None, valid_days: str
) -> None:
    """Print a new token on stdout, and everything else on stderr."""
    scope = _scope(role, node, cluster)
    expires = datetime.now(UTC) + _days(valid_days)
    chosen = name or "-".join([role, *((scope or "").split("/")[1::2])])
    token = create_token(path, name=chosen, role=CallerRole(role), scope=scope, expires=expires)
    print(token)
    ends = expires.isoformat(timespec="seconds")
    print(f"token {chosen}, role {role}, valid until {ends}; it is shown this once", file=sys.stderr)


def _scope(role: str, node: str | None, cluster: str | None) -> str | None:
    given = [scope for scope in (node, cluster) if scope is not None]
    if role == CallerRole.AGENT and len(given) != 1:
        raise DocumentError([Problem(file="--role agent", message="needs either --node or --cluster")])
    if role != CallerRole.AGENT and given:
        raise DocumentError([Problem(file=f"--role {role}", message="takes neither --node nor --cluster")])
    if node is not None and "/nodes/" not in node:
        raise DocumentError([Problem(file="--node", message=f"{node!r} is not clusters/CLUSTER/nodes/NODE")])
    if cluster is not None and "/nodes/" in cluster:
        raise DocumentError([Problem(file="--cluster", message=f"{cluster!r} is not clusters/CLUSTER")])
    return given[0] if given else None


def _days(text: str) -> timedelta:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 < days <= 3650:
        raise DocumentError([Problem(file="--valid", message=f"is {text}, must be days, more than 0, at most 3650")])
    return timedelta(days=days)


def report(error: Exception) -> ServiceExitCode:
    """Print the error on stderr, never a traceback, and return its exit code."""
    from hetis.planner.failures import ServiceError
    from hetis.planner.service.server import AddressError
    from hetis.planner.service.telemetry import MissingExtraError
    from hetis.planner.store.opening import StoreError

    match error:
        case DocumentError():
            code, lines = ServiceExitCode.INVALID, [str(problem) for problem in error.problems]
        case MissingExtraError():
            code, lines = ServiceExitCode.INVALID, [str(error)]
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


def store_url(path: str | None, flags: Sequence[Given]) -> str:
    """Return the store's URL in the configuration that a planner would be started with."""
    return load_config(path, environment=os.environ, flags=flags).store


def make_backup(url: str, file: str) -> None:
    num = back_up(url, Path(file))
    print(f"{file}: {num} rows, {Path(file).stat().st_size} bytes")


def restore_backup(url: str, file: str, *, replace: bool) -> None:
    num, epoch = restore(url, Path(file), replace=replace)
    print(f"restored {num} rows of {file}; the next planner leads with epoch {epoch + 1}")


def migrate_store(url: str, to: str | None) -> None:
    wanted = to or revisions()[-1]
    before = migrate_to(url, wanted)
    print(f"{wanted}, as before" if before == wanted else f"{before} -> {wanted}")


def print_audit(
    url: str,
    *,
    caller: str | None,
    method: str | None,
    resource: str | None,
    outcome: str | None,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Print the lines that match all filters, oldest first."""
    which = AuditFilter(
        caller=caller,
        method=method,
        outcome=outcome,
        resource=resource,
        since_s=_moment("--since", since),
        until_s=_moment("--until", until),
    )

    def show(reader: Reader) -> None:
        for line in reader.audit.lines(which):
            print(_as_json(line) if as_json else _as_text(line))

    read_store(url, show)


def check_audit(url: str) -> ServiceExitCode:
    """Report whether any line was altered, and print the last hash, which reveals a truncated log if kept elsewhere."""

    def check(reader: Reader) -> ServiceExitCode:
        if (wrong := reader.audit.first_wrong()) is not None:
            print(f"error: line {wrong} of the audit log is not what was written, or is missing", file=sys.stderr)
            return ServiceExitCode.STORE
        last = reader.audit.last()
        print("no lines" if last is None else f"{last.number} lines, unbroken; the last hash is {last.hash}")
        return ServiceExitCode.OK

    return read_store(url, check)


def _moment(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise single_problem(option, f"{text!r} is not a moment: write it like 2027-01-31T00:00:00Z") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _as_json(line: AuditLine) -> str:
    values = {"number": line.number, "time": _time(line), "epoch": line.epoch, **asdict(line.change)}
    return json.dumps(values | {"hash": line.hash}, ensure_ascii=False)


def _as_text(line: AuditLine) -> str:
    change = line.change
    parts = [str(line.number), _time(line), change.outcome, f"{change.caller} ({change.role})", change.method]
    parts += [change.resource] if change.resource else []
    parts += [f"plan {change.plan}"] if change.plan and change.plan != change.resource else []
    parts += [f"request {change.request_id}"] if change.request_id else []
    parts += [f"{change.times} times"] if change.times > 1 else []
    return "  ".join("".join(c if c.isprintable() else "?" for c in part) for part in parts)


def _time(line: AuditLine) -> str:
    return datetime.fromtimestamp(line.time_s, UTC).isoformat(timespec="milliseconds")
