"""``hetis-agent``: the daemon of a GPU node, and a command that lists the node's devices."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from hetis.commands.groups import group, option, ungrouped
from hetis.commands.verb import run_application, version_option
from hetis.engines.errors import OptionError
from hetis.formats.descriptors import raise_descriptor_limit
from hetis.formats.errors import DocumentError
from hetis.runtime.agent.options import (
    Checking,
    EngineChoice,
    PlannerAddress,
    checked_address,
    checked_devices,
    checked_node,
    default_state_dir,
    loopback_server,
)

_LEAST_FILES, _ENOUGH_FILES = 64, 4096  # open files of an agent, which its engines inherit
EXIT_FAILED, EXIT_INVALID, EXIT_STATE = 1, 2, 4
_EXAMPLES = """Examples:

hetis-agent --server planner.example:8470 --node clusters/paper/nodes/a100-0 --engine unix:///run/hetis/engine.sock
--tls-ca ca.pem --tls-cert node.pem --tls-key node.key

HETIS_AGENT_TOKEN=... hetis-agent --server planner.example:8470 --tls-ca ca.pem --node clusters/paper/nodes/l4-3
--engine vllm:http://127.0.0.1:8000

hetis-agent --server planner.example:8470 --tls-ca ca.pem --token-file token --node clusters/paper/nodes/l4-3
--engine launch:/etc/hetis/engine.yaml

hetis-agent devices

Exit codes: 0 stopped by SIGTERM or SIGINT · 1 failed · 2 invalid options · 4 the state directory cannot be used \
· 141 broken pipe
"""

app = typer.Typer(
    name="hetis-agent",
    help="Report the state of this GPU node to the planner, and apply the planner's assignments to the engine on "
    "this node. Variables set options as well: HETIS_AGENT_STATE_DIR sets --state-dir.",
    epilog=_EXAMPLES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(usage: str, default: Any = "") -> Any:
    """Declare an option that a variable sets as well, as HETIS_AGENT_STATE_DIR sets --state-dir."""
    name = usage.partition(":")[0].partition("/")[0].removeprefix("--").replace("-", "_").upper()
    return option(usage, default, envvar=f"HETIS_AGENT_{name}", show_envvar=False)


@group
class PlannerOptions:
    """The planner, and how the agent identifies itself there."""

    server: str = _option(
        "--server: Address of the planner, host:port; separate several by commas, and the agent finds the leader.",
        "127.0.0.1:8470",
    )
    tls_ca: Path | None = _option("--tls-ca: CA of the planner's certificate.", None)
    tls_cert: Path | None = _option("--tls-cert: Client certificate of this node.", None)
    tls_key: Path | None = _option("--tls-key: Key of the client certificate.", None)
    token_file: Path | None = _option("--token-file: File with the bearer token; or set HETIS_AGENT_TOKEN.", None)
    insecure: bool = _option("--insecure/--no-insecure: Connect without TLS to a planner on another machine.", False)

    def address(self) -> PlannerAddress:
        """Raises OptionError with all problems."""
        uses_tls = self.tls_ca is not None or self.tls_cert is not None
        return PlannerAddress(
            server=self.server,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            token_file=self.token_file,
            is_plain=self.insecure or (loopback_server(self.server) and not uses_tls),
        )


@group
class EngineOptions:
    """The node and its engine."""

    node: str = _option("--node: Name of this node: clusters/NAME/nodes/NODE. Required.")
    engine: str = _option(
        "--engine: Engine: unix:///PATH, vllm:http://HOST:PORT, sglang:http://HOST:PORT, launch:FILE or none.", "none"
    )
    engine_address: str = _option("--engine-address: Address where the engine listens for other engines.")
    state_dir: Path | None = _option(
        "--state-dir: Directory of the agent's persistent state. Default: under XDG_STATE_HOME.", None
    )


@group
class DeviceOptions:
    """The node's devices."""

    devices: str = _option("--devices: Source of the devices: auto, nvml, none or simulated:TYPE:COUNT,...", "auto")
    simulated_devices: str = _option(
        "--simulated-devices: TYPE:COUNT,...; short for --devices simulated:TYPE:COUNT,..."
    )

    @property
    def source(self) -> str:
        return f"simulated:{self.simulated_devices}" if self.simulated_devices else self.devices


@group
class ServiceOptions:
    """What the agent says of itself."""

    metrics: str = _option("--metrics: Serve the agent's Prometheus metrics on HOST:PORT.")
    log_level: str = _option("--log-level: Log level: debug, info, warning or error.", "info")


@app.callback(invoke_without_command=True)
@ungrouped
def run(
    context: typer.Context,
    planner: PlannerOptions,
    engine: EngineOptions,
    devices: DeviceOptions,
    service: ServiceOptions,
    _version: Annotated[bool, version_option("hetis-agent")] = False,
) -> None:
    """Run the agent of this node until SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    with checking() as check:
        check(lambda: set_up_logs(service.log_level))
        check(lambda: checked_node(engine.node))
        address = check(planner.address)
        choice = check(lambda: EngineChoice.parse(engine.engine))
        check(lambda: checked_devices(devices.source))
        listen = check(lambda: checked_address("--metrics", service.metrics)) if service.metrics else None
    assert address is not None
    assert choice is not None
    raise_descriptor_limit("hetis-agent", least=_LEAST_FILES, enough=_ENOUGH_FILES)
    from hetis.runtime.agent.daemon import Parts, run_agent

    parts = Parts(
        node=engine.node,
        address=address,
        choice=choice,
        engine_address=engine.engine_address,
        state_dir=engine.state_dir or default_state_dir(os.environ.get("XDG_STATE_HOME"), engine.node),
        devices=devices.source,
        metrics=listen,
        agent_version=version("hetis"),
    )
    run_until_signal(run_agent(parts))


@app.command(name="devices")
@ungrouped
def list_devices(devices: DeviceOptions) -> None:
    """Print the devices that the agent finds here, as JSON."""
    from google.protobuf import json_format

    from hetis.runtime.agent.devices import discover

    print(json.dumps(json_format.MessageToDict(discover(devices.source), preserving_proto_field_name=True), indent=2))


def main() -> int:
    """Run the command line of this process, and return the exit code."""
    return run_application(app, "hetis-agent", sys.argv[1:], _report_failure)


def _report_failure(error: Exception) -> int:
    """Print an error, an unexpected one with its traceback, and return the exit code."""
    from hetis.runtime.agent.devices import DevicesUnavailableError
    from hetis.runtime.agent.disk import StateError

    messages, code = [str(error)], EXIT_FAILED
    match error:
        case OptionError():
            messages, code = list(error.messages), EXIT_INVALID
        case DocumentError() | DevicesUnavailableError():
            code = EXIT_INVALID
        case StateError():
            code = EXIT_STATE
        case ModuleNotFoundError(name="prometheus_client"):  # hetis[vllm] has the rest
            messages = ["prometheus_client is not installed: pip install 'hetis[agent]'"]
        case OSError():
            pass
        case _:
            traceback.print_exception(error)
            return EXIT_FAILED
    for message in messages:
        print(f"hetis-agent: {message}", file=sys.stderr)
    return code


@contextmanager
def checking() -> Iterator[Checking]:
    """Check all options within the context, then raise OptionError with all problems if there is any."""
    check = Checking()
    yield check
    if check.wrong:
        raise OptionError(*check.wrong)


def run_until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until it ends or a signal arrives."""

    async def until_stopped() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        is_stopped = False

        def stop() -> None:
            nonlocal is_stopped
            is_stopped = True
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not is_stopped:
                raise

    begun_s = time.monotonic()
    asyncio.run(until_stopped())
    logging.getLogger(__name__).info("stopped after %.0f s", time.monotonic() - begun_s)


def set_up_logs(level: str) -> None:
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise OptionError(f"--log-level is {level!r}, must be debug, info, warning or error")
    if level.upper() != "DEBUG":  # gRPC logs every failed handshake itself, which our own messages already report
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=known[level.upper()], stream=sys.stderr, format=form)
