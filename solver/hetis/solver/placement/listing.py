"""The search of an engine's family: all its pipelines are columns of the master, and whole counts of them are proved.

`pipelines.py` lists the best replica of every composition. Those without attention workers are few and all there from
the start. Those with workers are many, and hardly any of them is worth its cards: at the relaxation's prices only
those are listed that improve it, until none does. Then the relaxation's value bounds every plan of the family; and a
replica whose rate is worth less than its GPUs by more than what lies between bound and incumbent is in no better plan
(reduced-cost fixing), so that whole counts over the others are the best of the family, and HiGHS's bound is one on all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.master import UNDECIDED, Columns, LpSolution, Master, MilpSolution, settled
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.pipelines import (
    Settings,
    Shape,
    StageTimes,
    Workers,
    best_splits,
    settings_of,
    shapes_of,
    shortest_with,
    stage_times,
    template_of_pipeline,
    workers_of,
)
from hetis.solver.placement.pool import NO_LINKS, Bound
from hetis.solver.placement.routes import UNIFIED
from hetis.solver.placement.tables import Atlas, BoolArray, FloatArray
from hetis.solver.placement.template import Template

ALIKE = 1e-7  # share of the relaxation's value that prices may be wrong by
SIFTED, ADDED = 3000, 1000  # columns that the relaxation begins with, and that join it at a time
QUICK_S, LEAST_S = 2.0, 0.2  # for whole counts of the likeliest columns, before all of them; the least, time or not
LIKELY = 400  # columns of every side that lose least at the relaxation's prices: most plans are made of these
MOST_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Block:
    """Replicas of a shape on one side, the best of each composition: intervals [C], and what `best_splits` found."""

    shape: Shape
    side: int
    workers: Workers | None
    counts: IntArray
    interval_s: FloatArray
    found: IntArray


class Listing:
    """The columns of one problem, as far as they are listed."""

    def __init__(self, atlas: Atlas, row_costs: FloatArray, shapes: Sequence[Shape], budget: Budget) -> None:
        self.atlas, self.row_costs, self.shapes, self.budget = atlas, row_costs, shapes, budget
        self.blocks = list[Block]()
        self.columns = self._columns_of([])
        self._begins: IntArray = np.zeros(1, dtype=np.int64)

    def add(self, blocks: Sequence[Block]) -> None:
        """Appends columns; those before keep their numbers."""
        self.blocks += blocks
        more = self._columns_of(blocks)
        self.columns = Columns(
            *(np.concatenate([getattr(self.columns, name), getattr(more, name)]) for name in _FIELDS)
        )
        self._begins = np.cumsum([0, *(len(block.counts) for block in self.blocks)])

    def template(self, column: int) -> Template:
        """The replica behind a column."""
        number = int(np.searchsorted(self._begins, column, side="right")) - 1
        block, c = self.blocks[number], column - int(self._begins[number])
        return template_of_pipeline(self.atlas, block.shape, block.counts[c], block.found[c], block.workers)

    def _columns_of(self, blocks: Sequence[Block]) -> Columns:
        atlas, num_rows = self.atlas, len(self.atlas.resources.rows)
        uses = np.concatenate([np.zeros((0, num_rows), dtype=np.int64), *map(self._uses, blocks)])
        links = np.zeros_like(atlas.routes.capacity) if atlas.routes.has_links else NO_LINKS
        return Columns(
            rates=1.0 / np.concatenate([np.zeros(0), *(block.interval_s for block in blocks)]),
            costs=uses @ self.row_costs,
            uses=uses,
            sides=np.concatenate(
                [np.zeros(0, np.int64), *(np.full(len(block.counts), block.side) for block in blocks)]
            ),
            links=np.broadcast_to(links, (len(uses), *links.shape)),
        )

    def _uses(self, block: Block) -> IntArray:
        return self._use(block.shape, block.counts, block.workers)

    def _use(self, shape: Shape, counts: IntArray, workers: Workers | None) -> IntArray:
        use = counts @ self.atlas.group_use[shape.ranks]
        if workers is not None:
            cards = shape.depth * self.atlas.pool_sizes[workers.size]
            use = use + cards * self.atlas.card_use[workers.device_class]
        return np.asarray(use)

    # --- listing

    def plain(self) -> list[Block] | None:
        """Replicas without attention workers, the best of every composition; None: no time was left."""
        found, done = list[Block](), dict[tuple[bytes, ...], tuple[FloatArray, IntArray]]()
        for shape in self.shapes:
            for side, mixes in self._mixes(shape.scope).items():
                if self.budget.is_spent():
                    return None
                settings = settings_of(self.atlas, shape.depth, mixes, np.zeros(1, dtype=np.int64))
                times = stage_times(self.atlas, shape, settings, None)
                # Zones are often alike: what is the same work is done once.
                t_cap = self.atlas.scopes[shape.scope].tables.t_cap[mixes, shape.in_flight_index]
                work = tuple(values.tobytes() for values in (shape.counts, mixes, t_cap, *times))
                if work not in done:
                    best_s = np.full(len(shape.counts), np.inf)
                    best = np.full((len(shape.counts), 4), -1, dtype=np.int64)
                    self._split(shape, settings, times, best_s, best)
                    done[work] = best_s, best
                found += _block(shape, side, None, *done[work])
        return found

    def with_workers(self, needed_s: Callable[[IntArray, FloatArray], FloatArray]) -> list[Block] | None:
        """Replicas with attention workers whose interval is shorter than ``needed_s(uses, costs)``; None: no time."""
        found = list[Block]()
        for shape in self.shapes:
            every = list(workers_of(self.atlas, shape))
            mixes = self._mixes(shape.scope).get(UNIFIED, np.zeros(0, dtype=np.int64))
            groups = int(self.atlas.scopes[shape.scope].tables.rank_groups[shape.ranks].min())
            settings = settings_of(self.atlas, shape.depth, mixes, np.arange(1, groups + 1))
            for alike in itertools.groupby(every, lambda workers: workers.device_class) if len(mixes) else ():
                by_size = list(alike[1])
                # As quick as with the most cards, at the price of the fewest: hardly any composition is.
                quickest_s = shortest_with(self.atlas, shape, mixes, by_size[-1])
                if not np.any(quickest_s < self._needed(shape, by_size[0], needed_s)):
                    continue
                for workers in by_size:
                    if self.budget.is_spent():
                        return None
                    best_s = self._needed(shape, workers, needed_s)
                    if np.any(shortest_with(self.atlas, shape, mixes, workers) < best_s):
                        best = np.full((len(shape.counts), 4), -1, dtype=np.int64)
                        times = stage_times(self.atlas, shape, settings, workers)
                        self._split(shape, settings, times, best_s, best)
                        found += _block(shape, UNIFIED, workers, best_s, best)
        return found

    def _needed(
        self, shape: Shape, workers: Workers, needed_s: Callable[[IntArray, FloatArray], FloatArray]
    ) -> FloatArray:
        """The interval that each composition must beat; 0 where the fleet has no room for it."""
        uses = self._use(shape, shape.counts, workers)
        fits = np.all(uses <= self.atlas.resources.limits, axis=1)
        return np.where(fits, needed_s(uses, uses @ self.row_costs), 0.0)

    def _split(self, shape: Shape, settings: Settings, times: StageTimes, best_s: FloatArray, best: IntArray) -> None:
        """Improves the best of every composition with settings that may be better, the most promising first."""
        t = self.atlas.scopes[shape.scope].tables
        shortest_s = times.shortest_s(t.num_layers, shape.counts)
        longest_s = t.t_cap[settings.mixes, shape.in_flight_index]
        promising = shortest_s < np.minimum(best_s[:, None], longest_s * (1.0 + ALIKE))
        some = np.flatnonzero(promising.any(axis=0))
        for i in some[np.argsort(shortest_s[:, some].min(axis=0))]:
            which = np.flatnonzero(promising[:, i] & (shortest_s[:, i] < best_s))
            if len(which):
                best_splits(
                    t.num_layers, shape.counts, which, times.layer_s[i], times.fixed_s[i], times.most[i],
                    float(longest_s[i]), t.t_floor, int(settings.mixes[i]), int(settings.groups[i]), best_s, best,
                )  # fmt: skip

    def _mixes(self, scope: int) -> dict[int, IntArray]:
        by_side: dict[int, list[int]] = {}
        for x, mix in enumerate(self.atlas.mixes):
            if self.atlas.scopes[scope].serves(mix):
                by_side.setdefault(self.atlas.side_of(scope, x), []).append(x)
        return {side: np.array(mixes, dtype=np.int64) for side, mixes in by_side.items()}


_FIELDS = ("rates", "costs", "uses", "sides", "links")


def _block(shape: Shape, side: int, workers: Workers | None, best_s: FloatArray, best: IntArray) -> list[Block]:
    here = np.isfinite(best_s) & (best[:, 0] >= 0)
    return [Block(shape, side, workers, shape.counts[here], best_s[here], best[here])] if here.any() else []


def search_listing(
    atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, gap_target: float, seed: int, report: Report
) -> Outcome | None:
    """The best plan of an engine's family, with a bound; None: it has none.

    Raises:
        InvalidProblemError: the family is too large to list, or the model may not be cut everywhere.
        NoPlanFoundError: none was found in time, nor proved that there is none.
    """
    if atlas.problem.model.forbidden_cuts:
        raise InvalidProblemError(
            f"{atlas.problem.model.name} has forbidden cuts, which the search of an engine's plans does not know; "
            "ask for any engine"
        )
    return _Search(atlas, master, row_costs, shapes_of(atlas), budget, gap_target, seed, report).run()


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
    """Replicas to choose from where some run already, with the relaxation's prices."""
    found = _Search(atlas, master, row_costs, shapes_of(atlas), budget, gap_target, seed, report)
    return found.explored()


class _Search:
    """One search. ``bound`` speaks of the whole family from `_complete` on."""

    def __init__(
        self, atlas: Atlas, master: Master, row_costs: FloatArray, shapes: Sequence[Shape], budget: Budget,
        gap_target: float, seed: int, report: Report,
    ) -> None:  # fmt: skip
        self.atlas, self.master, self.budget, self.report = atlas, master, budget, report
        self.gap_target, self.seed = gap_target, seed
        self.listing = Listing(atlas, row_costs, shapes, budget)
        self.bound = rate_bound(atlas) if master.maximises else 0.0  # of dense work alone, until more is known
        self.is_complete = False  # whether the bound is one on the whole family
        self.incumbent: MilpSolution | None = None
        self.relaxed: LpSolution | None = None
        self._listed_slack = 0.0  # replicas with workers that lose no more than this are known
        self.has_workers = any(True for shape in shapes for _ in workers_of(atlas, shape))

    def run(self) -> Outcome | None:
        """The best plan."""
        if self._find() and self.is_complete:
            self._prove()
        return self._outcome()

    def _find(self) -> bool:
        """Lists what may matter, and whole counts of the likeliest; False: the fleet has no replica, as far as known.

        Raises:
            NoPlanFoundError: there was no time for that.
        """
        plain = self.listing.plain()
        if plain is None:
            raise NoPlanFoundError(UNDECIDED)
        self.listing.add(plain)
        self.relaxed = self._relaxation()
        self._set_bound(complete=not self.has_workers)
        self._choose(QUICK_S)
        if self.has_workers:
            self._complete()
        return self.relaxed is not None

    def explored(self) -> Explored:
        """The same without a proof over whole counts."""
        if not self._find():
            return Explored((), None, None, is_empty=self.is_complete and self.relaxed is None)
        assert self.relaxed is not None, "something was found"
        chosen = np.flatnonzero(self._likeliest(LIKELY))
        if self.incumbent is not None:
            chosen = np.union1d(chosen, np.flatnonzero(self.incumbent.counts))
        lp = self.relaxed
        prices = Bound(lp.value, lp.row_prices, lp.link_prices, lp.rate_prices) if self.is_complete else None
        value = None if self.incumbent is None else self.incumbent.value
        return Explored(tuple(self.listing.template(int(i)) for i in chosen), value, prices, is_empty=False)

    def _set_bound(self, *, complete: bool) -> None:
        self.is_complete = complete
        if complete and self.relaxed is not None:
            self.bound = self.relaxed.value
        elif complete:
            self.bound = 0.0 if self.master.maximises else np.inf
        self._tell("relaxation")

    # --- relaxation

    def _relaxation(self) -> LpSolution | None:
        """Over all columns: those join that are worth more than their GPUs, until none is."""
        columns, master = self.listing.columns, self.master
        if not len(columns.rates):
            return None
        if self.relaxed is not None:
            inside = self._likeliest(SIFTED)
        else:
            inside = np.zeros(len(columns.rates), dtype=bool)
            worth = columns.costs + columns.uses @ self._first_prices()
            for side in np.unique(columns.sides):
                here = np.flatnonzero(columns.sides == side)
                ratio = columns.rates[here] / np.maximum(worth[here], 1e-300)
                inside[here[np.argsort(-ratio)[:SIFTED]]] = True
        for _ in range(MOST_ROUNDS):
            found = master.solve_lp(_some(columns, inside))
            if found is None:
                if inside.all():
                    return None
                inside[:] = True  # too few to meet the demand
                continue
            reduced = self._reduced(found, columns)
            missing = np.flatnonzero((reduced < -ALIKE * max(abs(found.value), 1e-12)) & ~inside)
            if not len(missing):
                counts = np.zeros(len(inside))
                counts[inside] = found.counts
                return replace(found, counts=counts)
            inside[missing[np.argsort(reduced[missing])[:ADDED]]] = True
        return master.solve_lp(columns)

    def _first_prices(self) -> FloatArray:
        types, rows = self.atlas.problem.cluster.gpu_types, self.atlas.resources.rows
        speed = np.array([types[self.atlas.classes[g].gpu].mem_bytes_per_s for g, _ in rows])
        return np.asarray(speed / speed.max() * self.atlas.resources.counts_gpus)

    def _reduced(self, lp: LpSolution, columns: Columns) -> FloatArray:
        """What a replica's GPUs are worth beyond its rate: how much a plan that holds it loses at least."""
        price = columns.uses @ lp.row_prices + (0.0 if self.master.maximises else columns.costs)
        return np.asarray(price - lp.rate_prices[columns.sides] * columns.rates)

    # --- attention workers

    def _complete(self) -> bool:
        """Adds replicas with workers until none improves the relaxation; False: the time was over before.

        Those are listed, too, that lose less than what lies between bound and incumbent: where none improves the
        relaxation, its prices stay, and these are all that may be part of a better plan.
        """
        for _ in range(MOST_ROUNDS):
            known = len(self.listing.columns.rates)
            slack = self._distance() if self._is_telling() else 0.0
            if not self._add_workers(slack):
                return False
            if self.relaxed is None:  # every replica is listed now
                self.relaxed = self._relaxation()
                self._choose(LEAST_S)
                if self.relaxed is not None:
                    continue
                self._set_bound(complete=True)
                return True
            new = self._reduced(self.relaxed, self.listing.columns)[known:]
            improves = bool(np.any(new < -ALIKE * max(abs(self.relaxed.value), 1e-12)))
            if not improves:
                self._listed_slack = slack
                self._set_bound(complete=True)
                return True
            self.relaxed = self._relaxation()
            self._choose(LEAST_S)
        return False

    def _is_telling(self) -> bool:
        """Whether what lies between bound and incumbent is less than a replica: else no replica is ruled out by it."""
        if self.relaxed is None:
            return False
        return self._distance() * float(self.relaxed.counts.sum()) <= abs(self.relaxed.value)

    def _distance(self) -> float:
        """Between the relaxation and the incumbent."""
        if self.relaxed is None or self.incumbent is None:
            return np.inf
        return abs(self.relaxed.value - self.incumbent.value)

    def _add_workers(self, slack: float) -> bool:
        """Lists replicas with workers that lose less than ``slack`` at the relaxation's prices; False: no time."""
        lp, maximises = self.relaxed, self.master.maximises
        rounding = ALIKE * (max(abs(lp.value), 1e-12) if lp is not None else 0.0)
        least = slack + (rounding if slack else -rounding)

        def needed_s(uses: IntArray, costs: FloatArray) -> FloatArray:
            if lp is None or not np.isfinite(least):
                return np.full(len(uses), np.inf)
            price = uses @ lp.row_prices + (0.0 if maximises else costs) - least
            found: FloatArray = np.where(price > 0.0, float(lp.rate_prices[0]) / np.maximum(price, 1e-300), np.inf)
            return found

        found = self.listing.with_workers(needed_s)
        if found is None:
            return False
        self.listing.add(found)
        return True

    # --- whole counts

    def _choose(self, limit_s: float) -> None:
        """Whole counts of the likeliest columns."""
        if self.relaxed is None:
            return
        self._round_down()
        self._solve(self._likeliest(LIKELY), limit_s)

    def _likeliest(self, num: int) -> BoolArray:
        """So many columns of every side that lose least, and those of the relaxation."""
        assert self.relaxed is not None, "prices say which are likely"
        columns = self.listing.columns
        inside = np.zeros(len(columns.rates), dtype=bool)
        inside[: len(self.relaxed.counts)] = self.relaxed.counts > 0.0
        reduced = self._reduced(self.relaxed, columns)
        for side in np.unique(columns.sides):
            here = np.flatnonzero(columns.sides == side)
            inside[here[np.argsort(reduced[here])[:num]]] = True
        return inside

    def _round_down(self) -> None:
        """The whole part of the relaxation, which always fits: a plan where no time is left for a better one."""
        if self.relaxed is None or not self.master.maximises or self.master.pins is not None:
            return
        columns = self.listing.columns
        counts = np.zeros(len(columns.rates), dtype=np.int64)
        counts[: len(self.relaxed.counts)] = np.floor(self.relaxed.counts + 1e-9).astype(np.int64)
        flows = self.master.best_flows(columns, counts)
        value = self.master.served(columns, counts, flows)
        if value > 0.0 and self._is_better(value):
            self.incumbent = MilpSolution(counts, flows, value, np.inf)

    def _prove(self) -> None:
        """Whole counts over every column that may be part of a better plan: HiGHS's bound is one on the family."""
        if self.relaxed is None or self._gap() <= self.gap_target or self.budget.is_spent():
            return
        distance = self._distance()
        if self.has_workers and distance > self._listed_slack:
            if not self._is_telling():
                self._solve(self._likeliest(SIFTED), min(QUICK_S, self.budget.remaining_s()))
                return
            if not self._add_workers(distance):
                return
        columns = self.listing.columns
        worthwhile = self._reduced(self.relaxed, columns) <= distance * (1.0 + ALIKE) + ALIKE * abs(self.bound)
        bound = self._solve(worthwhile, self.budget.remaining_s(), proves=True)
        if bound is not None:
            self.bound = min(self.bound, bound) if self.master.maximises else max(self.bound, bound)
        self._tell("whole counts")

    def _solve(self, which: BoolArray, limit_s: float, *, proves: bool = False) -> float | None:
        """Whole counts of some columns, never worse than the incumbent; returns HiGHS's bound on them."""
        columns = self.listing.columns
        chosen = np.flatnonzero(which)
        if not len(chosen):
            return None
        start = None
        if self.incumbent is not None:
            inside = np.zeros(len(columns.rates), dtype=np.int64)
            inside[: len(self.incumbent.counts)] = self.incumbent.counts
            chosen = np.union1d(chosen, np.flatnonzero(inside))
            start = replace(self.incumbent, counts=inside[chosen])
        part = _some(columns, chosen)
        least = None
        if not proves and self.relaxed is not None and self.master.pins is None:
            relaxed = np.zeros(len(columns.rates))
            relaxed[: len(self.relaxed.counts)] = self.relaxed.counts
            (least,) = settled([relaxed[chosen]]) or (None,)
            if least is not None and start is not None and np.any(start.counts < least):
                start = None
        found = self.master.solve_milp(
            part, time_limit_s=max(LEAST_S, limit_s), gap=self.gap_target / (1 if proves else 10), seed=self.seed,
            start=start, least=least,
        )  # fmt: skip
        if found is not None and (found.value > 0.0 or not self.master.maximises) and self._is_better(found.value):
            counts = np.zeros(len(columns.rates), dtype=np.int64)
            counts[chosen] = found.counts
            self.incumbent = replace(found, counts=counts)
            self._tell("whole counts")
        return None if found is None else found.bound

    def _is_better(self, value: float) -> bool:
        if self.incumbent is None:
            return True
        return value > self.incumbent.value if self.master.maximises else value < self.incumbent.value

    def _gap(self) -> float:
        if self.incumbent is None or not self.is_complete:
            return np.inf
        return abs(self.bound - self.incumbent.value) / max(abs(self.incumbent.value), 1e-12)

    def _tell(self, phase: str) -> None:
        known = self.is_complete and np.isfinite(self.bound)
        self.report(
            Progress(
                phase=phase,
                elapsed_s=self.budget.elapsed_s(),
                incumbent=None if self.incumbent is None else self.incumbent.value,
                bound=self.bound if known else None,
                gap=self._gap() if known and self.incumbent is not None else None,
            )
        )

    def _outcome(self) -> Outcome | None:
        if self.incumbent is None or self.relaxed is None or (self.master.maximises and self.incumbent.value <= 0.0):
            if self.is_complete and self.master.pins is None:
                return None
            raise NoPlanFoundError(UNDECIDED)
        columns, counts = self.listing.columns, np.zeros(len(self.listing.columns.rates), dtype=np.int64)
        counts[: len(self.incumbent.counts)] = self.incumbent.counts
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


def _some(columns: Columns, which: IntArray | BoolArray) -> Columns:
    return Columns(*(getattr(columns, name)[which] for name in _FIELDS))
