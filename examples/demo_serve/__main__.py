"""A model whose heads live in three processes: ``python -m examples.demo_serve`` (or ``make demo-serve``).

The demo makes a tiny model, starts planner, agent, vLLM with hetis' plugin and two attention workers, and activates a
plan. While a chat streams, the planner sees the primary's KV fill up and moves head groups through the agent. Then the
worker that received them is killed and restarted. Every answer is compared with that of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from examples.demo_serve.processes import HERE, ChatClient, Json, Planner, Processes, summary_of, vllm_python
from examples.processes import ON_CPUS, ProcessError

PRIMARY = "box/0"  # its name in the plan
QUESTION = "Where do the heads of this answer live?"
TOKENS = 360
EVERY = 90  # tokens between two lines of the story
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a last token that ends within a character; vLLM does not stream it
MOST_CHATS = 12  # enough for everything to happen; the planner compiles its kernels during the first
NOT_INSTALLED = "vLLM is not installed in .venv-vllm (make vllm), nor does HETIS_VLLM_PYTHON name its Python"
Say = Callable[[str], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print what was seen as JSON on stdout; the story on stderr"
    )
    parser.add_argument("--stages", type=int, choices=(1, 2), default=1, help="pipeline stages of the model (1)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs, model and store in this folder")
    options = parser.parse_args()
    python = vllm_python()
    if python is None:
        print(f"error: {NOT_INSTALLED}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        try:
            folder = options.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            seen = tell(folder, python, sys.stderr if options.json else sys.stdout, stages=options.stages)
        except (ProcessError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(seen, indent=2))
    return 0 if all(seen["same"]) and seen["redispatches"] and seen["is_back"] else 1


def tell(folder: Path, python: Path, out: TextIO, *, stages: int) -> Json:
    """Tell the story to ``out`` and return what was seen."""

    def say(text: str = "") -> None:
        print(text, file=out, flush=True)

    begun_s = time.monotonic()
    model = folder / "demo"
    wanted = make_model(python, model)
    size = sum(path.stat().st_size for path in model.iterdir()) // 1024
    say(f"A model with random weights: 4 layers, 8 KV heads of 2 query heads, {size} KiB.")
    with Processes(folder, model, stages) as processes:
        layers = " and ".join(map(str, processes.layout.layers))
        say(f"Planned: {layers} layers on {stages} L4, heads on {2 * stages} T4 beside.")
        address = processes.start_planner(listen="127.0.0.1:0", lease="10s", heartbeat="250ms")
        with closing(Planner(address)) as planner:
            planner.create_cluster(processes.cluster)
            processes.start_agent(address, node="clusters/demo/nodes/box", python=python)
            processes.wait_until(planner.is_agent_ready, "the agent has called the planner")
            planner.put_in_force(processes.plan)
            processes.wait_until(planner.is_serving, "the replica is in force")
            replica = planner.replica()
            say(f"hetis-planner at {address}: the plan is in force. hetis-agent has")
            say(f"started vLLM at {replica.report.endpoint}; {' and '.join(processes.workers)} hold KV alone.\n")
            url = f"http://{replica.report.endpoint}"
            with closing(ChatClient(url, processes.socket(replica.name), replica.name)) as client:
                story = Story(processes, planner, client, say)
                texts = story.tell()
                samples = client.metrics()
            processes.end_agent()
    same = [text.rstrip(UNFINISHED) == wanted.rstrip(UNFINISHED) for text in texts]
    say(f"\n{story.count} re-dispatches by the planner, one dead worker, {len(texts)} answers:")
    say(f"their texts are {'those' if all(same) else 'NOT those'} of transformers.")
    say(f"Done in {time.monotonic() - begun_s:.0f} s; every process has been stopped.")
    return {
        "same": same,
        "is_back": story.is_back,
        "redispatches": story.count,
        "maps": story.maps,
        "moved_groups": _sum(samples, "hetis_moved_groups_total"),
        "committed": _sum(samples, "hetis_moves_total", 'by="planner"', 'state="committed"'),
        "recomputes": _sum(samples, "hetis_recomputes_total"),
        "exchanges": _sum(samples, "hetis_exchanges_total"),
        "decisions": _sum(samples, "hetis_dispatch_decisions_total"),
        "dispatch_count": _sum(samples, "hetis_dispatch_seconds_count"),
    }


def make_model(python: Path, folder: Path) -> str:
    """Make the model in a folder and return the answer of transformers. Raises ProcessError on failure."""
    command = [str(python), "-m", "examples.demo_serve.model", str(folder), QUESTION, str(TOKENS)]
    environment = os.environ | ON_CPUS
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProcessError(f"the model was not made:\n{done.stderr[-2000:]}")
    return str(json.loads(done.stdout.splitlines()[-1])["text"])


@dataclass
class Story:
    """The story that happens while chats stream.

    Attributes:
        count: number of the planner's re-dispatches that have been printed.
        killed: the worker that was killed; empty if none was yet.
        is_missed: whether the engine has noticed that.
        is_back: whether it takes heads again.
        maps: the device of each head, at every line of the story.
    """

    processes: Processes
    planner: Planner
    client: ChatClient
    say: Say
    count: int = 0
    killed: str = ""
    is_missed: bool = False
    is_back: bool = False
    maps: list[list[str]] = field(default_factory=list)

    def tell(self) -> list[str]:
        """Chat until everything has happened, and return the texts."""
        texts: list[str] = []
        while len(texts) < MOST_CHATS and not (self.is_back and len(texts) > 1):
            self.say(f"Chat {len(texts) + 1} streams {TOKENS} tokens. Which heads are where:")
            texts.append(self._chat())
        return texts

    def _chat(self) -> str:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": "demo", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        texts: list[str] = []
        for number, chunk in enumerate(self.client.stream_chat(body), 1):
            texts += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
            if number % (EVERY // 6) == 0:
                self._look(number, is_line=number % EVERY == 0)
        self._tell_news()
        return "".join(texts)

    def _look(self, tokens: int, *, is_line: bool) -> None:
        """Print a line of the story now and then, and kill the worker that got heads."""
        moved, seen = self._tell_news(), self.client.heads()
        self.is_missed |= bool(self.killed) and self.killed not in seen.up
        if self.is_missed and not self.is_back and self.killed in seen.up:
            self.is_back = True
            self.say(f"  {self.killed} has joined again and takes heads.")
        if not seen.owners:
            return
        self.maps.append(list(seen.owners))
        if is_line or moved:
            devices = PRIMARY, *self.processes.workers
            self.say(f"  {tokens:4d} tokens   {_shown(devices, seen.owners, seen.up)}")
        victims = [name for name in self.processes.workers if name in seen.owners]
        if self.count and victims and not self.killed:
            self.killed = max(victims, key=seen.owners.count)
            self.processes.kill_worker(self.killed)
            self.say(f"  {self.killed} is killed (kill -9), with the KV of {seen.owners.count(self.killed)} heads")

    def _tell_news(self) -> bool:
        news = self.planner.redispatches()[self.count :]
        for redispatch in news:
            self.say(f"  planner: {summary_of(redispatch)}")
        self.count += len(news)
        return bool(news)


def _shown(devices: tuple[str, ...], owners: tuple[str, ...], up: tuple[str, ...]) -> str:
    """Return a part such as ``box/0 0·23·56·`` for each device."""
    parts = []
    for name in devices:
        marks = "".join(str(i) if owner == name else "·" for i, owner in enumerate(owners))
        parts.append(f"{name} {marks if name in up else 'lost'.ljust(len(owners))}")
    return "   ".join(parts)


def _sum(samples: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value for key, value in samples.items() if key.partition("{")[0] == name and all(one in key for one in labels)
    )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
