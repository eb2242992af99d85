"""The correction of a profile: fitted to one half of the observations, judged on the other.

An iteration takes ``k K + s + q R`` seconds, where K is the time of its kernels in the profile and R the number of its
sequences. Of the factor k, the seconds s of an iteration and q of a sequence, those are fitted that the observations
can tell apart; the rest stays as in the profile. Since neighbours are alike, whole blocks of consecutive observations
are taken in turn for the fit and for the judgement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.calibrate.observed import Observed, ObservedKind
from hetis.profiler.calibrate.replica import CalibratedReplica, Price
from hetis.profiler.fitting import FloatArray, non_negative_least_squares
from hetis.profiler.plausibility import STEP_SECONDS
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile, Provenance, Source

PARAMETERS = ("kernels", "step", "sequence")
STOOD_STILL = 5.0  # multiple of the usual time of such iterations: a compilation, a swapped-out process
_CANDIDATES = (("kernels",), ("step",), ("step", "sequence"), ("kernels", "step"), ("kernels", "step", "sequence"))
# Column of a parameter in `_Table`, and how wrong a profile's value may be, as a share of it.
_DOUBTS = {"kernels": ("kernels_s", 0.25), "step": ("step_s", 1.0), "sequence": ("sample_s", 1.0)}
_BLOCKS = 40
_GROUPS = 10  # groups of blocks that are left out one after the other, to know how certain a fit is
_CERTAIN = 0.1  # largest half-width of the interval of each of several parameters, as a share of an iteration
_LEAST_SEVERAL = 50  # observations; fewer happen to fit several parameters about as well
_WORTH = 0.97  # largest share of the error that may be left for another parameter to be worth it
_LEAST_WORTH = 0.001  # least amount by which the error must fall as well
CHECK = "check that the model, its precision, the TP degree and the GPU are the server's"
_HUGE = 0.5  # held-out error above which a correction has not understood the observations
_LEAST_JUDGED = 10  # observations of a kind that judge a correction
_FACTORS = (0.05, 20.0)  # range of a factor on kernels; beyond it, it means another model, GPU or engine
_REWEIGHTS = 6  # rounds of reweighting towards the least absolute relative error
_TWO_SIDED = 1.96  # standard errors of a 95% interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Predicted / measured - 1 over some observations: mean of absolutes, mean, and 90th percentile of absolutes."""

    mape: float
    bias: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutErrors:
    """Errors over the observations of a kind (empty: all kinds) that the fit never saw."""

    kind: str
    count: int
    mean_s: float  # mean measured seconds
    before: Errors
    after: Errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the correction: a factor, or seconds. ``margin`` is half of its 95% interval.

    None: not fitted, since the observations do not tell it apart; ``after`` is then the profile's value.
    """

    name: str
    before: float
    after: float
    margin: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """The result of a calibration; if ``profile`` is None, ``refusal`` says why."""

    profile: Profile | None
    refusal: str
    parameters: tuple[Parameter, ...]
    judged: tuple[HeldOutErrors, ...]  # by kind; the last one is over all kinds
    num_fitted: int
    left_out: Mapping[str, int]


def calibrate(observed: Observed, replica: CalibratedReplica) -> CalibrationResult:
    """Fit a correction of the replica's profile, and judge it. Raises InvalidProblemError if there are too few
    observations.
    """
    left_out = Counter(observed.left_out)
    table = _without_standstills(_table(observed, replica), left_out)
    if len(table.seconds) < observed.least:
        why = "; ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        raise InvalidProblemError(
            f"{len(table.seconds)} {observed.what} are of use, {observed.least} are needed"
            + (f" (left out: {why})" if why else "")
        )
    block = np.arange(len(table.seconds)) * _BLOCKS // max(_BLOCKS, len(table.seconds))
    fitted, judged = table.rows(block % 2 == 0), table.rows(block % 2 == 1)
    chosen, values, margins = _chosen(fitted, block[block % 2 == 0] // 2)
    before, after = judged.predicted({}), judged.predicted(values)
    judgements = list(_judgements(judged, before, after))
    refusal = _refusal(chosen, values, judgements)
    was = {"kernels": 1.0, "step": float(np.median(table.step_s))}
    was["sequence"] = float(np.median(table.sample_s / np.maximum(table.sequences, 1e-9)))
    return CalibrationResult(
        profile=corrected(replica, observed, values, judgements[-1], len(fitted.seconds)) if not refusal else None,
        refusal=refusal,
        parameters=tuple(
            Parameter(name=name, before=was[name], after=values.get(name, was[name]), margin=margins.get(name))
            for name in PARAMETERS
        ),
        judged=tuple(judgements),
        num_fitted=len(fitted.seconds),
        left_out=left_out,
    )


def _refusal(chosen: Sequence[str], values: Mapping[str, float], judgements: Sequence[HeldOutErrors]) -> str:
    """Return why a correction is of no use, or an empty string if it is."""
    factor = values.get("kernels", 1.0)
    if not _FACTORS[0] <= factor <= _FACTORS[1]:
        least, most = _FACTORS
        return f"kernels take {factor:.3g} times the profile's time, expected {least:g} to {most:g}: {CHECK}"
    if not chosen or judgements[-1].after.mape >= judgements[-1].before.mape:
        return "no correction reduces the error on held-out data"
    worst = max(judgements, key=lambda one: one.after.mape if one.count >= _LEAST_JUDGED else 0.0)
    if worst.count >= _LEAST_JUDGED and worst.after.mape > _HUGE:
        what = f"of {worst.kind} iterations" if worst.kind else "on held-out data"
        return f"the error {what} would still be {worst.after.mape:.0%}: {CHECK}"
    return ""


def corrected(
    replica: CalibratedReplica, observed: Observed, values: Mapping[str, float], judged: HeldOutErrors, num_fitted: int
) -> Profile:
    """Return the profile with these parameters.

    Kernels that took part are faster or slower by the factor for every model and TP degree, so that plans keep
    comparing like with like. The error on held-out observations becomes that of the fits that predicted them.
    """
    origin = (
        f"corrected by {num_fitted:,} {observed.what} of {observed.origin} with {replica.model.name} at TP {replica.tp}"
    )
    kinds = {work.kind for one in observed.observations for _, work in one.parts}
    decodes, prefills = any(kind != "prefill" for kind in kinds), any(kind != "decode" for kind in kinds)
    took_part = {Op.DENSE}
    took_part |= {Op.EXPERTS} if replica.model.experts is not None else set()
    took_part |= {Op.DECODE_ATTENTION} if decodes else set()
    took_part |= {Op.PREFILL_ATTENTION} if prefills else set()
    took_part |= {Op.ALL_REDUCE} if replica.tp > 1 else set()
    used = {op: replica.fit(op) for op in took_part}

    def changed(fit: Fit) -> Fit:
        mine = used.get(fit.op)
        if mine is None or _kernels_of(fit) != _kernels_of(mine):
            return fit
        known = fit.provenance
        factor = values.get("kernels", 1.0)
        if fit is mine:
            known = replace(known, source=Source.FITTED, held_out_mape=round(judged.after.mape, 4), range_error=None)
        if fit is mine or factor != 1.0:
            known = replace(known, origin=f"{known.origin}; {origin}")
        return replace(fit, pieces=tuple(_scaled(piece, factor) for piece in fit.pieces), provenance=known)

    replaced = {Op.STEP: "step", Op.SAMPLE: "sequence"}
    fits = [changed(fit) for fit in replica.profile.fits if replaced.get(fit.op) not in values]
    known = Provenance(source=Source.FITTED, origin=origin, held_out_mape=round(judged.after.mape, 4))
    if "step" in values:
        fits.append(Fit(op=Op.STEP, pieces=(Piece(fixed_s=values["step"]),), provenance=known, scope=FitScope()))
    if "sequence" in values:
        fits.append(Fit(op=Op.SAMPLE, pieces=(Piece(token_s=values["sequence"]),), provenance=known, scope=FitScope()))
    return replace(replica.profile, fits=tuple(fits))


def _kernels_of(fit: Fit) -> tuple[str | float | None, ...]:
    """Return what distinguishes a fit's kernels within its operator: precision, and whether attention is linear."""
    return fit.scope.weights, fit.scope.weight_bytes, fit.scope.state_flops


def _scaled(piece: Piece, factor: float) -> Piece:
    return Piece(**{field.name: float(f"{getattr(piece, field.name) * factor:.4g}") for field in fields(Piece)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Observations as columns, shape [observations]."""

    seconds: FloatArray
    # As in `Price`
    kernels_s: FloatArray
    step_s: FloatArray
    sample_s: FloatArray
    sequences: FloatArray
    kind: NDArray[np.str_]

    def rows(self, mine: NDArray[np.bool_]) -> _Table:
        return _Table(**{name: getattr(self, name)[mine] for name in self.__slots__})

    def features(self, names: Sequence[str]) -> FloatArray:
        """Return the multipliers of the parameters, shape [observations, names]."""
        columns = {"kernels": self.kernels_s, "step": np.ones(len(self.seconds)), "sequence": self.sequences}
        return np.stack([columns[name] for name in names], axis=1)

    def own(self, names: Sequence[str]) -> FloatArray:
        """Return the profile's seconds for everything except these parameters."""
        columns = (getattr(self, column) for name, (column, _) in _DOUBTS.items() if name not in names)
        return sum(columns, np.zeros(len(self.seconds)))

    def predicted(self, values: Mapping[str, float]) -> FloatArray:
        own = self.own(tuple(values))
        return own + self.features(tuple(values)) @ np.array([*values.values()]) if values else own


def _table(observed: Observed, replica: CalibratedReplica) -> _Table:
    prices = [replica.price(one) for one in observed.observations]
    return _Table(
        seconds=np.array([one.seconds for one in observed.observations]),
        **{one.name: np.array([getattr(price, one.name) for price in prices]) for one in fields(Price)},
        kind=np.array([one.kind.value for one in observed.observations], dtype=np.str_),
    )


def _without_standstills(table: _Table, left_out: Counter[str]) -> _Table:
    """Return the table without observations that took several times as long as others of their kind, by the profile."""
    ratio = table.seconds / table.predicted({})
    keep = np.ones(len(ratio), np.bool_)
    for kind in np.unique(table.kind):
        mine = table.kind == kind
        keep[mine] = ratio[mine] <= STOOD_STILL * np.median(ratio[mine])
    if not keep.all():
        left_out[f"took {STOOD_STILL:g} times as long as others like it (compilation, or the host stood still)"] += int(
            (~keep).sum()
        )
    return table.rows(keep)


def _chosen(table: _Table, block: NDArray[np.intp]) -> tuple[tuple[str, ...], dict[str, float], dict[str, float]]:
    """Return the parameters that the table can distinguish and that predict best, their values and margins.

    Each candidate is fitted again without each group of blocks: its predictions for that group judge it, and how far
    its parameters move shows how certain they are (jackknife).
    """
    best: tuple[tuple[str, ...], dict[str, float], dict[str, float]] = ((), {}, {})
    least = float(np.abs(table.predicted({}) / table.seconds - 1).mean())
    group = block % _GROUPS
    groups = [g for g in np.unique(group) if (group != g).any()]
    # Means over intervals tell at most one parameter: the others shift several of them by more than the jackknife sees.
    are_means = bool((table.kind == ObservedKind.INTERVAL.value).all())
    are_enough = len(table.seconds) >= _LEAST_SEVERAL and not are_means
    for names in [names for names in _CANDIDATES if len(names) == 1 or are_enough]:
        values = _fit(table, names)
        without = np.array([_fit(table.rows(group != g), names) for g in groups])
        spread = np.sqrt((len(groups) - 1) / len(groups) * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
        margins = _TWO_SIDED * spread
        share = margins * np.abs(table.features(names)).mean(axis=0) / table.seconds.mean()
        errors = []
        for g, found in zip(groups, without, strict=True):
            left = table.rows(group == g)
            errors.append(np.abs(left.predicted(dict(zip(names, found, strict=True))) / left.seconds - 1))
        error = float(np.concatenate(errors).mean())
        # Several parameters that the load does not tell apart move by much together, without predicting worse.
        told_apart = len(names) == 1 or bool((share <= _CERTAIN).all())
        # Nor do they tell kernels apart if none of the time is left for them.
        told_apart &= len(names) == 1 or dict(zip(names, values, strict=True)).get("kernels", 1.0) >= _FACTORS[0]
        is_worth_it = error < min(_WORTH * least, least - _LEAST_WORTH)
        if told_apart and is_worth_it:
            least = error
            rounded = {name: _rounded(name, value) for name, value in zip(names, values, strict=True)}
            if are_means:
                margins = margins + _shifts(table, names, values)
            best = names, rounded, {name: float(m) for name, m in zip(names, margins, strict=True)}
    return best


def _shifts(table: _Table, names: Sequence[str], values: FloatArray) -> FloatArray:
    """Return how far the fitted values may move because other parameters are not what the profile has."""
    shifts = np.zeros(len(names))
    for name, (column, doubt) in _DOUBTS.items():
        if name not in names:
            others = [replace(table, **{column: getattr(table, column) * (1.0 + sign * doubt)}) for sign in (-1, 1)]
            shifts += np.max([np.abs(_fit(other, names) - values) for other in others], axis=0)
    return shifts


def _rounded(name: str, value: float) -> float:
    """Return a value to four digits; of the host, 0 for times that are too short for a profile to be plausible."""
    number_of = {"step": 1.0, "sequence": 64.0}
    if name in number_of and value * number_of[name] < STEP_SECONDS[0]:
        return 0.0
    return float(f"{value:.4g}")


def _fit(table: _Table, names: Sequence[str]) -> FloatArray:
    """Return the values >= 0 of parameters with the least absolute relative error (iteratively reweighted)."""
    features = table.features(names) / table.seconds[:, None]
    target = 1.0 - table.own(names) / table.seconds
    weights, values = np.ones(len(target)), np.zeros(len(names))
    for _ in range(_REWEIGHTS):
        values = np.array(non_negative_least_squares(features.T, target, weights))
        weights = 1.0 / np.maximum(np.abs(features @ values - target), 0.01)
    return values


def _judgements(table: _Table, before: FloatArray, after: FloatArray) -> list[HeldOutErrors]:
    def judgement(kind: str) -> HeldOutErrors:
        mine = table.kind == kind if kind else np.ones(len(table.kind), np.bool_)
        seconds = table.seconds[mine]
        errors = [_errors(predicted[mine] / seconds - 1) for predicted in (before, after)]
        count, mean_s = int(mine.sum()), float(seconds.mean())
        return HeldOutErrors(kind=kind, count=count, mean_s=mean_s, before=errors[0], after=errors[1])

    kinds = [str(kind) for kind in np.unique(table.kind)]
    return [judgement(kind) for kind in [*(kinds if len(kinds) > 1 else []), ""]]


def _errors(errors: FloatArray) -> Errors:
    absolute = np.abs(errors)
    return Errors(mape=float(absolute.mean()), bias=float(errors.mean()), p90=float(np.quantile(absolute, 0.9)))
