"""Notes on fits that are used outside of what was measured."""

from __future__ import annotations

from hetis.planner.use_cases.robustness.profile_errors import (
    outside_regions,
)
from hetis.solver.model import DraftShape
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import FitRegion, Op
from tests.models import replace
from tests.planner.use_cases.robustness.studied import planned, posed


def in_region(problem: PlacementProblem, op: Op, region: FitRegion) -> PlacementProblem:
    profiles = {
        gpu: replace(profile, fits=tuple(replace(fit, region=region) if fit.op is op else fit for fit in profile.fits))
        for gpu, profile in problem.profiles.items()
    }
    return replace(problem, profiles=profiles)


def test_a_plan_inside_every_region_needs_no_note() -> None:
    wide = in_region(posed("paper"), Op.DENSE, FitRegion(tokens=(1, 100_000)))
    assert outside_regions(planned("paper"), wide) == ()


def test_a_fit_outside_its_region_is_named_with_both_numbers_once_per_gpu_and_operator() -> None:
    plan, problem = planned("h100-p100"), posed("h100-p100")
    batch = plan.replicas[0].micro_batch
    narrow = in_region(problem, Op.DECODE_ATTENTION, FitRegion(batch=(1, 4), context_tokens=(1, 1e6)))
    notes = outside_regions(plan, narrow)
    assert notes == tuple(
        f"outside the region of its fit: decode_attention of {gpu} at {batch} requests, measured 1 to 4"
        for gpu in ("H100-SXM-80GB", "P100-PCIe-12GB")
    )
    assert outside_regions(plan, in_region(problem, Op.DENSE, FitRegion(tokens=(1, 8))))[0].endswith("measured 1 to 8")


def test_drafts_are_among_the_tokens_of_an_iteration() -> None:
    plan, problem = planned("h100-p100"), posed("h100-p100")
    drafting = replace(problem, model=replace(problem.model, draft=DraftShape(tokens=3, acceptance=0.5)))
    tokens = 4 * plan.replicas[0].micro_batch + plan.replicas[0].chunk_tokens
    (note, *_) = outside_regions(plan, in_region(drafting, Op.DENSE, FitRegion(tokens=(1, 8))))
    assert f" at {tokens:,} tokens, measured 1 to 8" in note


def test_a_chunk_over_a_past_that_was_not_measured_is_named_with_the_past() -> None:
    """The average chunk of Azure's conversations attends to a tokens on average, half of which are its own."""
    plan, problem = planned("h100-p100"), posed("h100-p100")
    moments = problem.workload.clipped_to(problem.model.max_position).moments(
        block_tokens=problem.assumptions.block_tokens
    )
    past = moments.prefill_pairs / moments.mean_prompt - plan.replicas[0].chunk_tokens / 2
    assert past > 10
    (note,) = outside_regions(plan, in_region(problem, Op.PREFILL_ATTENTION, FitRegion(past_tokens=(0, 0))))
    assert note == (
        f"outside the region of its fit: prefill_attention of H100-SXM-80GB at {past:,.0f} earlier tokens "
        "read per request, measured without any"
    )
    assert outside_regions(plan, in_region(problem, Op.PREFILL_ATTENTION, FitRegion(past_tokens=(0, 1e4)))) == ()


def test_a_window_is_what_is_read_of_a_context() -> None:
    plan, problem = planned("h100-p100"), posed("h100-p100")
    windowed = replace(problem, model=replace(problem.model, sliding_window=64))
    notes = outside_regions(plan, in_region(windowed, Op.DECODE_ATTENTION, FitRegion(context_tokens=(256, 4096))))
    assert notes
    assert all(" at 64 tokens read per request, measured 256 to 4,096" in note for note in notes)


def test_kv_beyond_what_any_call_read_is_named_though_batch_and_context_are_inside() -> None:
    plan, problem = planned("h100-p100"), posed("h100-p100")
    region = FitRegion(batch=(1, 1e6), context_tokens=(1, 1e6), kv_bytes=(1, 1e5))
    notes = outside_regions(plan, in_region(problem, Op.DECODE_ATTENTION, region))
    assert len(notes) == 2
    assert all("MB of KV, measured 1e-06 to 0.1" in note for note in notes)


def test_kv_that_a_cache_served_is_named_once_per_gpu_though_smaller_kv_was_fitted() -> None:
    """Regions of decode attention begin above the cache: a plan with a small batch has the note, and no warning."""
    plan, problem = planned("h100-p100"), posed("h100-p100")
    region = FitRegion(batch=(1, 1e6), context_tokens=(1, 1e6), kv_bytes=(1e12, 2e12))
    notes = outside_regions(plan, in_region(problem, Op.DECODE_ATTENTION, region))
    assert len(notes) == 2
    for note, gpu in zip(notes, ("H100-SXM-80GB", "P100-PCIe-12GB"), strict=True):
        assert note.startswith(f"outside the region of its fit: decode_attention of {gpu} at ")
        assert note.endswith(" MB of KV, measured 1,000,000 to 2,000,000")
