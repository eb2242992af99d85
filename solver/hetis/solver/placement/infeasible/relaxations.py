"""Relaxations of a conflict's members while the others are kept; each one is tried and confirmed by a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from hetis.solver.constraints import AtMost, Constraint, Replicas, Sum, Use
from hetis.solver.placement.explanation.wording import in_bytes
from hetis.solver.placement.infeasible.requirements import (
    Requirement,
    Subject,
    keeping,
    with_faster_links,
)
from hetis.solver.placement.infeasible.trials import Trials
from hetis.solver.placement.infeasible.wording import listed, option_down, option_up, rounded_down

PRECISION = 1.02  # ratio to which a best latency is determined
LINK_PRECISION = 1.2  # ratio to which the speed-up of links is determined
FASTEST_LINKS = 1024.0
MOST_SPENT = 1e4  # largest ratio to the allowed amount
SMALLER_WEIGHTS = ((1.0, "8-bit weights (fp8 or int8)"), (0.53, "4-bit weights"))  # bytes per parameter
SMALLER_KV = 1.0  # bytes per element


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change with which a plan exists; ``sentence`` states what is known of it.

    Attributes:
        about: the requirement that gives way; None if the fleet grows instead.
        change: what to do, in words.
        option: the option that does it; empty if an input must change.
        usd_per_hour: its cost; None if unknown or nothing.
        is_tried: whether a plan was found with it; if False, the sentence only says what is out of reach.
    """

    about: Requirement | None
    sentence: str
    change: str = ""
    option: str = ""
    usd_per_hour: float | None = None
    is_tried: bool = True


def relaxations_of(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Iterator[Relaxation]:
    """Yield ways in which one requirement can give way while ``others`` stay."""
    match member.subject:
        case Subject.DEMAND:
            yield _best_rate(trials, member, others)
        case Subject.TPOT | Subject.TTFT:
            yield _best_latency(trials, member, others)
        case Subject.LINKS:
            yield _faster_links(trials, member, others)
        case Subject.MEMORY:
            yield from smaller_memory(trials, member, [member, *others])
        case Subject.CONSTRAINT if isinstance(member.constraint, Use | Replicas) and member.constraint.least > 1:
            yield _fewer(trials, member, member.constraint, others)
        case Subject.CONSTRAINT if isinstance(member.constraint, AtMost):
            yield _more_allowed(trials, member, member.constraint, others)
        case _:
            yield _gone(trials, member, others)


def _shown(others: Collection[Requirement]) -> list[Requirement]:
    """Return the requirements that a number depends on, without those that go without saying."""
    return [r for r in others if not r.subject.is_of_fleet and r.subject not in (Subject.STRATEGY, Subject.ROLES)]


def _beside(others: Collection[Requirement]) -> str:
    shown = _shown(others)
    return f" beside {listed(shown)}" if shown else ""


def _not_alone(member: Requirement, others: Collection[Requirement]) -> Relaxation:
    sentence = f"{member} is not the only obstacle: without it no plan exists either{_beside(others)}"
    return Relaxation(about=member, sentence=sentence, is_tried=False)


def _unknown(member: Requirement, what: str) -> Relaxation:
    return Relaxation(about=member, sentence=f"{member} {what}", is_tried=False)


def _best_rate(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    limits = _shown(others)
    within = f" within {listed(limits)}" if limits else ""
    if others and trials.of(others).exists is False:
        return _unknown(member, f"is not the only obstacle: no plan at all exists{within}")
    outcome = trials.best(others)
    share = trials.problem.assumptions.planned_utilisation
    if outcome is None:
        most = f"{share * trials.rate_bound(others):.4g} requests/s at most, at dense work alone"
        text = f"is above what this fleet serves{within}: {most}; no time was left to find how much it does (--rate)"
        return _unknown(member, text)
    value, bound = f"{share * outcome.value:.4g}", f"{share * outcome.bound:.4g}"
    proof = "" if bound == value else f" with the best plan found, proven at most {bound}"
    option = f"--rate {rounded_down(share * outcome.value):g}"
    sentence = f"{member} is above what this fleet serves{within}: {value} requests/s{proof} ({option})"
    return Relaxation(about=member, sentence=sentence, change=f"demand {value} requests/s", option=option)


def _best_latency(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    """Bisect between the limit and the latency of a plan found without it."""
    keeping_ = _beside(others)
    name = f"--{member.subject.name.lower()}"
    of_all = any(r.subject is Subject.DEMAND for r in others)
    first = trials.of(others)
    if first.exists is None:
        text = f"is out of reach{keeping_}; no time was left to find what is not: try a longer one, or {name} none"
        return _unknown(member, text)
    if not first.exists:
        return _not_alone(member, others)
    low, high = member.value, first.latency_s(member.subject, of_all=of_all)
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        trial = trials.of([*others, member.at(middle)])
        if trial.exists is None:
            break
        if trial.exists:
            high = min(middle, trial.latency_s(member.subject, of_all=of_all))
        else:
            low = middle
    impossible, possible = option_down(low), option_up(high)
    option = f"{name} {possible}"
    sentence = f"{member} is out of reach{keeping_}: {impossible} cannot be kept, {possible} can ({option})"
    return Relaxation(about=member, sentence=sentence, change=f"{member.subject} {possible}", option=option)


def _faster_links(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    def exists(factor: float) -> bool | None:
        kept = keeping(trials.problem, [member, *others])
        faster = replace(kept, cluster=with_faster_links(kept.cluster, factor))
        return trials.of_problem(faster, demand_of(others)).exists

    found = _smallest(exists, LINK_PRECISION, FASTEST_LINKS)
    if found is None:
        return _unknown(member, f"are too slow{_beside(others)}; no time was left to find how fast they must be")
    text = f"{math.ceil(found * 10.0) / 10.0:g} times as fast"
    sentence = f"{member} are too slow{_beside(others)}: {text} they would do, bandwidth and latency alike"
    return Relaxation(about=member, sentence=sentence, change=f"links {text}")


def smaller_memory(
    trials: Trials, member: Requirement, kept: Collection[Requirement]
) -> Iterator[Relaxation]:  # fmt: skip
    """Yield the first smaller size of weights with which a plan exists, then a smaller KV cache if one exists."""
    model = trials.problem.model
    sizes = [(num_bytes, words) for num_bytes, words in SMALLER_WEIGHTS if num_bytes < model.weight_bytes]
    for num_bytes, words in sizes:
        if _exists_with(trials, kept, weight_bytes=num_bytes):
            size = model.params() * model.weight_bytes, model.params() * num_bytes
            sentence = f"with {words} a plan exists: {in_bytes(size[1])} instead of {in_bytes(size[0])}"
            yield Relaxation(about=member, sentence=sentence, change=words)
            break
    if model.kv_bytes > SMALLER_KV and _exists_with(trials, kept, kv_bytes=SMALLER_KV):
        sentence = "with an 8-bit KV cache (fp8) a plan exists: half the bytes of every token"
        yield Relaxation(about=member, sentence=sentence, change="8-bit KV cache (fp8)")


def _exists_with(trials: Trials, kept: Collection[Requirement], **sizes: float) -> bool:
    """Return whether a plan exists for the model with other bytes per number."""
    problem = keeping(trials.problem, kept)
    precisions = tuple(replace(one, **sizes) for one in problem.model.precisions)  # type: ignore[arg-type]
    model = replace(problem.model, **sizes, precisions=precisions)  # type: ignore[arg-type]
    smaller = replace(problem, model=model)
    return bool(trials.of_problem(smaller, demand_of(kept)).exists)


def _fewer(
    trials: Trials, member: Requirement, constraint: Use | Replicas, others: Collection[Requirement]
) -> Relaxation:
    """Return the most GPUs that can be in use, or the most replicas of a plan, while keeping the others."""
    low, high = 0, constraint.least
    if trials.of(others).exists is not True:
        return _gone(trials, member, others)
    while high - low > 1:
        middle = (low + high) // 2
        if _with_constraint(trials, member, constraint, replace(constraint, least=middle), others):
            low = middle
        else:
            high = middle
    if low == 0:
        return _gone(trials, member, others)
    option = str(replace(constraint, least=low))
    if isinstance(constraint, Use):
        possible, change = f"{low} of them can be in use", f"{low} of {constraint.gpus} in use"
    else:
        possible, change = f"a plan with {low} exists", f"{low} replicas"
    sentence = f"{member} is out of reach{_beside(others)}: {possible} ({option})"
    return Relaxation(about=member, sentence=sentence, change=change, option=option)


def _more_allowed(
    trials: Trials, member: Requirement, constraint: AtMost, others: Collection[Requirement]
) -> Relaxation:
    """Return the least rent, or the fewest GPUs, with which a plan exists."""
    if trials.of(others).exists is not True:
        return _gone(trials, member, others)

    def exists(factor: float) -> bool | None:
        most = constraint.most * factor
        return _with_constraint(
            trials,
            member,
            constraint,
            replace(constraint, most=most if constraint.of is Sum.USD else round(most)),
            others,
        )

    found = _smallest(exists, PRECISION, MOST_SPENT)
    if found is None:
        return _gone(trials, member, others)
    most = constraint.most * found
    allowed = replace(constraint, most=-rounded_down(-most) if constraint.of is Sum.USD else round(most))
    unit = {Sum.USD: "USD/h", Sum.GPUS: "GPUs"}[constraint.of]
    sentence = f"{member} is too little{_beside(others)}: {allowed.most:g} {unit} are enough ({allowed})"
    return Relaxation(about=member, sentence=sentence, change=f"{allowed.most:g} {unit} at most", option=str(allowed))


def _with_constraint(
    trials: Trials, member: Requirement, constraint: Constraint, changed: Constraint, others: Collection[Requirement]
) -> bool | None:
    """Return whether a plan exists with one constraint changed."""
    problem = keeping(trials.problem, [member, *others])
    problem = replace(problem, constraints=tuple(changed if w == constraint else w for w in problem.constraints))
    return trials.of_problem(problem, demand_of(others)).exists


def _gone(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    """Return the relaxation that drops a requirement without a number."""
    exists = trials.of(others).exists
    if exists is None:
        return _unknown(member, "is in the way; no time was left to tell whether it alone is")
    if not exists:
        return _not_alone(member, others)
    words = {
        Subject.CONSTRAINT: "without it",
        Subject.ROLES: "with all roles of the strategy",
        Subject.STRATEGY: "with strategy hetis",
        Subject.SETTINGS: "with engines started as is best",
        Subject.CUTS: f"if {trials.problem.model.name} could be cut between any two layers",
    }[member.subject]
    option = {Subject.STRATEGY: "--strategy hetis"}.get(member.subject, "")
    sentence = f"{member} is in the way: {words} a plan exists"
    change = f"without {member}" if member.subject is Subject.CONSTRAINT else words
    return Relaxation(about=member, sentence=sentence, change=change, option=option)


def _smallest(exists: Callable[[float], bool | None], precision: float, most: float) -> float | None:
    """Return the smallest factor above 1 for which a plan exists, by bisection, or None if none was found."""
    low, high = 1.0, 2.0
    while not exists(high):
        low, high = high, high * 4.0
        if high > most:
            return None
    while high > low * precision:
        middle = math.sqrt(low * high)
        if exists(middle):
            high = middle
        else:
            low = middle
    return high


def demand_of(kept: Collection[Requirement]) -> float:
    """Return the demanded goodput among the requirements, or 0 without one."""
    return next((r.value for r in kept if r.subject is Subject.DEMAND), 0.0)
