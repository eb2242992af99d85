"""The search for placements of layers: annealing from several starts, a proven bound, and names for nodes and links."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.errors import BrokenProofError, InfeasibleError, NoPlanFoundError
from hetis.solver.layers.annealing import LayerPlacement, anneal, copy_of, polish
from hetis.solver.layers.bound import rate_bound
from hetis.solver.layers.naming import named
from hetis.solver.layers.objective import judge
from hetis.solver.layers.plan import LayersPlan
from hetis.solver.layers.problem import LayersProblem
from hetis.solver.layers.sweep import SweepRoom, new_sweep
from hetis.solver.layers.tables import IntArray, LayerTables, tabulate

STARTS, SPARSE_STARTS = 8, 2  # with all nodes; with as few as can hold the layers
FINALISTS = 2  # starts that are searched longer
MOVES_PER_NODE, FINAL_MOVES_PER_NODE = 10_000, 30_000
MOST_MOVES = 4_000_000  # per search
SLICE = 2_000_000  # moves times nodes between two reads of the clock
HOT, FINAL_HOT, COLD = 0.01, 0.005, 0.0003  # losses of the rate at which a third of moves are kept, first and last
POLISHING = 60


def solve_layers(
    problem: LayersProblem, *, budget: Budget | None = None, seed: int = 0, report: Report = silent
) -> LayersPlan:
    """Find ranges of layers and shares of requests that serve many requests per second, with a bound.

    The same seed gives the same plan as long as the budget does not end the search.

    Raises:
        InfeasibleError: all nodes together cannot hold the layers.
        NoPlanFoundError: the budget was spent before the first placement.
    """
    search = _Search.of(problem, budget or Budget(), report, flow_only=False)
    placement = search.run(seed)
    nodes, links, idle = named(problem, placement, search.kind, search.sweep, search.tables)
    judgement = judge(problem, nodes, links)
    search.tell("bound", judgement.rate_rps)
    bound = rate_bound(search.tables, search.counts, served=judgement.rate_rps)
    if bound.rate_rps < judgement.rate_rps * (1 - 1e-9):
        raise BrokenProofError(f"the plan serves {judgement.rate_rps}, the bound is {bound.rate_rps}")
    return LayersPlan(
        nodes=nodes,
        links=links,
        judgement=judgement,
        bound=bound,
        idle=idle,
        solver_s=search.budget.elapsed_s(),
        stopped=search.stopped,
    )


def solve_max_flow(problem: LayersProblem, *, budget: Budget | None = None, seed: int = 0) -> LayersPlan:
    """Return the placement with the largest flow by measured token rates and links, whatever is in flight.

    This is the objective of Helix (ASPLOS'25), found by the same search. Its judgement is that of `solve_layers`.

    Raises:
        InfeasibleError, NoPlanFoundError: as `solve_layers`.
    """
    search = _Search.of(problem, budget or Budget(), silent, flow_only=True)
    placement = search.run(seed)
    nodes, links, idle = named(problem, placement, search.kind, search.sweep, search.tables, flow_only=True)
    judgement = judge(problem, nodes, links)
    return LayersPlan(
        nodes=nodes,
        links=links,
        judgement=judgement,
        bound=rate_bound(search.tables, search.counts, served=judgement.rate_rps),
        idle=idle,
        solver_s=search.budget.elapsed_s(),
        stopped=search.stopped,
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    """One search: its problem, its working arrays, and its caller's budget and report."""

    problem: LayersProblem
    tables: LayerTables
    kind: IntArray  # of every node
    sweep: SweepRoom
    budget: Budget
    report: Report
    flow_only: bool
    stopped: bool = field(default=False, init=False)

    @classmethod
    def of(cls, problem: LayersProblem, budget: Budget, report: Report, *, flow_only: bool) -> _Search:
        held = sum(kind.count * problem.most_layers(kind) for kind in problem.node_types)
        if held < problem.num_layers:
            raise InfeasibleError(
                (f"the {problem.num_nodes} nodes can hold {held} layers, the model has {problem.num_layers}",)
            )
        counts = [kind.count for kind in problem.node_types]
        return cls(
            problem=problem,
            tables=tabulate(problem),
            kind=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
            sweep=new_sweep(problem.num_nodes, problem.num_layers),
            budget=budget,
            report=report,
            flow_only=flow_only,
        )

    @property
    def counts(self) -> IntArray:
        return np.array([kind.count for kind in self.problem.node_types], np.int64)

    def run(self, seed: int) -> LayerPlacement:
        """Return the best placement from all starts."""
        found: list[tuple[float, LayerPlacement, bool]] = []
        for start, placement in enumerate(self._starts(seed)):
            if found and self.budget.is_spent():
                break
            wild = start >= STARTS
            found.append(self._anneal(placement, MOVES_PER_NODE, HOT, wild, seed + 101 * start))
            self.tell(f"start {start + 1} of {STARTS + SPARSE_STARTS}", max(rate for rate, *_ in found))
        found.sort(key=lambda entry: -entry[0])
        for finalist, (_, placement, wild) in enumerate(found[:FINALISTS]):
            if self.budget.is_spent():
                break
            again = copy_of(placement)
            found.append(self._anneal(again, FINAL_MOVES_PER_NODE, FINAL_HOT, wild, seed + 101 * finalist + 1))
            self.tell(f"finalist {finalist + 1} of {FINALISTS}", max(rate for rate, *_ in found))
        rate, best, _ = max(found, key=lambda entry: entry[0])
        if rate <= 0:
            raise NoPlanFoundError("the time limit ended the search before the first placement")
        self.stopped = self.budget.is_spent()
        polish(best, self.kind, self.tables, self.flow_only, self.sweep, POLISHING)
        return best

    def tell(self, phase: str, rate: float) -> None:
        """Report progress."""
        self.report(Progress(phase=phase, elapsed_s=self.budget.elapsed_s(), incumbent=rate))

    def _anneal(
        self, placement: LayerPlacement, moves_per_node: int, hottest: float, wild: bool, seed: int
    ) -> tuple[float, LayerPlacement, bool]:
        """Return (rate, best placement, ``wild``), annealing in slices so that the budget is checked."""
        num_moves = min(moves_per_node * self.problem.num_nodes, MOST_MOVES)
        slices = max(1, num_moves * self.problem.num_nodes // SLICE)
        cooling = (COLD / hottest) ** (1 / slices)
        best = copy_of(placement)
        rate = 0.0
        for number in range(slices):
            hot = hottest * cooling**number
            rate = anneal(
                placement,
                best,
                self.kind,
                self.tables,
                self.flow_only,
                self.sweep,
                math.ceil(num_moves / slices),
                hot,
                hot * cooling,
                wild,
                (seed + 7919 * number) % 2**32,
            )
            if self.budget.is_spent():
                break
        return rate, best, wild

    def _starts(self, seed: int) -> Iterator[LayerPlacement]:
        """Yield chains of nodes that hold some share of what they can.

        The first starts use all nodes in random order, and surplus nodes join others. The last ones go type by type,
        and surplus nodes stay idle. A node that slows all others is hard to remove, while one that helps is easily
        added.
        """
        for start in range(STARTS + SPARSE_STARTS):
            random = np.random.default_rng((seed, start))
            fill = float(random.uniform(0.4, 0.9))
            while (placement := self._chain(random, fill, is_sparse=start >= STARTS)) is None:
                fill = min(1.0, 1.15 * fill)
            yield placement

    def _chain(self, random: np.random.Generator, fill: float, *, is_sparse: bool) -> LayerPlacement | None:
        n, num_layers = self.problem.num_nodes, self.problem.num_layers
        placement = LayerPlacement(np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n))
        layer, chain = 0, []
        for i in self._by_type(random) if is_sparse else random.permutation(n):
            most = int(self.tables.most[self.kind[i]])
            if layer < num_layers:
                placement.first[i] = layer
                placement.held[i] = min(max(1, round(fill * most)), num_layers - layer)
                layer += int(placement.held[i])
                chain.append(i)
            elif is_sparse:
                break
            else:
                twin = random.choice(chain)
                placement.first[i] = placement.first[twin]
                placement.held[i] = min(int(placement.held[twin]), most)
        return placement if layer == num_layers else None

    def _by_type(self, random: np.random.Generator) -> IntArray:
        """Return all nodes, grouped by types in random order."""
        order = random.permutation(len(self.counts))
        return np.argsort(order[self.kind], kind="stable")
