"""The story of the demo, step by step, using only the published API: its processes, and the output of it.

The processes are one planner, and one agent with a simulated engine per node. The output has chapters, events with
their times, and bars of KV use.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from rich.text import Text

from examples.processes import DemoProcesses
from hetis.planner.client import Client, document_of_file
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    document_pb2,
    plan_pb2,
    plan_service_pb2,
    redispatch_pb2,
    replica_pb2,
    report_pb2,
)

BAR = 24


class Teller:
    """Prints to ``file``; every line has the seconds since the story began."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, width=100 if not file.isatty() else None)
        self._started_s = time.monotonic()

    def chapter(self, title: str) -> None:
        self._console.print()
        self._console.print(Text(title, style="bold"))

    def say(self, text: str) -> None:
        elapsed = f"{time.monotonic() - self._started_s:6.1f} s  "
        self._console.print(Text(elapsed, style="dim"), Text(text), sep="", soft_wrap=False)

    def loads(self, report: report_pb2.ReplicaReport) -> None:
        """Print one bar of the KV blocks in use per device."""
        for stage in report.stages:
            for device in stage.devices:
                if not device.total_blocks:
                    continue
                ratio = device.used_blocks / device.total_blocks
                bar = "█" * round(BAR * min(ratio, 1.0))
                slow = device.observed_s / device.predicted_s if device.predicted_s and device.observed_s else 1.0
                note = "" if 0.8 < slow < 1.25 else f"  {slow:.1f}x its predicted time"
                lost = "  lost" if device.status == report_pb2.DEVICE_STATUS_LOST else ""
                self._console.print(
                    f"            stage {stage.stage}  {device.device:<10} {bar:<{BAR}} {ratio:4.0%}"
                    f"  {device.heads:4d} heads{note}{lost}"
                )


START_TIMEOUT_S = 300.0  # the first start on a machine compiles kernels


class Processes(DemoProcesses):
    """The processes that the demo starts."""

    def start_agent(self, node: str, *, server: str, devices: str, control: Path) -> None:
        command = [
            *(sys.executable, "-m", "examples.simulated_engine", "--server", server),
            *("--node", f"clusters/demo/nodes/{node}", "--simulated-devices", devices, "--control", str(control)),
            *("--state-dir", str(self.folder / "agents" / node), "--seed", "1"),
        ]
        self._start(node, command)

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait like `DemoProcesses.wait_until`, with time for such processes to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)


CLUSTER = "clusters/demo"
MODEL, WORKLOAD = "Llama-3.1-70B", "8000/300"
TPOT_LIMIT_S = 0.2
NODES = {"h100": "H100-SXM-80GB:2"} | {f"p100-{i}": "P100-PCIe-16GB:1" for i in range(11)}
SLOW_FACTOR = 3.0
LOAD = {"load_ratio": 0.8, "prompt_tokens": 8000, "output_tokens": 300}
RUSH = LOAD | {"load_ratio": 4.0}  # until enough requests run; at the normal load that would take a minute
NUM_RUNNING = 20
HEARTBEAT, LEASE = "500ms", "3s"
PATIENCE_S = 6


class Story:
    """The story, which records for a test what was seen."""

    def __init__(self, processes: Processes, teller: Teller, folder: Path) -> None:
        self._processes, self._teller = processes, teller
        self._control = folder / "control.json"
        self._address = ""
        self._client: Client
        self._seen: dict[str, Any] = {}

    def tell(self, *, after: Callable[[str], None] = lambda _chapter: None) -> dict[str, Any]:
        """Run the whole story and return what was seen. ``after`` is called with the name of every finished chapter.

        Raises:
            ProcessError: something did not happen in time.
        """
        self._steer({})
        self._start()
        try:
            for name, chapter in {
                "place": self._place,
                "serve": self._serve,
                "slow": self._slow_one_down,
                "killed": self._kill_one,
                "planner": self._kill_the_planner,
                "recovered": self._bring_it_back,
            }.items():
                chapter()
                after(name)
        finally:
            self._client.close()
        return self._seen

    # --- chapters

    def _start(self) -> None:
        say = self._teller.say
        self._teller.chapter("A planner and twelve agents")
        self._address = self._processes.start_planner(listen="127.0.0.1:0", lease=LEASE, heartbeat=HEARTBEAT)
        say(f"hetis-planner serves on {self._address}; watch it on {self._processes.status_page}")
        self._client = Client(self._address)
        self._client.clusters.CreateCluster(
            cluster_service_pb2.CreateClusterRequest(
                cluster_id="demo",
                cluster=cluster_pb2.Cluster(
                    document=document_of_file(
                        Path(__file__).with_name("cluster.yaml"), document_pb2.DOCUMENT_KIND_CLUSTER
                    ),
                    policy=cluster_pb2.ClusterPolicy(
                        redispatch_interval=Duration(seconds=1), placement_patience=Duration(seconds=PATIENCE_S)
                    ),
                ),
            )
        )
        for node, devices in NODES.items():
            self._processes.start_agent(node, server=self._address, devices=devices, control=self._control)
        self._processes.wait_until(lambda: self._ready() == len(NODES), "all nodes are ready")
        say(f"{len(NODES)} agents are connected: 2 H100, 11 P100; the engines behind them are simulated")

    def _place(self) -> None:
        say = self._teller.say
        self._teller.chapter(f"A placement of {MODEL} for {WORKLOAD} tokens, {TPOT_LIMIT_S * 1e3:.0f} ms per token")
        spec = plan_pb2.PlanSpec(
            model_name=MODEL,
            workload_name=WORKLOAD,
            objective=plan_pb2.Objective(ttft_unlimited=True, tpot_limit_s=TPOT_LIMIT_S),
        )
        request = plan_service_pb2.CreatePlanRequest(
            plan_id="demo", plan=plan_pb2.Plan(cluster=CLUSTER, spec=spec), request_id=str(uuid.uuid4())
        )
        self._client.plans.CreatePlan(request)
        plan = self._client.wait("plans/demo", on_change=self._news())
        result = plan.result
        say(
            f"{result.value:.4g} {result.unit}, bound {result.bound:.4g}, gap {result.gap:.2%}:"
            f" {result.num_gpus} GPUs, {result.num_attention_workers} of them attention workers"
        )
        activated = self._client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name="plans/demo"))
        for step in activated.steps:
            kind = plan_service_pb2.TransitionKind.Name(step.kind).rpartition("_")[2].lower()
            say(f"wave {step.wave}: {kind} {step.replica} on {len(step.devices)} GPUs, {step.load_bytes / 1e9:.0f} GB")
        plan = self._client.wait("plans/demo")
        say(f"the plan is {plan_pb2.ActivationState.Name(plan.activation).rpartition('_')[2].lower()}")
        self._seen["plan"] = {
            "value": result.value,
            "gap": result.gap,
            "attention_workers": result.num_attention_workers,
            "active": plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVE,
        }

    def _serve(self) -> None:
        self._teller.chapter("Requests arrive")
        fullest = self._fullest()
        self._steer(RUSH)
        self._processes.wait_until(
            lambda: self._replica().report.num_running >= NUM_RUNNING, f"{NUM_RUNNING} requests run", timeout_s=120
        )
        self._steer(LOAD)
        self._teller.say(f"{NUM_RUNNING} requests run. KV blocks in use, and query heads, by device:")
        self._teller.loads(self._replica().report)
        self._teller.say(f"from now on {LOAD['load_ratio']:.0%} of the rate that the plan promises")
        self._seen["pressure"] = {"before": fullest, "after": self._fullest()}

    def _slow_one_down(self) -> None:
        say = self._teller.say
        slow = self._busiest_worker()
        self._teller.chapter(f"{slow} becomes {SLOW_FACTOR:.0f} times slower")
        before, heads = self._ended(), self._heads_on(slow)
        self._steer(LOAD | {"slow": {slow: SLOW_FACTOR}})
        self._processes.wait_until(lambda: self._ended() > before, "head groups have left it", timeout_s=120)
        moved = self._last_redispatch()
        triggers = ", ".join(_trigger(trigger) for trigger in moved.triggers)
        say(f"re-dispatch because of {triggers}")
        say(
            f"{moved.num_moves} moves, {moved.kv_bytes / 1e9:.2f} GB of KV; a layer of a step"
            f" {moved.makespan_before_s * 1e6:.0f} us -> {moved.makespan_after_s * 1e6:.0f} us"
            f" (with the cost of moving {moved.objective_s / moved.bound_s - 1:.2%} above the proven bound)"
        )
        took_s = moved.end_time.ToNanoseconds() / 1e9 - moved.create_time.ToNanoseconds() / 1e9
        say(f"prepared, committed and released in {took_s:.2f} s, while the requests went on decoding")
        self._processes.wait_until(lambda: self._heads_on(slow) < heads, "its primary reports fewer heads there")
        self._teller.loads(self._replica().report)
        self._seen["slow"] = {
            "device": slow,
            "moves": moved.num_moves,
            "before_s": moved.makespan_before_s,
            "after_s": moved.makespan_after_s,
            "took_s": took_s,
        }

    def _kill_one(self) -> None:
        say = self._teller.say
        device = self._busiest_worker()
        self._killed = device.partition("/")[0]
        self._teller.chapter(f"{self._killed} dies (kill -9), with the KV that it holds")
        before = self._replica().report
        self._processes.kill(self._killed)
        took_s = self._processes.wait_until(
            lambda: self._replica().state == replica_pb2.REPLICA_STATE_DEGRADED, "the planner misses the node"
        )
        say(f"its lease of {LEASE} ran out: after {took_s:.1f} s the replica is DEGRADED and goes on without it")
        self._processes.wait_until(lambda: not self._heads_on(device), "its head groups live elsewhere")
        self._processes.wait_until(
            lambda: self._replica().report.num_finished > before.num_finished + 3,
            "requests finish again",
            timeout_s=180,
        )
        report = self._replica().report
        say(
            f"{report.num_preempted - before.num_preempted} requests that had KV there began anew;"
            f" {report.num_running} run, {report.num_finished - before.num_finished} have finished since"
        )
        self._teller.loads(report)
        self._seen["killed"] = {
            "node": self._killed,
            "noticed_s": took_s,
            "finished_since": report.num_finished - before.num_finished,
        }

    def _kill_the_planner(self) -> None:
        say = self._teller.say
        self._teller.chapter("The planner dies (kill -9)")
        report = self._replica().report
        self._client.close()
        self._processes.kill("planner")
        address = self._processes.start_planner(listen=self._address, lease=LEASE, heartbeat=HEARTBEAT)
        assert address == self._address
        self._client = Client(self._address)
        took_s = self._processes.wait_until(lambda: self._ready() == len(NODES) - 1, "the agents come back")
        self._processes.wait_until(lambda: self._replica().report.num_steps > report.num_steps, "the replica reports")
        now = self._replica().report
        say(f"a new planner knows plan and replica; eleven agents were back {took_s:.1f} s after it was up")
        say(f"nobody had to wait for it: {now.num_steps - report.num_steps} decode steps were made meanwhile")
        self._seen["planner"] = {"back_s": took_s, "steps_meanwhile": now.num_steps - report.num_steps}

    def _bring_it_back(self) -> None:
        say = self._teller.say
        self._teller.chapter("The planner proposes, the node comes back")
        self._processes.wait_until(lambda: self._proposals() != [], "the planner proposes a placement", timeout_s=120)
        (proposal, *_) = self._proposals()
        say(f"{proposal.name}: {proposal.proposal_reason}")
        say(f"it waits for `hetis-plan apply {proposal.name} --activate`: the cluster's policy is ADVISORY")
        self._processes.start_agent(
            self._killed, server=self._address, devices=NODES[self._killed], control=self._control
        )
        self._steer(LOAD)
        took_s = self._processes.wait_until(
            lambda: self._replica().state == replica_pb2.REPLICA_STATE_SERVING, "the replica is whole again"
        )
        say(f"{self._killed} is back; after {took_s:.1f} s the replica is SERVING with all its devices")
        self._seen["recovered"] = {"proposal": proposal.proposal_reason, "took_s": took_s}

    # --- the planner's view

    def _ready(self) -> int:
        return sum(1 for _ in self._client.list_nodes(CLUSTER, states=[cluster_pb2.NODE_STATE_READY]))

    def _replica(self) -> replica_pb2.Replica:
        """Return the only replica of the plan, with its last report."""
        (found,) = self._client.list_replicas(CLUSTER, plan="plans/demo")
        return self._client.clusters.GetReplica(cluster_service_pb2.GetReplicaRequest(name=found.name)).replica

    def _fullest(self) -> float:
        devices = [device for stage in self._replica().report.stages for device in stage.devices]
        return max((device.used_blocks / device.total_blocks for device in devices if device.total_blocks), default=0.0)

    def _busiest_worker(self) -> str:
        """Return the attention worker with the most heads."""
        loads = [load for stage in self._replica().report.stages for load in stage.devices]
        return max((load for load in loads if load.device.startswith("p100")), key=lambda load: load.heads).device

    def _heads_on(self, device: str) -> int:
        return sum(
            load.heads for stage in self._replica().report.stages for load in stage.devices if load.device == device
        )

    def _ended(self) -> int:
        return sum(
            1
            for redispatch in self._client.list_redispatches(CLUSTER)
            if redispatch.state == redispatch_pb2.REDISPATCH_STATE_DONE
        )

    def _last_redispatch(self) -> redispatch_pb2.Redispatch:
        """Return the newest finished re-dispatch."""
        return next(
            redispatch
            for redispatch in self._client.list_redispatches(CLUSTER)
            if redispatch.state == redispatch_pb2.REDISPATCH_STATE_DONE
        )

    def _proposals(self) -> list[plan_pb2.Plan]:
        return [
            plan for plan in self._client.list_plans(cluster=CLUSTER) if plan.origin == plan_pb2.PLAN_ORIGIN_PROPOSAL
        ]

    def _news(self) -> Any:
        said: list[str] = []

        def news(plan: plan_pb2.Plan) -> None:
            phase = plan.progress.phase if plan.state == plan_pb2.PLAN_STATE_SOLVING else ""
            if phase and phase not in said:
                said.append(phase)
                self._teller.say(f"searching: {phase}")

        return news

    def _steer(self, control: dict[str, Any]) -> None:
        """Set the behaviour of the simulated engines from now on."""
        self._control.write_text(json.dumps(control), encoding="utf-8")


def _trigger(trigger: redispatch_pb2.RedispatchTrigger) -> str:
    kind = redispatch_pb2.TriggerKind.Name(trigger.kind).removeprefix("TRIGGER_KIND_").lower().replace("_", " ")
    where = f" of {trigger.device}" if trigger.device else ""
    return f"{kind}{where} ({trigger.value:.0%} above {trigger.limit:.0%})" if trigger.limit else f"{kind}{where}"
