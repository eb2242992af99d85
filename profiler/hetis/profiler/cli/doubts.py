"""Impossible and doubtful figures in a profile."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.formats.units import format_bytes
from hetis.profiler.cli.profile_table import scope_words
from hetis.profiler.plausibility import implausible_fits
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, Op, Profile

_TOLERANCE = 1.15  # boost clocks and rounding go slightly above nominal peaks
_CACHED = 4.0  # attention and small products may read from a cache faster than from memory
WANTED_ERROR = 0.10


def impossible(profile: Profile, gpu: GpuType) -> Iterator[str]:
    """Yield a sentence per number that no ``gpu`` can reach."""
    if profile.usable_bytes > gpu.memory_bytes:
        yield (
            f"usable_bytes is {format_bytes(profile.usable_bytes)}, more than the {format_bytes(gpu.memory_bytes)} of "
            f"a {gpu.name}"
        )
    if profile.reserve_bytes >= profile.usable_bytes:
        yield f"reserve_bytes is {format_bytes(profile.reserve_bytes)}, which leaves nothing of usable_bytes"
    for fit in profile.fits:
        if fit.op not in (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION):
            continue
        flops = gpu.fp16_flops if fit.scope.weight_bytes != 1.0 else gpu.fp8_flops or gpu.fp16_flops
        reached = _rate([piece.flop_s for piece in fit.pieces])
        if reached is not None and fit.op is not Op.DECODE_ATTENTION and reached > flops * _TOLERANCE:
            yield f"{_name(fit)} reaches {reached / 1e12:.4g} TFLOP/s, {gpu.name} at most {flops / 1e12:.4g}"
        reached = _rate([piece.byte_s for piece in fit.pieces])
        if reached is not None and reached > gpu.mem_bytes_per_s * _CACHED:
            yield (
                f"{_name(fit)} reads {reached / 1e9:.4g} GB/s, {gpu.name} at most {gpu.mem_bytes_per_s / 1e9:.4g} from "
                "memory"
            )
    for fit, doubt in implausible_fits(profile, gpu):
        yield f"{_name(fit)}: {doubt}"


def doubts_of(profile: Profile) -> Iterator[str]:
    """Yield a sentence for everything that makes a plan with this profile less certain than it may look."""
    for fit in profile.fits:
        error = fit.provenance.held_out_mape
        if error is None and fit.op not in (Op.STEP, Op.SAMPLE):
            yield f"{_name(fit)}: how wrong it is on points it never saw is not known"
        elif error is not None and error > WANTED_ERROR:
            yield f"{_name(fit)}: wrong by {error:.1%} on points it never saw, {WANTED_ERROR:.1%} is wanted"
        if all(piece.flop_s == piece.byte_s == piece.token_s == piece.wire == 0 for piece in fit.pieces) and (
            fit.op is not Op.STEP
        ):
            yield f"{_name(fit)}: takes the same time whatever the work"


def _rate(coefficients: list[float]) -> float | None:
    """Return the rate for large work: that of the piece with the largest slope."""
    steepest = max(coefficients)
    return 1 / steepest if steepest > 0 else None


def _name(fit: Fit) -> str:
    scope = ", ".join(scope_words(fit.scope))
    return f"{fit.op.value} ({scope})" if scope else fit.op.value
