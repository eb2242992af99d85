"""The engine on emulated cards of different speeds: capacity, throughput by dispatch rule, steps beside predictions.

    python -m benchmarks.emulation [--quick] [--json] [--only TEXT] [--rounds N]

*capacity*: devices with memory limits; requests come until nobody more is admitted. ``held``: most KV held at a time,
over the memory of all devices, and ``over_first`` over that of the first alone.

*cards*: a primary and attention workers in processes of their own, one each of speed 1, 1, 1/2 and 1/4, on the same
requests under every rule. A card is slow by waiting: its process computes, and answers when the emulated card would, so
that a machine with few cores can have many of them; links are emulated in the same way (delay and rate in the worker).
The model and its dense part are real, and small. Costs are what `hetis.runtime.server.measuring` finds on these cards,
before the first request. Rules: *hetis*, the solver's dispatcher with costs that follow and re-dispatch; *paper*, the
linear program of Hetis (SC'25), rounded, with costs as they were at the start; *equal*, the same share of every request
on every card; *primary only*.

Texts are compared first: all rules must give the tokens of an engine with one device. ``step_ms`` and ``predicted_ms``:
means over steps that only decode; ``error``: mean of |predicted / measured - 1|. Rules take turns; each round has other
requests, and medians of the rounds count. ``over_primary``: tokens per second over those of *primary only* in the same
round; ``least`` and ``most``: of the rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import torch

from benchmarks.measuring import plots, rows
from benchmarks.measuring.dispatch_rules import EqualSplit, PaperRule, PrimaryOnly
from benchmarks.measuring.emulated import PAGE_TOKENS, SIZES, Replica, close, emulated_replica
from benchmarks.measuring.emulated_worker import Pace
from benchmarks.measuring.rows import Row
from examples.demo_serve.checkpoint import make_checkpoint
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices, local_devices_of_bytes
from hetis.runtime.engine.placement import DispatchRule
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.moving.redispatch import Redispatch
from hetis.runtime.server.measuring import Measured, follow, measure_engine
from hetis.runtime.server.timing import StepPredictor
from hetis.solver.dispatch.problem import Stage
from hetis.solver.redispatch.warming import compile_redispatch

CARD = Pace()
MIB = 2**20
PAGES = 4000
SLOWNESS, QUICK_SLOWNESS = (1.0, 1.0, 2.0, 4.0), (1.0, 2.0)
CAPACITIES = ((4.0,), (4.0, 2.0, 1.0), (4.0, 1.3, 0.7, 0.3))  # MiB; the first is the primary
LINK = {"link_bytes_per_s": 2e6, "latency_s": 1e-2}
HETIS = "hetis"
RULES: dict[str, Callable[[Stage], DispatchRule]] = {
    "paper": PaperRule,
    "equal": EqualSplit,
    "primary only": PrimaryOnly,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests that come at once, prompts of 100 to 400 tokens, of which ``seats`` run at a time.

    Answers have half to one and a half times ``output_tokens``, so that they end, and others begin, one by one.
    """

    requests: int
    output_tokens: int
    seats: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        chooser = random.Random(2 * self.seed)
        return [
            [chooser.randrange(SIZES.vocab) for _ in range(chooser.randint(100, 400))] for _ in range(self.requests)
        ]

    def params(self) -> list[SamplingParams]:
        chooser, mean = random.Random(2 * self.seed + 1), self.output_tokens
        return [
            SamplingParams(max_tokens=chooser.randint(mean // 2, mean + mean // 2), ignore_eos=True)
            for _ in range(self.requests)
        ]

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(most_running=self.seats, growth_tokens=2 * self.output_tokens)


FULL = Traffic(requests=24, output_tokens=24, seats=8)
QUICK = Traffic(requests=3, output_tokens=6, seats=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Cards, and what they turn into when half of the tokens are through."""

    name: str
    paces: tuple[Pace, ...]
    later: tuple[Pace, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one rule made of the traffic."""

    tokens: list[list[int]]
    tokens_per_s: float
    measured_s: list[float]
    predicted_s: list[float]
    heads: list[int]  # head-steps on every device


def main() -> None:
    """Prints a row per layout of memory, and per scenario and rule; draws the rules."""
    parser = rows.parser("benchmarks.emulation", __doc__)
    rows.add_rounds(parser, "how many traffics every rule is asked to serve; 3, quick 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = range(arguments.rounds or (1 if arguments.quick else 3))
    traffics = [replace(QUICK if arguments.quick else FULL, seed=seed) for seed in rounds]
    capacity = [row for row in capacity_rows(arguments.quick) if arguments.only in str(row["name"])]
    rows.show(capacity, arguments, name="emulation capacity")
    chosen = [scenario for scenario in scenarios(arguments.quick) if arguments.only in scenario.name]
    shown = rows.show(card_rows(chosen, traffics), arguments, name="emulation")
    if not arguments.quick and shown:
        plots.draw_bars(_bars(shown), name="emulation", label="tokens/s, ms", document=arguments.markdown)


# --- capacity


def capacity_rows(quick: bool) -> Iterator[Row]:
    """Devices in this process, each with its own memory for KV."""
    with TemporaryDirectory(prefix="hetis-capacity-") as text:
        folder = make_checkpoint(Path(text) / "model", sizes=SIZES)
        for limits in CAPACITIES[:2] if quick else CAPACITIES:
            devices = local_devices_of_bytes([int(limit * MIB) for limit in limits])
            engine = engine_from_folder(folder, devices, options=EngineOptions(growth_tokens=15))
            yield _capacity_row(engine, limits)


def _capacity_row(engine: Engine, limits: Sequence[float]) -> Row:
    """Equal requests of 128 tokens in the end; more than fit."""
    chooser = random.Random(1)
    for _ in range(64):
        prompt = [chooser.randrange(SIZES.vocab) for _ in range(113)]
        engine.add(prompt, SamplingParams(max_tokens=16, ignore_eos=True))
    pages = sum(device.num_pages for device in engine.stage.devices)
    used, running = 0, 0
    while engine.has_work:
        engine.step()
        held = pages - int(engine.placement.state.free_blocks().sum())
        used, running = max(used, held), max(running, len(engine.running))
    page_bytes = engine.stage.shape.page_bytes
    return {
        "name": " + ".join(f"{limit:g}" for limit in limits) + " MiB",
        "requests": running,
        "token_heads": used * PAGE_TOKENS,
        "held_mib": used * page_bytes / MIB,
        "sum_mib": pages * page_bytes / MIB,
        "held": used / pages,
        "over_first": used / engine.stage.devices[0].num_pages,
        "preempted": engine.num_preempted,
    }


# --- cards


def scenarios(quick: bool) -> Iterator[Scenario]:
    """Cards of four speeds; with a slow link to one; with one that is throttled meanwhile."""
    scale = 0.02 if quick else 1.0
    base = replace(CARD, head_s=CARD.head_s * scale, kv_byte_s=CARD.kv_byte_s * scale, call_s=CARD.call_s * scale)
    cards = tuple(replace(base, slow=slow) for slow in (QUICK_SLOWNESS if quick else SLOWNESS))
    if quick:
        yield Scenario(name="cards of 1, 1/2", paces=cards)
        return
    yield Scenario(name="cards of 1, 1, 1/2, 1/4", paces=cards)
    linked = (cards[0], replace(cards[1], **LINK), *cards[2:])
    yield Scenario(name="2 MB/s and 10 ms to the second", paces=linked)
    throttled = (cards[0], replace(cards[1], slow=4.0), *cards[2:])
    yield Scenario(name="the second turns into 1/4 halfway", paces=cards, later=throttled)


def card_rows(chosen: Sequence[Scenario], traffics: Sequence[Traffic]) -> Iterator[Row]:
    """Of every scenario and rule; a round for each traffic."""
    if not chosen:
        return
    compile_redispatch()  # as a server does before it serves: on a new machine it would take a minute of the first run
    with emulated_replica(len(chosen[0].paces) - 1, pages=PAGES) as replica:
        alone = engine_from_folder(replica.folder, local_devices([PAGES]), options=traffics[0].options)
        asked = [
            (traffic, [one.tokens for one in generate(alone, traffic.prompts(), traffic.params())])
            for traffic in traffics
        ]
        epochs = iter(range(1, 10**6))
        for scenario in chosen:
            yield from _scenario_rows(replica, scenario, asked, epochs)


def _scenario_rows(
    replica: Replica, scenario: Scenario, asked: Sequence[tuple[Traffic, list[list[int]]]], epochs: Iterator[int]
) -> Iterator[Row]:
    """``asked``: what comes in every round, and the right answers."""
    engine = replica.engine(scenario.paces, epoch=next(epochs), options=asked[0][0].options)
    measured = measure_engine(engine)
    following = measured.following[0]
    close(engine)
    names = [HETIS, *RULES]
    if scenario.later is not None:
        names.insert(1, f"{HETIS}, costs of the start")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for traffic, expected in asked:
        for name in names:
            engine = replica.engine(scenario.paces, epoch=next(epochs), options=traffic.options)
            engine.placement.change_costs(following.calibrated)
            predictor = _prepared(engine, name, measured)
            run = _run(engine, predictor, scenario, traffic, replica)
            close(engine)
            if run.tokens != expected:
                raise SystemExit(f"{scenario.name}, {name}: the text differs from that of one device")
            runs[name].append(run)
    for name in names:
        yield _row(f"{scenario.name}: {name}", runs[name], runs["primary only"])


def _prepared(engine: Engine, name: str, measured: Measured) -> StepPredictor:
    """The engine under a rule, and what predicts its steps."""
    known, following, copy_byte_s = measured.predictor, measured.following[0], measured.copy_byte_s[0]
    assert known is not None, "there is one stage"
    predictor = StepPredictor(engine.placement.costs, layers=known.layers, dense=known.dense, in_turn=False)
    if name in RULES:
        engine.placement.rule = RULES[name]
        return predictor
    if name == HETIS:
        follow(engine, 0, predictor, read_s=following.read_s)
    Redispatch(hauler=Hauler(engine=engine), link_byte_s=copy_byte_s)
    return predictor


def _run(engine: Engine, predictor: StepPredictor, scenario: Scenario, traffic: Traffic, replica: Replica) -> Run:
    params = traffic.params()
    numbers = [engine.add(prompt, own) for prompt, own in zip(traffic.prompts(), params, strict=True)]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    measured_s, predicted_s, heads = [], [], [0] * len(scenario.paces)
    begun_s, count, half = time.perf_counter(), 0, sum(own.max_tokens for own in params) // 2
    while engine.has_work:
        step_s = time.perf_counter()
        for news in engine.step():
            answers[news.request] += [] if news.token is None else [news.token]
            count += 1
            if count == half and scenario.later is not None:
                replica.set_paces(scenario.later[1:])
        taken_s = time.perf_counter() - step_s
        expected_s = predictor.step_s(engine.last_step) if engine.last_step is not None else None
        if expected_s is not None:
            measured_s.append(taken_s)
            predicted_s.append(expected_s)
        for request in engine.running.values():
            for owner in request.heads[0]:
                heads[owner] += 1
    seconds = time.perf_counter() - begun_s
    return Run(
        tokens=[answers[number] for number in numbers],
        tokens_per_s=count / seconds,
        measured_s=measured_s,
        predicted_s=predicted_s,
        heads=heads,
    )


def _row(name: str, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    pairs = [pair for run in runs for pair in zip(run.measured_s, run.predicted_s, strict=True)]
    held = [sum(run.heads[i] for run in runs) for i in range(len(runs[0].heads))]
    over = [run.tokens_per_s / primary.tokens_per_s for run, primary in zip(runs, base, strict=True)]
    return {
        "name": name,
        "tokens_per_second": median(run.tokens_per_s for run in runs),
        "over_primary": median(over),
        "least": min(over),
        "most": max(over),
        "step_ms": 1e3 * fmean(m for m, _ in pairs),
        "predicted_ms": 1e3 * fmean(p for _, p in pairs),
        "error": fmean(abs(p / m - 1) for m, p in pairs),
        "heads": " : ".join(f"{100 * one / sum(held):.0f}" for one in held),
    }


def _bars(shown: Sequence[Row]) -> list[plots.Bars]:
    """A group for each rule: tokens per second in one panel, step times beside their predictions in another."""
    bars = []
    for row in shown:
        scenario, _, rule = str(row["name"]).partition(": ")
        heights = {
            "tokens/s": row["tokens_per_second"],
            "step, ms": row["step_ms"],
            "predicted, ms": row["predicted_ms"],
        }
        numbers = {name: float(value) for name, value in heights.items() if isinstance(value, int | float)}
        bars.append(plots.Bars(panel=scenario, group=rule.replace(", ", ",\n"), heights=numbers))
    return bars


if __name__ == "__main__":
    main()
