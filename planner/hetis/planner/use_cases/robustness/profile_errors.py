"""Profiles with errors: changed coefficients, and the range of a plan's numbers under the errors that they state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from hetis.planner.use_cases.grouping import group_replicas
from hetis.planner.use_cases.record.forms import Errors, Predicted, Range
from hetis.planner.use_cases.record.parts import ProfileErrors
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Performance, Profiles
from hetis.profiler.ranges import range_factors, stated_error
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile, Source
from hetis.solver.workload import WorkloadMoments

Factor = Callable[[str, Fit], float]  # the factor for a fit's times on a GPU type

COEFFICIENTS = ("fixed_s", "flop_s", "byte_s", "token_s", "head_s", "wire")


def tp_sizes(plan: Plan, problem: PlacementProblem) -> frozenset[int]:
    """Return every TP size that pricing a plan of the problem may need, including 1 for attention workers."""
    return frozenset(
        {
            1,
            *problem.family.tp_sizes,
            *(s.tp * dp for r in plan.replicas for s in r.stages for dp in (1, r.attention_dp)),
        }
    )


def used_fits(profiles: Profiles, model: ModelSpec, sizes: Iterable[int]) -> dict[str, Profile]:
    """Return the profiles without fits for other models and TP sizes, which does not change the pricing of ``model``.

    Attention workers compute in the precision of their primary, so fits for each precision are kept.

    A fitted profile contains dozens of such fits, and every sample would perturb and search them all.
    """
    sizes, models = tuple(sizes), tuple(dict.fromkeys(map(model.on, profiles)))

    def kept(profile: Profile) -> tuple[Fit, ...]:
        every = (profile.fit(op, one, tp) for one in models for op in Op for tp in sizes)
        found = [fit for fit in every if fit is not None]
        ops = {fit.op for fit in found}
        return tuple(fit for fit in profile.fits if fit.op not in ops or any(fit is one for one in found))

    return {gpu: replace(profile, fits=kept(profile)) for gpu, profile in profiles.items()}


def scaled(profiles: Profiles, factor: float) -> dict[str, Profile]:
    """Multiply all times by ``factor``."""
    return scaled_by(profiles, lambda _gpu, _fit: factor)


def scaled_by(profiles: Profiles, factor: Factor) -> dict[str, Profile]:
    """Multiply all times of every fit by its ``factor``."""
    return {
        gpu: replace(profile, fits=tuple(_scaled(fit, factor(gpu, fit)) for fit in profile.fits))
        for gpu, profile in profiles.items()
    }


def _scaled(fit: Fit, factor: float) -> Fit:
    if factor == 1.0:
        return fit
    return replace(
        fit, pieces=tuple(Piece(**{name: factor * getattr(old, name) for name in COEFFICIENTS}) for old in fit.pieces)
    )


# --- the range of rate and latencies that follows from stated errors


COMPUTE = (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION)


def predicted(plan: Plan, problem: PlacementProblem) -> Predicted | None:
    """Return the range that stated errors leave.

    None if a used GPU type states no error for its layers and attention.

    Times grow with all coefficients. So the plan is priced twice: with every fit too fast by its stated error, and with
    every fit too slow by it (`hetis.profiler.ranges.range_factors`). The plan's result lies between the two if no fit
    is off by more; errors of operators are weighted by their share of the time, and never cancel. The error of a fit to
    measurements is a mean: single points are further off, but a plan's times are sums over many of them. The error of a
    fit modelled for a GPU without measurements covers nine in ten times of measured GPUs that are left out in turn.
    What the plugin takes of an exchange with attention workers has the measured range.
    """
    if not plan.replicas:
        return None
    fixed = FixedPlan(plan, problem)
    used = {gpu: problem.profiles[gpu] for gpu in sorted(fixed.gpus)}
    profiles = used_fits(used, problem.model, tp_sizes(plan, problem))
    if not all(map(_states_errors, profiles.values())):
        return None

    plugin = problem.family.plugin

    def reach(end: int) -> Performance:
        exchange_s = (plugin.exchange_low_s, plugin.exchange_high_s)[end]
        return fixed.as_planned(scaled_by(profiles, lambda _gpu, fit: range_factors(fit)[end]), exchange_s)

    errors: dict[str, dict[str, float]] = {gpu: {} for gpu in profiles}
    assumed = dict[str, None]()  # ordered, without duplicates
    for gpu, profile in profiles.items():
        for fit in profile.fits:
            errors[gpu][fit.op.value] = max(errors[gpu].get(fit.op.value, 0.0), stated_error(fit))
            if fit.provenance.held_out_mape is None and fit.provenance.range_error is None:
                assumed[f"{gpu} {fit.op}"] = None
    fast, slow = reach(0), reach(1)
    return Predicted(
        rate=Range(low=slow.rate, high=fast.rate),
        ttft_s=Range(low=fast.ttft_s, high=slow.ttft_s),
        tpot_s=Range(low=fast.tpot_s, high=slow.tpot_s),
        errors=errors,
        assumed=tuple(assumed),
    )


def _states_errors(profile: Profile) -> bool:
    return any(
        fit.op in COMPUTE and (fit.provenance.held_out_mape, fit.provenance.range_error) != (None, None)
        for fit in profile.fits
    )


# --- uses of a fit outside the measured sizes


_WORDS = {
    "tokens": "tokens",
    "batch": "requests",
    "past_tokens": "earlier tokens read per request",
    "context_tokens": "tokens read per request",
    "kv_bytes": "MB of KV",
    "num_bytes": "bytes",
}
_UNITS = {"kv_bytes": 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitUse:
    """A fit and the sizes at which a plan uses it."""

    gpu: str
    op: Op
    tp: int
    sizes: Mapping[str, float]


def outside_regions(plan: Plan, problem: PlacementProblem) -> tuple[str, ...]:
    """Return a sentence per GPU type and operator about its furthest use, with that size and the measured range."""
    furthest: dict[tuple[str, Op, str], tuple[float, str]] = {}
    workload = problem.workload.clipped_to(problem.model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    for group in group_replicas(plan.replicas):
        own = problem.of_replica(group.first)
        for use in _uses(group.first, moments, own):
            fit = own.profiles[use.gpu].fit(use.op, own.model, use.tp)
            if fit is None or fit.region is None:
                continue
            for name in fit.region.outside(**use.sizes):
                unit = _UNITS.get(name, 1.0)
                low, high, size = (value / unit for value in (*getattr(fit.region, name), use.sizes[name]))
                off = size / max(high, 1.0 / unit) if size > high else low / max(size, 1e-9)
                sentence = f"{use.op} of {use.gpu} at {_number(size)} {_WORDS[name]}, measured {_span(low, high)}"
                key = (use.gpu, use.op, name)
                if key not in furthest or off > furthest[key][0]:
                    furthest[key] = (off, sentence)
    by_op: dict[tuple[str, Op], tuple[float, str]] = {}
    for (gpu, op, _), found in furthest.items():
        by_op[gpu, op] = max(by_op.get((gpu, op), (0.0, "")), found)
    return tuple(f"outside the region of its fit: {sentence}" for _, sentence in by_op.values())


def _uses(replica: ReplicaPlan, moments: WorkloadMoments, problem: PlacementProblem) -> Iterator[FitUse]:
    b, C, model = replica.micro_batch, replica.chunk_tokens, problem.model
    decoding = b * model.step_tokens  # tokens of the decoding requests, including drafts
    attended = model.read_tokens(moments.resident_context)
    kvb = model.kv_bytes_per_token_group()
    # The average chunk, as in docs/cost-model.md: it attends to a tokens, on average including half of itself.
    a = model.read_tokens(moments.prefill_pairs / moments.mean_computed)
    past, context = max(0.0, a - C / 2), a + C / 2

    def decode(pairs: float) -> dict[str, float]:
        return {"batch": float(b), "context_tokens": attended, "kv_bytes": pairs * attended * kvb}

    for position, stage in enumerate(replica.stages):
        for tokens in sorted({decoding, decoding + C} - {0}):
            yield FitUse(gpu=stage.gpu, op=Op.DENSE, tp=stage.tp, sizes={"tokens": float(tokens)})
            num_bytes = float(tokens * model.hidden * model.activation_bytes)
            if stage.tp > 1:
                sizes = {"num_bytes": num_bytes, "tokens": float(tokens)}
                yield FitUse(gpu=stage.gpu, op=Op.ALL_REDUCE, tp=stage.tp, sizes=sizes)
            if replica.expert_parallel:  # tokens of all copies are exchanged, half of the message at a time
                ranks, all_tokens = stage.tp * stage.copies, stage.copies * tokens
                sizes = {"num_bytes": stage.copies * num_bytes / 2, "tokens": all_tokens / 2}
                yield FitUse(gpu=stage.gpu, op=Op.ALL_REDUCE, tp=ranks, sizes=sizes)
            if position > 0:
                sent = {"num_bytes": float(tokens * model.residual_width * model.activation_bytes)}
                yield FitUse(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes=sent)
        if C:
            kv_bytes = context * max(1.0, model.head_groups / stage.tp) * kvb
            prefill = {"tokens": float(C), "past_tokens": past, "context_tokens": context, "kv_bytes": kv_bytes}
            yield FitUse(gpu=stage.gpu, op=Op.PREFILL_ATTENTION, tp=stage.tp, sizes=prefill)
        if b and stage.kv_head_groups_kept:
            sizes = decode(b * stage.kv_head_groups_kept)
            yield FitUse(gpu=stage.gpu, op=Op.DECODE_ATTENTION, tp=stage.tp, sizes=sizes)
        if replica.role is Role.PREFILL:
            sent = {"num_bytes": C * model.head_groups * kvb}
            yield FitUse(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes=sent)
        if replica.role is Role.DECODE and stage.kv_head_groups_kept:
            kept = min(stage.tp, model.head_groups) * stage.kv_head_groups_kept
            received = {"num_bytes": moments.mean_prompt * kept * kvb}
            yield FitUse(gpu=stage.gpu, op=Op.TRANSFER, tp=stage.tp, sizes=received)
    for pool in replica.attention_workers:
        stage = replica.stages[pool.stage]
        cards = len(pool.devices) / stage.copies
        sizes = decode(b * pool.kv_head_groups * stage.tp / cards)
        yield FitUse(gpu=pool.gpu, op=Op.DECODE_ATTENTION, tp=1, sizes=sizes)


def _span(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if high else "without any"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


# --- notes of a plan about its profiles


def profile_notes(problem: PlacementProblem) -> tuple[str, ...]:
    """Return notes on profiles that are not measurements of this fleet, based on the fits used for the model."""
    profiles = used_fits(problem.profiles, problem.model, problem.family.tp_sizes)
    modelled = sorted(gpu for gpu, profile in profiles.items() if _is_modelled(profile))
    fitted = sorted(gpu for gpu, profile in profiles.items() if gpu not in modelled and _is_fitted(profile))
    notes = []
    if modelled:
        names = ", ".join(modelled)
        parts = [f"; {', '.join(_fitted_ops(profiles[g]))} of {g} fitted" for g in modelled if _is_fitted(profiles[g])]
        notes.append(
            f"modelled, not measured: the profiles of {names}; real rates may differ (--profile FILE){''.join(parts)}"
        )
    if fitted:
        ops = sorted({fit.op.value for gpu in fitted for fit in profiles[gpu].fits if _modelled(fit)})
        but = f"; modelled: {', '.join(ops)}" if ops else ""
        notes.append(f"fitted to measurements: the profiles of {', '.join(fitted)}{but}")
    return tuple(notes)


def with_profile_errors(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with the range that its profiles' errors leave, and notes on fits used outside their range.

    What they do to pools of classes of requests is not known.
    """
    noted = replace(plan, notes=plan.notes + outside_regions(plan, problem))
    found = None if plan.classes else predicted(plan, problem)
    return noted if found is None else ProfileErrors(errors=Errors(predicted=found)).on(noted)


def _is_modelled(profile: Profile) -> bool:
    """Return whether any computing operator is modelled."""
    return any(fit.op in COMPUTE and _modelled(fit) for fit in profile.fits)


def _is_fitted(profile: Profile) -> bool:
    return bool(_fitted_ops(profile))


def _fitted_ops(profile: Profile) -> list[str]:
    return sorted({fit.op.value for fit in profile.fits if fit.provenance.source in (Source.FITTED, Source.IMPORTED)})


def _modelled(fit: Fit) -> bool:
    return fit.provenance.source is Source.MODELLED
