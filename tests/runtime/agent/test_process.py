"""Real processes: an agent beside an engine, what it says of its options, and how it ends. Kills: tests/protocol."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from hetis.engines.errors import OptionError
from hetis.planner.convert import names
from hetis.runtime.agent.executor import SocketExecutor
from hetis.runtime.agent.main import main
from hetis.runtime.agent.options import checked_node
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse, StateRequest
from hetis.v1.change_pb2 import Change, ChangePhase
from hetis.v1.executor_service_pb2 import ReadHeadMapsRequest
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move, MoveReason
from hetis.v1.report_pb2 import AssignmentState
from tests.command_line import command_of, run_here
from tests.runtime.agent.builders import (
    AUTHORITY,
    NODE,
    REPLICA,
    SOURCE,
    Planner,
    assignment,
    change,
    stage_model,
)
from tests.runtime.agent.planner_double import WAIT_S, PlannerDouble

COMMAND = command_of("hetis.runtime.agent")
ENGINE = command_of("examples.simulated_engine")
ROOT = Path(__file__).parents[3]
BUSY = {"rate_rps": 20, "prompt_tokens": 50, "output_tokens": 2000, "load_s": 0, "dense_step_s": 0.05}


def hetis_agent(arguments: Sequence[str]) -> int:
    """Run the command line in this process."""
    with mock.patch.object(sys, "argv", ["hetis-agent", *arguments]):
        return main()


class Processes:
    """Starts processes, and stops all of them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, command: Sequence[str] = COMMAND, **environment: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=log, env={**os.environ, **environment}, cwd=self.folder
            )
        self._running.append(process)
        return process

    def agent(self, server: str, *more: str) -> subprocess.Popen[bytes]:
        options = ["--server", server, "--node", NODE + "p", "--state-dir", str(self.folder / "state")]
        return self.start(*options, "--simulated-devices", "L4:1", *more)

    def engine(self) -> subprocess.Popen[bytes]:
        return self._simulated("--socket", str(self.folder / "e.sock"))

    def agent_with_engine(self, server: str) -> subprocess.Popen[bytes]:
        """Start a node whose engine ends with its agent."""
        return self._simulated("--server", server, "--state-dir", str(self.folder / "state"))

    def _simulated(self, *options: str) -> subprocess.Popen[bytes]:
        control = self.folder / "control.json"
        control.write_text(json.dumps(BUSY), encoding="utf-8")
        usual = ("--node", NODE + "p", "--simulated-devices", "L4:1", "--control", str(control))
        return self.start(*options, *usual, command=ENGINE, PYTHONPATH=str(ROOT))

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8")

    def stop(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.stop()


def serving(message: ConnectNodeRequest) -> bool:
    return any(
        replica.num_running > 2 and replica.assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
        for replica in message.report.replicas
    )


async def moves_of(executor: SocketExecutor) -> tuple[int, Move]:
    """Generation, and a move that the head map allows."""
    for answer in await executor.call(ReadHeadMapsRequest(replica=REPLICA)):
        for request in answer.head_maps[0].requests:
            names = [device.name for device in answer.head_maps[0].devices]
            source = names[request.owners[0]]
            target = next(name for name in names if name != source)
            reason = MoveReason.MOVE_REASON_BALANCE
            move = Move(
                request=request.id,
                incarnation=request.incarnation,
                head_groups=[0],
                source=source,
                target=target,
                kv_bytes=1e9,
                reason=reason,
            )
            return answer.generation, move
    raise AssertionError("nothing runs")


async def owner(executor: SocketExecutor, what: Change) -> str:
    for answer in await executor.call(ReadHeadMapsRequest(replica=REPLICA)):
        head_map = answer.head_maps[0]
        (request,) = [request for request in head_map.requests if request.id == what.moves[0].request]
        return head_map.devices[request.owners[0]].name
    raise AssertionError("no head map")


def is_lost(message: ConnectNodeRequest) -> bool:
    return any(
        replica.assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
        and replica.failure.reason == ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE
        for replica in message.report.replicas
    )


async def test_an_engine_that_hangs_or_is_gone_is_reported_as_failed(processes: Processes) -> None:
    async with PlannerDouble() as planner:
        engine = processes.engine()
        processes.agent(planner.address, "--engine", f"unix://{processes.folder / 'e.sock'}")
        await planner.connected(1)
        planner.send(Planner().assign(assignment(model=stage_model(blocks=4000))))
        await planner.until(serving)
        engine.send_signal(signal.SIGSTOP)
        since = len(planner.heard)
        await planner.until(is_lost, since=since)
        engine.send_signal(signal.SIGCONT)
        since = len(planner.heard)
        await planner.until(serving, since=since)
        engine.kill()
        engine.wait()
        since = len(planner.heard)
        await planner.until(is_lost, since=since)


async def test_an_agent_whose_planner_is_gone_aborts_at_the_deadline(processes: Processes) -> None:
    executor = SocketExecutor(processes.folder / "state" / "engine.sock")
    say = Planner()
    async with PlannerDouble() as planner:
        processes.agent_with_engine(planner.address)
        await planner.connected(1)
        planner.send(say.assign(assignment(model=stage_model(blocks=4000))))
        await planner.until(serving)
        base, move = await moves_of(executor)
        what = change(base=base, timeout_s=8.0, moves=[move])  # a busy machine takes seconds until READY
        planner.send(say.prepare(what, AUTHORITY, SOURCE, base=base))
        await planner.phase(what.change_id, ChangePhase.CHANGE_PHASE_READY)
    async with asyncio.timeout(WAIT_S):
        async for report in executor.watch_reports(0.1):
            phases = {status.change_id: status.phase for status in report.changes}
            assert report.replicas[0].assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
            if phases[what.change_id] == ChangePhase.CHANGE_PHASE_ABORTED:
                break
    assert await owner(executor, what) == move.source
    await executor.close()


@pytest.mark.parametrize("reason", ["NODE_TAKEN_OVER", "NODE_IN_USE"])
async def test_an_agent_whose_node_another_has_comes_back_by_itself(reason: str, processes: Processes) -> None:
    async with PlannerDouble() as planner:
        planner.end_with = Failure(
            reason=ErrorReason.Value(f"ERROR_REASON_{reason}"), message="another agent is connected"
        )
        agent = processes.agent(planner.address)
        await planner.connected(1)  # after the refused Hello
        assert sum(message.HasField("hello") for message in planner.heard) == 2
        assert agent.poll() is None
    assert "another agent is connected; retrying in" in processes.log()


async def test_sigterm_ends_an_agent_cleanly_and_metrics_and_token_work(processes: Processes) -> None:
    async with PlannerDouble() as planner:
        agent = processes.start(
            *("--server", planner.address, "--node", NODE + "p", "--state-dir", str(processes.folder / "s")),
            *("--simulated-devices", "L4:2", "--engine", "none"),
            HETIS_AGENT_TOKEN="secret",
        )
        await planner.connected(1)
        assert planner.metadata["authorization"] == "Bearer secret"
        planner.send(ConnectNodeResponse(epoch=1, state_request=StateRequest(request_id="q", inventory=True)))
        found = await planner.until(lambda message: message.HasField("inventory"))
        assert [device.gpu_type for device in found.inventory.devices] == ["L4", "L4"]
        await planner.until(lambda message: message.HasField("heartbeat"))
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, WAIT_S) == 0
    assert "Traceback" not in processes.log()


@pytest.mark.parametrize("hung", ["open", "inventory", "sample", "close"])
def test_a_driver_that_hangs_does_not_keep_an_agent_from_ending(processes: Processes, hung: str) -> None:
    """The calls of a driver that hangs cannot be interrupted: they block in C."""
    program = f"""
import sys, threading
from hetis.runtime.agent import daemon
from hetis.runtime.agent.devices import SimulatedDevices

class Devices:
    def close(self): pass
    def inventory(self): return SimulatedDevices().inventory()
    def sample(self): return []

def hang(*_, **__):
    print("it hangs", flush=True)
    threading.Event().wait()

setattr(Devices, {hung!r}, hang)
daemon.open_devices = hang if {hung!r} == "open" else lambda *_, **__: Devices()
sys.argv = ["hetis-agent", "--server", "127.0.0.1:1", "--node", {NODE + "p"!r}, "--state-dir", "s"]
from hetis.runtime.agent.__main__ import main
sys.exit(main())
"""
    with open(processes.folder / "log.txt", "ab") as log:
        agent = subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log, cwd=processes.folder)
    try:
        end_s = time.monotonic() + WAIT_S
        while ("stream to" if hung == "close" else "it hangs") not in processes.log():
            assert time.monotonic() < end_s, processes.log()
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 0, processes.log()
    finally:
        agent.kill()
        agent.wait()
    assert "Traceback" not in processes.log()


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("clusters/c/nodes/größe_7.rack", True),
        (f"clusters/c/nodes/{'n' * 200}", True),
        (f"clusters/c/nodes/{'n' * 201}", False),
        ("clusters/c/nodes/_n", False),
        ("clusters/c-/nodes/n", False),
        ("clusters/c/nodes/a/b", False),
    ],
)
def test_every_node_that_a_cluster_may_have_can_have_an_agent(name: str, is_known: bool) -> None:
    assert names.NODE.matches(name) == is_known
    with nullcontext() if is_known else pytest.raises(OptionError, match="must be clusters/CLUSTER/nodes/NODE"):
        checked_node(name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--node", "paper"], "--node is 'paper', must be clusters/CLUSTER/nodes/NODE"),
        (["--node", NODE + "p", "--engine", "ollama"], "--engine is 'ollama', must be"),
        (["--node", NODE + "p", "--server", "nowhere"], "--server is 'nowhere', must be host:port"),
        (["--node", NODE + "p", "--engine", "vllm:http://here:http"], "--engine has the address 'http://here:http'"),
        (["--node", NODE + "p", "--engine", "vllm:http://me:secret@here:1"], "--engine has a user or password in its"),
        (["--node", NODE + "p", "--tls-cert", "/dev/null"], "--tls-cert and --tls-key must be given together"),
    ],
)
def test_bad_options_are_one_clear_line(arguments: list[str], says: str) -> None:
    ended = run_here(hetis_agent, *arguments)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_agent_with_too_few_descriptors_says_how_many_it_needs(tmp_path: Path) -> None:
    options = ["--node", NODE + "p", "--simulated-devices", "L4:1", "--state-dir", str(tmp_path)]
    limited = ["bash", "-c", 'ulimit -n 12; exec "$@"', "bash", *COMMAND, *options]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("hetis-agent: ulimit -n: hetis-agent may have at most 12 files and connections open")
    assert "needs at least 64: raise the hard limit" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_token_in_the_environment_that_cannot_be_sent_is_an_invalid_option() -> None:
    ended = run_here(hetis_agent, "--node", NODE + "p", "--engine", "none", HETIS_AGENT_TOKEN="two words")
    assert ended.returncode == 2
    assert ended.stderr.startswith("hetis-agent: HETIS_AGENT_TOKEN holds no token")
    assert "two words" not in ended.stderr


def test_everything_that_is_wrong_with_the_options_is_said_at_once() -> None:
    wrong = {
        "--node": "paper",
        "--server": "nowhere",
        "--tls-cert": "/no/such.pem",
        "--engine": "ollama",
        "--devices": "lots",
        "--metrics": "here",
        "--log-level": "loud",
    }
    arguments = [text for option in wrong.items() for text in option]
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    said = ended.stderr.splitlines()
    assert all(line.startswith("hetis-agent: ") for line in said)
    assert {option for option in wrong if option in ended.stderr} == set(wrong)
    assert "/no/such.pem cannot be read" in ended.stderr
    assert len(said) == len(wrong) + 1  # the additional line: a key belongs to a certificate


def test_an_agent_says_in_its_own_words_what_is_wrong_with_its_certificates(processes: Processes) -> None:
    bad = processes.folder / "ca.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\nMIIB", encoding="utf-8")  # half of a file
    agent = processes.agent("127.0.0.1:1", "--tls-ca", str(bad))
    end_s = time.monotonic() + WAIT_S
    while "stream to 127.0.0.1:1" not in processes.log():
        assert time.monotonic() < end_s, processes.log()
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    agent.wait(WAIT_S)
    form = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ hetis\.")
    assert [line for line in processes.log().splitlines() if not form.match(line)] == []


def test_the_agent_imports_without_solver_libraries() -> None:
    blocked = ["cvxpy", "torch", "highspy", "numba", "sqlalchemy"]
    program = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
import pkgutil, importlib, hetis.runtime.agent as agent
for module in pkgutil.walk_packages(agent.__path__, "hetis.runtime.agent."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
