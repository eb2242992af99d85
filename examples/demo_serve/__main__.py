"""A model whose heads live in three processes: ``python -m examples.demo_serve`` (or ``make demo-serve``).

A tiny model is made; planner, agent, `hetis-serve` and two attention workers are started, and a plan is put in force.
While a chat streams, the planner sees the primary's KV fill and has heads moved, through the agent. Then the worker
that got them is killed, and started again. Every answer is compared with that of an engine with one device only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from examples.demo_serve.checkpoint import make_checkpoint
from examples.demo_serve.client import Client, Json
from examples.demo_serve.planner import HERE, Planner, told
from examples.demo_serve.processes import Processes
from examples.processes import ProcessError

PRIMARY, WORKERS = "box/0", ("box/1", "box/2")  # as the plan calls them
DEVICES = (PRIMARY, *WORKERS)
KV_TOKENS = 144  # the plan's room is that of real cards; here the primary is full soon
WORKER_KV = "8MiB"
QUESTION = [{"role": "user", "content": "Where do the heads of this answer live?"}]
TOKENS = 900
EVERY = 150  # tokens between two lines of the story
MOST_CHATS = 4  # within which all of it has happened
Say = Callable[[str], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print what was seen as JSON on stdout; the story on stderr"
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs, model and store in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        try:
            folder = options.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            seen = tell(folder, sys.stderr if options.json else sys.stdout)
        except (ProcessError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(seen, indent=2))
    return 0 if all(seen["same"]) and seen["redispatches"] and seen["is_back"] else 1


def tell(folder: Path, out: TextIO) -> Json:
    """The story, told to ``out``; returns what was seen."""

    def say(text: str = "") -> None:
        print(text, file=out, flush=True)

    begun_s = time.monotonic()
    model = make_checkpoint(folder / "demo")
    size = sum(path.stat().st_size for path in model.iterdir()) // 1024
    say(f"A model with random weights: 4 layers, 8 KV heads of 2 query heads, {size} KiB.")
    wanted = unsplit_text(model)
    with Processes(folder, WORKERS) as processes:
        address = processes.start_planner(listen="127.0.0.1:0", lease="10s", heartbeat="250ms")
        with closing(Planner(address)) as planner:
            planner.create_cluster()
            processes.start_agent(address, node="clusters/demo/nodes/box", devices="L4:1,T4:2")
            for name in WORKERS:
                processes.start_worker(name, WORKER_KV)
            options = ("--plan", str(HERE / "plan.json"), "--kv-tokens", str(KV_TOKENS), "--seats", "4")
            url = processes.start_server(model, *options)
            say(f"hetis-planner at {address}, hetis-agent beside hetis-serve at")
            say(f"{url}; {' and '.join(WORKERS)} are processes that hold KV alone.")
            processes.wait_until(planner.is_agent_ready, "the agent has called the planner")
            planner.put_in_force()
            processes.wait_until(planner.is_serving, "the replica is in force")
            say("The plan is checked and in force: the engine has its assignment.\n")
            story = Story(processes, planner, Client(url), say)
            texts = story.tell()
            samples = story.client.metrics()
            processes.end_server()
    same = [text == wanted for text in texts]
    say(f"\n{story.count} re-dispatches by the planner, one dead worker, {len(texts)} answers:")
    say(f"their texts are {'those' if all(same) else 'NOT those'} of the unsplit engine.")
    say(f"Done in {time.monotonic() - begun_s:.0f} s; every process has been stopped.")
    return {
        "same": same,
        "is_back": story.is_back,
        "redispatches": story.count,
        "maps": story.maps,
        "moved_heads": _sum(samples, "hetis_moved_heads_total"),
        "committed": _sum(samples, "hetis_migrations_total", 'state="committed"'),
        "measured_s": _sum(samples, "hetis_decode_step_seconds_measured_total"),
        "predicted_s": _sum(samples, "hetis_decode_step_seconds_predicted_total"),
    }


def unsplit_text(model: Path) -> str:
    """The same answer by an engine with one device, offline."""
    from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices
    from hetis.runtime.engine.request import SamplingParams
    from hetis.runtime.server.chat import ChatTemplate
    from hetis.runtime.server.text import Tokens

    chat = ChatTemplate.from_folder(model)
    assert chat is not None
    prompt = Tokens.from_folder(model).encode(chat.render(QUESTION), special=False)
    engine = engine_from_folder(model, local_devices([1000]))
    (answer,) = generate(engine, [prompt], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    return answer.text


@dataclass
class Story:
    """What happens while chats stream.

    Attributes:
        count: re-dispatches of the planner that have been told.
        killed: the worker that was killed; empty: none yet.
        is_back: it takes heads again.
        maps: where each head was, at every line of the story.
    """

    processes: Processes
    planner: Planner
    client: Client
    say: Say
    count: int = 0
    killed: str = ""
    is_back: bool = False
    maps: list[Json] = field(default_factory=list)

    def tell(self) -> list[str]:
        """Chats until all has happened; their texts."""
        texts: list[str] = []
        while len(texts) < MOST_CHATS and not (self.killed and self.is_back and len(texts) > 1):
            self.say(f"Chat {len(texts) + 1} streams {TOKENS} tokens. Which heads are where:")
            texts.append(self._chat())
            if self.killed and not self.is_back:
                self.processes.start_worker(self.killed, WORKER_KV)
                self.processes.wait_until(lambda: self.killed in self._up(), f"{self.killed} is back")
                self.is_back = True
                self.say(f"  {self.killed} was started again and takes heads again.\n")
        return texts

    def _chat(self) -> str:
        body = {"model": "demo", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        texts: list[str] = []
        for number, chunk in enumerate(self.client.stream_chat(body), 1):
            texts += [choice["delta"].get("content", "") for choice in chunk["choices"]]
            if number % (EVERY // 3) == 0:
                self._look(number, is_line=number % EVERY == 0)
        self._tell_news()
        return "".join(texts)

    def _look(self, tokens: int, *, is_line: bool) -> None:
        """A line of the story now and then; and the worker that got heads is killed."""
        moved = self._tell_news()
        seen = self.client.heads()
        if not seen["requests"] or not seen["requests"][0]["heads"]:
            return
        heads, up = seen["requests"][0]["heads"], [device["name"] for device in seen["devices"] if device["up"]]
        self.maps.append(heads)
        if is_line or moved:
            self.say(f"  {tokens:4d} tokens   {_shown(heads, up)}")
        victims = [name for name in WORKERS if name in heads]
        if self.count and victims and not self.killed:
            self.killed = max(victims, key=heads.count)
            self.processes.kill_worker(self.killed)
            self.say(f"  {self.killed} is killed (kill -9), with the KV of {heads.count(self.killed)} heads")

    def _tell_news(self) -> bool:
        news = self.planner.redispatches()[self.count :]
        for redispatch in news:
            self.say(f"  planner: {told(redispatch)}")
        self.count += len(news)
        return bool(news)

    def _up(self) -> list[str]:
        return [device["name"] for device in self.client.heads()["devices"] if device["up"]]


def _shown(heads: list[str], up: list[str]) -> str:
    """``box/0 0·23·56·`` for each device."""
    parts = []
    for name in DEVICES:
        marks = "".join(str(i) if owner == name else "·" for i, owner in enumerate(heads))
        parts.append(f"{name} {marks if name in up else 'lost'.ljust(len(heads))}")
    return "   ".join(parts)


def _sum(samples: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name and label in key)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
