"""The search of an engine's family: columns where prices ask for them, then whole counts of all that may matter.

At the relaxation's prices only those replicas join it that improve it (`candidates.py`), until none does. Then its
value bounds every plan of the family; and a replica whose rate is worth less than its GPUs by more than what lies
between bound and incumbent is in no better plan (reduced-cost fixing), so that whole counts over the others are the
best of the family, and HiGHS's bound on them is one on all.

A replica improves the relaxation where its rate at the rate's price is worth more than its GPUs. Where that stops at a
share of ``1 + ALIKE`` too much, GPUs dearer by this share prove the bound: it is wider by so much.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.candidates import Candidates, candidates_of
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.master import UNDECIDED, Columns, LpSolution, Master, MilpSolution, padded, settled
from hetis.solver.placement.nodes import Kind, NodeProgram, counts_of_kinds, shared_places
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.outcome import Outcome, relative_gap, sound_bound
from hetis.solver.placement.pipelines import least_nodes
from hetis.solver.placement.pool import Bound, first_prices
from hetis.solver.placement.tables import Atlas, BoolArray, FloatArray
from hetis.solver.placement.template import Template

ALIKE = 1e-7  # share by which replicas may be worth more than their GPUs when the relaxation ends
FIRST, AT_ONCE = 32, 64  # compositions of each kind that are evaluated before there are prices, and at a time
MORE = 8  # times as many where those improved nothing
ADDED = 1000  # columns that join the relaxation at a time
MOST_ROUNDS = 100
MORE_TIME = 1.5  # times as long for every further try
QUICK_S, LEAST_S = 2.0, 0.2  # for whole counts of the likeliest columns, before all of them; the least, time or not
# Columns of every side that lose least at the relaxation's prices: most plans are made of these. Few are soon good.
LIKELY, MANY_LIKELY = 50, 400
SIMPLE, SIMPLER_S = 200, 10.0  # likeliest columns of each side, and the longest search, for fewer nodes
MOST_LOST = 0.5  # of what its GPUs are worth, by a replica on few nodes
MOST_ON_NODES, MOST_ON_NODES_S = 3000, 30.0  # columns, and the longest search, where nodes are part of it
MOST_PROVED = 20_000  # columns: with more HiGHS comes to no bound in a minute
FEW = 200_000  # compositions: so many may all be evaluated where prices rule hardly any out, until time is over


@dataclass(frozen=True, slots=True)
class Listed:
    """Columns of some candidates: the compositions [K] behind them, and the number of the first."""

    candidates: Candidates
    compositions: IntArray
    begin: int


class Listing:
    """The columns of one problem, as far as they are listed."""

    def __init__(self, atlas: Atlas, row_costs: FloatArray) -> None:
        self.row_costs = row_costs
        self.without_workers, self._with_workers = candidates_of(atlas)
        self.columns: Columns | None = None
        self._listed = list[Listed]()

    @cached_property
    def candidates(self) -> list[Candidates]:
        """All of them; a first plan is made without those with attention workers, which are most."""
        return [*self.without_workers, *self._with_workers]

    def add(self, candidates: Candidates, which: IntArray) -> None:
        """Known replicas become columns; those before keep their numbers."""
        more = candidates.columns(which, self.row_costs)
        begin = 0 if self.columns is None else len(self.columns.rates)
        self.columns = more if self.columns is None else self.columns.followed_by(more)
        self._listed.append(Listed(candidates, which, begin))
        candidates.is_listed[which] = True

    def template(self, column: int) -> Template:
        """The replica behind a column."""
        listed = self._listed_at(column)
        return listed.candidates.template(int(listed.compositions[column - listed.begin]))

    def kind(self, column: int) -> Kind:
        """The GPUs that the replica behind a column takes."""
        listed = self._listed_at(column)
        return listed.candidates.kind(int(listed.compositions[column - listed.begin]))

    def _listed_at(self, column: int) -> Listed:
        begins = [listed.begin for listed in self._listed]
        return self._listed[int(np.searchsorted(begins, column, side="right")) - 1]

    @property
    def num_columns(self) -> int:
        return 0 if self.columns is None else len(self.columns.rates)

    @property
    def num_compositions(self) -> int:
        return sum(len(each.fits) for each in self.candidates)


def search_listing(
    atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, gap_target: float, seed: int,
    report: Report, simplest_within: float = 0.0,
) -> Outcome | None:  # fmt: skip
    """The best plan of an engine's family, with a bound; None: it has none.

    With ``simplest_within``, of the plans that lose no more than this share of it the one whose replicas are on the
    fewest nodes, then of the fewest shapes, as far as they are found; the bound stays that on the best.

    Raises:
        InvalidProblemError: the family is too large to list, or the model may not be cut everywhere.
        NoPlanFoundError: none was found in time, nor proved that there is none.
    """
    searching = _Search(atlas, master, row_costs, budget, gap_target, seed, report)
    best = searching.run()
    return best if best is None or not simplest_within else searching.simpler(best, simplest_within)


@dataclass(frozen=True, slots=True)
class Explored:
    """What a search knows beside its plan: replicas that are likely in good plans, and what proves the bound.

    ``prices`` are dual feasible: no replica of the family is worth more than its GPUs; None: not known in time.
    """

    templates: tuple[Template, ...]
    value: float | None
    prices: Bound | None
    is_empty: bool


def explore_listing(
    atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, gap_target: float, seed: int, report: Report
) -> Explored:
    """Replicas to choose from where some run already, with the relaxation's prices; raises as `search_listing`."""
    return _Search(atlas, master, row_costs, budget, gap_target, seed, report).explored()


class _Search:
    """One search."""

    def __init__(
        self, atlas: Atlas, master: Master, row_costs: FloatArray, budget: Budget, gap_target: float, seed: int,
        report: Report,
    ) -> None:  # fmt: skip
        if atlas.problem.model.forbidden_cuts:
            raise InvalidProblemError(
                f"{atlas.problem.model.name} has forbidden cuts, which the search of an engine's plans does not know; "
                "ask for any engine"
            )
        self.atlas, self.master, self.row_costs = atlas, master, row_costs
        self.budget, self.report, self.gap_target, self.seed = budget, report, gap_target, seed
        self.listing = Listing(atlas, row_costs)
        self.bound = rate_bound(atlas) if master.maximises else 0.0  # of dense work alone, until more is known
        self.is_complete = False  # the bound is of the relaxation over the whole family
        self.is_impossible = False  # no whole counts of the replicas of the family meet the demand
        self.incumbent: MilpSolution | None = None
        self.relaxed: LpSolution | None = None

    def run(self) -> Outcome | None:
        """The best plan."""
        engine = self.atlas.problem.family.engine
        self._relax()
        if engine is not None and engine.max_nodes is not None:
            self._keep_to_nodes(engine.max_nodes)
        elif not (self.is_complete and self._prove()):
            self._choose(MANY_LIKELY, QUICK_S)
            self._go_on()
        return self._outcome()

    def explored(self) -> Explored:
        """The same without a proof over whole counts."""
        self._relax()
        self._choose(MANY_LIKELY, QUICK_S)
        if self.relaxed is None:
            return Explored((), None, None, is_empty=self.is_complete)
        chosen = np.flatnonzero(self._likeliest(MANY_LIKELY))
        if self.incumbent is not None:
            chosen = np.union1d(chosen, np.flatnonzero(self.incumbent.counts))
        lp, dearer = self.relaxed, 1.0 + ALIKE
        prices = Bound(self.bound, lp.row_prices * dearer, lp.link_prices * dearer, lp.rate_prices)
        value = None if self.incumbent is None else self.incumbent.value
        return Explored(
            templates=tuple(self.listing.template(int(i)) for i in chosen),
            value=value,
            prices=prices if self.is_complete else None,
            is_empty=False,
        )

    # --- relaxation

    def _relax(self) -> None:
        """Solves the relaxation over all replicas of the family, and whole counts of the likeliest.

        Raises:
            NoPlanFoundError: there was no time for any.
        """
        self._list_first()
        for number in range(MOST_ROUNDS):
            lp = self._solve_relaxation()
            if number == 0:
                self._round_down()
                self._choose(LIKELY, LEAST_S)
            if self.budget.is_spent():
                break
            if self._list_improving(lp):
                self._set_bound()
                break
        if self.listing.columns is None and not self.is_complete:
            raise NoPlanFoundError(f"no plan found within {self.budget.elapsed_s():.1f} s; allow more time")
        self._round_down()
        self._choose(LIKELY, QUICK_S, back=8)

    def _solve_relaxation(self) -> LpSolution | None:
        """Over the columns listed, which it leaves in ``relaxed``; where they do not meet the demand, their most."""
        columns, master = self.listing.columns, self.master
        if columns is None:
            return None
        self.relaxed = master.solve_lp(columns)
        if self.relaxed is None and not master.maximises:
            return replace(master, demand=None).solve_lp(columns)
        return self.relaxed

    def _list_first(self) -> None:
        """Replicas that are worth their GPUs if a GPU is worth about its memory bandwidth."""
        prices = first_prices(self.atlas)
        for each in self.listing.without_workers:
            if not self.budget.is_spent():
                ratio = each.evaluator.shortest_s * each.worth(prices + self.row_costs)
                which = np.argsort(ratio)[:FIRST]
                which = which[each.fits[which] & np.isfinite(ratio[which])]
                self._add(each, each.found_among(which, np.full(len(which), np.inf)))

    def _list_improving(self, lp: LpSolution | None) -> bool:
        """Lists replicas that improve the relaxation; returns whether there is none in the whole family."""
        at_once = AT_ONCE if lp is not None else self.listing.num_compositions
        while not self.budget.is_spent():
            found, is_whole = self._improving(lp, at_once)
            if found:
                by_side: dict[int, list[FloatArray]] = {}
                for each, _, reduced in found:
                    by_side.setdefault(each.side, []).append(reduced)
                most = {side: _smallest(np.concatenate(parts), ADDED) for side, parts in by_side.items()}
                for each, which, reduced in found:
                    self._add(each, which[reduced <= most[each.side]])
                return False
            if is_whole:
                return True
            at_once *= MORE
        return False

    def _improving(
        self, lp: LpSolution | None, at_once: int
    ) -> tuple[list[tuple[Candidates, IntArray, FloatArray]], bool]:
        """Replicas that improve the relaxation, with what they lose, and whether these are all.

        So many of each candidates are evaluated: those that promise most.
        """
        found, is_whole = list[tuple[Candidates, IntArray, FloatArray]](), True
        for each, worth, needed_s in self._needed_s(lp):
            which = each.asked(needed_s)
            if len(which) > at_once:
                share = each.evaluator.shortest_s[which] / np.minimum(needed_s[which], 1e300)
                which, is_whole = which[np.argpartition(share, at_once)[:at_once]], False
            if not len(which):
                continue
            if self.budget.is_spent():
                return found, False
            better = each.found_among(which, needed_s[which])
            if len(better):
                price = 0.0 if lp is None else lp.rate_prices[each.side]
                found.append((each, better, worth[better] - price / each.evaluator.shortest_s[better]))
        return found, is_whole

    def _needed_s(
        self, lp: LpSolution | None, slack: float | None = None
    ) -> Iterator[tuple[Candidates, FloatArray, FloatArray]]:
        """Yield all candidates, what their GPUs are worth, and below which interval a replica improves the relaxation.

        With ``slack`` that below which it loses no more than this. Without prices any replica may be wanted.
        """
        for each in self.listing.candidates:
            if lp is None:
                yield each, np.zeros(len(each.fits)), np.full(len(each.fits), np.inf)
                continue
            is_for_cost = not self.master.maximises and self.relaxed is not None
            worth = each.worth(lp.row_prices + (self.row_costs if is_for_cost else 0.0))
            price = lp.rate_prices[each.side]
            least, otherwise = (worth * (1.0 + ALIKE), price > 0.0) if slack is None else (worth - slack, True)
            with np.errstate(divide="ignore", invalid="ignore"):
                yield each, worth, np.where(least > 0.0, price / least, np.inf if otherwise else 0.0)

    def _add(self, candidates: Candidates, which: IntArray) -> None:
        if len(which):
            self.listing.add(candidates, which)

    def _set_bound(self) -> None:
        self.is_complete, lp = True, self.relaxed
        if lp is None:
            self.bound = 0.0 if self.master.maximises else np.inf
        elif self.master.demand is None:
            self.bound = min(self.bound, lp.value * (1.0 + ALIKE))
        else:
            self.bound = max(0.0, lp.value - ALIKE * self.master.demand * lp.demand_price)
        self._tell("relaxation")

    # --- whole counts

    def _choose(self, num: int, limit_s: float, *, back: int = 1) -> None:
        """Whole counts of so many of the likeliest columns of each side; ``back``: see `settled`."""
        if self.relaxed is None or self._gap() <= self.gap_target:
            return
        if self.incumbent is None or not self.budget.is_spent():
            self._solve(self._likeliest(num), limit_s, back=back)

    def _go_on(self) -> None:
        """Looks for better whole counts while time is left: other columns, more of the relaxation given up."""
        limit_s, back = QUICK_S, 1
        for num in itertools.cycle((4 * LIKELY, LIKELY, 2 * LIKELY)):
            if self._gap() <= self.gap_target or self.budget.is_spent() or not np.isfinite(self.budget.remaining_s()):
                return
            limit_s, back = MORE_TIME * limit_s, 2 * back
            self._choose(num, min(limit_s, self.budget.remaining_s()), back=back)

    def _reduced(self, lp: LpSolution, columns: Columns) -> FloatArray:
        """What a replica's GPUs are worth beyond its rate: how much a plan that holds it loses at least."""
        worth = columns.uses @ lp.row_prices + (0.0 if self.master.maximises else columns.costs)
        return np.asarray(worth - lp.rate_prices[columns.sides] * columns.rates)

    def _within(self, distance: float) -> BoolArray:
        """Columns that lose no more than that: better plans are made of no others."""
        columns = self.listing.columns
        assert self.relaxed is not None, "prices say what is lost"
        assert columns is not None, "prices are those of columns"
        return np.asarray(self._reduced(self.relaxed, columns) <= distance * (1.0 + ALIKE))

    def _likeliest(self, num: int) -> BoolArray:
        """So many columns of every side that lose least, and those of the relaxation."""
        columns = self.listing.columns
        assert self.relaxed is not None, "prices say which are likely"
        assert columns is not None, "prices are those of columns"
        inside = padded(self.relaxed.counts, len(columns.rates)) > 0.0
        reduced = self._reduced(self.relaxed, columns)
        for side in np.unique(columns.sides):
            here = np.flatnonzero(columns.sides == side)
            inside[here[np.argsort(reduced[here])[:num]]] = True
        return np.asarray(inside)

    def _round_down(self) -> None:
        """A plan where no time is left for a better one."""
        columns = self.listing.columns
        if columns is not None and self.relaxed is not None and self.master.maximises and self.master.pins is None:
            found = self.master.rounded_down(columns, padded(self.relaxed.counts, len(columns.rates)))
            if found.value > 0.0 and self.master.prefers(found.value, self.incumbent):
                is_first, self.incumbent = self.incumbent is None, found
                if is_first:
                    self._tell("rounding")

    def _prove(self) -> bool:
        """Whole counts over every column that may be part of a better plan: HiGHS's bound is one on the family.

        Returns whether that was tried: not where hardly any column is ruled out, or no time is left.
        """
        if self.relaxed is None or self._gap() <= self.gap_target:
            return True
        distance = np.inf if self.incumbent is None else abs(self.bound - self.incumbent.value)
        is_telling = distance * float(self.relaxed.counts.sum()) <= abs(self.bound)  # less than a replica is worth
        may_take_long = self.listing.num_compositions <= FEW and (
            self.incumbent is None or np.isfinite(self.budget.remaining_s())
        )
        if not (is_telling or may_take_long) or not self._list_within(distance) or self.budget.is_spent():
            return False
        worthwhile = self._within(distance)
        if worthwhile.sum() > MOST_PROVED:
            return False
        bound = self._solve(worthwhile, self.budget.remaining_s(), proves=True)
        if bound is not None:
            self._tighten(bound)
        self._tell("whole counts")
        return True

    def _list_within(self, distance: float) -> bool:
        """Lists every replica that loses no more than that; False: no time was left."""
        for each, _, needed_s in self._needed_s(self.relaxed, slack=distance * (1.0 + ALIKE)):
            which = each.asked(needed_s)
            if len(which):
                if self.budget.is_spent():
                    return False
                self._add(each, each.found_among(which, needed_s[which]))
        return True

    def _solve(self, which: BoolArray, limit_s: float, *, proves: bool = False, back: int = 1) -> float | None:
        """Whole counts of some columns, never worse than the incumbent; returns HiGHS's bound on them."""
        columns, num = self.listing.columns, len(which)
        chosen = np.flatnonzero(which)
        if columns is None or not len(chosen):
            return None
        if self.master.pins is None:
            chosen = chosen[columns.some(chosen).undominated()]
        start = None
        if self.incumbent is not None:
            inside = padded(self.incumbent.counts, num)
            chosen = np.union1d(chosen, np.flatnonzero(inside))
            start = replace(self.incumbent, counts=inside[chosen])
        least = None
        if not proves and self.relaxed is not None and self.master.pins is None:
            (least,) = settled([padded(self.relaxed.counts, num)[chosen]], back=back) or (None,)
            if least is not None and start is not None and np.any(start.counts < least):
                start = None
        found, is_settled = self.master.attempt(
            columns.some(chosen), time_limit_s=max(LEAST_S, limit_s),
            gap=self.gap_target / (1 if proves else 10), seed=self.seed, start=start, least=least,
            presolves=self.master.pins is not None, stop=self._is_over(limit_s),
        )  # fmt: skip
        if proves and not self.master.serves(found):  # every replica of the family was there to choose from
            self.is_impossible = is_settled and self.incumbent is None
        if found is None:
            return None
        self._adopt_if_better(found, chosen)
        return found.bound

    # --- whole counts that nodes have room for, where a replica may lie on few

    def _keep_to_nodes(self, most_nodes: int) -> None:
        """Chooses whole counts again, of replicas that nodes have room for on so few of them.

        What was chosen before kept to that only one replica at a time, and so does the relaxation, whose bound holds.
        Columns within the distance of the two are all that better plans are made of: HiGHS's bound is one on these.

        Raises:
            NoPlanFoundError: no such choice was found.
        """
        if self.relaxed is None:
            return
        self.incumbent = None
        self._solve_on_nodes(self._likeliest(MANY_LIKELY), most_nodes)
        if self.incumbent is None:
            self._solve_on_nodes(self._likeliest(MOST_ON_NODES), most_nodes)
        if self.incumbent is None:
            raise NoPlanFoundError(
                f"no plan was found with replicas on at most {most_nodes} nodes each, nor proved that there is none"
            )
        distance = abs(self.bound - self.incumbent.value)
        is_tellable = self.is_complete and self.listing.num_compositions <= FEW and self._gap() > self.gap_target
        if not is_tellable or self.budget.is_spent() or not self._list_within(distance):
            return
        worthwhile = self._within(distance)
        if worthwhile.sum() <= MOST_ON_NODES:
            bound = self._solve_on_nodes(worthwhile, most_nodes)
            if bound is not None:
                self._tighten(bound)
                self._tell("whole counts")

    # --- plans on fewer nodes that lose little

    def simpler(self, best: Outcome, share: float) -> Outcome:
        """Return the plan on the fewest nodes that is found among those that lose at most that share of the best."""
        if self.incumbent is None or self.relaxed is None:
            return best
        self._list_of_few_nodes(min(2.0 * share, MOST_LOST))
        columns, num = self.listing.columns, self.listing.num_columns
        assert columns is not None, "the incumbent has columns"
        chosen = np.flatnonzero(self._likeliest(SIMPLE) | (padded(self.incumbent.counts, num) > 0))
        engine, value = self.atlas.problem.family.engine, self.incumbent.value
        kinds, of_columns = counts_of_kinds([self.listing.kind(int(i)) for i in chosen])
        program = NodeProgram.of(self.atlas.classes, kinds, None if engine is None else engine.max_nodes)
        if program is None:
            return best
        least = value * (1.0 - share) if self.master.maximises else value * (1.0 + share)
        limit_s = min(SIMPLER_S, max(QUICK_S, self.budget.remaining_s()))
        found, _ = self.master.attempt(
            columns.some(chosen), time_limit_s=limit_s, gap=0.0, seed=self.seed,
            extend=lambda highs: program.simplify(highs, of_columns.tolist(), least), stop=self._is_over(limit_s),
        )  # fmt: skip
        if found is None:
            return best
        self._adopt(found, chosen, "simpler plans")
        return replace(self._outcome() or best, best=best)

    def _list_of_few_nodes(self, share: float) -> None:
        """Lists replicas that lose no more than a share of what their GPUs are worth, those on few nodes first."""
        places = shared_places(self.atlas.classes)
        for each, worth, _ in self._needed_s(self.relaxed):
            assert self.relaxed is not None, "its prices say what is lost"
            with np.errstate(divide="ignore", invalid="ignore"):
                needed_s = self.relaxed.rate_prices[each.side] / (worth * (1.0 - share))
            which = each.asked(needed_s)
            nodes = least_nodes(self.atlas, each.shape, each.workers, places)[which]
            ratio = each.evaluator.shortest_s[which] / np.minimum(needed_s[which], 1e300)
            which = which[np.lexsort((ratio, nodes))[:AT_ONCE]]
            if len(which) and not self.budget.is_spent():
                self._add(each, each.found_among(which, needed_s[which]))

    def _solve_on_nodes(self, which: BoolArray, most_nodes: int) -> float | None:
        """The best whole counts of some columns that nodes have room for; HiGHS's bound, if it is one on them all."""
        columns = self.listing.columns
        assert columns is not None, "prices are those of columns"
        chosen = np.flatnonzero(which)
        kinds, of_columns = counts_of_kinds([self.listing.kind(int(i)) for i in chosen])
        program = NodeProgram.of(self.atlas.classes, kinds, most_nodes)
        if program is None:
            return None
        limit_s = min(MOST_ON_NODES_S, max(QUICK_S, self.budget.remaining_s()))
        found, _ = self.master.attempt(
            columns.some(chosen), time_limit_s=limit_s, gap=self.gap_target / 2, seed=self.seed,
            extend=lambda highs: program.extend(highs, of_columns.tolist()), stop=self._is_over(limit_s),
        )  # fmt: skip
        if found is None:
            return None
        self._adopt_if_better(found, chosen)
        return found.bound if program.is_whole else None

    def _adopt_if_better(self, found: MilpSolution, chosen: IntArray) -> None:
        if self.master.serves(found) and self.master.prefers(found.value, self.incumbent):
            self._adopt(found, chosen, "whole counts")

    def _adopt(self, found: MilpSolution, chosen: IntArray, phase: str) -> None:
        """Makes whole counts of the columns chosen the incumbent."""
        counts = np.zeros(self.listing.num_columns, dtype=np.int64)
        counts[chosen] = found.counts
        self.incumbent = replace(found, counts=counts)
        self._tell(phase)

    def _tighten(self, bound: float) -> None:
        self.bound = min(self.bound, bound) if self.master.maximises else max(self.bound, bound)

    def _is_over(self, limit_s: float) -> Callable[[], bool]:
        """Whether so much time has gone by, by the budget's clock, or the caller gave up."""
        end_s = self.budget.elapsed_s() + max(LEAST_S, limit_s)
        return lambda: self.budget.cancelled.is_set() or self.budget.elapsed_s() >= end_s

    def _gap(self) -> float:
        return relative_gap(self.incumbent, self.bound) if self.is_complete else np.inf

    def _tell(self, phase: str) -> None:
        known = np.isfinite(self.bound) and (self.is_complete or self.master.maximises)
        self.report(
            Progress(
                phase=phase,
                elapsed_s=self.budget.elapsed_s(),
                incumbent=None if self.incumbent is None else self.incumbent.value,
                bound=self.bound if known else None,
                gap=relative_gap(self.incumbent, self.bound) if known and self.incumbent is not None else None,
            )
        )

    def _outcome(self) -> Outcome | None:
        columns = self.listing.columns
        if self.incumbent is None or self.relaxed is None or columns is None:
            serves_nothing = self.relaxed is None or (self.master.maximises and self.relaxed.value <= 0.0)
            if self.master.pins is None and (self.is_impossible or (self.is_complete and serves_nothing)):
                return None
            raise NoPlanFoundError(UNDECIDED)
        counts = padded(self.incumbent.counts, len(columns.rates))
        reduced = self._reduced(self.relaxed, columns)
        others = [int(i) for i in np.argsort(reduced)[: 5 + int((counts > 0).sum())] if not counts[i]][:5]
        value = self.incumbent.value
        return Outcome(
            chosen=tuple((self.listing.template(int(i)), int(counts[i])) for i in np.flatnonzero(counts)),
            value=value,
            bound=sound_bound(self.bound, value, maximises=self.master.maximises) if self.is_complete else self.bound,
            row_prices=self.relaxed.row_prices,
            rate_prices=self.relaxed.rate_prices,
            flows=self.incumbent.flows,
            runners_up=tuple(map(self.listing.template, others)),
            interrupted=self.budget.cancelled.is_set(),
        )


def _smallest(values: FloatArray, num: int) -> float:
    """The last of so many that are smallest, or the largest of all."""
    return float(np.partition(values, num)[num] if len(values) > num else values.max(initial=-np.inf))
