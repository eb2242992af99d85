"""The columns of an engine's family, listed when prices say that they matter.

At the master's prices a replica gains by its rate and costs what its GPUs are worth (`ColumnPrices`). Those that gain
join the relaxation (`list_improving`); those that lose no more than a distance may be in a better plan (`list_within`).
Compositions whose lower bound on the interval rules both out are never evaluated (`candidates.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.candidates import Candidates, candidates_of
from hetis.solver.placement.columns import Columns, first_prices
from hetis.solver.placement.constraint_rows import Pins
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.policy import POLICY, RELAXATION_TOLERANCE
from hetis.solver.placement.replicas.kinds import Kind
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template

JOINED = "joined"  # the key of what `CostTables.shared` knows of relaxations at other utilisations


@dataclass(frozen=True, slots=True)
class ColumnPrices:
    """Prices at which replicas are judged.

    ``side_prices`` [sides, rows] and ``replica_price`` are what a replica on a side costs, by its GPUs and as such;
    ``rate_prices`` [sides] are what a request/s is worth.
    """

    side_prices: FloatArray
    replica_price: float
    rate_prices: FloatArray

    def judge(self, each: Candidates, slack: float | None = None) -> tuple[FloatArray, FloatArray]:
        """Return what each composition costs, and the interval below which a replica improves the optimum; [C] each.

        With ``slack`` the interval is the one below which a replica loses at most ``slack``.
        """
        worth = each.worth(self.side_prices[each.side]) + self.replica_price
        price = self.rate_prices[each.side] * each.load
        least, gains = (
            worth * (1.0 + RELAXATION_TOLERANCE),
            worth < -RELAXATION_TOLERANCE * np.abs(worth).max(initial=0.0),
        )
        if slack is not None:
            least, gains = worth - slack, np.full(len(worth), fill_value=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return worth, np.where(least > 0.0, price / least, np.where((price > 0.0) | gains, np.inf, 0.0))


class EnumeratedColumns:
    """The columns of one problem that have been enumerated so far."""

    def __init__(self, costs: CostTables, row_costs: FloatArray, pins: Pins | None) -> None:
        self.row_costs = row_costs
        self.without_workers, self._with_workers = candidates_of(costs, pins)
        self.columns: Columns | None = None
        # Compositions that joined the relaxation at another utilisation, and those that do at this one, by candidates.
        self._before: dict[Hashable, BoolArray] = costs.shared.get(JOINED, {})
        self._joined: dict[Hashable, BoolArray] = {}
        costs.shared[JOINED] = self._joined
        self._blocks = list[tuple[int, Candidates, IntArray]]()  # the first column's number, then compositions [K]

    @cached_property
    def candidates(self) -> list[Candidates]:
        """Return all candidates; a first plan needs only those without attention workers, which are far fewer."""
        return [*self.without_workers, *self._with_workers]

    def add(self, candidates: Candidates, which: IntArray) -> None:
        """Add known replicas as columns; existing columns keep their numbers."""
        if not len(which):
            return
        more = candidates.columns(which, self.row_costs)
        self._blocks.append((self.num_columns, candidates, which))
        self.columns = more if self.columns is None else self.columns.followed_by(more)
        candidates.is_enumerated[which] = True

    @property
    def is_prepared(self) -> bool:
        """Return whether the relaxation begins with what it had at another utilisation."""
        return bool(self._before)

    def _join(self, each: Candidates, which: IntArray) -> None:
        """Add known replicas to the relaxation."""
        self.add(each, which)
        if len(which):
            self._joined.setdefault(each.key, np.zeros(len(each.fits), dtype=bool))[which] = True

    def list_first(self, costs: CostTables, budget: Budget) -> None:
        """List replicas that are worth their GPUs if a GPU is worth about its memory bandwidth.

        If the same tables were searched at another utilisation, those that joined its relaxation are listed instead.
        """
        for each in self.candidates if self._before else ():
            which = np.flatnonzero(self._before.get(each.key, np.zeros(0, dtype=bool)))
            if len(which) and not budget.is_spent():
                self._join(each, each.found_among(which, np.full(len(which), np.inf)))
        if self.columns is not None:
            return
        prices = first_prices(costs)
        for each in self.without_workers:
            if not budget.is_spent():
                ratio = each.evaluator.shortest_s * each.worth(prices + self.row_costs)
                which = np.argsort(ratio)[: POLICY.first]
                which = which[each.fits[which] & np.isfinite(ratio[which])]
                self._join(each, each.found_among(which, np.full(len(which), np.inf)))

    def list_improving(self, prices: ColumnPrices | None, budget: Budget) -> bool:
        """List replicas that improve the optimum (None: any); return whether the whole family has none."""
        at_once = POLICY.at_once if prices is not None else self.num_compositions
        while not budget.is_spent():
            found, is_whole = self._improving(prices, at_once, budget)
            if found:
                by_side: dict[int, list[FloatArray]] = {}
                for each, _, reduced in found:
                    by_side.setdefault(each.side, []).append(reduced)
                most = {side: _smallest(np.concatenate(parts), POLICY.added) for side, parts in by_side.items()}
                for each, which, reduced in found:
                    self._join(each, which[reduced <= most[each.side]])
                return False
            if is_whole:
                return True
            at_once *= POLICY.more
        return False

    def _improving(
        self, prices: ColumnPrices | None, at_once: int, budget: Budget
    ) -> tuple[list[tuple[Candidates, IntArray, FloatArray]], bool]:
        """Return replicas that improve the optimum, with their reduced costs, and whether these are all of them.

        At most ``at_once`` compositions of each candidate are evaluated, the most promising first.
        """
        found, is_whole = list[tuple[Candidates, IntArray, FloatArray]](), True
        for each in self.candidates:
            worth, needed_s = np.zeros(len(each.fits)), np.full(len(each.fits), np.inf)
            if prices is not None:
                worth, needed_s = prices.judge(each)
            which = each.worth_evaluating(needed_s)
            if len(which) > at_once:
                share = each.evaluator.shortest_s[which] / np.minimum(needed_s[which], 1e300)
                which, is_whole = which[np.argpartition(share, at_once)[:at_once]], False
            if not len(which):
                continue
            if budget.is_spent():
                return found, False
            budget.charge(len(which))
            better = each.found_among(which, needed_s[which])
            if len(better):
                price = 0.0 if prices is None else prices.rate_prices[each.side] * each.load
                found.append((each, better, worth[better] - price / each.evaluator.shortest_s[better]))
        return found, is_whole

    def list_within(self, prices: ColumnPrices, distance: float, budget: Budget) -> bool:
        """List every replica that loses at most ``distance``; return False if time ran out."""
        for each in self.candidates:
            _, needed_s = prices.judge(each, distance)
            which = each.worth_evaluating(needed_s)
            for some in np.array_split(which, len(which) // POLICY.before_clock + 1):
                if len(some) and budget.is_spent():
                    return False
                budget.charge(len(some))
                self.add(each, each.found_among(some, needed_s[some]))
        return True

    def template(self, column: int) -> Template:
        """Return the replica behind a column."""
        candidates, composition = self._behind(column)
        return candidates.template(composition)

    def has_workers(self, column: int) -> bool:
        """Return whether the replica behind a column has attention workers."""
        return self._behind(column)[0].workers is not None

    def kind(self, column: int) -> Kind:
        """Return the GPUs that the replica behind a column takes."""
        candidates, composition = self._behind(column)
        return candidates.kind(composition)

    def _behind(self, column: int) -> tuple[Candidates, int]:
        begin, candidates, which = self._blocks[bisect_right(self._blocks, column, key=itemgetter(0)) - 1]
        return candidates, int(which[column - begin])

    @property
    def num_columns(self) -> int:
        return 0 if self.columns is None else len(self.columns.rates)

    @property
    def num_compositions(self) -> int:
        return sum(len(each.fits) for each in self.candidates)


def _smallest(values: FloatArray, num: int) -> float:
    """Return the value after the ``num`` smallest, or the largest of all if there are no more."""
    return float(np.partition(values, num)[num] if len(values) > num else values.max(initial=-np.inf))
