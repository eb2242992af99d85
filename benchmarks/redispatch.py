"""Re-dispatch under drift: the joint program against the paper's rule, whole requests, LIFO eviction and no moves.

    python -m benchmarks.redispatch [--quick] [--json]

One stage of Llama-2-70B (two A100 as primary, two RTX 3090 and four P100 as attention workers) runs in virtual time;
see `benchmarks.measuring.drift`. Some requests grow eight times as long as expected, a device becomes half as fast, a
device leaves after a notice of 150 steps, memory is short, or all of these. Figures are means over seeds.

All policies check every five steps and act on a trigger: ``joint`` and ``whole`` on any, ``paper`` as published on
deviation and memory. For ``joint`` the trigger must be due (`Watch`, as in the service); the others may check in vain
any number of times. If a device still runs full, the request admitted last there is evicted
(``none``: the one that cannot grow).

``mean_us`` and ``p95_us`` are makespans per layer and decode step. ``refill_us`` is the time to prefill KV lost by
eviction or with a device, spread over all layers and steps. ``over_ideal`` is the mean excess of the makespan over a
new dispatch of all running requests, which does not reward a policy for evictions. ``moved_gib`` is the KV copied
between devices, and ``refilled_gib`` the KV lost and recomputed. ``saved_us`` is the saving in makespan and refill
against ``none``, and ``saved_us_per_gib`` the same per GiB moved, over all seeds. ``more_us`` and ``more_us_per_gib``
are the amounts by which both exceed the savings of the paper's rule at the same Theta on the same seeds, with
``.._error`` their standard errors (the second by the jackknife). ``evictions`` counts those for lack of memory, and
``tokens_per_s`` the tokens decoded per second of virtual time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.baselines import paper_rule, whole_request_moves
from benchmarks.measuring.drift import (
    LAYERS,
    REFILL_TOKEN_S,
    Policy,
    Run,
    Scenario,
    Still,
    Tally,
)
from benchmarks.measuring.rows import Row
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.redispatch.redispatch_problem import Move, RedispatchProblem
from hetis.solver.redispatch.redispatcher import Redispatcher, compile_redispatch
from hetis.solver.redispatch.triggers import TriggerKind

SCENARIOS = (
    Scenario(name="long", long_share=0.1),
    Scenario(name="slow", slow="3090-0", slow_at=100),
    Scenario(name="leave", leaves="P100-1", leaves_at=100),
    Scenario(name="memory", long_share=0.1, requests=260, overcommits=True),
    Scenario(name="all", long_share=0.1, slow="3090-0", slow_at=100, leaves="P100-1", leaves_at=250, requests=130),
)
STEPS, SEEDS, THETAS = 600, 6, (0.5, 0.1)
GIB = 2**30
T = TypeVar("T")
ALL = frozenset(TriggerKind)


@dataclass(slots=True)
class Joint:
    """The policy that solves the joint program over all running requests."""

    evicts_itself: bool = False
    heeds: frozenset[TriggerKind] = ALL
    is_watched: bool = True
    solvers: dict[int, Redispatcher] = field(default_factory=dict)
    solve_s: list[float] = field(default_factory=list)

    def moves(self, problem: RedispatchProblem, dispatcher: Dispatcher, full: int | None) -> Sequence[Move]:
        solver = self.solvers.setdefault(id(dispatcher), Redispatcher(dispatcher))
        started = time.thread_time()
        plan = solver.solve(replace(problem, full=_only(full)))
        self.solve_s.append(time.thread_time() - started)
        return plan.moves


@dataclass(slots=True)
class Paper:
    """The policy that moves the one request whose re-dispatch helps most (Hetis, SC'25)."""

    evicts_itself: bool = False
    heeds: frozenset[TriggerKind] = frozenset({TriggerKind.DEVIATION, TriggerKind.HIGH_WATER})
    is_watched: bool = False
    solve_s: list[float] = field(default_factory=list)

    def moves(self, problem: RedispatchProblem, dispatcher: Dispatcher, full: int | None) -> Sequence[Move]:
        started = time.thread_time()
        found = paper_rule(problem, dispatcher, device=full)
        self.solve_s.append(time.thread_time() - started)
        return found


@dataclass(slots=True)
class Whole:
    """The policy that moves whole requests and never splits them."""

    evicts_itself: bool = False
    heeds: frozenset[TriggerKind] = ALL
    is_watched: bool = False
    solve_s: list[float] = field(default_factory=list)

    def moves(self, problem: RedispatchProblem, dispatcher: Dispatcher, full: int | None) -> Sequence[Move]:
        started = time.thread_time()
        found = whole_request_moves(replace(problem, full=_only(full)))
        self.solve_s.append(time.thread_time() - started)
        return found


POLICIES: dict[str, Callable[[], Policy]] = {
    "none": lambda: Still(evicts_itself=True),
    "lifo": lambda: Still(evicts_itself=False),
    "paper": Paper,
    "whole": Whole,
    "joint": Joint,
}


def _only(full: int | None) -> frozenset[int]:
    return frozenset() if full is None else frozenset({full})


def main() -> None:
    """Print one row per scenario, policy and Theta."""
    arguments = rows.parser("benchmarks.redispatch", __doc__).parse_args()
    rows.show(measured(quick=arguments.quick, only=arguments.only), arguments, name="redispatch")


def measured(*, quick: bool, only: str) -> Iterator[Row]:
    """Yield every scenario with every policy; with ``quick``, one scenario, seed and Theta, and fewer steps."""
    compile_redispatch()  # otherwise the first policy's time would be the compiler's
    scenarios = SCENARIOS[-1:] if quick else SCENARIOS
    steps, seeds, thetas = (300, 1, THETAS[:1]) if quick else (STEPS, SEEDS, THETAS)
    for scenario in (s for s in scenarios if only in s.name):
        nothing: list[Tally] = []
        papers: dict[float, list[Tally]] = {}
        for name, policy in POLICIES.items():
            for theta in thetas if policy().heeds else thetas[:1]:
                made = [policy() for _ in range(seeds)]
                tallies = [Run(scenario, p, theta=theta, seed=s).run(steps) for s, p in enumerate(made)]
                nothing = nothing or tallies
                if name == "paper":
                    papers[theta] = tallies
                label = f"{name}, Theta {theta:g}" if policy().heeds else name
                solve_s = [s for p in made for s in p.solve_s]
                paper = papers.get(theta) if policy().heeds and name != "paper" else None
                yield _row(f"{scenario.name}, {label}", tallies, solve_s, nothing, paper)


def _row(
    title: str,
    tallies: Sequence[Tally],
    solve_s: Sequence[float],
    nothing: Sequence[Tally],
    paper: Sequence[Tally] | None,
) -> Row:
    makespans = np.array([tally.makespans_s for tally in tallies])
    over = np.mean([np.mean(np.array(t.makespans_s) / np.maximum(t.ideals_s, 1e-12)) for t in tallies]) - 1
    return {
        "name": title,
        "mean_us": 1e6 * float(makespans.mean()),
        "p95_us": 1e6 * float(np.quantile(makespans, 0.95)),
        "refill_us": _mean([_refill_us(t) for t in tallies]),
        "over_ideal": float(over),
        "moved_gib": _mean([t.moved_bytes for t in tallies]) / GIB,
        "refilled_gib": _mean([t.refilled_bytes for t in tallies]) / GIB,
        "saved_us": _mean(_saved_us(tallies, nothing)),
        "saved_us_per_gib": _per_gib(tallies, _saved_us(tallies, nothing)),
        **_beside(tallies, paper, nothing),
        "evictions": _mean([t.evictions for t in tallies]),
        "tokens_per_s": sum(t.tokens for t in tallies) / sum(t.seconds for t in tallies),
        "looks": _mean([t.looks for t in tallies]),
        "solve_p50_ms": 1e3 * float(np.median(solve_s)) if solve_s else None,
    }


def _beside(
    tallies: Sequence[Tally], paper: Sequence[Tally] | None, nothing: Sequence[Tally]
) -> dict[str, float | None]:  # fmt: skip
    """Return the savings beyond those of the paper's rule, also per GiB, with standard errors over the seeds."""
    names = ("more_us", "more_us_error", "more_us_per_gib", "more_us_per_gib_error")
    if paper is None:
        return dict.fromkeys(names)
    ours, theirs = _saved_us(tallies, nothing), _saved_us(paper, nothing)
    more, num = np.subtract(ours, theirs), len(tallies)
    error = float(more.std(ddof=1) / np.sqrt(num)) if num > 1 else None
    a, b = _per_gib(tallies, ours), _per_gib(paper, theirs)
    if a is None or b is None:
        return dict(zip(names, (float(more.mean()), error, None, None), strict=True))
    without = list[float]()
    for s in range(num):
        a_s, b_s = _per_gib(_but(tallies, s), _but(ours, s)), _per_gib(_but(paper, s), _but(theirs, s))
        if a_s is not None and b_s is not None:
            without.append(a_s - b_s)
    jackknife = float(np.sqrt((num - 1) * np.var(without))) if num > 1 and len(without) == num else None
    return dict(zip(names, (float(more.mean()), error, a - b, jackknife), strict=True))


def _saved_us(tallies: Sequence[Tally], nothing: Sequence[Tally]) -> list[float]:
    """Return how far makespan and refill are below those of no re-dispatch, by seed."""
    return [_cost_us(still) - _cost_us(tally) for tally, still in zip(tallies, nothing, strict=True)]


def _per_gib(tallies: Sequence[Tally], saved_us: Sequence[float]) -> float | None:
    gib = sum(tally.moved_bytes for tally in tallies) / GIB
    return sum(saved_us) / gib if gib > 0 else None


def _but(values: Sequence[T], place: int) -> list[T]:
    return [*values[:place], *values[place + 1 :]]


def _cost_us(tally: Tally) -> float:
    return 1e6 * _mean(tally.makespans_s) + _refill_us(tally)


def _refill_us(tally: Tally) -> float:
    return 1e6 * tally.refilled_tokens * REFILL_TOKEN_S / (len(tally.makespans_s) * LAYERS)


def _mean(values: Sequence[float]) -> float:
    return float(statistics.mean(values))


if __name__ == "__main__":
    main()
