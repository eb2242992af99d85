"""Classes of requests by prompt length: cuts that are tried, and whether pools of classes keep enough more to be used.

The best plan with pools of classes is compared with the plan without, in the same simulated traffic, with the target's
router, which knows classes if a plan has them: as planned, drifted to longer prompts, and in bursts. It replaces the
other only if it keeps more by a share (``--worth``) in the first two. Kept is the highest rate at which every class
meets its limits; of plans that leave most after a loss, the share of it counts that is left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hetis.planner.use_cases.climbing import Carriers, gain_of
from hetis.planner.use_cases.record.forms import ClassLatency, KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes, Surviving
from hetis.planner.use_cases.simulation.simulate import NothingSimulatedError, Question, answer, default_rate
from hetis.planner.use_cases.verification.outcome import AS_PLANNED, router_of
from hetis.planner.use_cases.verification.rates import simulation_report
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.simulate import Timings
from hetis.simulator.values import Run, Settings
from hetis.solver.budget import Budget, Report
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import ClassShare, Objective, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import RequestClass, Workload

AUTO, NONE = "auto", "none"
TRIED = ("p50", "p75", "p90", "p50,p90")  # what `AUTO` tries
NAMES = {2: ("short", "long"), 3: ("short", "medium", "long"), 4: ("short", "medium", "long", "longest")}
_PERCENTILE = re.compile(r"p(\d{1,2})")
LONGEST, MORE_LONGEST = 0.1, 1.5  # drift: this share of the longest prompts becomes so many times as frequent
SHORT, LESS_SHORT = 0.5, 0.75  # and this share of the shortest
BURSTS = 2.0  # coefficient of variation of the gaps between arrivals in bursts
REQUESTS = 3_000  # of a run
STEP = 1.06  # first ratio of rates until one is kept and one missed
PRECISE, ROUGH = 0.03, 0.06  # ratio of these in the end; where they decide nothing
MOST_CUTS = 2  # of the cuts to try, whose best plans are searched
MOST_STEPS = 7  # ever larger ones: rates tried beyond the first, up or down
HARDER = 0.88  # share of the rate kept as planned from which that of other traffic is searched
NEEDS_ROUTER = (
    "replicas for one class of requests need a router that knows prompt lengths, as exports that carry this plan have; "
    "behind any other it keeps far less than a plan without classes"
)
Find = Callable[[PlacementProblem], Iterator[Plan]]  # raises InfeasibleError, NoPlanFoundError


def cuts_of(text: str, workload: Workload) -> dict[str, tuple[RequestClass, ...]]:
    """Return the classes to try by name: cuts at percentiles of prompt lengths, or those of the workload.

    Raises:
        InvalidProblemError: the text is not ``auto``, ``none`` or percentiles in ascending order such as ``p50,p90``,
            or so cut that a class has no requests, or the workload has classes with limits of their own.
    """
    if text == NONE or (not text and not workload.classes):
        return {}
    if not text:
        return {"the workload's": workload.classes}
    if own := [one.name for one in workload.classes if (one.ttft_limit_s, one.tpot_limit_s) != (None, None)]:
        raise InvalidProblemError(
            f"--classes {text[:80]}: class {own[0]} of {workload.name} has limits of its own, which other classes "
            f"would not keep; leave the option out, or plan without with --classes {NONE}"
        )
    if text != AUTO:
        return {text: _cut(text, workload)}
    found = dict[tuple[RequestClass, ...], str]()
    for name in TRIED:
        try:
            found.setdefault(_cut(name, workload), name)
        except InvalidProblemError:
            continue
    return {name: classes for classes, name in found.items()}


def _cut(text: str, workload: Workload) -> tuple[RequestClass, ...]:
    matches = [_PERCENTILE.fullmatch(part.strip()) for part in text.split(",")]
    shares = [int(match[1]) / 100 for match in matches if match is not None]
    if len(shares) < len(matches) or not 1 <= len(shares) <= 3 or shares != sorted(set(shares)) or not shares[0]:
        message = (
            "must be auto, none, or 1 to 3 ascending percentiles of prompt lengths from p1 to p99, such as p50,p90"
        )
        raise InvalidProblemError(f"--classes is {text[:80]}, {message}")
    prompts, below = _shares_below(workload)
    bounds = [math.ceil(prompts[np.searchsorted(below, share - 1e-12)]) for share in shares]
    if len({*bounds, math.ceil(prompts[-1])}) <= len(bounds):
        raise InvalidProblemError(
            f"--classes {text}: prompts of {workload.name} differ too little, a class would have no requests "
            f"({', '.join(map(str, bounds))} and at most {math.ceil(prompts[-1])} tokens)"
        )
    return tuple(
        RequestClass(name=name, max_prompt_tokens=most)
        for name, most in zip(NAMES[len(bounds) + 1], [*bounds, None], strict=True)
    )


def _shares_below(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompt lengths in ascending order, and the share of the requests up to each."""
    prompts = np.array([b.prompt_tokens for b in workload.bins])
    order = np.argsort(prompts, kind="stable")
    below = np.cumsum(np.array([b.weight for b in workload.bins])[order])
    return prompts[order], below / below[-1]


def drifted(workload: Workload) -> Workload:
    """Return the workload with its longest prompts more frequent, and its shorter half less."""
    prompts, below = _shares_below(workload)
    short, longest = (float(prompts[np.searchsorted(below, share - 1e-12)]) for share in (SHORT, 1.0 - LONGEST))

    def factor(tokens: float) -> float:
        return LESS_SHORT if tokens <= short else MORE_LONGEST if tokens > longest else 1.0

    return replace(workload, bins=tuple(replace(b, weight=b.weight * factor(b.prompt_tokens)) for b in workload.bins))


@dataclass(frozen=True, slots=True, kw_only=True)
class WithClasses:
    """A plan and its problem; either may have pools of classes."""

    plan: Plan
    problem: PlacementProblem


def choose(
    without: WithClasses, objective: Objective, cuts: Mapping[str, tuple[RequestClass, ...]], find: Find, *,
    worth: float, seed: int, budget: Budget, report: Report, carriers: Carriers | None = None, target: str = "",
    verified: Callable[[WithClasses], Plan] | None = None,
    promise: Callable[[PlacementProblem], Plan] | None = None,
) -> WithClasses:  # fmt: skip
    """Return the best plan with classes if it is worth its pools, or else the plan without, with a record of both.

    Args:
        without: the plan without classes, which keeps the strictest of their limits.
        objective: the requested one, whose limits apply to classes without their own.
        cuts: the classes to try; of their plans that have pools, the first by value that keeps enough is compared.
        find: searches a problem for candidates.
        worth: share by which it must keep more.
        seed, budget, report: those of simulations.
        carriers: what each export target cannot carry; None: not known. Some must carry all of it, or the ``target``.
        verified: simulates the plan that is returned as that without was, which changes its value, not how it runs;
            None: neither was, and the gain is that of the cost model.
        promise: finds a plan quickly, by which the `MOST_CUTS` best cuts are chosen; None: all are searched.
    """
    record = Classes(cut=", ".join(cuts), worth=worth)
    if not _knows_lengths(without, carriers, target):
        unsearched = f"export target {target} cannot route by prompt length, so none were searched"
        return _told(without, replace(record, why_not=unsearched))
    found, workload = list[_Candidate](), without.problem.workload
    posed = {
        cut: replace(without.problem, workload=replace(workload, classes=classes), objective=objective)
        for cut, classes in cuts.items()
    }
    for cut in posed if promise is None else _promising(posed, promise, without.plan):
        with suppress(InfeasibleError, NoPlanFoundError):
            for plan in find(posed[cut]):
                found.append(_Candidate(cut, WithClasses(plan=plan, problem=posed[cut])))
    found = [one for one in found if any(replica.classes for replica in one.found.plan.replicas)]
    found.sort(key=lambda one: _planned_gain(one.found.plan, without.plan), reverse=True)
    found = list({one.runs: one for one in reversed(found)}.values())[::-1]  # the best of those that run the same
    if not found:
        return _told(without, replace(record, why_not="no plan with pools of classes has a better value"))
    why_not = [_not_carried(one.found, carriers, target) for one in found]
    if all(why_not):
        return _told(without, replace(found[0].on(record), why_not=why_not[0]))
    found = [one for one, why in zip(found, why_not, strict=True) if not why]
    chosen, best = found[0], found[0].found
    record, gains = chosen.on(record), [_planned_gain(best.plan, without.plan)]
    if verified is not None:
        settings = replace(AS_PLANNED, router=router_of(target))
        compared = _Compared(without, best.problem, seed=seed, budget=budget, report=report, settings=settings)
        try:
            chosen = next((one for one in found if compared.keeps_more(one.found, worth)), chosen)
            best = chosen.found
            kept = tuple(compared.kept(best, worth))
            record = replace(chosen.on(record), kept=kept, ttft=tuple(compared.latencies(best, kept[0])))
        except NothingSimulatedError:
            return _told(without, replace(record, why_not="simulations ended before both plans were compared"))
        gains = [_gain(one, without.plan, best.plan) for one in record.kept if one.counts]
    if min(gains) < worth:
        what, gain = "keeps" if _counted(best.plan) == 1.0 else "leaves", min(gains)
        gained = f"{abs(gain):.1%} {'less' if gain < 0.0 else 'more'}"
        why = f"it {what} {gained}, but only {worth:.0%} more is worth pools of their own (--worth)"
        return _told(without, replace(record, why_not=why))
    return _told(best if verified is None else replace(best, plan=verified(best)), record)


def _promising(
    posed: Mapping[str, PlacementProblem], promise: Callable[[PlacementProblem], Plan], without: Plan
) -> list[str]:
    """Return the cuts of the best plans among those that are found quickly."""
    if len(posed) <= MOST_CUTS:
        return [*posed]
    gains = dict.fromkeys(posed, -math.inf)
    for cut, problem in posed.items():
        with suppress(InfeasibleError, NoPlanFoundError):
            gains[cut] = gain_of(promise(problem), without)
    return sorted(posed, key=gains.__getitem__, reverse=True)[:MOST_CUTS]


class _Candidate(NamedTuple):
    """A plan with pools of classes that are cut in a way."""

    cut: str
    found: WithClasses

    @property
    def runs(self) -> Hashable:
        """What decides how the plan does in simulation: its replicas, at whatever utilisation their latencies are."""
        plan = self.found.plan
        return self.cut, tuple(replace(one, ttft_s=0.0, tpot_s=0.0) for one in plan.replicas), plan.kv_routes

    def on(self, record: Classes) -> Classes:
        result = self.found.plan.result
        return replace(record, cut=self.cut, value=result.value, bound=result.bound)


def _told(chosen: WithClasses, record: Classes) -> WithClasses:
    return replace(chosen, plan=record.on(chosen.plan))


def _gain(kept: KeptWithClasses, without: Plan, plan: Plan) -> float:
    """Return what is kept more with classes: requests/s or, if a rate is demanded, what is kept of it for its cost."""

    def worth(rate: float, of: Plan) -> float:
        return rate if of.objective.maximises else min(rate, of.objective.demand_rps or 0.0) / of.result.value

    before = worth(kept.without_rps, without)
    return worth(kept.with_rps, plan) / before - 1.0 if before else math.inf


def _planned_gain(plan: Plan, without: Plan) -> float:
    gain, counted = gain_of(plan, without), _counted(without)
    return (1.0 + gain) * _counted(plan) / counted - 1.0 if counted else gain


def _counted(plan: Plan) -> float:
    """Return the share of a plan's rate that counts: all of it, or what a loss leaves where that is maximised."""
    survived, value = Surviving.of(plan), plan.result.value
    return (survived.left_rps or 0.0) / value if survived.bound_rps is not None and value else 1.0


def _knows_lengths(without: WithClasses, carriers: Carriers | None, target: str) -> bool:
    """Return whether the target carries one of a plan's replicas as well if there are classes."""
    if carriers is None or not target:
        return True
    alone = replace(without.plan, replicas=without.plan.replicas[:1], kv_routes=())
    divided = replace(alone, classes=(ClassShare(name="all", share=1.0),))
    return bool(carriers(alone, without.problem)[target]) or not carriers(divided, without.problem)[target]


def _not_carried(best: WithClasses, carriers: Carriers | None, target: str) -> str:
    """Return why no export, or not the target, carries the plan's router; empty: it is carried."""
    if carriers is None:
        return ""
    reasons = carriers(best.plan, best.problem)
    wanted = [target] if target else list(reasons)
    if any(not reasons[name] for name in wanted):
        return ""
    return f"export target {target} cannot route by prompt length" if target else "no export target carries it"


class _Traffic(NamedTuple):
    """A kind of traffic; ``counts``: whether a gain there is required."""

    name: str
    gap_cv: float = 1.0
    is_drifted: bool = False
    counts: bool = True


TRAFFIC = _Traffic("as planned"), _Traffic("longer prompts", is_drifted=True), _Traffic("bursts", BURSTS, counts=False)


class _Compared:
    """Simulations of a plan without classes and others with them, in the same traffic and within the same limits."""

    def __init__(
        self, without: WithClasses, limits: PlacementProblem, *, seed: int, budget: Budget, report: Report,
        settings: Settings,
    ) -> None:  # fmt: skip
        self._without, self._seed, self._budget, self._report = without, seed, budget, report
        self._limits, self._settings = limits, settings
        self._before = dict[_Traffic, float]()  # what the plan without keeps
        self._runs = dict[Hashable, tuple[bool, Run]]()  # by plan, traffic and rate
        self._timings = dict[Hashable, Timings]()  # by classes

    def before(self, traffic: _Traffic) -> float:
        """Return the rate that the plan without classes keeps."""
        if traffic not in self._before:
            planned = self._before.get(TRAFFIC[0], 0.0)
            start = HARDER * planned or default_rate(self._without.plan, self._without.problem)
            self._before[traffic] = self._highest(self._without, traffic, start)
        return self._before[traffic]

    def keeps_more(self, one: WithClasses, worth: float) -> bool:
        """Return whether a plan keeps more by a share wherever that is required."""
        demand_rps = math.inf if one.plan.objective.maximises else one.plan.objective.demand_rps or 0.0
        needed = ((traffic, self._needed(one, traffic, worth)) for traffic in TRAFFIC if traffic.counts)
        return all(
            rate_rps <= demand_rps and self._keeps(*self._run(one, traffic, rate_rps))
            for traffic, rate_rps in needed
            if rate_rps
        )

    def _needed(self, one: WithClasses, traffic: _Traffic, worth: float) -> float:
        """Return the rate that a plan must keep, of a demand for its cost, to keep more by a share."""
        before, objective = self.before(traffic), one.plan.objective
        if objective.maximises:
            return (1.0 + worth) * before * _counted(self._without.plan) / (_counted(one.plan) or math.inf)
        cost = one.plan.result.value / self._without.plan.result.value
        return (1.0 + worth) * cost * min(before, objective.demand_rps or 0.0)

    def kept(self, best: WithClasses, worth: float) -> Iterator[KeptWithClasses]:
        """Yield the rates that both plans keep in each traffic, up to the first in which too little more is kept.

        Of plans that leave most after a loss, they are those that are left. Those with classes are searched from what
        `keeps_more` has tried or, where they decide nothing, from the gain in the traffic before.
        """
        ratio = 0.0
        for traffic in TRAFFIC:
            before = self.before(traffic)
            start = self._needed(best, traffic, worth) if traffic.counts else ratio * before
            after = self._highest(best, traffic, start or default_rate(best.plan, best.problem))
            ratio = after / before if before else 0.0
            before, after = before * _counted(self._without.plan), after * _counted(best.plan)
            found = KeptWithClasses(traffic=traffic.name, without_rps=before, with_rps=after, counts=traffic.counts)
            yield found
            if found.counts and _gain(found, self._without.plan, best.plan) < worth:
                return

    def latencies(self, best: WithClasses, kept: KeptWithClasses) -> Iterator[ClassLatency]:
        """Yield the p95 TTFT of each class in both plans, at the lower of the rates that they keep."""
        shares = [_counted(one.plan) or 1.0 for one in (self._without, best)]
        rates = [rate / share for rate, share in zip((kept.without_rps, kept.with_rps), shares, strict=True)]
        rate = min(rates) or max(rates)
        runs = [self._run(one, TRAFFIC[0], rate)[1] for one in (self._without, best)]
        for one in best.problem.class_shares() if rate else ():
            before, after = (_latencies(best.problem, run, one.name)[0] for run in runs)
            yield ClassLatency(
                name=one.name, share=one.share, max_prompt_tokens=one.max_prompt_tokens,
                limit_s=best.problem.of_classes((one.name,)).objective.ttft_limit_s, rate_rps=rate,
                without_s=before, with_s=after,
            )  # fmt: skip

    def _highest(self, one: WithClasses, traffic: _Traffic, rate: float) -> float:
        """Return the highest rate at which every class keeps its limits, searched from a rate; 0: none tried does."""

        def keeps(rate: float) -> bool:
            return self._keeps(*self._run(one, traffic, rate))

        low, high, step = rate, rate, STEP
        rising = keeps(rate)
        for number in range(MOST_STEPS):
            low, high = (high, high * step) if rising else (low / step, low)
            if keeps(high if rising else low) != rising:
                break
            step *= step if number else 1.0
        else:
            return high if rising else 0.0
        while high > low * (1.0 + (PRECISE if traffic.counts else ROUGH) + 1e-9):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def _run(self, one: WithClasses, traffic: _Traffic, rate: float) -> tuple[bool, Run]:
        """Return whether the fleet carried the load, and the requests after the warm-up; nothing is run twice."""
        key = one.plan.replicas, one.plan.kv_routes, one.problem.workload.classes, traffic, rate
        if key not in self._runs:
            self._runs[key] = self._simulated(one, traffic, rate)
        return self._runs[key]

    def _simulated(self, one: WithClasses, traffic: _Traffic, rate: float) -> tuple[bool, Run]:
        planned = self._limits.workload
        load = Load(
            lengths=drifted(planned) if traffic.is_drifted else planned, max_position=one.problem.model.max_position,
            arrivals=Arrivals.DRAWN, rate_rps=rate, gap_cv=traffic.gap_cv,
        )  # fmt: skip
        question = Question(
            load=load, num_requests=REQUESTS, seeds=(self._seed,), settings=self._settings,
            limits=one.problem.objective, keep_run=True,
        )  # fmt: skip
        told = simulation_report(one.plan, self._report)
        found = answer(
            one.plan, one.problem, question, processes=1, is_cancelled=self._budget.cancelled.is_set,
            report=lambda given, total: told(rate, given, total),
            timings=self._timings.setdefault(one.problem.workload.classes, {}),
        )  # fmt: skip
        if found.run is None or not found.complete:
            raise NothingSimulatedError
        inside = found.run.arrival_s >= found.runs[0].window_start_s
        names = ("arrival_s", "first_token_s", "finished_s", "prompt_tokens", "output_tokens")
        run = replace(found.run, **{name: getattr(found.run, name)[inside] for name in names})
        return found.summary.steady is not False, run

    def _keeps(self, is_steady: bool, run: Run) -> bool:
        if not is_steady:
            return False
        for name in self._limits.limits_of_classes():
            objective = self._limits.of_classes((name,)).objective if name else self._limits.objective
            ttft_s, tpot_s = _latencies(self._limits, run, name)
            if not ttft_s <= (objective.ttft_limit_s or math.inf) or not tpot_s <= (objective.tpot_limit_s or math.inf):
                return False
        return True


def _latencies(problem: PlacementProblem, run: Run, name: str) -> tuple[float, float]:
    """Return p95 TTFT and mean TPOT of the requests of a class, or of all; unfinished ones take forever."""
    bounds = [one.max_prompt_tokens or math.inf for one in problem.workload.classes]
    numbers = np.searchsorted(bounds, run.prompt_tokens, side="left")
    names = [one.name for one in problem.workload.classes]
    own = np.full(len(numbers), True) if not name else numbers == names.index(name)
    ttft_s = np.nan_to_num((run.first_token_s - run.arrival_s)[own], nan=math.inf)
    decoding_s, tokens = (run.finished_s - run.first_token_s)[own], (run.output_tokens - 1)[own]
    done = np.isfinite(decoding_s) & (tokens > 0)
    if not len(ttft_s):
        return 0.0, 0.0
    mean_s = float(decoding_s[done].sum() / tokens[done].sum()) if done.any() else 0.0
    return float(np.quantile(ttft_s, 0.95, method="higher")), mean_s
