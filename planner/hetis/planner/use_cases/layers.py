"""A placement of layers with its proof checked, beside the placement by maximum flow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from hetis.solver.budget import Budget, Report, silent
from hetis.solver.errors import UncheckedPlanError
from hetis.solver.layers.plan import LayersPlan, NodeLoad
from hetis.solver.layers.problem import LayersProblem, Links, NodeType


@dataclass(frozen=True, slots=True, kw_only=True)
class Layered:
    """The result of `hetis-plan layers`: the placement and, if requested, the one by maximum flow, both checked."""

    problem: LayersProblem
    plan: LayersPlan
    max_flow: LayersPlan | None

    @property
    def output_tokens_per_s(self) -> float:
        return self.plan.rate_rps * self.problem.mean_output_tokens

    @property
    def has_room_for_a_request(self) -> bool:
        """Return whether KV has room for a mean request; the model, for many in flight, has parts of requests, too."""
        return self.plan.judgement.in_flight * self.problem.tokens_in_flight >= self.problem.tokens_per_request


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStage:
    """Nodes that hold the same layers."""

    first_layer: int
    num_layers: int
    loads: tuple[NodeLoad, ...]

    @property
    def visits(self) -> float:
        """The share of the requests that pass through the stage."""
        return sum(load.visits for load in self.loads)

    @property
    def round_trip_s(self) -> float:
        """The stage's part of the round trip of a mean request."""
        return sum(load.visits * load.visit_s for load in self.loads)


def is_compiled() -> bool:
    """Return whether the kernels are already compiled on this machine; if not, the first run takes 30 s longer."""
    from hetis.solver.compiled import is_cached
    from hetis.solver.layers.annealing import anneal

    return is_cached(anneal)


def compile_layers() -> None:
    """Compile or load the kernels, by solving a problem with two equal nodes that hold one layer each."""
    from hetis.solver.layers.solve import solve_layers

    node = NodeType(name="node", count=2, tokens_per_s=(1e3,), kv_token_layers=(1e5,))
    links = Links(bandwidth=1e9, latency_s=1e-3, activation_bytes=8192)
    lengths = {"mean_prompt_tokens": 512.0, "mean_output_tokens": 128.0}
    solve_layers(LayersProblem(name="smallest", num_layers=2, node_types=(node,), links=links, **lengths))


def place_layers(
    problem: LayersProblem,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    compare: bool = True,
    report: Report = silent,
) -> Layered:
    """Solve and check. ``compare``: also find the placement by maximum flow, within the rest of the budget.

    Raises:
        InfeasibleError: the nodes cannot hold all layers.
        NoPlanFoundError: the budget was spent before the first placement.
        UncheckedPlanError: a plan fails the checker.
    """
    from hetis.solver.layers.check import check_layers_plan
    from hetis.solver.layers.solve import solve_layers, solve_max_flow

    plan = solve_layers(problem, budget=budget, seed=seed, report=report)
    max_flow = solve_max_flow(problem, budget=budget, seed=seed) if compare else None
    for one in (plan, max_flow):
        violations = check_layers_plan(problem, one) if one is not None else ()
        if violations:
            raise UncheckedPlanError(violations)
    return Layered(problem=problem, plan=plan, max_flow=max_flow)


def stages(plan: LayersPlan) -> Iterator[LayerStage]:
    """Yield the plan's stages ordered by first layer, shorter ones first."""
    key = attrgetter("node.first_layer", "node.num_layers")
    for (first, held), loads in itertools.groupby(sorted(plan.judgement.loads, key=key), key):
        yield LayerStage(first_layer=first, num_layers=held, loads=tuple(loads))
