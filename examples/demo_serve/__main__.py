"""A model whose heads live in three processes: ``python -m examples.demo_serve`` (or ``make demo-serve``).

A tiny model is made, `hetis-serve` is started on it with two attention workers, and a chat streams while its heads are
moved from device to device. In the middle one worker is killed; later it is started again and takes heads again. Both
answers are compared with that of an engine which has one device only.
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
from typing import TextIO

from examples.demo_serve.checkpoint import make_checkpoint
from examples.demo_serve.client import Client, Json
from examples.demo_serve.processes import ProcessError, Processes

WORKERS = ("worker-1", "worker-2")
DEVICES = ("primary", *WORKERS)
QUESTION = [{"role": "user", "content": "Where do the heads of this answer live?"}]
TOKENS = 400
EVERY = 40  # tokens between two moves
KILL_AFTER = 5  # moves
BACK_S = 60
Say = Callable[[str], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print what was seen as JSON on stdout; the story on stderr"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        try:
            seen = tell(Path(temporary), sys.stderr if options.json else sys.stdout)
        except (ProcessError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(seen, indent=2))
    return 0 if all(seen["same"]) else 1


def tell(folder: Path, out: TextIO) -> Json:
    """The story, told to ``out``; returns what was seen."""

    def say(text: str = "") -> None:
        print(text, file=out, flush=True)

    model = make_checkpoint(folder / "demo")
    size = sum(path.stat().st_size for path in model.iterdir()) // 1024
    say(f"A model with random weights: 4 layers, 8 KV heads of 2 query heads each, {size} KiB.")
    wanted = unsplit_text(model)
    with Processes(folder, WORKERS) as processes:
        for name in WORKERS:
            processes.start_worker(name, "4MiB")
        url = processes.start_server(model, "--seats", "4", "--device", "primary=cpu:4MiB")
        say(f"hetis-serve is up at {url}, with {' and '.join(WORKERS)} as processes of their own.")
        client = Client(url)
        say(f"\nA chat streams {TOKENS} tokens; every {EVERY} of them a few heads move, then {WORKERS[0]} is killed.\n")
        first, maps = stream_while_moving(client, say, kill=lambda: processes.kill(WORKERS[0]))
        processes.start_worker(WORKERS[0], "4MiB")
        is_back = _until_up(client, WORKERS[0])
        say(f"\n{WORKERS[0]} was started again and {'takes heads again' if is_back else 'is NOT back'}. Once more:\n")
        second, more = stream_while_moving(client, say)
        samples = client.metrics()
        processes.end_server()
    same = [first == wanted, second == wanted]
    moved = _sum(samples, "hetis_moved_heads_total")
    say(f"\n{moved:.0f} heads moved, one worker died in the middle of an answer.")
    say(f"Both texts are {'the same as' if all(same) else 'NOT those of'} the unsplit engine's.")
    return {
        "same": same,
        "is_back": is_back,
        "characters": len(first),
        "moved_heads": moved,
        "maps": maps + more,
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


def stream_while_moving(client: Client, say: Say, *, kill: Callable[[], None] | None = None) -> tuple[str, list[Json]]:
    """The streamed text, and on which device each head was on the way; ``kill`` happens after some moves."""
    body = {"model": "demo", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    texts, maps, told = [], [], 0
    for number, chunk in enumerate(client.stream_chat(body)):
        texts += [choice["delta"].get("content", "") for choice in chunk["choices"]]
        if number % EVERY != EVERY - 1:
            continue
        seen = client.heads()
        if not seen["requests"] or not seen["requests"][0]["heads"]:
            continue
        (request,) = seen["requests"]
        up = [device["name"] for device in seen["devices"] if device["up"]]
        maps.append(request["heads"])
        text = "".join(texts)
        say(f"{request['output_tokens']:4d} tokens  {_shown(request['heads'], up)}   {_printable(text[told:])[-28:]}")
        told = len(text)
        if kill is not None and len(maps) == KILL_AFTER:
            say(f"             {WORKERS[0]} is killed")
            kill()
            continue
        _move_some(client, chunk["id"], request["heads"], up, turn=len(maps))
    return "".join(texts), maps


def _move_some(client: Client, request: str, heads: list[str], up: list[str], *, turn: int) -> None:
    """Every third head goes on to another device."""
    for head in range(turn % 3, len(heads), 3):
        others = [name for name in up if name != heads[head]]
        if others:
            client.move(request, [head], others[(turn + head) % len(others)])


def _until_up(client: Client, name: str) -> bool:
    deadline_s = time.monotonic() + BACK_S
    while time.monotonic() < deadline_s:
        if any(device["name"] == name and device["up"] for device in client.heads()["devices"]):
            return True
        time.sleep(0.1)
    return False


def _shown(heads: list[str], up: list[str]) -> str:
    """``primary: 0·23·56·`` for each device."""
    parts = []
    for name in DEVICES:
        marks = "".join(str(i) if owner == name else "·" for i, owner in enumerate(heads))
        parts.append(f"{name}: {marks if name in up else 'lost'.ljust(len(heads))}")
    return "  ".join(parts)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _sum(samples: dict[str, float], name: str) -> float:
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
