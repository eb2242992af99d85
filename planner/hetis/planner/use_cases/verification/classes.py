"""Classes of requests by prompt length: cuts that are tried, and whether pools of classes keep enough more to be used.

The best plan with pools of classes is compared with the plan without, in the same simulated traffic, with the router
that the plan needs: as planned, drifted to longer prompts, and in bursts. It replaces the other only if it keeps more
by a share (``--worth``) in the first two. Kept is the highest rate at which every class meets its limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetis.planner.use_cases.climbing import Carriers, gain_of
from hetis.planner.use_cases.record.forms import ClassLatency, KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes
from hetis.planner.use_cases.simulation.simulate import NothingSimulatedError, Question, answer, default_rate
from hetis.planner.use_cases.verification.outcome import AS_PLANNED
from hetis.planner.use_cases.verification.rates import simulation_report
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.values import Run
from hetis.solver.budget import Budget, Report
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import Objective, Plan
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
STEP, PRECISE = 1.06, 0.03  # ratio of rates until one is kept and one missed, and of these in the end
MOST_STEPS = 30  # rates tried beyond the first, up or down
HARDER = 0.88  # share of the rate kept as planned from which that of other traffic is searched
NEEDS_ROUTER = (
    "replicas for one class of requests need a router that knows prompt lengths, as exports that carry this plan have; "
    "behind any other it keeps far less than a plan without classes"
)
Find = Callable[[PlacementProblem], Plan]  # raises InfeasibleError, NoPlanFoundError


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
) -> WithClasses:  # fmt: skip
    """Return the best plan with classes if it is worth its pools, or else the plan without, with a record of both.

    Args:
        without: the plan without classes, which keeps the strictest of their limits.
        objective: the requested one, whose limits apply to classes without their own.
        cuts: the classes to try; the plan of the best value is simulated.
        find: searches a problem.
        worth: share by which it must keep more.
        seed, budget, report: those of simulations.
        carriers: what each export target cannot carry; None: not known. Some must carry all of it, or the ``target``.
        verified: simulates the plan with classes as that without was, such as with more seats; None: neither was, and
            the gain is that of the cost model.
    """
    best, name = None, ""
    for cut, classes in cuts.items():
        workload = replace(without.problem.workload, classes=classes)
        posed = replace(without.problem, workload=workload, objective=objective)
        try:
            plan = find(posed)
        except (InfeasibleError, NoPlanFoundError):
            continue
        if best is None or gain_of(plan, best.plan) > 0.0:
            best, name = WithClasses(plan=plan, problem=posed), cut
    record = Classes(cut=name or ", ".join(cuts), worth=worth)
    if best is None or not any(one.classes for one in best.plan.replicas):
        return _told(without, replace(record, why_not="no plan with pools of classes has a better value"))
    record = replace(record, value=best.plan.result.value, bound=best.plan.result.bound)
    if why := _not_carried(best, carriers, target):
        return _told(without, replace(record, why_not=why))
    gains = [gain_of(best.plan, without.plan)]
    if verified is not None:
        best = replace(best, plan=verified(best))
        compared = _Compared(without, best, seed=seed, budget=budget, report=report)
        try:
            record = replace(record, kept=tuple(compared.kept()), ttft=tuple(compared.latencies()))
        except NothingSimulatedError:
            return _told(without, replace(record, why_not="simulations ended before both plans were compared"))
        gains = [_gain(one, without.plan, best.plan) for one in record.kept if one.counts]
    if min(gains) < worth:
        why = f"it keeps {min(gains):+.1%} where {worth:.0%} more is worth pools of their own (--worth)"
        return _told(without, replace(record, why_not=why))
    return _told(best, record)


def _told(chosen: WithClasses, record: Classes) -> WithClasses:
    return replace(chosen, plan=record.on(chosen.plan))


def _gain(kept: KeptWithClasses, without: Plan, plan: Plan) -> float:
    """Return what is kept more with classes: requests/s or, if a rate is demanded, what is kept of it for its cost."""

    def worth(rate: float, of: Plan) -> float:
        return rate if of.objective.maximises else min(rate, of.objective.demand_rps or 0.0) / of.result.value

    before = worth(kept.without_rps, without)
    return worth(kept.with_rps, plan) / before - 1.0 if before else math.inf


def _not_carried(best: WithClasses, carriers: Carriers | None, target: str) -> str:
    """Return why no export, or not the target, carries the plan's router; empty: it is carried."""
    if carriers is None:
        return ""
    reasons = carriers(best.plan, best.problem)
    wanted = [target] if target else list(reasons)
    if any(not reasons[name] for name in wanted):
        return ""
    return f"export target {target} cannot route by prompt length" if target else "no export target carries it"


class _Compared:
    """Simulations of a plan without classes and one with them, in the same traffic."""

    def __init__(
        self, without: WithClasses, best: WithClasses, *, seed: int, budget: Budget, report: Report
    ) -> None:  # fmt: skip
        self._both, self._seed, self._budget, self._report = (without, best), seed, budget, report
        self._limits = best.problem  # of each class
        self._kept = (0.0, 0.0)

    def kept(self) -> Iterator[KeptWithClasses]:
        """Yield the rates that both plans keep: in planned traffic, with longer prompts, and in bursts."""
        planned = self._limits.workload
        for name, lengths, gap_cv, counts in (
            ("as planned", planned, 1.0, True),
            ("longer prompts", drifted(planned), 1.0, True),
            ("bursts", planned, BURSTS, False),
        ):
            starts = (
                HARDER * kept or default_rate(one.plan, one.problem)
                for one, kept in zip(self._both, self._kept, strict=True)
            )
            before, after = (
                self._highest(one, lengths, gap_cv, rate) for one, rate in zip(self._both, starts, strict=True)
            )
            self._kept = self._kept if any(self._kept) else (before, after)
            yield KeptWithClasses(traffic=name, without_rps=before, with_rps=after, counts=counts)

    def latencies(self) -> Iterator[ClassLatency]:
        """Yield the p95 TTFT of each class in both plans, at the lower of the rates that they keep."""
        rate = min(self._kept) or max(self._kept)
        runs = [self._run(one, self._limits.workload, rate, 1.0)[1] for one in self._both]
        for one in self._limits.class_shares() if rate else ():
            before, after = (self._latencies(run, one.name)[0] for run in runs)
            yield ClassLatency(
                name=one.name, share=one.share, max_prompt_tokens=one.max_prompt_tokens,
                limit_s=self._limits.of_classes((one.name,)).objective.ttft_limit_s, rate_rps=rate,
                without_s=before, with_s=after,
            )  # fmt: skip

    def _highest(self, one: WithClasses, lengths: Workload, gap_cv: float, rate: float) -> float:
        """Return the highest rate at which every class keeps its limits, searched from a rate; 0: none tried does."""

        def keeps(rate: float) -> bool:
            return self._keeps(*self._run(one, lengths, rate, gap_cv))

        low, high = (rate, rate * STEP) if keeps(rate) else (rate / STEP, rate)
        rising = low == rate
        for _ in range(MOST_STEPS):
            if keeps(high if rising else low) != rising:
                break
            low, high = (high, high * STEP) if rising else (low / STEP, low)
        else:
            return low if rising else 0.0
        while high > low * (1.0 + PRECISE):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def _run(self, one: WithClasses, lengths: Workload, rate: float, gap_cv: float) -> tuple[bool, Run]:
        """Return whether the fleet carried the load, and the requests after the warm-up."""
        load = Load(
            lengths=lengths, max_position=one.problem.model.max_position, arrivals=Arrivals.DRAWN, rate_rps=rate,
            gap_cv=gap_cv,
        )  # fmt: skip
        question = Question(
            load=load, num_requests=REQUESTS, seeds=(self._seed,), settings=AS_PLANNED,
            limits=one.problem.objective, keep_run=True,
        )  # fmt: skip
        told = simulation_report(one.plan, self._report)
        found = answer(
            one.plan, one.problem, question, processes=1, is_cancelled=self._budget.cancelled.is_set,
            report=lambda given, total: told(rate, given, total),
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
        of_all = self._limits.objective
        has_own = any((one.ttft_limit_s, one.tpot_limit_s) != (None, None) for one in self._limits.workload.classes)
        limits = {name: self._limits.of_classes((name,)).objective for name in self._limits.workload.shares()}
        for name, objective in limits.items() if has_own else [("", of_all)]:
            ttft_s, tpot_s = self._latencies(run, name)
            if not ttft_s <= (objective.ttft_limit_s or math.inf) or not tpot_s <= (objective.tpot_limit_s or math.inf):
                return False
        return True

    def _latencies(self, run: Run, name: str) -> tuple[float, float]:
        """Return p95 TTFT and mean TPOT of the requests of a class, or of all; unfinished ones take forever."""
        bounds = [one.max_prompt_tokens or math.inf for one in self._limits.workload.classes]
        numbers = np.searchsorted(bounds, run.prompt_tokens, side="left")
        names = [one.name for one in self._limits.workload.classes]
        own = np.full(len(numbers), True) if not name else numbers == names.index(name)
        ttft_s = np.nan_to_num((run.first_token_s - run.arrival_s)[own], nan=math.inf)
        decoding_s, tokens = (run.finished_s - run.first_token_s)[own], (run.output_tokens - 1)[own]
        done = np.isfinite(decoding_s) & (tokens > 0)
        if not len(ttft_s):
            return 0.0, 0.0
        mean_s = float(decoding_s[done].sum() / tokens[done].sum()) if done.any() else 0.0
        return float(np.quantile(ttft_s, 0.95, method="higher")), mean_s
