"""The settings of a search, and the problem that they make of inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis.planner.use_cases.climbing import DEFAULT_WORTH, HIGHEST, LEAST_LAYERS, Carriers, Climbing
from hetis.planner.use_cases.listing import refuse_unlisted, stages_to_list
from hetis.planner.use_cases.request import PlacementRequest, ratio_of
from hetis.planner.use_cases.sources import Inputs, engine_rules
from hetis.solver.engine_rules import EngineRules
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, Objective, Role
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """Settings of the search, all of which are recorded in ``plan.inputs``.

    ``roles``: those that replicas may have; empty: all roles of the strategy. ``engine``: the engine whose rules plans
    must obey; None: any engine. ``keep_stages``: whether to search pipelines of as many stages as its rules have; if
    not, of fewer where those are too many to list (`listing`). ``simplest_within``: the share of the optimum that the
    simplest plan may lose. ``survive``: ``node`` or ``zone`` if most, or the demand, must be served even if any
    one of them is lost; empty: neither. ``keep``: the share of its rate that must then be left. ``rung``, ``worth``,
    ``target`` and ``least_layers`` are those of `Climbing`; other strategies than the default one are searched whole
    unless a rung is requested.
    """

    strategy: str = DEFAULT_STRATEGY
    roles: tuple[Role, ...] = ()
    engine: EngineRules | None = None
    keep_stages: bool = False
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    gap_target: float = 0.001
    seed: int = 0
    simplest_within: float = 0.0
    survive: str = ""
    keep: float | None = None
    rung: str = ""
    worth: float = DEFAULT_WORTH
    target: str = ""
    least_layers: int = LEAST_LAYERS

    def climbing(self, carriers: Carriers | None = None) -> Climbing:
        """Return how the rung is chosen."""
        rung = self.rung or ("" if self.strategy == DEFAULT_STRATEGY else HIGHEST)
        return Climbing(
            rung=rung, worth=self.worth, target=self.target, least_layers=self.least_layers, carriers=carriers,
            survive=self.survive, by_what_is_left=bool(self.survive) and self.keep is None,
        )  # fmt: skip

    def problem(self, inputs: Inputs, objective: Objective, *, least_stages: int = 1) -> PlacementProblem:
        """Return the problem that these inputs define, with the strategy's family of plans.

        Its engine has fewer stages than ``engine`` if those are too many to list, but at least ``least_stages``.

        Raises:
            InvalidProblemError: the inputs contradict each other, the strategy lacks one of the roles, or stages that
                must be kept are too many.
        """
        problem = inputs.problem(objective, self.strategy, self.roles, self.engine)
        if self.engine is None:
            return problem
        if self.keep_stages:
            refuse_unlisted(problem)
            return problem
        stages = max(stages_to_list(problem), least_stages)
        if stages >= self.engine.max_stages:
            return problem
        return inputs.problem(objective, self.strategy, self.roles, replace(self.engine, max_stages=stages))


def settings_of(request: PlacementRequest) -> PlacementSettings:
    """Return the settings of a request's search.

    Raises:
        InvalidProblemError: there is no such engine, or limits are specified for any engine.
    """
    return PlacementSettings(
        strategy=request.strategy,
        roles=request.all_roles,
        engine=engine_rules(
            request.engine, request.strategy, kv_between_vendors=request.kv_between_vendors, **request.limits
        ),
        keep_stages=request.max_stages is not None,
        time_limit_s=request.time_limit_s,
        gap_target=ratio_of(request.gap),
        seed=request.seed,
        simplest_within=ratio_of(request.simplest_within),
        survive=request.survive,
        keep=None if request.keep is None else ratio_of(request.keep),
        rung=request.rung,
        worth=ratio_of(request.worth),
        target=request.target,
        least_layers=LEAST_LAYERS if request.min_layers is None else 1,
    )
