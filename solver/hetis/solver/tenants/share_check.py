"""The checker of shared fleets: plans, disjointness, rates, the rule and the arithmetic of the bound, derived again.

It shares no code with the search. It does not check claims that only a search can prove: that a tenant alone reaches
the stated rate, that no replica exceeds the multipliers of a proof (this is checked for the plans' replicas), and that
whole replicas reach less than the prices prove.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster, GpuSlots, node_of
from hetis.solver.plan import Plan, Status
from hetis.solver.tenants.tenancy import FleetShares, PriceProof, Tenancy, TenantRule

RELATIVE = 1e-6
OPTIMAL_GAP = 1e-6


def check_fleet_shares(tenancy: Tenancy, answer: FleetShares) -> tuple[str, ...]:
    """Return every error of an answer as a sentence; empty if it is sound.

    The problems of the tenants must have the family that was searched.
    """
    names = [tenant.name for tenant in tenancy.tenants]
    if [share.name for share in answer.shares] != names:
        return (f"shares are of {', '.join(s.name for s in answer.shares)}, the tenants are {', '.join(names)}",)
    found = [*_check_plans(tenancy, answer), *_check_devices(answer), *_check_rates(tenancy, answer)]
    found += [*_check_rule(answer), *_check_result(answer)]
    for name, proof in (("bound", answer.proof), ("level bound", answer.level_proof)):
        if proof is not None:
            found += (f"{name}: {sentence}" for sentence in _check_proof(tenancy.cluster, answer, proof))
    return (*found, *_check_what_proofs_say(answer))


def _check_plans(tenancy: Tenancy, answer: FleetShares) -> Iterator[str]:
    for tenant, share in zip(tenancy.tenants, answer.shares, strict=True):
        if share.plan is not None:
            for violation in check_plan(share.plan, tenant.problem):
                yield f"{share.name}: {violation}"


def _check_devices(answer: FleetShares) -> Iterator[str]:
    owners: dict[str, str] = {}
    for share in answer.shares:
        for replica in share.plan.replicas if share.plan is not None else ():
            for device in replica.devices():
                if owners.setdefault(device, share.name) != share.name:
                    yield f"{device} is given to {owners[device]} and to {share.name}"


def _check_rates(tenancy: Tenancy, answer: FleetShares) -> Iterator[str]:
    for tenant, share in zip(tenancy.tenants, answer.shares, strict=True):
        placed = share.plan.result.value if share.plan is not None else 0.0
        if not _close(share.placed, placed):
            yield f"{share.name}: placed rate is {share.placed:.9g}, its plan serves {placed:.9g}"
        if share.rate > share.placed * (1.0 + RELATIVE):
            yield f"{share.name}: is granted {share.rate:.9g}, its replicas serve {share.placed:.9g}"
        if share.weight != tenant.weight:
            yield f"{share.name}: weight is {share.weight}, the tenant's is {tenant.weight}"
        for what, reached, above in (
            ("alone", share.alone, share.alone_bound),
            ("on its part", share.part, share.part_bound),
        ):
            if reached > above * (1.0 + RELATIVE):
                yield f"{share.name}: reaches {reached:.9g} {what}, above its own bound {above:.9g}"
        if not share.alone > 0.0:
            yield f"{share.name}: reaches nothing alone, so that no rate is a share of it"
        elif share.placed > share.alone_bound * (1.0 + RELATIVE):
            yield f"{share.name}: serves {share.placed:.9g}, more than the bound alone {share.alone_bound:.9g}"
        worth = tenant.worth if tenant.worth is not None else 1.0 / share.alone
        if not _close(share.worth, worth):
            yield f"{share.name}: a request/s is worth {share.worth:.9g}, must be {worth:.9g}"


def _check_rule(answer: FleetShares) -> Iterator[str]:
    levels = [share.rate / share.alone / share.weight for share in answer.shares]
    if not _close(answer.level, min(levels)):
        yield f"level is {answer.level:.9g}, the least normalised rate per part is {min(levels):.9g}"
    if answer.rule.has_level != (answer.level_bound is not None):
        yield f"rule {answer.rule} {'lacks' if answer.rule.has_level else 'has no'} bound on the level"
    for share, level in zip(answer.shares, levels, strict=True):
        if answer.rule is TenantRule.EQUAL_THROUGHPUT and not _close(level, answer.level):
            yield f"{share.name}: has {level:.9g} per part, everybody must have {answer.level:.9g}"
        if answer.rule is TenantRule.SHARING_INCENTIVE and share.rate < share.part * (1.0 - RELATIVE):
            yield f"{share.name}: has {share.rate:.9g}, its part of the fleet would serve {share.part:.9g}"
        if answer.rule is not TenantRule.EQUAL_THROUGHPUT and not _close(share.rate, share.placed):
            yield f"{share.name}: is granted {share.rate:.9g} of {share.placed:.9g}, the rule grants all"


def _check_result(answer: FleetShares) -> Iterator[str]:
    value = sum(share.worth * share.rate for share in answer.shares)
    if not _close(answer.value, value):
        yield f"value is {answer.value:.9g}, the shares are worth {value:.9g}"
    if answer.bound < answer.value * (1.0 - 1e-9):
        yield f"bound {answer.bound:.9g} is below the value {answer.value:.9g}"
    if answer.level_bound is not None and answer.level_bound < answer.level * (1.0 - RELATIVE):
        yield f"level bound {answer.level_bound:.9g} is below the level {answer.level:.9g}"
    far = max(answer.gap if answer.value else 0.0, answer.level_gap if answer.level else 0.0)
    if answer.status is Status.OPTIMAL and far > OPTIMAL_GAP * (1.0 + RELATIVE) + 1e-9:
        yield f"status is optimal at a gap of {far:.9g}"


def _check_proof(cluster: Cluster, answer: FleetShares, proof: PriceProof) -> Iterator[str]:
    """Check that the proof's rows are those of the cluster, and that the placed replicas respect its multipliers."""
    if min([row.price for row in proof.rows] + list(proof.multipliers)) < 0.0:
        yield "a price is negative"
    has = Counter[tuple[str, int, int]]()
    for group in cluster.node_groups:
        for gpu, per_node in _counts(group.gpus).items():
            for size in {row.tp_at_least for row in proof.rows}:
                has[gpu, per_node, size] += group.count * size * (per_node // size)
    says = Counter[tuple[str, int, int]]()
    for row in proof.rows:
        says[row.gpu, row.gpus_per_node, row.tp_at_least] += row.limit
    for key, limit in says.items():
        if limit != has[key]:
            yield f"{key[0]} x{key[1]} has room for {has[key]} GPUs in groups of {key[2]}, the proof says {limit}"
    missing = {key for key, room in has.items() if key[2] == 1 and room and key not in says}
    if missing:
        yield f"has no row for {', '.join(f'{gpu} x{per_node}' for gpu, per_node, _ in sorted(missing))}"
    per_node_of = {group.node_name(i): _counts(group.gpus) for group in cluster.node_groups for i in range(group.count)}
    for share, multiplier in zip(answer.shares, proof.multipliers, strict=True):
        if share.plan is None:
            continue
        paid = sum(_price(proof, gpu, per_node_of[node_of(device)][gpu], tp)
                   for gpu, tp, device in _cards(share.plan))  # fmt: skip
        if multiplier * share.placed / share.alone > paid * (1.0 + RELATIVE) + 1e-12:
            yield f"{share.name}: its replicas are worth {multiplier * share.placed / share.alone:.9g}, pay {paid:.9g}"


def _counts(slots: tuple[GpuSlots, ...]) -> dict[str, int]:
    counts = Counter[str]()
    for one in slots:
        counts[one.gpu] += one.count
    return counts


def _cards(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Yield type, TP size and name of every GPU; attention workers have TP size 1."""
    for replica in plan.replicas:
        for stage in replica.stages:
            yield from ((stage.gpu, stage.tp, device) for device in stage.devices)
        for pool in replica.attention_workers:
            yield from ((pool.gpu, 1, device) for device in pool.devices)


def _price(proof: PriceProof, gpu: str, per_node: int, tp: int) -> float:
    """Return the highest price of one GPU of a TP group; classes that look alike may have several prices."""
    prices: dict[int, float] = {}
    for row in proof.rows:
        if row.gpu == gpu and row.gpus_per_node == per_node and tp >= row.tp_at_least:
            prices[row.tp_at_least] = max(prices.get(row.tp_at_least, 0.0), row.price)
    return sum(prices.values())


def _check_what_proofs_say(answer: FleetShares) -> Iterator[str]:
    """Check that prices, multipliers and floors prove what is said, and that no bound is wider than that."""
    gains = [share.worth * share.alone for share in answer.shares]
    if answer.level_proof is not None and answer.level_bound is not None:
        proof = answer.level_proof
        covered = sum(a * share.weight for a, share in zip(proof.multipliers, answer.shares, strict=True))
        worth = sum(row.price * row.limit for row in proof.rows)
        yield from _check_bound(
            "level bound", answer.level_bound, proof, worth / covered if covered > 0.0 else math.inf
        )
    if answer.proof is None or answer.rule is TenantRule.EQUAL_THROUGHPUT:
        return
    proof = answer.proof
    bound = sum(row.price * row.limit for row in proof.rows)
    for share, gain, multiplier, floor in zip(answer.shares, gains, proof.multipliers, proof.floors, strict=True):
        if multiplier < gain * (1.0 - RELATIVE):
            yield f"{share.name}: multiplier {multiplier:.9g} is below its gain {gain:.9g}"
        owed = share.weight * answer.level if answer.rule.has_level else 0.0
        if answer.rule is TenantRule.SHARING_INCENTIVE:
            owed = share.part / share.alone
        if floor > owed * (1.0 + RELATIVE) + 1e-12:
            yield f"{share.name}: the proof requires {floor:.9g}, the rule owes it {owed:.9g}"
        bound -= (multiplier - gain) * floor
    yield from _check_bound("bound", answer.bound, proof, bound)


def _check_bound(what: str, stated: float, proof: PriceProof, proved: float) -> Iterator[str]:
    """Check a bound, which may be tighter than its prices prove: then it holds for whole replicas alone."""
    if not _close(proof.bound, proved):
        yield f"{what} of the prices is {proof.bound:.9g}, they prove {proved:.9g}"
    if stated > proof.bound * (1.0 + RELATIVE):
        yield f"{what} is {stated:.9g}, though its prices prove {proof.bound:.9g}"


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-9)
