"""Commands on a store apart from serving: backup, restore, migration, and reading the audit log."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from hetis.formats.errors import single_problem
from hetis.formats.units import parse_moment
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.settings import Given, load_config
from hetis.planner.store import Reader
from hetis.planner.store.audit import AuditFilter, AuditLine
from hetis.planner.store.copying import back_up, migrate_to, read_store, restore
from hetis.planner.store.schema import revisions


def store_url(config: str | None, store: str | None) -> str:
    """Return the store's URL from the configuration with which a planner would be started."""
    flags = [Given(name="store", text=store, by="--store")] if store else []
    return load_config(config, environment=os.environ, flags=flags).store


def make_backup(url: str, file: str) -> None:
    num = back_up(url, Path(file))
    print(f"{file}: {num} rows, {Path(file).stat().st_size} bytes")


def restore_backup(url: str, file: str, *, replace: bool) -> None:
    num, epoch = restore(url, Path(file), replace=replace)
    print(f"restored {num} rows of {file}; the next planner leads with epoch {epoch + 1}")


def migrate_store(url: str, to: str | None) -> None:
    wanted = to or revisions()[-1]
    before = migrate_to(url, wanted)
    print(f"{wanted}, unchanged" if before == wanted else f"{before} -> {wanted}")


def print_audit(url: str, filters: Mapping[str, str | None], *, as_json: bool) -> None:
    """Print the lines that match all filters, the oldest first; ``since`` and ``until`` are times."""
    texts = dict(filters)
    since_s, until_s = (_moment(f"--{name}", texts.pop(name)) for name in ("since", "until"))
    which = AuditFilter(**texts, since_s=since_s, until_s=until_s)

    def show(reader: Reader) -> None:
        for line in reader.audit.lines(which):
            print(_as_json(line) if as_json else _as_text(line))

    read_store(url, show)


def check_audit(url: str) -> ServiceExitCode:
    """Report whether any line was altered, and print the last hash: a copy kept elsewhere reveals a truncated log."""

    def check(reader: Reader) -> ServiceExitCode:
        if (wrong := reader.audit.first_wrong()) is not None:
            print(f"error: line {wrong} of the audit log was altered or is missing", file=sys.stderr)
            return ServiceExitCode.STORE
        last = reader.audit.last()
        print("no lines" if last is None else f"{last.number} lines, intact; the last hash is {last.hash}")
        return ServiceExitCode.OK

    return read_store(url, check)


def _moment(option: str, text: str | None) -> float | None:
    try:
        return None if text is None else parse_moment(text).timestamp()
    except ValueError as error:
        raise single_problem(option, str(error)) from None


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
