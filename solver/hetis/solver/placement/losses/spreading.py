"""Exchanges of replicas between nodes of a class, after which the loss of any one node takes less.

The assignment of GPUs to a plan's replicas is free within a class: which node holds which of them changes neither rates
nor latencies, as long as no replica spans more nodes than before. What is left after a loss does change, because a node
that holds a part of every prefill replica takes all of them with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hetis.solver.plan import Role

_LEAST_GAIN = 1e-9  # share of the whole rate: less is an error of rounding


class Piece(NamedTuple):
    """What a replica has in one node: numbers of its parts, which together have so many GPUs."""

    size: int
    parts: tuple[int, ...]


@dataclass(slots=True)
class ClassNode:
    """What one node of a class holds: a piece of every replica that is there, and GPUs of none."""

    free: int
    pieces: dict[int, Piece] = field(default_factory=dict)

    def exchanged(self, given: Collection[int], taken: ClassNode, received: Collection[int]) -> ClassNode | None:
        """Return the node after it gave replicas to the node ``taken`` for those received; None if there is no room."""
        free = self.free + sum(self.pieces[r].size for r in given) - sum(taken.pieces[r].size for r in received)
        if free < 0:
            return None
        kept = {replica: piece for replica, piece in self.pieces.items() if replica not in given}
        return ClassNode(free, kept | {replica: taken.pieces[replica] for replica in received})


class Rates:
    """The saturated rates [R] of a plan's replicas in requests/s, their roles, and the classes that they serve.

    The rate of a replica for some of the ``classes`` is that over their share of the requests.
    """

    def __init__(
        self, rates: Sequence[float], roles: Sequence[Role], ranges: Sequence[tuple[str, ...]] = (),
        classes: Sequence[str] = ("",),
    ) -> None:  # fmt: skip
        self.rates, self.roles, self.classes = rates, roles, classes
        self.ranges = ranges or [()] * len(rates)
        self._whole = self._by_pool(range(len(rates)))

    def left_without(self, lost: Collection[int]) -> float:
        """Return the rate of unified replicas, and of prefill and decode replicas together, without the lost ones.

        With classes, it is that of the class that has the least.
        """
        left, gone = dict(self._whole), self._by_pool(lost)
        for pool, rate in gone.items():
            left[pool] -= rate
        served = dict.fromkeys(self.classes, 0.0)
        for names in dict.fromkeys(self.ranges):
            unified, prefill, decode = (
                left.get((names, role), 0.0) for role in (Role.UNIFIED, Role.PREFILL, Role.DECODE)
            )
            for name in names or self.classes:
                served[name] += unified + min(prefill, decode)
        return min(served.values())

    def _by_pool(self, replicas: Collection[int]) -> dict[tuple[tuple[str, ...], Role], float]:
        found = defaultdict[tuple[tuple[str, ...], Role], float](float)
        for replica in replicas:
            found[self.ranges[replica], self.roles[replica]] += self.rates[replica]
        return found


def spread_out(nodes: Sequence[ClassNode], rates: Rates) -> list[ClassNode]:
    """Return the nodes of a class after exchanges of replicas between them, by which most is left after the worst loss.

    As long as the node whose loss leaves least can exchange replicas with another such that the loss of either leaves
    more, it makes the best such exchange. So the losses, in order, improve with every step, and the steps end.
    """
    found, least = list(nodes), _LEAST_GAIN * rates.left_without(())
    left = [rates.left_without(node.pieces) for node in found]
    while True:
        worst = min(range(len(found)), key=lambda v: (left[v], v))
        best, after = left[worst] + least, None
        for other in _partners(found, worst, rates):
            for given, received in _exchanges(found[worst], found[other], rates):
                mine = found[worst].exchanged(given, found[other], received)
                its = found[other].exchanged(received, found[worst], given)
                if mine is None or its is None:
                    continue
                both = rates.left_without(mine.pieces), rates.left_without(its.pieces)
                if min(both) > best:
                    best, after = min(both), (other, mine, its, both)
        if after is None:
            return found
        other, found[worst], found[other], (left[worst], left[other]) = after


def _partners(nodes: Sequence[ClassNode], worst: int, rates: Rates) -> Iterator[int]:
    """Yield the nodes that share no replica with the worst one, of those that hold alike replicas the first."""
    seen = set[tuple[object, ...]]()
    for number, node in enumerate(nodes):
        pieces = node.pieces.items()
        alike = node.free, *sorted((rates.ranges[r], rates.roles[r], rates.rates[r], p.size) for r, p in pieces)
        if number != worst and alike not in seen and not nodes[worst].pieces.keys() & node.pieces.keys():
            seen.add(alike)
            yield number


def _exchanges(one: ClassNode, other: ClassNode, rates: Rates) -> Iterator[tuple[list[int], list[int]]]:
    """Yield replicas that one node gives, and receives: one on either side for as few of the other as make room."""
    greatest = sorted(one.pieces, key=lambda r: (-rates.rates[r], r))
    smallest = sorted(other.pieces, key=lambda r: (rates.rates[r], r))
    for replica in greatest:
        yield [replica], _enough(smallest, other, one.pieces[replica].size - other.free)
    for replica in smallest:
        yield _enough(greatest, one, other.pieces[replica].size - one.free), [replica]


def _enough(replicas: Sequence[int], node: ClassNode, size: int) -> list[int]:
    """Return the first replicas whose GPUs in a node are at least ``size``, or all of them."""
    chosen = list[int]()
    for replica in replicas:
        if size <= 0:
            break
        size -= node.pieces[replica].size
        chosen.append(replica)
    return chosen
