"""The side of an engine that is measured: it says that it is ready, then answers one batch of prompts per line.

Only the standard library is used here: other engines run in environments that have nothing of ours. What the engine
prints goes to stderr, so that stdout has nothing but answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Greedy continuations, of exactly so many tokens, of prompts."""


def answer(start: Callable[[], Generate]) -> None:
    """Starts the engine, and serves until stdin ends: ``{"prompts": [[...]], "tokens": n}`` gives ``[[...]]``."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generate = start()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(generate(asked["prompts"], asked["tokens"])), file=answers, flush=True)
