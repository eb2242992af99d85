"""The `hetis-planner` command: options, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.groups import group, option, ungrouped
from hetis.commands.verb import choice_of, run_application, version_option
from hetis.planner.callers import CallerRole
from hetis.planner.service.exit_codes import ServiceExitCode

if TYPE_CHECKING:
    from hetis.planner.service.settings import Given

_HELP = (
    "Serve the planning service: plans, clusters, dispatch, and the agents of GPU nodes.\n\n"
    "Settings come from flags, HETIS_* variables (HETIS_TLS__CERTIFICATE sets tls.certificate) and the --config file,"
    " in this order of precedence; all have defaults. examples/service/planner.yaml has all of them."
)
_EXAMPLES = """Examples:

  hetis-planner                                 listen on loopback, store in ~/.local/state/hetis

  hetis-planner --config planner.yaml --check   validate and exit

  HETIS_LOG__LEVEL=debug hetis-planner --config planner.yaml

  hetis-planner --listen 127.0.0.1:0 --status-page off --ready-json

  hetis-planner token create --file tokens.yaml --name node-7 --role agent --node clusters/c/nodes/n7"""


app = typer.Typer(
    name="hetis-planner",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
token = typer.Typer(help="Manage the bearer tokens of callers.", no_args_is_help=True)
app.add_typer(token, name="token")


ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", envvar="HETIS_CONFIG", help="PlannerConfig file.")
]
_STORE = "--store URL: Store: sqlite:///... or postgresql://..."
_setting = partial(option, panel="Settings")


@group
class SettingFlags:
    """The settings that have a flag, and ``--set`` for all others."""

    listen: list[str] | None = _setting("--listen HOST:PORT: Address to listen on; repeatable.")
    status_page: str | None = _setting("--status-page HOST:PORT|off: HTTP address of the status page.")
    store: str | None = _setting(_STORE)
    log_level: str | None = _setting("--log-level LEVEL: debug, info, warning or error.")
    log_format: str | None = _setting("--log-format FORM: json or text.")
    standby: bool | None = _setting(
        "--standby/--no-standby: While another planner leads, wait and serve reads, or exit; by default it waits on"
        " PostgreSQL."
    )
    settings: list[str] | None = _setting("--set NAME=VALUE: Any setting, such as solver.queue=64; repeatable.")

    def given(self) -> list[Given]:
        from hetis.planner.service.settings import Given

        flags = [Given(name=name, text=text, by=f"--set {name}") for name, text in map(_split, self.settings or ())]
        for name, flag, value in (
            ("listen", "--listen", ",".join(self.listen or ())),
            ("status_page.address", "--status-page", self.status_page),
            ("store", "--store", self.store),
            ("log.level", "--log-level", self.log_level),
            ("log.format", "--log-format", self.log_format),
            ("leadership.standby", "--standby", None if self.standby is None else str(self.standby).lower()),
        ):
            if value:
                flags.append(Given(name=name, text=value, by=flag))
        return flags


@group
class StoreFlags:
    """The store on which a command works apart from a planner."""

    config: str | None = option("--config -c FILE: PlannerConfig file.", envvar="HETIS_CONFIG")
    store: str | None = option(_STORE)

    @property
    def url(self) -> str:
        from hetis.planner.service.maintenance import store_url

        return store_url(self.config, self.store)


@app.callback(invoke_without_command=True, help=_HELP, epilog=f"{_EXAMPLES}\n\n{ServiceExitCode.listed()}")
@ungrouped
def hetis_planner(
    context: typer.Context,
    flags: SettingFlags,
    config: ConfigOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate the configuration, certificates and tokens, and exit.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective configuration, without secrets, and exit.")
    ] = False,
    ready_json: Annotated[
        bool, typer.Option("--ready-json", help="When ready, print the addresses to stdout as one line of JSON.")
    ] = False,
    _version: Annotated[bool, version_option("hetis-planner")] = False,
) -> None:
    """Handle the options that `_HELP` describes."""
    if context.invoked_subcommand is not None:
        return
    from hetis.planner.service.actions import check_config, print_effective, serve

    if print_config:
        print_effective(config, flags.given())
    elif check:
        check_config(config, flags.given())
    else:
        serve(config, flags.given(), ready_json=ready_json)


@token.command("create")
def create(
    file: Annotated[str, typer.Option("--file", metavar="FILE", help="Token file; created if it does not exist.")],
    role: Annotated[
        CallerRole, typer.Option("--role", parser=choice_of(CallerRole), help="Role that the token grants.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name for logs. Default: role and node.")] = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="clusters/C/nodes/N", help="For an agent of this node.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="clusters/C", help="For an agent of any node of this cluster.")
    ] = None,
    valid: Annotated[str, typer.Option("--valid", metavar="DAYS", help="Validity in days.")] = "365",
) -> None:
    """Create a token, print it once to stdout, and append its SHA-256 to the token file."""
    from hetis.planner.service.actions import make_token

    make_token(file, role=role, name=name, node=node, cluster=cluster, valid_days=valid)


@token.command("rotate")
def rotate(
    file: Annotated[str, typer.Option("--file", metavar="FILE", help="Token file.")],
    name: Annotated[str, typer.Option("--name", help="Name of the token.")],
    valid: Annotated[str, typer.Option("--valid", metavar="DAYS", help="Validity in days.")] = "365",
) -> None:
    """Create a further token with the name, role and scope of another one, which stays valid until it is deleted."""
    from hetis.planner.service.actions import rotate_token

    rotate_token(file, name=name, valid_days=valid)


@app.command("backup")
@ungrouped
def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Backup file to create; it must not exist yet.")],
    of: StoreFlags,
) -> None:
    """Write a snapshot of the store to a file. Planners can keep running."""
    from hetis.planner.service.maintenance import make_backup

    make_backup(of.url, file)


@app.command("restore")
@ungrouped
def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Backup file that `backup` wrote.")],
    of: StoreFlags,
    replace: Annotated[bool, typer.Option("--replace", help="Discard the store's present contents.")] = False,
) -> None:
    """Restore the store from a backup, and raise its epoch. No planner may lead during the restore."""
    from hetis.planner.service.maintenance import restore_backup

    restore_backup(of.url, file, replace=replace)


@app.command("migrate")
@ungrouped
def migrate(
    of: StoreFlags,
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="Target version, such as v0002. Default: the newest.")
    ] = None,
) -> None:
    """Migrate the store's tables up or down to a version. Make a backup first."""
    from hetis.planner.service.maintenance import migrate_store

    migrate_store(of.url, to)


@group
class AuditFlags:
    """Which lines of the audit log are shown."""

    caller: str | None = option("--caller: Name of the caller.")
    method: str | None = option("--method: Method, such as CreatePlan.")
    resource: str | None = option("--resource: Resource of the call, or the plan chosen.")
    outcome: str | None = option("--outcome: Outcome: OK, REPEATED, or a reason such as ROLE.")
    since: str | None = option("--since TIME: Only lines from this time on.")
    until: str | None = option("--until TIME: Only lines up to this time.")


@app.command("audit")
@ungrouped
def audit(
    which: AuditFlags,
    of: StoreFlags,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check for lines that were altered or removed.")] = False,
) -> None:
    """Show who changed what and when, and the outcome, oldest first."""
    from hetis.planner.service.maintenance import check_audit, print_audit

    if check:
        raise typer.Exit(check_audit(of.url))
    print_audit(of.url, vars(which), as_json=as_json)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    return name, value


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed on stderr."""
    return run_application(app, "hetis-planner", arguments, _report_failure)


def _report_failure(error: Exception) -> int:
    from hetis.planner.service.actions import report  # only once something has failed

    return report(error)
