"""A plan that serves: ``python -m examples.demo_vllm`` (or ``make demo-vllm``).

The demo makes a tiny model, starts a planner and the agents of two nodes, and activates a plan. The agents start vLLM,
one replica each, of different sizes. nginx distributes requests by the plan's weights. One engine is killed and comes
back. Then another plan is rolled out, which replaces a replica. Clients send requests all the time, and none fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from examples.demo_serve.processes import vllm_python
from examples.demo_vllm.processes import NODES, Load, Processes, nginx_program, vllm_cpu
from examples.processes import ProcessError
from hetis.planner.client import Client
from hetis.v1 import replica_pb2

HERE = Path(__file__).parent
CLUSTER = "clusters/demo"
ANSWERS = 40  # answers between two events of the story
NO_VLLM = "vLLM is not installed in .venv-vllm (make vllm), nor does HETIS_VLLM_PYTHON name its Python"
NO_NGINX = "nginx is not installed (make routers, or apt install nginx), nor does HETIS_NGINX name it"
Json = dict[str, Any]
State = replica_pb2.ReplicaState


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_vllm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print what was seen as JSON; the story on stderr")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs, model and store in this folder")
    options = parser.parse_args()
    python, nginx = vllm_python(), nginx_program()
    if python is None or nginx is None:
        print(f"error: {NO_VLLM if python is None else NO_NGINX}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        try:
            folder = (options.keep or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            model = make_model(python, folder / "model")
            out = sys.stderr if options.json else sys.stdout
            seen = Story(folder, model, vllm_cpu(python, model), nginx, out).tell()
        except (ProcessError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(seen, indent=2))
    return 1 if seen["failures"] else 0


def make_model(python: Path, folder: Path) -> Path:
    """Make a tiny model with random weights. Raises ProcessError if that fails."""
    command = [str(python), "-m", "examples.demo_serve.model", str(folder)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProcessError(f"the model was not made:\n{done.stderr[-2000:]}")
    return folder


class Story:
    """The demo, which prints to ``out`` as it proceeds."""

    def __init__(self, folder: Path, model: Path, engine: Json, nginx: Path, out: TextIO) -> None:
        self._folder, self._model, self._engine, self._nginx, self._out = folder, model, engine, nginx, out
        self._begun_s = time.monotonic()

    def tell(self) -> Json:
        """Run the whole demo and return what was seen."""
        with Processes(self._folder) as processes:
            address = processes.start_planner(listen="127.0.0.1:0", lease="30s", heartbeat="500ms")
            with Client(address) as client:
                self._processes, self._client, self._address = processes, client, address
                processes.hetis_plan("apply", str(HERE / "cluster.yaml"), "--server", address)
                for node in NODES:
                    processes.start_agent(node, server=address, engine=self._engine)
                self._say(f"hetis-planner at {address}, hetis-agents of the nodes {' and '.join(NODES)}.")
                return self._serve()

    def _serve(self) -> Json:
        self._put_in_force("one")
        url = self._processes.start_router(self._nginx, self._address)
        self._say(f"nginx at {url} shares requests out.\n")
        with Load(url) as load:
            first = self._answers(load)
            self._say("OpenAI's client asks through nginx; answers by replica, planned and seen:")
            shares = self._shares(first)

            killed = self._processes.kill_engine("big")
            self._say(f"\nvLLM of node big, process {killed}, is killed (kill -9).")
            self._wait_for(load, lambda: "FAILED" in self._states(), "the planner knows")
            with load.slow():
                self._wait_for(load, lambda: set(self._states()) == {"SERVING"}, "it serves again")
            (again,) = self._processes.engines("big")
            self._say(f"The agent has started it again: process {again}.")
            self._answers(load)

            self._say("\nAnother plan, where node small has a replica on each of its cards, is rolled out:")
            with load.slow():
                self._put_in_force("two", load)
            second = self._answers(load)
            shares_after = self._shares(second)
            everything = load.served
        failures = load.failures
        self._say(f"\n{sum(everything.values())} requests were answered, {len(failures)} failed.")
        for failure in failures[:5]:
            self._say(f"  {failure}")
        self._say(f"Done in {time.monotonic() - self._begun_s:.0f} s; every process is stopped.")
        return {
            "answers": sum(everything.values()),
            "failures": failures,
            "replicas": [shares, shares_after],
            "is_back": killed != again,
        }

    # --- steps

    def _put_in_force(self, name: str, load: Load | None = None) -> None:
        """Make and activate a plan as an operator does, the latter by one command that returns when it is active."""
        file = os.path.relpath(self._processes.make_plan(name, self._model))
        begun_s = time.monotonic()
        words = ["apply", "--server", self._address, "--cluster", "demo", "--plan", file, "--name", name]
        self._processes.hetis_plan(*words, "--activate")
        self._say(f"hetis-plan {' '.join(words[0:1] + words[3:])} --activate: in force after {_since(begun_s)}")
        for one in self._serving():
            self._say(f"  {one.name.rpartition('/')[2]:8} on {', '.join(_devices(one)):20} at {one.report.endpoint}")

    def _answers(self, load: Load) -> dict[str, int]:
        """Wait for this many more answers and return how many came from each replica."""
        before = load.served
        self._wait_for(load, lambda: sum((load.served - before).values()) >= ANSWERS, f"{ANSWERS} answers came")
        return dict(load.served - before)

    def _shares(self, answers: dict[str, int]) -> list[Json]:
        whole, replicas = sum(answers.values()), self._serving()
        rate = sum(one.shape.rate_rps for one in replicas)
        found = [
            {
                "replica": one.name.rpartition("/")[2],
                "devices": _devices(one),
                "planned": one.shape.rate_rps / rate,
                "seen": answers.get(one.report.endpoint, 0) / whole,
            }
            for one in replicas
        ]
        for share in found:
            self._say(f"  {share['replica']:8} planned {share['planned']:4.0%}   seen {share['seen']:4.0%}")
        return found

    def _wait_for(self, load: Load, is_so: Any, what: str) -> None:
        begun, begun_s = sum(load.served.values()), time.monotonic()
        self._processes.wait_until(is_so, what)
        answers = sum(load.served.values()) - begun
        self._say(f"  {what}: {_since(begun_s)}, {answers} answers meanwhile, {len(load.failures)} requests failed")

    def _states(self) -> list[str]:
        return [State.Name(one.state).removeprefix("REPLICA_STATE_") for one in self._client.list_replicas(CLUSTER)]

    def _serving(self) -> list[replica_pb2.Replica]:
        """Return the replicas that serve."""
        from hetis.v1.cluster_service_pb2 import GetReplicaRequest

        up = State.REPLICA_STATE_SERVING
        names = [one.name for one in self._client.list_replicas(CLUSTER) if one.state == up]
        return [self._client.clusters.GetReplica(GetReplicaRequest(name=name)).replica for name in names]

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def _devices(replica: replica_pb2.Replica) -> list[str]:
    return [device for stage in replica.shape.stages for device in stage.devices]


def _since(begun_s: float) -> str:
    return f"{time.monotonic() - begun_s:.0f} s"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
