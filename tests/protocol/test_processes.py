"""Real processes on loopback: kill -9 of planner, agents and engines while head groups move all the time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from examples.processes import free_ports
from hetis.planner.store import Store
from hetis.runtime.agent.executor import SocketExecutor
from hetis.runtime.moves.refusals import RefusedError
from hetis.v1 import redispatch_pb2
from hetis.v1.change_pb2 import ChangePhase, ChangeStatus
from hetis.v1.executor_service_pb2 import ReadHeadMapsRequest, WatchReportsResponse
from hetis.v1.head_map_pb2 import HeadMap
from tests.command_line import command_of
from tests.planner.fleet.samples import CLUSTER, REPLICA
from tests.protocol.planner_host import NODES, PRIMARY, new_store

State = redispatch_pb2.RedispatchState
AGENT = command_of("hetis.runtime.agent")
ENGINE = [sys.executable, "-m", "examples.simulated_engine"]
LOAD = {"rate_rps": 4, "prompt_tokens": 60, "output_tokens": 100, "load_s": 1.0, "dense_step_s": 0.05}
FINAL = (State.REDISPATCH_STATE_DONE, State.REDISPATCH_STATE_ABORTED)
OPEN = (ChangePhase.CHANGE_PHASE_PREPARING, ChangePhase.CHANGE_PHASE_READY)
FLIPPED = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
WAIT_S = 180.0
FIRST_S = 600.0  # the engine may have to compile its dispatcher


class Fleet:
    """One planner, and an engine and an agent per node; every process is stopped by its id at the end.

    Attributes:
        kept: re-dispatches that planners reported as stored.
    """

    def __init__(self, folder: Path, template_folder: Path) -> None:
        self.folder = folder
        self.store = new_store(template_folder, folder)
        self.kept: set[str] = set()
        self.ready = threading.Event()
        self._log = open(folder / "log.txt", "ab")  # noqa: SIM115  # closed in `stop`
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        self._number = 0
        self._port = free_ports()
        (folder / "control.json").write_text(json.dumps(LOAD), encoding="utf-8")

    def start_engine(self, node: str) -> None:
        self._start(
            f"engine {node}",
            [
                *(*ENGINE, "--socket", self.socket(node), "--node", f"{CLUSTER}/nodes/{node}"),
                *("--simulated-devices", "L4:1", "--control", str(self.folder / "control.json")),
                *("--peer-address", f"127.0.0.1:{self.peer_port(node)}"),
            ],
        )

    def start_agent(self, node: str) -> None:
        self._start(
            f"agent {node}",
            [
                *(*AGENT, "--server", f"127.0.0.1:{self._port}", "--node", f"{CLUSTER}/nodes/{node}"),
                *("--engine", f"unix://{self.socket(node)}", "--state-dir", str(self.folder / node)),
                *("--engine-address", f"127.0.0.1:{self.peer_port(node)}", "--simulated-devices", "L4:1"),
            ],
        )

    def start_planner(self) -> None:
        self._number += 1
        self.ready.clear()
        command = [sys.executable, "-m", "tests.protocol.planner_process"]
        process = self._start(
            "planner", [*command, str(self.store), str(self._port), str(self._number)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._listen, args=(process.stdout,))
        reader.start()
        self._readers.append(reader)

    def start(self, name: str) -> None:
        kind, _, node = name.partition(" ")
        if kind == "planner":
            self.start_planner()
        elif kind == "agent":
            self.start_agent(node)
        else:
            self.start_engine(node)

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for name in list(self._running):
            self.kill(name)
        for reader in self._readers:
            reader.join()
        self._log.close()

    def socket(self, node: str) -> str:
        return str(self.folder / f"{node}.sock")

    def peer_port(self, node: str) -> int:
        """A fixed address, as for an engine in a data centre."""
        if not hasattr(self, "_ports"):
            first = free_ports(len(NODES))
            self._ports = {one: first + place for place, one in enumerate(NODES)}
        return self._ports[node]

    def _start(self, name: str, command: list[str], stdout: int | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command,
            stdout=self._log if stdout is None else stdout,
            stderr=self._log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
        self._running[name] = process
        return process

    def _listen(self, stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                word, _, rest = line.decode().strip().partition(" ")
                if word == "ready":
                    self.ready.set()
                elif word == "kept" and len(rest) == 36:  # the kill may cut a line
                    self.kept.add(rest)

    # --- state

    def redispatches(self) -> dict[str, State.ValueType]:
        async def read() -> dict[str, State.ValueType]:
            store = await Store.open(f"sqlite:///{self.store}")
            try:
                records = await store.read(lambda tx: tx.redispatches.all())
            finally:
                await store.close()
            return {record.body.change.change_id: record.state for record in records}

        return asyncio.run(read())

    def num_done(self) -> int:
        return sum(state == State.REDISPATCH_STATE_DONE for state in self.redispatches().values())

    def head_map(self) -> HeadMap | None:
        async def read() -> HeadMap | None:
            executor = SocketExecutor(Path(self.socket(PRIMARY)))
            try:
                return (await executor.call(ReadHeadMapsRequest(replica=REPLICA)))[0].head_maps[0]
            except RefusedError:
                pass
            finally:
                await executor.close()
            return None

        return asyncio.run(read())

    def report(self, node: str) -> WatchReportsResponse:
        async def read() -> WatchReportsResponse:
            executor = SocketExecutor(Path(self.socket(node)))
            try:
                async for report in executor.watch_reports(0.2):
                    return report
            finally:
                await executor.close()
            raise AssertionError("an engine that reports nothing")

        return asyncio.run(read())

    def until(self, holds: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
        end_s = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > end_s:
                tail = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
                raise AssertionError(f"not after {limit_s:g} s: {what}\n{tail}")
            time.sleep(0.1)

    # --- invariants

    def check_moving_again(self) -> None:
        """Check that re-dispatches are made again once everything has restarted."""
        done = self.num_done()
        self.until(lambda: self.num_done() > done, "another re-dispatch is done")

    def check_ends(self) -> None:
        """Check that, once the planner proposes nothing more, everything ends and all sides agree."""
        self.kill("planner")
        phases = {node: self._until_closed(node) for node in NODES}
        for node in NODES:
            for change_id, phase in phases[node].items():
                said = phases[PRIMARY].get(change_id)
                if said is not None and said != ChangePhase.CHANGE_PHASE_UNSPECIFIED:
                    assert (phase in FLIPPED) == (said in FLIPPED), f"{node} and {PRIMARY} differ on {change_id}"
        states = self.redispatches()
        lost = self.kept - states.keys()
        assert not lost, f"acknowledged, and not in the store: {lost}"
        for change_id, state in states.items():
            if state in FINAL and (said := phases[PRIMARY].get(change_id)) is not None:
                assert (state == State.REDISPATCH_STATE_DONE) == (said in FLIPPED), f"{change_id}: {State.Name(state)}"
        head_map = self.head_map()
        assert head_map is not None
        for request in head_map.requests:
            assert len(request.owners) == 4
            assert all(owner < len(head_map.devices) for owner in request.owners)
        self.start_planner()
        self.until(self.ready.is_set, "the planner serves")
        left = [change_id for change_id, state in states.items() if state not in FINAL]
        self.until(lambda: all(self.redispatches()[one] in FINAL for one in left), f"{left} end")
        now = self.redispatches()
        for change_id in left:
            said = phases[PRIMARY].get(change_id)
            if said is not None:
                assert (now[change_id] == State.REDISPATCH_STATE_DONE) == (said in FLIPPED), change_id

    def _until_closed(self, node: str) -> dict[str, int]:
        """Wait, without a planner, until every prepared move resolves by its deadline; return phases by change."""
        statuses: list[ChangeStatus] = []

        def is_closed() -> bool:
            statuses[:] = self.report(node).changes
            return not any(status.phase in OPEN for status in statuses)

        self.until(is_closed, f"the changes of {node} resolve without a planner")
        return {status.change_id: status.phase for status in statuses}


@pytest.fixture
def fleet(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    found = Fleet(tmp_path, tmp_path_factory.mktemp("template"))
    try:
        yield found
    finally:
        found.stop()


def kill_in_turn(fleet: Fleet, names: list[str], rounds: int, dice: random.Random) -> None:
    for node in NODES:
        fleet.start_engine(node)
    for node in NODES:
        fleet.start_agent(node)
    fleet.start_planner()
    fleet.until(lambda: fleet.num_done() >= 2, "the first re-dispatches are done", FIRST_S)
    for number in range(rounds):
        name = names[number % len(names)]
        time.sleep(dice.uniform(0.0, 1.0))
        fleet.kill(name)
        time.sleep(dice.uniform(0.0, 1.0))
        fleet.start(name)
        fleet.check_moving_again()
    fleet.check_ends()
    fleet.check_moving_again()


def test_killed_processes_leave_one_owner_per_head_group_and_lose_no_write(fleet: Fleet) -> None:
    kill_in_turn(fleet, ["planner", f"agent {PRIMARY}", "agent b"], rounds=3, dice=random.Random(1))
    assert len(fleet.kept) > 3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_processes_leave_one_owner_per_head_group_for_long(fleet: Fleet, seed: int) -> None:
    dice = random.Random(seed)
    names = ["planner", *(f"agent {node}" for node in NODES), "engine b", "engine c"]
    rounds = int(os.environ.get("HETIS_KILLS", "40"))
    kill_in_turn(fleet, dice.choices(names, k=rounds), rounds=rounds, dice=dice)
