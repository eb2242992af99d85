"""Relaxations of a conflict's members while the others are kept, each of them confirmed by a plan where possible.

Another way out is to add GPUs: for every offered type the fewest with which a plan exists, the lowest rent first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from hetis.solver.cluster import GpuSlots, GpuType, NodeGroup
from hetis.solver.constraints import AtMost, Constraint, Replicas, Sum, Use
from hetis.solver.placement.infeasible.requirements import Requirement, Subject, demand_of, keeping, with_faster_links
from hetis.solver.placement.infeasible.trials import Trials
from hetis.solver.placement.wording import in_bytes, listed, option_down, option_up, rounded_down
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile

PRECISION = 1.02  # ratio up to which a best latency is determined
LINK_PRECISION = 1.2  # ratio up to which the speed-up of links is determined
FASTEST_LINKS = 1024.0
MOST_SPENT = 1e4  # largest ratio to the allowed amount
SMALLER_WEIGHTS = ((1.0, "8-bit weights", "fp8"), (0.53, "4-bit weights", "int4"))  # bytes per parameter, precision
WORTH_SAYING = 0.9  # ratio of sizes above which the smaller one is no change
SMALLER_KV = 1.0  # bytes per element
LARGEST_SHARE = 0.95  # of the memory that tools report: engines start with it where little else holds memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change with which a plan exists; ``sentence`` states what is known about it.

    Attributes:
        about: the requirement that gives way; None if the fleet grows instead.
        change: what to do, in words.
        option: the command-line option that makes the change; empty if an input must change.
        usd_per_hour: cost of the change; None if unknown or nothing.
        is_tried: whether a plan was found with it; if False, the sentence only states what is out of reach.
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
    """Return the requirements on which a number depends, without those that go without saying."""
    return [r for r in others if not r.subject.is_of_fleet and r.subject not in (Subject.STRATEGY, Subject.ROLES)]


def _beside(others: Collection[Requirement]) -> str:
    shown = _shown(others)
    return f" given {listed(shown)}" if shown else ""


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
        most = f"{share * trials.rate_bound(others):.4g} requests/s at most, even at dense work alone"
        text = f"is above what this fleet serves{within}: {most}; no time was left to find the exact limit (--rate)"
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
        text = f"is out of reach{keeping_}; no time was left to find a feasible one: try a higher limit, or {name} none"
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
    found = f"{_in_words(impossible)} cannot be kept, {_in_words(possible)} can ({option})"
    sentence = f"{member} is out of reach{keeping_}: {_by_the_model(trials.problem, member, others)}, {found}"
    return Relaxation(about=member, sentence=sentence, change=f"{member.subject} {possible}", option=option)


def _by_the_model(problem: PlacementProblem, member: Requirement, others: Collection[Requirement]) -> str:
    """Return what latencies hold by: the model, whose prompts queue for prefill replicas that are used as planned."""
    roles = keeping(problem, [member, *others]).family.roles
    if member.subject is not Subject.TTFT or Role.UNIFIED in roles:
        return "by the model"
    share = problem.assumptions.planned_utilisation
    return f"by the model, at {share:.0%} of a prefill replica's rate (lower rates may keep it)"


def _in_words(option: str) -> str:
    """Return a time as limits are written in sentences: ``119 ms`` for the option's ``119ms``."""
    return re.sub(r"(?=m?s$)", " ", option, count=1)


def _faster_links(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    def exists(factor: float) -> bool | None:
        kept = keeping(trials.problem, [member, *others])
        faster = replace(kept, cluster=with_faster_links(kept.cluster, factor))
        return trials.of_problem(faster, demand_of(others)).exists

    found = _smallest(exists, LINK_PRECISION, FASTEST_LINKS)
    if found is None:
        slow = "are too slow" if trials.of(others).exists else "may be too slow"
        return _unknown(member, f"{slow}{_beside(others)}; no time was left to find how fast they must be")
    text = f"{math.ceil(found * 10.0) / 10.0:g} times as fast"
    sentence = f"{member} are too slow{_beside(others)}: {text}, in bandwidth and latency alike, they would suffice"
    return Relaxation(about=member, sentence=sentence, change=f"links {text}")


def smaller_memory(trials: Trials, member: Requirement, kept: Collection[Requirement]) -> Iterator[Relaxation]:
    """Yield a larger share of the memory, and what others hold of it, if a plan exists with that; then the first
    smaller size of weights with which a plan exists, then a smaller KV cache if one exists.
    """
    yield from _more_of_the_memory(trials, member, kept)
    yield from smaller_weights(trials, member, kept)
    if trials.problem.model.kv_bytes > SMALLER_KV and _exists_with(trials, kept, kv_bytes=SMALLER_KV):
        sentence = "with an 8-bit KV cache a plan exists (--kv fp8): half the bytes of every token"
        yield Relaxation(about=member, sentence=sentence, change="8-bit KV cache", option="--kv fp8")


def smaller_weights(trials: Trials, member: Requirement | None, kept: Collection[Requirement]) -> Iterator[Relaxation]:
    """Yield the first smaller size of weights with which a plan exists."""
    model = trials.problem.model
    for num_bytes, words, name in SMALLER_WEIGHTS:
        if num_bytes < WORTH_SAYING * model.weight_bytes and _exists_with(trials, kept, weight_bytes=num_bytes):
            size, option = [model.params() * each for each in (num_bytes, model.weight_bytes)], f"--weights {name}"
            sentence = f"with {words} a plan exists ({option}): {in_bytes(size[0])} instead of {in_bytes(size[1])}"
            yield Relaxation(about=member, sentence=sentence, change=words, option=option)
            break


def _more_of_the_memory(trials: Trials, member: Requirement, kept: Collection[Requirement]) -> Iterator[Relaxation]:
    problem = keeping(trials.problem, kept)
    larger = {kind: memory.at(LARGEST_SHARE) for kind, memory in problem.memories.items()}
    if larger != problem.memories and trials.of_problem(replace(problem, memories=larger), demand_of(kept)).exists:
        option = f"--gpu-memory-utilization {LARGEST_SHARE:g}"
        sentence = f"with {LARGEST_SHARE:.0%} of the GPUs' memory for engines a plan exists ({option})"
        yield Relaxation(about=member, sentence=sentence, change=f"{LARGEST_SHARE:.0%} of the memory", option=option)
    cluster = problem.cluster
    groups = tuple(
        replace(group, gpus=tuple(replace(slots, reserved_bytes=0) for slots in group.gpus))
        for group in cluster.node_groups
    )
    if groups == cluster.node_groups:
        return
    freed = replace(problem, cluster=replace(cluster, node_groups=groups))
    if trials.of_problem(freed, demand_of(kept)).exists:
        held = max(slots.reserved_bytes for group in cluster.node_groups for slots in group.gpus)
        sentence = f"without the memory that others hold of GPUs, up to {in_bytes(held)}, a plan exists (`reserved`)"
        yield Relaxation(about=member, sentence=sentence, change="the memory that others hold")


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
        if _with_constraint(trials, member, replace(constraint, least=middle), others):
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
        changed = replace(constraint, most=most if constraint.of is Sum.USD else round(most))
        return _with_constraint(trials, member, changed, others)

    found = _smallest(exists, PRECISION, MOST_SPENT)
    if found is None:
        return _gone(trials, member, others)
    most = constraint.most * found
    allowed = replace(constraint, most=-rounded_down(-most) if constraint.of is Sum.USD else round(most))
    unit = {Sum.USD: "USD/h", Sum.GPUS: "GPUs"}[constraint.of]
    sentence = f"{member} is too low{_beside(others)}: {allowed.most:g} {unit} would be enough ({allowed})"
    return Relaxation(about=member, sentence=sentence, change=f"{allowed.most:g} {unit} at most", option=str(allowed))


def _with_constraint(
    trials: Trials, member: Requirement, changed: Constraint, others: Collection[Requirement]
) -> bool | None:
    """Return whether a plan exists with the member's constraint changed."""
    problem = keeping(trials.problem, [member, *others])
    constraints = tuple(changed if each == member.constraint else each for each in problem.constraints)
    return trials.of_problem(replace(problem, constraints=constraints), demand_of(others)).exists


def _gone(trials: Trials, member: Requirement, others: Collection[Requirement]) -> Relaxation:
    """Return the relaxation that drops a requirement without a number."""
    exists = trials.of(others).exists
    if exists is None:
        return _unknown(member, "prevents a plan; no time was left to determine whether it is the only cause")
    if not exists:
        return _not_alone(member, others)
    words = {
        Subject.CONSTRAINT: "without it",
        Subject.ROLES: "with all roles of the strategy",
        Subject.STRATEGY: "with strategy hetis",
        Subject.SETTINGS: "with the best engine settings",
        Subject.CUTS: f"if {trials.problem.model.name} could be cut between any two layers",
    }[member.subject]
    option = {Subject.STRATEGY: "--strategy hetis"}.get(member.subject, "")
    sentence = f"{member} prevents a plan: {words} one exists"
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


# --- GPUs to add


PER_NODE = 8
COUNTS = (*range(1, PER_NODE + 1), 16, 24, 32, 48, 64)  # GPUs to add: up to one node, then whole nodes
OF_MARKET = 2  # types of the market that are tried for each criterion
ADDED = "added"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A GPU type that could be rented, at its own price in ``gpu``."""

    gpu: GpuType
    profile: Profile

    @property
    def usd_per_hour(self) -> float:
        return float("inf") if self.gpu.usd_per_hour is None else self.gpu.usd_per_hour


Market = Callable[[], Sequence[Offer]]


def growths(trials: Trials, kept: Collection[Requirement], market: Market) -> Iterator[Relaxation]:
    """Yield what to add so that all of ``kept`` can be met, the cheapest first."""
    problem = keeping(trials.problem, kept)
    found: list[tuple[float, Relaxation]] = []
    for offer in () if trials.is_over() else _offers(trials.problem, market):
        if trials.is_over():
            break
        trials.settings.tell(f"no plan exists: trying to add {offer.gpu.name}")
        enough = min((usd for usd, _ in found), default=float("inf"))
        fewest = _fewest(trials, problem, demand_of(kept), offer, enough)
        if fewest is not None:
            usd = fewest * offer.usd_per_hour
            found.append((usd, _relaxation(offer, fewest, usd)))
    yield from (relaxation for _, relaxation in sorted(found, key=lambda one: one[0]))


def _relaxation(offer: Offer, count: int, usd: float) -> Relaxation:
    rent = f", {usd:.4g} USD/h" if usd < float("inf") else ""
    nodes = f"{count // PER_NODE} nodes of {PER_NODE}" if count > PER_NODE else "one node"
    change, known_usd = f"add {count} {offer.gpu.name}", usd if usd < float("inf") else None
    sentence = f"{change} ({nodes}{rent}): a plan exists; none was found with fewer of them"
    return Relaxation(about=None, sentence=sentence, change=change, usd_per_hour=known_usd)


def _offers(problem: PlacementProblem, market: Market) -> list[Offer]:
    """Return the fleet's own types, then the market's with the cheapest memory, cheapest bandwidth, most bandwidth."""
    offers: dict[str, Offer] = {}
    for name in dict.fromkeys(slots.gpu for group in problem.cluster.node_groups for slots in group.gpus):
        offers[name] = Offer(gpu=problem.cluster.gpu_types[name], profile=problem.profiles[name])
    others = [offer for offer in market() if offer.gpu.name not in offers]
    promises: tuple[Callable[[Offer], float], ...] = (
        lambda offer: offer.usd_per_hour / offer.profile.usable_bytes,
        lambda offer: offer.usd_per_hour / offer.gpu.mem_bytes_per_s,
        lambda offer: -offer.gpu.mem_bytes_per_s,
    )
    for promise in promises:
        offers |= {offer.gpu.name: offer for offer in sorted(others, key=promise)[:OF_MARKET]}
    return list(offers.values())


def _fewest(
    trials: Trials, problem: PlacementProblem, demand_rps: float, offer: Offer, enough_usd: float
) -> int | None:  # fmt: skip
    """Return the fewest of `COUNTS` with which a plan exists below a rent, or None if none was found."""
    counts = [n for n in COUNTS if n * offer.usd_per_hour < enough_usd or enough_usd == float("inf")]
    if not counts or trials.is_refuted_at_once(with_added(problem, offer, counts[-1]), demand_rps):
        return None
    last = len(counts) - 1
    low, high, step = -1, -1, 0  # indices in counts: no plan exists at `low`, one does at `high`
    while step < len(counts):
        if trials.of_problem(with_added(problem, offer, counts[step]), demand_rps).exists:
            high = step
            break
        if trials.is_over():
            return None
        low, step = step, len(counts) if step == last else min(2 * step + 1, last)
    if high < 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if trials.of_problem(with_added(problem, offer, counts[middle]), demand_rps).exists:
            high = middle
        else:
            low = middle
    fewest: int = counts[high]
    return fewest


def with_added(problem: PlacementProblem, offer: Offer, count: int) -> PlacementProblem:
    """Return the problem with ``count`` more GPUs in new nodes on the fleet's network, in its first zone."""
    cluster, per_node = problem.cluster, min(count, PER_NODE)
    slots, (zone, *_) = (GpuSlots(gpu=offer.gpu.name, count=per_node),), cluster.zones() or ("default",)
    group = NodeGroup(name=ADDED, gpus=slots, count=count // per_node, numbered=True, zone=zone)
    types = {offer.gpu.name: offer.gpu, **cluster.gpu_types}
    grown = replace(cluster, node_groups=(*cluster.node_groups, group), gpu_types=types)
    return replace(problem, cluster=grown, profiles={offer.gpu.name: offer.profile, **problem.profiles})


def may_help(members: Collection[Requirement]) -> bool:
    """Return whether more GPUs could resolve this conflict: not if it limits GPUs, or has only constraints."""
    if any(isinstance(m.constraint, AtMost) for m in members):
        return False
    return any(m.subject in (Subject.DEMAND, Subject.MEMORY, Subject.TPOT, Subject.TTFT) for m in members)
