"""vLLM with the plugin on emulated GPUs of different speeds: throughput by dispatch rule.

    python -m benchmarks.emulation [--quick] [--json] [--only TEXT] [--rounds N] [--python PYTHON]

A primary and attention workers of speed 1, 1, 1/2 and 1/4 run in separate processes and serve the same requests under
every rule. A GPU is slowed down by waiting: its process computes and answers when the emulated GPU would, so that a
machine with few cores can emulate many GPUs. The worker also emulates the delay and rate of its link. The model and its
dense part are real but small. Costs are those of the emulated GPUs, as calibration would find them. The rules: *hetis*,
the solver's dispatcher with re-dispatch and costs that follow the GPUs (*costs of the start*: they do not); *paper*,
the rounded linear program of Hetis (SC'25) with the initial costs; *equal*, the same share of every request on every
GPU; *primary only*.

Texts are compared first: all rules must give the same tokens. Rules take turns, each round has new requests, and
medians over the rounds are reported. ``over_primary`` is tokens per second over those of *primary only* in the same
round, ``least`` and ``most`` its extremes over the rounds, and ``heads`` the percentage of head groups on each GPU over
all steps.

vLLM needs its own environment: `make vllm`, or `--python`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.measuring import plots, rows
from benchmarks.measuring.emulated import MODEL, Pace, Replica, emulated_replica
from benchmarks.measuring.rows import Row

ROOT = Path(__file__).parents[1]
# These times were chosen for heads of dimension 16; a head here reads twice as many bytes.
CARD = Pace(kv_byte_s=5e-8)
SLOWNESS, QUICK_SLOWNESS = (1.0, 1.0, 2.0, 4.0), (1.0, 2.0)
LINK = {"link_bytes_per_s": 4e6, "latency_s": 1e-2}
HETIS, START = "hetis", "hetis, costs of the start"
RULES = ("paper", "equal", "primary only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests that arrive together, with prompts of 100 to 400 tokens; ``seats`` of them run concurrently.

    Outputs have 0.5 to 1.5 times ``output_tokens``, so that requests end and start individually.
    """

    requests: int
    output_tokens: int
    seats: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        chooser = random.Random(2 * self.seed)
        return [
            [chooser.randrange(MODEL.vocab) for _ in range(chooser.randint(100, 400))] for _ in range(self.requests)
        ]

    def tokens(self) -> list[int]:
        chooser, mean = random.Random(2 * self.seed + 1), self.output_tokens
        return [chooser.randint(mean // 2, mean + mean // 2) for _ in range(self.requests)]


FULL = Traffic(requests=24, output_tokens=24, seats=8)
QUICK = Traffic(requests=3, output_tokens=6, seats=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The GPUs, and their paces after half of the tokens."""

    name: str
    paces: tuple[Pace, ...]
    later: tuple[Pace, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The result of one rule on the traffic."""

    tokens_per_s: float
    heads: list[int]  # head groups on every device, summed over all steps
    moved: int


def main() -> None:
    """Print a row per scenario and rule, and draw the rules."""
    parser = rows.parser("benchmarks.emulation", __doc__)
    rows.add_rounds(parser, "how many traffics every rule is asked to serve; 3, quick 1")
    parser.add_argument("--python", metavar="PYTHON", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        parser.error(f"{arguments.python} is not there: make vllm, or say --python")
    rounds = range(arguments.rounds or (1 if arguments.quick else 3))
    traffics = [replace(QUICK if arguments.quick else FULL, seed=seed) for seed in rounds]
    chosen = [scenario for scenario in scenarios(arguments.quick) if arguments.only in scenario.name]
    shown = rows.show(card_rows(chosen, traffics, arguments.python), arguments, name="emulation")
    if not arguments.quick and shown:
        plots.draw_bars(_bars(shown), name="emulation", label="tokens/s", document=arguments.markdown)


def scenarios(quick: bool) -> Iterator[Scenario]:
    """Yield GPUs of four speeds: unchanged, with a slow link to one, and with one throttled halfway."""
    scale = 0.02 if quick else 1.0
    base = replace(CARD, head_s=CARD.head_s * scale, kv_byte_s=CARD.kv_byte_s * scale, call_s=CARD.call_s * scale)
    cards = tuple(replace(base, slow=slow) for slow in (QUICK_SLOWNESS if quick else SLOWNESS))
    if quick:
        yield Scenario(name="cards of 1, 1/2", paces=cards)
        return
    yield Scenario(name="cards of 1, 1, 1/2, 1/4", paces=cards)
    linked = (cards[0], replace(cards[1], **LINK), *cards[2:])
    yield Scenario(name="4 MB/s and 10 ms to the second", paces=linked)
    throttled = (cards[0], replace(cards[1], slow=4.0), *cards[2:])
    yield Scenario(name="the second turns into 1/4 halfway", paces=cards, later=throttled)


def card_rows(chosen: Sequence[Scenario], traffics: Sequence[Traffic], python: Path) -> Iterator[Row]:
    """Yield the rows of every scenario and rule, with one round for each traffic."""
    if not chosen:
        return
    first = traffics[0]
    with emulated_replica(
        len(chosen[0].paces) - 1,
        python=python,
        seats=first.seats,
        most_tokens=400 + 2 * first.output_tokens,
        growth_tokens=2 * first.output_tokens,
    ) as replica:
        # The first steps of an engine and of its workers take longer than all others.
        replica.serve(first.prompts()[:2], first.tokens()[:2], rule=HETIS, paces=chosen[0].paces, later=None)
        for scenario in chosen:
            yield from _scenario_rows(replica, scenario, traffics)


def _scenario_rows(replica: Replica, scenario: Scenario, traffics: Sequence[Traffic]) -> Iterator[Row]:
    names = [HETIS, *((START,) if scenario.later is not None else ()), *RULES]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for traffic in traffics:
        prompts, tokens = traffic.prompts(), traffic.tokens()
        texts = {}
        for name in names:
            said = replica.serve(
                prompts,
                tokens,
                rule=name.partition(",")[0],
                paces=scenario.paces,
                later=scenario.later,
                followed=name == HETIS,
            )
            texts[name] = said["tokens"]
            runs[name].append(Run(tokens_per_s=sum(tokens) / said["wall_s"], heads=said["heads"], moved=said["moved"]))
        for name in names:
            if texts[name] != texts["primary only"]:
                raise SystemExit(f"{scenario.name}, {name}: the text differs from that of one device")
    for name in names:
        yield _row(f"{scenario.name}: {name}", runs[name], runs["primary only"])


def _row(name: str, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    held = [sum(run.heads[i] for run in runs) for i in range(len(runs[0].heads))]
    over = [run.tokens_per_s / primary.tokens_per_s for run, primary in zip(runs, base, strict=True)]
    return {
        "name": name,
        "tokens_per_second": median(run.tokens_per_s for run in runs),
        "over_primary": median(over),
        "least": min(over),
        "most": max(over),
        "moved": sum(run.moved for run in runs),
        "heads": " : ".join(f"{100 * one / sum(held):.0f}" for one in held),
    }


def _bars(shown: Sequence[Row]) -> list[plots.Bars]:
    """Return a group of bars for each rule with its tokens per second."""
    bars = []
    for row in shown:
        scenario, _, rule = str(row["name"]).partition(": ")
        speed = row["tokens_per_second"]
        heights = {"tokens/s": float(speed)} if isinstance(speed, int | float) else {}
        bars.append(plots.Bars(panel=scenario, group=rule.replace(", ", ",\n"), heights=heights))
    return bars


if __name__ == "__main__":
    main()
