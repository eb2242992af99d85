"""Two planners on one PostgreSQL server, each behind its own proxy, with agents, writers and watchers.

All are real processes, except for writers and watchers, which are threads that record what they see. The caller injects
faults.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc

from hetis.planner.client import CallError, Client
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2, plan_pb2, plan_service_pb2, replica_pb2
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from tests.faults.history import History, Led, Read, Sighting, Write
from tests.faults.planners import REGISTER, SERVED, Agent, Planner, read

NODES = ("a", "b")


MODEL, WORKLOAD = "Llama-2-7B", "1000/200"


_PAUSE_S = 0.1  # mean pause between two writes of a writer, which leaves the machine to the planners


_WITNESS_S = 0.02


def fleet(number: int, kind: str = "r") -> document_pb2.Document:
    """Return a document that carries a number, the register's value."""
    text = f"""
apiVersion: hetis/v1
kind: Cluster
name: {kind}{number}
nodes:
- {{name: a, gpus: [{{type: L4, count: 2}}]}}
- {{name: b, gpus: [{{type: L4, count: 2}}]}}
network: {{bandwidth: 100Gbps, latency: 20us}}
"""
    return document_pb2.Document(content=text.encode())


class Watcher:
    """Watches what serves with one planner whenever it leads, and records each reported state."""

    def __init__(self, planner: Planner, history: History) -> None:
        self._planner, self._history = planner, history
        self._stopped = threading.Event()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            if self._call is not None:
                self._call.cancel()
            self._thread.join(0.1)

    def _run(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        while not self._stopped.is_set():
            with grpc.insecure_channel(self._planner.address, options) as channel:
                call = ClusterServiceStub(channel).WatchCluster(cluster_service_pb2.WatchClusterRequest(name=SERVED))
                self._call = call
                with contextlib.suppress(grpc.RpcError):
                    for event in call:
                        self._note(event)
            self._stopped.wait(0.1)  # it is a standby, or down

    def _note(self, event: cluster_service_pb2.WatchClusterResponse) -> None:
        if event.WhichOneof("event") == "node":
            name, state = event.node.name, cluster_pb2.NodeState.Name(event.node.state)
        elif event.WhichOneof("event") == "replica":
            name, state = event.replica.name, replica_pb2.ReplicaState.Name(event.replica.state)
        else:
            return
        state = state.partition("_STATE_")[2]
        self._history.sightings.append(
            Sighting(planner=self._planner.name, resource=name, state=state, time_s=time.time())
        )


class Writer:
    """Compares and swaps the register until it is stopped, and records every attempt.

    Args:
        address: addresses of all planners, or only that of ``planner``, whose redirects are ignored.
    """

    def __init__(
        self,
        name: str,
        address: str,
        history: History,
        *,
        planner: str = "",
        timeout_s: float = 20.0,
        token: str | None = None,
    ) -> None:
        self._name, self._planner, self._timeout_s = name, planner, timeout_s
        self._history = history
        self._stopped = threading.Event()
        self._chance = random.Random(name)
        self._client = Client(address, token=token)
        self._channel = grpc.insecure_channel(address) if planner else None
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._client.close()
        if self._channel is not None:
            self._channel.close()

    def _run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            try:
                self._swap(f"{self._name}{number}", number)
            except CallError as error:
                self.errors.append(f"{error.code.name} {error.reason}: {error}")
            # Not evenly: writers whose race has ended at one moment would race again and again.
            self._stopped.wait(_PAUSE_S * self._chance.uniform(0.0, 2.0))

    def _swap(self, value: str, number: int) -> None:
        seen = read(self._client, timeout_s=self._timeout_s)
        self._history.reads.append(seen)
        # Each writer has its own range of a million numbers.
        stamp = (hash_of(self._name) % 900 + 1) * 1_000_000 + number
        began_s = time.time()
        version, refused, raced = None, False, False
        try:
            version = self._update(stamp, seen.version)
        except CallError as error:
            changed = error.metadata.get("changed")
            raced = error.code is grpc.StatusCode.ABORTED
            refused = raced or changed == "no" or (error.reason in ("NOT_LEADER", "DRAINING") and not changed)
            if not raced:
                self.errors.append(f"{error.code.name} {error.reason}: {error}")
        self._history.writes.append(
            Write(
                value=str(stamp),
                base=seen.version,
                began_s=began_s,
                ended_s=time.time(),
                version=version,
                refused=refused,
                raced=raced,
                planner=self._planner,
            )
        )

    def _update(self, stamp: int, base: int) -> int:
        cluster = cluster_pb2.Cluster(name=REGISTER, etag=f"v{base}", document=fleet(stamp))
        request = cluster_service_pb2.UpdateClusterRequest(cluster=cluster)
        answer = self._client.clusters.UpdateCluster(request, timeout=self._timeout_s)
        return int(answer.cluster.etag.removeprefix("v"))


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**position for position, letter in enumerate(text))


class Witness:
    """The longest delay of this process's wake-ups, which shows whether the machine had processors to spare."""

    def __enter__(self) -> Witness:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            began_s = time.monotonic()
            if self._ended.wait(_WITNESS_S):
                return
            self.longest_s = max(self.longest_s, time.monotonic() - began_s - _WITNESS_S)


class Faulty:
    """All processes together. ``history`` and the planners' logs record the outcome.

    Args:
        options: further options of the planners.
        token: of an admin, if the planners require one; agents, which have none, are then left to the caller.
    """

    def __init__(
        self,
        store: str,
        folder: Path,
        *,
        lease_s: float,
        seed: int,
        num_writers: int = 2,
        options: Sequence[str] = (),
        token: str | None = None,
    ) -> None:
        self.chance = random.Random(seed)
        self.lease_s = lease_s
        self.planners = [Planner(f"p{number}", folder, store, lease_s, options) for number in range(2)]
        self.token = token
        self.addresses = ",".join(planner.address for planner in self.planners)
        self.history = History(first=(1, "1000"))
        self._folder = folder
        self._num_writers = num_writers
        self.writers: list[Writer] = []
        self.watchers: list[Watcher] = []
        self.agents: list[Agent] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Faulty:
        for planner in self.planners:
            self._stack.callback(planner.close)
            planner.start()
            self.wait(planner.is_ready, 90)
        self.client = Client(self.addresses, token=self.token)
        self._stack.callback(self.client.close)
        self.create("register", fleet(1000))
        if self.token is None:
            self._serve_by_agents()
        writers = range(self._num_writers)
        self.writers = [Writer(f"w{n}-", self.addresses, self.history, token=self.token) for n in writers]
        return self

    def create(self, name: str, document: document_pb2.Document) -> None:
        cluster = cluster_pb2.Cluster(document=document)
        self.client.clusters.CreateCluster(cluster_service_pb2.CreateClusterRequest(cluster_id=name, cluster=cluster))

    def _serve_by_agents(self) -> None:
        """Start agents, and wait until a replica on their nodes is seen to serve."""
        self.create("served", fleet(1, "s"))
        for node in NODES:
            self.agents.append(Agent(node, self._folder, self.addresses))
            self._stack.callback(self.agents[-1].close)
        self.wait(lambda: all(agent.epochs() for agent in self.agents), 60)
        self._serve()
        for planner in self.planners:
            self.watchers.append(Watcher(planner, self.history))
            self._stack.callback(self.watchers[-1].stop)
        self.wait(lambda: any(seen.state == "SERVING" for seen in self.history.sightings[:]), 60)

    def _serve(self) -> None:
        """Activate a plan, so that a replica serves before any fault."""
        spec = plan_pb2.PlanSpec(
            model_name=MODEL,
            workload_name=WORKLOAD,
            objective=plan_pb2.Objective(ttft_unlimited=True),
            strategy="uniform",  # the family with the shortest search
            roles=[replica_pb2.REPLICA_ROLE_UNIFIED],
            skip_verification=True,
        )
        plan = plan_pb2.Plan(cluster=SERVED, spec=spec)
        self.client.plans.CreatePlan(plan_service_pb2.CreatePlanRequest(plan_id="served", plan=plan))
        self.client.wait("plans/served")
        self.client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name="plans/served"))
        self.client.wait("plans/served")

    def __exit__(self, *_: object) -> None:
        self._stop_writers()
        self._stack.close()

    def leader(self) -> Planner:
        """Wait until one planner leads, and return it."""
        found: list[Planner] = []

        def one_leads() -> bool:
            found[:] = [p for p in self.planners if (shown := p.shown()) is not None and shown["role"] == "leader"]
            return bool(found)

        self.wait(one_leads, 60)
        return found[0]

    def other(self, planner: Planner) -> Planner:
        return self.planners[1 - self.planners.index(planner)]

    def term_after(self, moment_s: float, planner: Planner) -> Led:
        """Wait until a planner has begun to lead after a moment, and return its term."""
        found = list[Led]()

        def has_begun() -> bool:
            found[:] = [led for led in planner.terms() if led.time_s > moment_s]
            return bool(found)

        self.wait(has_begun, 60)
        return found[0]

    def acknowledged_after(self, moment_s: float) -> float:
        """Wait for a write of the writers that keep retrying, and return when it was acknowledged, in Unix time."""
        ends = list[float]()

        def is_there() -> bool:
            writes = [w for w in self.history.writes[:] if w.version is not None and not w.planner]
            ends[:] = [write.ended_s for write in writes if write.ended_s > moment_s]
            return bool(ends)

        self.wait(is_there, 90)
        return min(ends)

    def welcomes(self, epoch: int) -> list[float]:
        """Wait until every agent has a Welcome of this term or a later one; return the Unix times of the first ones."""

        def all_have() -> bool:
            return all(any(found >= epoch for _, found in agent.epochs()) for agent in self.agents)

        self.wait(all_have, 90)
        return [min(moment for moment, found in agent.epochs() if found >= epoch) for agent in self.agents]

    def finish(self) -> Read:
        """Stop the writers and return the final register, with the terms added to the history."""
        self._stop_writers()
        self.history.terms = sorted((led for p in self.planners for led in p.terms()), key=lambda led: led.time_s)
        return read(self.client)

    @property
    def errors(self) -> list[str]:
        """Return the answers to writers other than acknowledgements and lost races."""
        return [error for writer in self.writers for error in writer.errors]

    def _stop_writers(self) -> None:
        for writer in self.writers:
            writer.stop()

    def wait(self, happens: Callable[[], bool], most_s: float) -> None:
        end_s = time.monotonic() + most_s
        while not happens():
            if time.monotonic() > end_s:
                logs = {p.name: p.lines()[-5:] for p in self.planners}
                raise AssertionError(f"it did not happen in {most_s:g} s; the last of the logs: {logs}")
            time.sleep(0.05)


@contextlib.contextmanager
def pinned(faulty: Faulty, planner: Planner) -> Iterator[list[Write]]:
    """Yield a writer that calls only one planner and ignores redirects, to see what it acknowledges while cut off."""
    history, stop = faulty.history, threading.Event()
    made = list[Write]()

    def run() -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with grpc.insecure_channel(planner.address, options) as channel:
            stub = ClusterServiceStub(channel)
            number = 0
            while not stop.is_set():
                number += 1
                stamp = 950_000_000 + int(time.time() * 100) % 10_000_000 + number
                try:
                    seen = stub.GetCluster(cluster_service_pb2.GetClusterRequest(name=REGISTER), timeout=3).cluster
                except grpc.RpcError:
                    stop.wait(0.1)
                    continue
                base, began_s = int(seen.etag.removeprefix("v")), time.time()
                cluster = cluster_pb2.Cluster(name=REGISTER, etag=seen.etag, document=fleet(stamp))
                request = cluster_service_pb2.UpdateClusterRequest(cluster=cluster)
                version = None
                with contextlib.suppress(grpc.RpcError):
                    version = int(stub.UpdateCluster(request, timeout=20).cluster.etag.removeprefix("v"))
                write = Write(
                    value=str(stamp),
                    base=base,
                    began_s=began_s,
                    ended_s=time.time(),
                    version=version,
                    planner=planner.name,
                )
                made.append(write)
                history.writes.append(write)
                stop.wait(0.05)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
