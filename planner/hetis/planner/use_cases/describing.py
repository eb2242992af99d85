"""What a plan says of itself: notes, what it was made from, and what was requested."""

from __future__ import annotations

from dataclasses import replace

from hetis.planner.use_cases.listing import kinds_in_a_zone
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import notes_on_exchange
from hetis.planner.use_cases.record.forms import MAY_DIFFER
from hetis.planner.use_cases.record.parts import MadeFrom, Requested
from hetis.planner.use_cases.record.versions import installed_versions
from hetis.planner.use_cases.robustness.profile_errors import profile_notes
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

ONE_TOKEN = "requests have one output token, so that a limit on TPOT does not apply"
KV_IS_FOR_ENGINES = "engines must be configured to transfer KV along the routes"


def describe(
    plan: Plan, loaded: LoadedInputs, problem: PlacementProblem, settings: PlacementSettings,
    requested: Objective | None = None, *, rung: str = "",
) -> Plan:  # fmt: skip
    """Add its inputs to a plan, and notes about its links and profiles; ``requested`` as in `make_plan`."""
    from hetis.solver.placement.explanation import link_sentences

    routed = (KV_IS_FOR_ENGINES, *link_sentences(plan, problem)) if plan.kv_routes else ()
    lengths = () if loaded.inputs.has_tpot else (ONE_TOKEN,)
    notes = (
        *plan.notes, *notes_on_stages(problem, settings), *loaded.notes, *lengths, *routed, *profile_notes(problem),
        *notes_on_exchange(plan, problem),
    )  # fmt: skip
    return with_inputs(replace(plan, notes=notes), loaded, settings, problem, requested or plan.objective, rung=rung)


def notes_on_stages(problem: PlacementProblem, settings: PlacementSettings) -> tuple[str, ...]:
    """Return a note if the problem's pipelines have fewer stages than the engine allows."""
    engine, of_engine = problem.family.engine, settings.engine
    if engine is None or of_engine is None or engine.max_stages >= of_engine.max_stages:
        return ()
    return (
        f"pipelines of up to {engine.max_stages} stage{'s' * (engine.max_stages > 1)}, not {of_engine.max_stages}: "
        f"{kinds_in_a_zone(problem)} kinds of GPUs in a zone; --max-stages allows more",
    )


def with_inputs(
    plan: Plan, loaded: LoadedInputs, settings: PlacementSettings, problem: PlacementProblem, requested: Objective,
    *, rung: str = "",
) -> Plan:  # fmt: skip
    """Return a plan for the problem with a record of what it was made from, and of what was requested.

    ``rung`` is that of the problem's family.
    """
    planned = plan.objective
    own = {name: (getattr(requested, name), getattr(planned, name)) for name in MAY_DIFFER}
    request = Requested(
        roles=problem.family.roles,
        engine=problem.family.engine,
        engine_settings=problem.family.engine_settings,
        constraints=tuple(map(str, problem.constraints)),
        seed=settings.seed,
        gap_target=settings.gap_target,
        time_limit_s=settings.time_limit_s,
        simplest_within=settings.simplest_within,
        survive=settings.survive,
        rung=rung,
        of_objective={name: given for name, (given, value) in own.items() if given != value},
    )
    made_from = MadeFrom(
        versions=installed_versions(),
        origins=loaded.origins,
        digests=loaded.inputs.digests(),
        documents=loaded.inputs.documents(),
    )
    return made_from.on(request.on(plan))
