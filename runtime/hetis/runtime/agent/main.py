"""``hetis-agent``: the daemon of a GPU node, and a command that lists the node's devices."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hetis.runtime.agent.connecting import AgentOptionError, PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.options import (
    Checking,
    EngineChoice,
    checked_address,
    checked_devices,
    checked_node,
    default_state_dir,
    loopback_server,
)

EXIT_FAILED, EXIT_INVALID, EXIT_STATE = 1, 2, 4
_EXAMPLES = """Examples:

hetis-agent --server planner.example:8470 --node clusters/paper/nodes/a100-0 --engine unix:///run/hetis/engine.sock
--tls-ca ca.pem --tls-cert node.pem --tls-key node.key

HETIS_AGENT_TOKEN=... hetis-agent --server planner.example:8470 --tls-ca ca.pem --node clusters/paper/nodes/l4-3
--engine vllm:http://127.0.0.1:8000

hetis-agent --server planner.example:8470 --tls-ca ca.pem --token-file token --node clusters/paper/nodes/l4-3
--engine launch:/etc/hetis/engine.yaml

hetis-agent --server 127.0.0.1:8470 --node clusters/demo/nodes/a100-0 --engine simulated --simulated-devices
A100-SXM-80GB:4

hetis-agent devices

Exit codes: 0 stopped by SIGTERM or SIGINT · 1 failed · 2 invalid options · 4 the state directory cannot be used
"""

app = typer.Typer(
    name="hetis-agent",
    help="Tell the planner how this GPU node is, and make the engine beside it do what the planner asks.",
    epilog=_EXAMPLES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Devices = Annotated[
    str,
    typer.Option(
        envvar="HETIS_AGENT_DEVICES",
        help="Where devices come from: auto, nvml, none or simulated:TYPE:COUNT,...",
    ),
]
SimulatedDevices = Annotated[
    str,
    typer.Option(
        envvar="HETIS_AGENT_SIMULATED_DEVICES",
        help="TYPE:COUNT,... is short for --devices simulated:TYPE:COUNT,...: only said to be there.",
    ),
]
Control = Annotated[
    Path | None,
    typer.Option(
        envvar="HETIS_AGENT_CONTROL", help="YAML or JSON that steers a simulated engine; read when it changes."
    ),
]
Seed = Annotated[int, typer.Option(envvar="HETIS_AGENT_SEED", help="Of the load of a simulated engine.")]
Peer = Annotated[
    str,
    typer.Option(
        envvar="HETIS_AGENT_PEER_ADDRESS", help="Where a simulated engine lets other engines read; port 0: any."
    ),
]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    server: Annotated[
        str,
        typer.Option(
            envvar="HETIS_AGENT_SERVER",
            help="The planner, host:port; several with commas: the one that leads is found.",
        ),
    ] = "127.0.0.1:8470",
    node: Annotated[
        str, typer.Option(envvar="HETIS_AGENT_NODE", help="This node: clusters/CLUSTER/nodes/NODE. Required.")
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            envvar="HETIS_AGENT_ENGINE",
            help="unix:///PATH, vllm:http://HOST:PORT, sglang:http://HOST:PORT, launch:FILE, simulated or none.",
        ),
    ] = "none",
    engine_address: Annotated[
        str, typer.Option(envvar="HETIS_AGENT_ENGINE_ADDRESS", help="Where the engine listens for other engines.")
    ] = "",
    state_dir: Annotated[
        Path | None,
        typer.Option(envvar="HETIS_AGENT_STATE_DIR", help="What must not be forgotten. Default: under XDG_STATE_HOME."),
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(envvar="HETIS_AGENT_TLS_CA", help="Signs the planner's certificate.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="HETIS_AGENT_TLS_CERT", help="This node's certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="HETIS_AGENT_TLS_KEY", help="Its key.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="HETIS_AGENT_TOKEN_FILE", help="Holds a bearer token; or set HETIS_AGENT_TOKEN."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option(envvar="HETIS_AGENT_INSECURE", help="No TLS, to a planner on another machine.")
    ] = False,
    metrics: Annotated[
        str, typer.Option(envvar="HETIS_AGENT_METRICS", help="Serve the agent's own metrics on HOST:PORT.")
    ] = "",
    devices: Devices = "auto",
    simulated_devices: SimulatedDevices = "",
    control: Control = None,
    seed: Seed = 0,
    peer_address: Peer = "127.0.0.1:0",
    log_level: Annotated[
        str, typer.Option(envvar="HETIS_AGENT_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run the agent of this node until SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    uses_tls = tls_ca is not None or tls_cert is not None
    source = f"simulated:{simulated_devices}" if simulated_devices else devices
    checking = Checking()
    checking.get(lambda: _set_up_logs(log_level))
    checking.get(lambda: checked_node(node))
    address = checking.get(
        lambda: PlannerAddress(
            server=server,
            ca=tls_ca,
            cert=tls_cert,
            key=tls_key,
            token_file=token_file,
            is_plain=insecure or (loopback_server(server) and not uses_tls),
        )
    )
    choice = checking.get(lambda: EngineChoice.parse(engine))
    checking.get(lambda: checked_devices(source, engine=choice))
    listen = checking.get(lambda: checked_address("--metrics", metrics)) if metrics else None
    checking.get(lambda: checked_address("--peer-address", peer_address))
    try:
        checking.finish()
    except AgentOptionError as error:
        _fail_options(error)
    assert address is not None
    assert choice is not None
    state = state_dir or default_state_dir(os.environ.get("XDG_STATE_HOME"), node)

    async def work() -> None:
        from hetis.runtime.agent.assembly import Parts, run_agent

        await run_agent(
            Parts(
                node=node,
                address=address,
                choice=choice,
                engine_address=engine_address,
                state_dir=state,
                devices=source,
                control=control,
                seed=seed,
                peer_address=peer_address,
                metrics=listen,
                agent_version=version("hetis"),
            ),
            ReconnectBackoff(random.Random()),
        )

    _run_until_told(work())


@app.command()
def devices(devices: Devices = "auto", simulated_devices: SimulatedDevices = "") -> None:
    """Print the devices that the agent finds here, as JSON."""
    from google.protobuf import json_format

    from hetis.runtime.agent.devices import DevicesUnavailableError, discover

    try:
        found = discover(f"simulated:{simulated_devices}" if simulated_devices else devices)
    except DevicesUnavailableError as error:
        _fail(str(error), EXIT_INVALID)
    print(json.dumps(json_format.MessageToDict(found, preserving_proto_field_name=True), indent=2))


@app.command()
def simulate(
    socket: Annotated[Path, typer.Option(help="Unix socket for the agent.")],
    node: Annotated[str, typer.Option(envvar="HETIS_AGENT_NODE", help="clusters/CLUSTER/nodes/NODE.")],
    simulated_devices: SimulatedDevices,
    control: Control = None,
    seed: Seed = 0,
    peer_address: Peer = "127.0.0.1:0",
) -> None:
    """Run a simulated engine alone, for an agent that is started with --engine unix://SOCKET."""
    source = f"simulated:{simulated_devices}"
    checking = Checking()
    checking.get(lambda: _set_up_logs("info"))
    checking.get(lambda: checked_node(node))
    checking.get(lambda: checked_devices(source, engine=None))
    checking.get(lambda: checked_address("--peer-address", peer_address))
    try:
        checking.finish()
    except AgentOptionError as error:
        _fail_options(error)

    async def work() -> None:
        from hetis.runtime.agent.assembly import run_engine

        await run_engine(node, source, socket, control, seed, peer_address)

    _run_until_told(work())


def main() -> None:
    """Run the command ``hetis-agent``."""
    app()


def _run_until_told(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until it ends or a signal arrives. Errors become one line and an exit code."""
    from hetis.runtime.agent.devices import DevicesUnavailableError
    from hetis.runtime.agent.disk import StateError

    async def until_told() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        told = False

        def stop() -> None:
            nonlocal told
            told = True
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not told:
                raise

    begun_s = time.monotonic()
    try:
        asyncio.run(until_told())
    except DevicesUnavailableError as error:
        _fail(str(error), EXIT_INVALID)
    except StateError as error:
        _fail(str(error), EXIT_STATE)
    except OSError as error:
        _fail(str(error), EXIT_FAILED)
    logging.getLogger(__name__).info("stopped after %.0f s", time.monotonic() - begun_s)


def _set_up_logs(level: str) -> None:
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise AgentOptionError(f"--log-level is {level!r}, must be debug, info, warning or error")
    if level.upper() != "DEBUG":  # gRPC logs every failed handshake itself; our own messages already say it
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(
        level=known[level.upper()], stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def _fail(message: str, code: int) -> NoReturn:
    print(f"hetis-agent: {message}", file=sys.stderr)
    raise SystemExit(code)


def _fail_options(error: AgentOptionError) -> NoReturn:
    """Print one line for each problem and exit."""
    for message in error.messages[:-1]:
        print(f"hetis-agent: {message}", file=sys.stderr)
    _fail(error.messages[-1], EXIT_INVALID)
