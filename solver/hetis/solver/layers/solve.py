"""The search for placements of layers: annealing from several starts, a proven bound, and names for nodes and links."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.errors import BrokenProofError, InfeasibleError, NoPlanFoundError
from hetis.solver.layers.annealing import (
    FlowSweep,
    LayerPlacement,
    LayerTables,
    anneal,
    copy_of,
    new_sweep,
    polish,
    share_requests,
    tabulate,
)
from hetis.solver.layers.bound import rate_bound
from hetis.solver.layers.plan import LayersPlan, LinkShare, PlacedNode, judge
from hetis.solver.layers.problem import LayersProblem

STARTS, SPARSE_STARTS = 8, 2  # starts with all nodes, and starts with as few as can hold the layers
FINALISTS = 2  # number of starts that are searched further
MOVES_PER_NODE, FINAL_MOVES_PER_NODE = 10_000, 30_000
MOST_MOVES = 4_000_000  # per search
SLICE = 2_000_000  # moves times nodes between two reads of the clock
HOT, FINAL_HOT, COLD = 0.01, 0.005, 0.0003  # rate losses of which a third are accepted, first and last
POLISHING = 60
MOST_MIXED = 4096  # most links at one layer; if there would be more, as few links as possible are used
_NOTHING = 1e-12  # shares of all requests below this are rounding

Placed = tuple[tuple[PlacedNode, ...], tuple[LinkShare, ...], tuple[str, ...]]


def solve_layers(
    problem: LayersProblem, *, budget: Budget | None = None, seed: int = 0, report: Report = silent
) -> LayersPlan:
    """Find ranges of layers and shares of requests that serve many requests per second, with a bound.

    The same seed gives the same plan as long as the budget does not end the search.

    Raises:
        InfeasibleError: all nodes together cannot hold the layers.
        NoPlanFoundError: the budget was spent before the first placement.
    """
    return _LayersSearch(problem, budget or Budget(), report, flow_only=False).plan(seed)


def solve_max_flow(problem: LayersProblem, *, budget: Budget | None = None, seed: int = 0) -> LayersPlan:
    """Return the placement with the largest flow by measured token rates and links, regardless of what is in flight.

    This is the objective of Helix (ASPLOS'25), found by the same search. Its judgement is that of `solve_layers`.

    Raises:
        InfeasibleError, NoPlanFoundError: as `solve_layers`.
    """
    return _LayersSearch(problem, budget or Budget(), silent, flow_only=True).plan(seed)


class _LayersSearch:
    """One search: its problem, its working arrays, and its caller's budget and report."""

    def __init__(self, problem: LayersProblem, budget: Budget, report: Report, *, flow_only: bool) -> None:
        held = sum(kind.count * problem.most_layers(kind) for kind in problem.node_types)
        if held < problem.num_layers:
            nodes = "the only node" if problem.num_nodes == 1 else f"the {problem.num_nodes} nodes"
            raise InfeasibleError((f"{nodes} can hold {held} layers, the model has {problem.num_layers}",))
        self.problem, self.budget, self.report, self.flow_only = problem, budget, report, flow_only
        self.tables = tabulate(problem)
        self.sweep = new_sweep(problem.num_nodes, problem.num_layers)

    def plan(self, seed: int) -> LayersPlan:
        placement = self._best_placement(seed)
        stopped = self.budget.is_spent()
        polish(placement, self.tables, self.flow_only, self.sweep, POLISHING)
        nodes, links, idle = named(self.problem, placement, self.tables, self.sweep, flow_only=self.flow_only)
        judgement = judge(self.problem, nodes, links)
        self._tell("bound", judgement.rate_rps)
        bound = rate_bound(self.tables, served=judgement.rate_rps)
        if bound.rate_rps < judgement.rate_rps * (1 - 1e-9):
            raise BrokenProofError(f"the plan serves {judgement.rate_rps}, the bound is {bound.rate_rps}")
        solver_s = self.budget.elapsed_s()
        return LayersPlan(
            nodes=nodes, links=links, judgement=judgement, bound=bound, idle=idle, solver_s=solver_s, stopped=stopped
        )

    def _best_placement(self, seed: int) -> LayerPlacement:
        """Return the best placement from all starts."""
        found: list[tuple[float, LayerPlacement, bool]] = []
        for start, placement in enumerate(self._starts(seed)):
            if found and self.budget.is_spent():
                break
            share_s = self.budget.remaining_s() / (STARTS + SPARSE_STARTS + FINALISTS - start)
            found.append(self._anneal(placement, MOVES_PER_NODE, HOT, start >= STARTS, seed + 101 * start, share_s))
            self._tell(f"start {start + 1} of {STARTS + SPARSE_STARTS}", max(rate for rate, *_ in found))
        found.sort(key=lambda entry: -entry[0])
        for finalist, (_, placement, wild) in enumerate(found[:FINALISTS]):
            if self.budget.is_spent():
                break
            seed_again, share_s = seed + 101 * finalist + 1, self.budget.remaining_s() / (FINALISTS - finalist)
            found.append(self._anneal(copy_of(placement), FINAL_MOVES_PER_NODE, FINAL_HOT, wild, seed_again, share_s))
            self._tell(f"finalist {finalist + 1} of {FINALISTS}", max(rate for rate, *_ in found))
        rate, best, _ = max(found, key=lambda entry: entry[0])
        if rate <= 0:
            raise NoPlanFoundError("the time limit ended the search before the first placement")
        return best

    def _tell(self, phase: str, rate: float) -> None:
        self.report(Progress(phase=phase, elapsed_s=self.budget.elapsed_s(), incumbent=rate))

    def _anneal(
        self, placement: LayerPlacement, moves_per_node: int, hottest: float, wild: bool, seed: int, share_s: float
    ) -> tuple[float, LayerPlacement, bool]:
        """Return (rate, best placement, ``wild``), annealing in slices so that the budget is checked.

        It cools by the share of its moves or, if that is larger, by the share of its time ``share_s``: a search that is
        cut short while it is hot ends with little more than its start.
        """
        num_moves = min(moves_per_node * self.problem.num_nodes, MOST_MOVES)
        slices = max(1, num_moves * self.problem.num_nodes // SLICE)
        cooling = (COLD / hottest) ** (1 / slices)
        best, rate, started_s = copy_of(placement), 0.0, self.budget.elapsed_s()
        for number in range(slices):
            past = (self.budget.elapsed_s() - started_s) / share_s if number and share_s > 0.0 else 0.0
            if past >= 1.0:
                break
            hot = hottest * cooling ** max(number, past * slices)
            rate = anneal(
                placement, best, self.tables, self.flow_only, self.sweep, math.ceil(num_moves / slices), hot,
                hot * cooling, wild, (seed + 7919 * number) % 2**32,
            )  # fmt: skip
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
        kind, layer, chain = self.tables.kind, 0, []
        order = random.permutation(len(self.tables.most))[kind]  # order of the types
        for i in np.argsort(order, kind="stable") if is_sparse else random.permutation(n):
            most = int(self.tables.most[kind[i]])
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


# --- names


def named(
    problem: LayersProblem, placement: LayerPlacement, tables: LayerTables, sweep: FlowSweep, *, flow_only: bool = False
) -> Placed:
    """Return nodes by first layer, links, and names of idle nodes, which are those that no request enters."""
    assert share_requests(placement, tables, flow_only, sweep), "every layer is on some node"
    names = list(problem.node_names())
    held = [tuple(map(int, pair)) for pair in zip(placement.first, placement.held, strict=True)]
    used = sorted((i for i in range(len(names)) if sweep.entries[i] > 0), key=lambda i: (*held[i], i))
    nodes = {
        i: PlacedNode(name=names[i][0], kind=names[i][1].name, first_layer=held[i][0], num_layers=held[i][1])
        for i in used
    }
    idle = tuple(name for i, (name, _) in enumerate(names) if i not in nodes)
    return tuple(nodes.values()), tuple(_links(problem.num_layers, nodes, sweep)), idle


def _links(num_layers: int, nodes: dict[int, PlacedNode], sweep: FlowSweep) -> Iterator[LinkShare]:
    """Yield the links at every layer where requests leave nodes and enter others."""
    visits = {i: float(sweep.share[i, : sweep.entries[i]].sum()) for i in nodes}
    for layer in range(num_layers + 1):
        leaving: list[tuple[str | None, float]] = [(None, 1.0)]
        if layer > 0:
            leaving = [(nodes[i].name, visits[i]) for i in nodes if nodes[i].end_layer == layer]
        if layer == num_layers:
            yield from (LinkShare(source=name, target=None, share=share) for name, share in leaving)
            return
        entering = [
            (nodes[i].name, float(sweep.share[i, e]))
            for i in nodes
            for e in range(sweep.entries[i])
            if sweep.entry[i, e] == layer
        ]
        join = _mixed if len(leaving) * len(entering) <= MOST_MIXED else _fewest
        yield from join(leaving, entering)


def _mixed(sources: Sequence[tuple[str | None, float]], targets: Sequence[tuple[str, float]]) -> Iterator[LinkShare]:
    """Yield a link from every source to every target, in proportion to what enters the targets.

    All sources together use the room of all targets: with fewer links, a target that is full by chance holds up
    requests that may only go there, while others have room.
    """
    total = sum(share for _, share in targets)
    for (source, there), (target, share) in itertools.product(sources, targets):
        if there * share / max(total, _NOTHING) > _NOTHING:
            yield LinkShare(source=source, target=target, share=there * share / total)


def _fewest(sources: Sequence[tuple[str | None, float]], targets: Sequence[tuple[str, float]]) -> Iterator[LinkShare]:
    """Yield the fewest links: what leaves the sources is assigned, in order, to the targets."""
    leaving = list(sources)
    for target, share in targets:
        left = share
        while left > _NOTHING and leaving:
            source, there = leaving[0]
            moved = min(left, there)
            yield LinkShare(source=source, target=target, share=moved)
            left -= moved
            leaving[0] = (source, there - moved)
            if there - moved <= _NOTHING:
                leaving.pop(0)
