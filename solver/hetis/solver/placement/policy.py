"""How much a search of an engine's family tries, as one value. The numbers are measured, not derived.

Whole counts end by nodes of the search tree, never by the clock, so that the same problem has the same plan on every
machine, busy or not. The time limit only guards: a search that reaches it keeps what it has.
"""

from __future__ import annotations

from dataclasses import dataclass

RELAXATION_TOLERANCE = 1e-7  # ratio by which replicas may be worth more than their GPUs when the relaxation ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One choice of whole counts.

    Attributes:
        columns: of every side, the columns that lose least are chosen among; most plans consist of these.
        back: replicas of each column that may be fewer than in the relaxation, see `settled`.
        nodes: limit on nodes of the search tree.
    """

    columns: int
    back: int
    nodes: int = 1000  # in fleets of 160 to 10,000 GPUs, attempts end by their gap after 1 to 700


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPolicy:
    """Limits of one search.

    Attributes:
        first: compositions of each kind that are evaluated before there are prices.
        at_once: those that are evaluated in a round, the most promising first.
        more: factor on ``at_once`` after a round that improved nothing.
        added: columns that join the relaxation in one round; more would slow down the relaxation more than they help.
        most_rounds: rounds of the relaxation; it has ended after 2 to 12 on all fleets tried.
        before_clock: compositions that are evaluated before the clock is read again.
        begins: the first attempt, before the relaxation is solved; a few columns soon give a plan.
        relaxed: the attempt at the relaxation's prices, whose plan makes the proof quick.
        attempts: those that follow if there is no proof. On 10,000 GPUs each improves on the one before; further
            ones, which only repeat the columns with more freedom, found nothing within a minute.
        explored: columns of each side that are returned for a running fleet.
        few_for_a_change: compositions up to which all of them are listed for a running fleet.
        most_listed: compositions that may all be evaluated for a proof if prices exclude hardly any.
        most_proved: columns of a proof; with more, HiGHS finds no bound within a minute.
        proof_nodes: limit on nodes of a proof, about a minute for the largest programs that it does not solve.
        most_on_nodes: columns if every replica is assigned to nodes, too.
        nodes_on_nodes: limit on nodes of the search tree in that case.
        least_s: the least time limit, whether the budget has time left or not.
    """

    first: int = 32
    at_once: int = 64
    more: int = 8
    added: int = 1000
    most_rounds: int = 100
    before_clock: int = 5000
    begins: Attempt = Attempt(columns=50, back=1, nodes=20)
    relaxed: Attempt = Attempt(columns=50, back=8, nodes=100)
    attempts: tuple[Attempt, ...] = (
        Attempt(columns=400, back=1),
        Attempt(columns=200, back=2),
        Attempt(columns=50, back=4),
        Attempt(columns=100, back=8),
        Attempt(columns=200, back=16),
        Attempt(columns=100, back=64),
    )
    explored: int = 400
    few_for_a_change: int = 500
    most_listed: int = 200_000
    most_proved: int = 20_000
    proof_nodes: int = 150_000
    most_on_nodes: int = 3000
    nodes_on_nodes: int = 10_000
    least_s: float = 0.2


POLICY = SearchPolicy()
