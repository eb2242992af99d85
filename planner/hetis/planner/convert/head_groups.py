"""The choice of individual head groups, of which the solver only decides the number.

A tensor-parallel primary of n cards computes G / n head groups on each card. It takes equally many from each card, so
that its cards stay balanced. All other devices take any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hetis.solver.dispatch.problem import IntArray, Stage


def owners_of(stage: Stage, groups: IntArray) -> list[int]:
    """Return the owner of every head group of a request that has ``groups`` [D] of them on the devices."""
    counts = groups.tolist()
    num = stage.heads.head_groups
    primary = None if stage.primary is None else stage.primary.device
    owners = [-1] * num
    if primary is not None:
        for group in _evenly(range(num), counts[primary], card_of(stage), {}):
            owners[group] = primary
    rest = iter([i for i, count in enumerate(counts) if i != primary for _ in range(count)])
    return [owner if owner >= 0 else next(rest) for owner in owners]


def leaving(stage: Stage, owners: Sequence[int], after: Sequence[int], source: int, target: int, num: int) -> list[int]:
    """Return ``num`` head groups that move from ``source`` to ``target``, in increasing order.

    Earlier moves lead from ``owners`` to ``after``; what they move is not moved again. Groups that leave or reach the
    primary keep its cards as even as the source's groups allow. If the source has fewer than ``num``, all are returned.
    """
    held = [group for group, owner in enumerate(owners) if owner == source == after[group]]
    cards, there = card_of(stage), dict[int, int]()
    if stage.primary is not None and stage.primary.device in (source, target):
        primary, sign = stage.primary.device, -1 if source == stage.primary.device else 1
        for group, owner in enumerate(after):
            there[cards[group]] = there.get(cards[group], 0) + sign * (owner == primary)
    return sorted(_evenly(held, num, cards, there))


def card_of(stage: Stage) -> list[int]:
    """Return, for every head group, the primary's card that computes it; the first one if there are several."""
    num = stage.heads.head_groups
    share = num // stage.primary_groups
    return [group // share for group in range(num)]


def _evenly(groups: Iterable[int], num: int, cards: Sequence[int], there: Mapping[int, int]) -> list[int]:
    """Return up to ``num`` groups, each from the card with the fewest so far, counting those already ``there``."""
    by_card: dict[int, list[int]] = {}
    for group in groups:
        by_card.setdefault(cards[group], []).append(group)
    counts, found = {card: there.get(card, 0) for card in by_card}, list[int]()
    while len(found) < num and by_card:
        card = min(by_card, key=lambda one: (counts[one], one))
        found.append(by_card[card].pop(0))
        counts[card] += 1
        if not by_card[card]:
            del by_card[card]
    return found
