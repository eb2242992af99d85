"""A model whose heads live on three devices: ``python -m examples.demo_serve`` (or ``make demo-serve``).

A tiny model is made, `hetis-serve` is started on it with a primary and two attention devices, and a chat streams while
its heads are moved from device to device. The text is compared with that of an engine which has one device only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from examples.demo_serve.checkpoint import make_checkpoint
from examples.demo_serve.client import Client, Json

DEVICES = ("primary", "worker-1", "worker-2")
QUESTION = [{"role": "user", "content": "Where do the heads of this answer live?"}]
TOKENS = 400
EVERY = 40  # tokens between two moves
START_S = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print what was seen as JSON on stdout; the story on stderr"
    )
    options = parser.parse_args()
    out = sys.stderr if options.json else sys.stdout
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        try:
            seen = tell(Path(temporary), out)
        except (RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(seen, indent=2))
    return 0 if seen["same"] else 1


def tell(folder: Path, out: TextIO) -> Json:
    """The story, told to ``out``; returns what was seen."""

    def say(text: str = "") -> None:
        print(text, file=out, flush=True)

    model = make_checkpoint(folder / "demo")
    say(f"A model with random weights: 4 layers, 8 KV heads of 2 query heads each ({_size(model)} KiB).")
    wanted = unsplit_text(model)
    with serving(model) as url:
        client = Client(url)
        say(f"hetis-serve is up at {url}: {', '.join(DEVICES)}, 4 MiB of KV each.")
        say(f"A chat streams {TOKENS} tokens; every {EVERY} of them a few heads move.")
        say()
        text, maps = stream_while_moving(client, say)
        samples = client.metrics()
    moved = _sum(samples, "hetis_moved_heads_total")
    measured_s, predicted_s = (
        _sum(samples, f"hetis_decode_step_seconds_{name}_total") for name in ("measured", "predicted")
    )
    same = text == wanted
    say()
    say(f"{moved:.0f} heads moved while {len(text)} characters were told.")
    say(f"The text is {'the same as' if same else 'NOT that of'} the unsplit engine's.")
    say(f"Decode steps took {measured_s:.2f} s, {predicted_s:.2f} s were predicted by what was measured at the start.")
    return {
        "same": same,
        "characters": len(text),
        "moved_heads": moved,
        "maps": maps,
        "measured_s": measured_s,
        "predicted_s": predicted_s,
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


def stream_while_moving(client: Client, say: Any) -> tuple[str, list[list[str]]]:
    """The streamed text, and the maps of heads that were seen on the way."""
    body = {"model": "demo", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    texts, maps, told = [], [], 0
    for number, chunk in enumerate(client.stream_chat(body)):
        texts += [choice["delta"].get("content", "") for choice in chunk["choices"]]
        if number % EVERY != EVERY - 1:
            continue
        running = client.heads()["requests"]
        if not running:
            continue
        heads = running[0]["heads"]
        maps.append(heads)
        new = "".join(texts)[told:]
        told += len(new)
        shown = "  ".join(f"{name}: {''.join(_mark(i, heads, name) for i in range(len(heads)))}" for name in DEVICES)
        say(f"{running[0]['output_tokens']:4d} tokens  {shown}   {_printable(new)[-32:]}")
        turn = len(maps)
        for head in range(turn % 3, len(heads), 3):
            target = DEVICES[(DEVICES.index(heads[head]) + 1 + turn % 2) % len(DEVICES)]
            client.move(chunk["id"], [head], target)
    return "".join(texts), maps


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """`hetis-serve` in a process of its own; its address. It is told to end, and waited for."""
    command = [sys.executable, "-m", "hetis.runtime.server.main", "--model", str(model), "--port", "0"]
    command += ["--threads", "1", "--seats", "4"]
    for name in DEVICES:
        command += ["--device", f"{name}=cpu:4MiB"]
    log = model.parent / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield _address(process, log)
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"hetis-serve ended with {process.returncode}: {log.read_text(encoding='utf-8')}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if found := re.search(r"serving demo at (http://\S+)", log.read_text(encoding="utf-8")):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"hetis-serve did not start: {log.read_text(encoding='utf-8')}")


def _mark(head: int, heads: list[str], name: str) -> str:
    return str(head) if heads[head] == name else "·"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) // 1024


def _sum(samples: dict[str, float], name: str) -> float:
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
