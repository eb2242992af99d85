"""Explanations of a plan from its own numbers and the cost model alone, without another search.

Sentences that say "at least" or "at most" are proofs; the others compare numbers of the cost model.
"""

from __future__ import annotations

from hetis.solver.explain import Explanation
from hetis.solver.placement.explanation.attention_workers import attention_workers
from hetis.solver.placement.explanation.bottleneck import what_binds
from hetis.solver.placement.explanation.idle import why_idle
from hetis.solver.placement.explanation.replica_view import replica_views
from hetis.solver.placement.explanation.routes import route_sentences
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

__all__ = ["explain_plan"]


def explain_plan(plan: Plan, problem: PlacementProblem) -> Explanation:
    """Explain where memory and time go, what limits every replica, and why GPUs are idle.

    Replicas that differ only in device names are explained once, under the number of the first. ``bottlenecks`` has one
    sentence for each of these, in the order of their numbers.

    Raises:
        InvalidProblemError: the plan names devices, layers or settings that its problem does not have.
    """
    views = replica_views(plan, problem)
    return Explanation(
        memory=tuple(bar for view in views for bar in view.memory()),
        stage_times=tuple(part for view in views for part in view.times()),
        bottlenecks=tuple(what_binds(view) for view in views),
        idle=tuple(why_idle(plan, problem, views)),
        attention_workers=" ".join(attention_workers(plan, problem, views)),
        kv_routes=tuple(route_sentences(plan, problem)),
    )
