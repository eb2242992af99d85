"""A node without GPUs, for demonstrations and tests.

    python -m examples.simulated_engine --node clusters/demo/nodes/l4-0 --simulated-devices L4:2

Runs a simulated engine and its agent in one process. With ``--socket PATH`` it runs the engine alone, which outlives
its agent (``hetis-agent --engine unix://PATH``).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import ControlFile
from examples.simulated_engine.server import SimulatedServer
from examples.simulated_engine.stage import best_admission
from hetis.runtime.agent.daemon import Parts, run_agent
from hetis.runtime.agent.devices import discover
from hetis.runtime.agent.main import run_until_signal, set_up_logs
from hetis.runtime.agent.options import EngineChoice, EngineKind, PlannerAddress, default_state_dir, loopback_server

_log = logging.getLogger(__name__)


async def run(options: argparse.Namespace) -> None:
    """Run the engine, and its agent unless it has a process of its own, until cancelled."""
    node, devices = options.node, f"simulated:{options.simulated_devices}"
    state_dir = options.state_dir or default_state_dir(os.environ.get("XDG_STATE_HOME"), node)
    socket = options.socket or state_dir / "engine.sock"
    admission = best_admission()
    _log.info("admission by %s", type(admission).__name__)
    engine = SimulatedEngine(
        node.rpartition("/")[2], len(discover(devices).devices), seed=options.seed, admission=admission
    )
    control = ControlFile(options.control) if options.control is not None else None
    server = SimulatedServer(engine, socket, peer_address=options.peer_address, control=control)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.close)
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        await server.start()
        _log.info("engine of %s on %s, other engines on %s", node, socket, server.address)
        if options.socket is not None:
            await server.wait()
        address = PlannerAddress(server=options.server, is_plain=loopback_server(options.server))
        parts = Parts(
            node=node,
            address=address,
            choice=EngineChoice(EngineKind.SOCKET, str(socket)),
            engine_address=server.address,
            state_dir=state_dir,
            devices=devices,
            metrics=None,
            agent_version=version("hetis"),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.wait())
            tasks.create_task(run_agent(parts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.simulated_engine", description=__doc__)
    parser.add_argument("--node", required=True, help="clusters/NAME/nodes/NODE")
    parser.add_argument("--simulated-devices", required=True, metavar="TYPE:COUNT,...")
    parser.add_argument("--socket", type=Path, help="run the engine alone, and serve its agent here")
    parser.add_argument("--server", default="127.0.0.1:8470", help="the planner of the agent")
    parser.add_argument("--state-dir", type=Path, help="where the agent keeps its state")
    parser.add_argument("--control", type=Path, help="YAML or JSON file with the load; read again after each change")
    parser.add_argument("--seed", type=int, default=0, help="seed of the load")
    parser.add_argument("--peer-address", default="127.0.0.1:0", help="where other engines read from this one")
    options = parser.parse_args()
    set_up_logs("info")
    run_until_signal(run(options))


if __name__ == "__main__":
    main()
