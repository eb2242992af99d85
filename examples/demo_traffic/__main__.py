"""Plans that follow traffic: ``python -m examples.demo_traffic`` (or ``make demo-traffic``), in a few minutes.

A planner and five agents with simulated engines. The plan has the fewest cards for the traffic. Traffic doubles and its
prompts lengthen: the planner notices, proposes a plan with a bound, activates it, and first tokens are in time again.
Traffic falls: cards are given back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from examples.demo_cluster.story import CLUSTER, Processes, Teller
from examples.processes import ProcessError
from hetis.planner.client import CallError, Client, document_of_file
from hetis.planner.convert.traffic import MINUTE_S, TrafficWindow
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2, plan_pb2, plan_service_pb2, replica_pb2
from hetis.v1.traffic_pb2 import ClusterTraffic

NODES = [f"l4-{number}" for number in range(5)]
# Enough requests that a minute tells a doubling from chance
RATE_RPS, PROMPT_TOKENS, OUTPUT_TOKENS, TTFT_LIMIT_S = 4.0, 500, 60, 5.0
LENGTHEN = 1.6
PROMPT_TOKEN_S = 1.5e-4  # of an L4 that computes prompts of an 8B model
IN_TIME = 0.95  # share of the first tokens of a minute that the limit of TTFT is of
SERVING = (replica_pb2.REPLICA_STATE_SERVING, replica_pb2.REPLICA_STATE_DEGRADED)
PATIENCE_S = 900.0


class Story:
    """The story, which returns what was seen. Every engine gets its share of the traffic, as a router would give it."""

    def __init__(self, processes: Processes, teller: Teller, folder: Path) -> None:
        self._processes, self._teller, self._control = processes, teller, folder / "control.json"
        self._rate_rps, self._prompt_tokens = 0.0, PROMPT_TOKENS
        self._client: Client

    def tell(self) -> list[dict[str, Any]]:
        """Tell the story, and return the changes.

        Raises ProcessError if something does not happen in time.
        """
        teller = self._teller
        teller.chapter(f"A planner, five agents, and the fewest cards for {1.2 * RATE_RPS:g} requests/s")
        self._start()
        self._tell_plan()
        self._arrive(RATE_RPS, PROMPT_TOKENS)
        self._until(lambda: len(self._minutes()) > 0, "a minute of traffic has been measured")
        changes = list[dict[str, Any]]()
        self._until(self._has_settled, "the planner has decided")
        teller.say(self._traffic().decision.reason)
        cards = self._tell_plan()
        teller.chapter(f"Traffic doubles, and its prompts are {LENGTHEN:g} times as long")
        self._arrive(2 * RATE_RPS, round(LENGTHEN * PROMPT_TOKENS))
        while not any(one["cards"] > cards for one in changes):
            changes.append(self._tell_change())
        changes += self._tell_until(self._is_in_time, "first tokens are in time again")
        teller.say(f"{self._in_time():.0%} of the first tokens of the last minute came within {TTFT_LIMIT_S:g} s")
        teller.chapter("Traffic falls to a quarter of that")
        cards = self._cards()
        self._arrive(RATE_RPS / 2, PROMPT_TOKENS)
        changes += self._tell_until(lambda: self._cards() < cards, "cards are given back")
        self._client.close()
        return changes

    def _start(self) -> None:
        self._arrive(0.0, PROMPT_TOKENS)
        address = self._processes.start_planner(listen="127.0.0.1:0", lease="6s", heartbeat="2s")
        self._teller.say(f"hetis-planner serves on {address}; watch it on {self._processes.status_page}")
        self._client = Client(address)
        kind = document_pb2.DOCUMENT_KIND_CLUSTER
        policy = cluster_pb2.ClusterPolicy(
            traffic=cluster_pb2.REACTION_MODE_AUTOMATIC, traffic_cool_down=Duration(seconds=60)
        )
        cluster = cluster_pb2.Cluster(
            document=document_of_file(Path(__file__).with_name("cluster.yaml"), kind), policy=policy
        )
        request = cluster_service_pb2.CreateClusterRequest(cluster_id="demo", cluster=cluster)
        self._client.clusters.CreateCluster(request)
        for node in NODES:
            self._processes.start_agent(node, server=address, devices="L4:1", control=self._control)
        ready = [cluster_pb2.NODE_STATE_READY]
        self._until(
            lambda: sum(1 for _ in self._client.list_nodes(CLUSTER, states=ready)) == len(NODES), "all nodes are ready"
        )
        spec = plan_pb2.PlanSpec(
            model_name="Llama-3.1-8B",
            workload_name=f"{PROMPT_TOKENS}/{OUTPUT_TOKENS}",
            objective=plan_pb2.Objective(
                kind=plan_pb2.OBJECTIVE_KIND_GPUS, demand_rps=1.2 * RATE_RPS, ttft_limit_s=TTFT_LIMIT_S
            ),
        )
        plan = plan_pb2.Plan(cluster=CLUSTER, spec=spec)
        self._client.plans.CreatePlan(plan_service_pb2.CreatePlanRequest(plan_id="demo", plan=plan))
        self._client.wait("plans/demo")
        self._client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name="plans/demo"))
        self._client.wait("plans/demo")

    def _tell_until(self, is_so: Callable[[], bool], what: str) -> list[dict[str, Any]]:
        """Wait until something is so, tell all changes until then, and return them."""
        changes, known = list[dict[str, Any]](), [self._in_force()]
        while True:
            self._until(lambda: is_so() or self._in_force() != known[-1], what)
            if self._in_force() == known[-1]:
                return changes
            changes.append(self._tell_change(known[-1]))
            known.append(self._in_force())

    def _tell_change(self, before: str = "") -> dict[str, Any]:
        """Wait until another plan is in force than before, or now, tell why and how, and return that."""
        before, since_s = before or self._in_force(), time.monotonic()
        self._until(lambda: self._in_force() != before, "the planner activates another plan")
        after_s, name = time.monotonic() - since_s, self._in_force()
        change = self._client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=name)).plan
        gains, reason = change.traffic_proposal, change.proposal_reason
        self._teller.say(f"after {after_s:.0f} s: {reason}")
        self._teller.say(f"{gains.gain:.3g} {gains.unit} gained, at most {gains.bound:.3g} can be")
        for step in gains.steps:
            self._teller.say(step)
        self._until(
            lambda: self._client.wait(name).activation != plan_pb2.ACTIVATION_STATE_ACTIVATING, "it is in force"
        )
        told = {"after_s": after_s, "reason": reason, "gain": gains.gain, "bound": gains.bound, "steps": [*gains.steps]}
        return {**told, "cards": self._tell_plan()}

    def _tell_plan(self) -> int:
        cards = self._cards()
        self._teller.say(f"{self._in_force()} is in force: {cards} of {len(NODES)} cards")
        return cards

    def _cards(self) -> int:
        request = plan_service_pb2.GetPlanRequest(name=self._in_force())
        return self._client.plans.GetPlan(request).plan.result.num_gpus

    def _in_force(self) -> str:
        request = cluster_service_pb2.GetClusterRequest(name=CLUSTER)
        return self._client.clusters.GetCluster(request).cluster.active_plan

    def _traffic(self) -> ClusterTraffic:
        request = cluster_service_pb2.GetClusterTrafficRequest(name=f"{CLUSTER}/traffic")
        return self._client.clusters.GetClusterTraffic(request).cluster_traffic

    def _has_settled(self) -> bool:
        """Return whether the planner has decided, and its plan is in force if that was another one."""
        decision = self._traffic().decision
        return bool(decision.reason) and not decision.plan

    def _minutes(self) -> list[TrafficWindow]:
        """Return the whole minutes that were measured."""
        windows = map(TrafficWindow.from_proto, self._traffic().windows)
        return [one for one in windows if one.span_s == MINUTE_S and one.traffic.seconds > MINUTE_S - 5]

    def _in_time(self) -> float:
        """Return the share of the first tokens of the last whole minute that came within the limit."""
        return self._minutes()[-1].traffic.ttft_s.share_within(TTFT_LIMIT_S)

    def _is_in_time(self) -> bool:
        return self._in_time() >= IN_TIME

    def _arrive(self, rate_rps: float, prompt_tokens: int) -> None:
        self._rate_rps, self._prompt_tokens = rate_rps, prompt_tokens
        self._share(1)

    def _share(self, num_replicas: int) -> None:
        share = {
            "rate_rps": self._rate_rps / max(1, num_replicas),
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": OUTPUT_TOKENS,
            "same_lengths": True,
            "prompt_token_s": PROMPT_TOKEN_S,
        }
        text = json.dumps(share)
        if not self._control.exists() or self._control.read_text(encoding="utf-8") != text:
            self._control.write_text(text, encoding="utf-8")

    def _until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait while the traffic is shared among the replicas that serve."""

        def shared() -> bool:
            self._share(sum(one.state in SERVING for one in self._client.list_replicas(CLUSTER)))
            return is_so()

        self._processes.wait_until(shared, what, timeout_s=PATIENCE_S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_traffic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the changes as JSON on stdout; the story on stderr")
    options = parser.parse_args()
    teller = Teller(sys.stderr if options.json else sys.stdout)
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as folder, Processes(Path(folder)) as processes:
        try:
            changes = Story(processes, teller, Path(folder)).tell()
        except (ProcessError, CallError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    teller.say("Done; every process has been stopped.")
    if options.json:
        print(json.dumps(changes, indent=2))
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
