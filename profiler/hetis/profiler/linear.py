"""Rates of the gated delta rule under each engine; ``tools/engine_kernels.py`` derives them.

The time for one prompt is one piece: ``fixed + token T + flop F``. ``token`` is there because every 64 tokens wait
for the state that those before them leave. Prompts of one iteration do not wait for one another, but the cost model
has no more than the iteration's tokens and counts them as one prompt: too long where an iteration has many short
ones. In decode a state is read and written about as fast as KV is, and the fits stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hetis.formats import catalogue
from hetis.profiler.engine_tables import NEAREST, kernels_in, provenance_of
from hetis.profiler.fitting import rounded
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, Op, Profile

FILE = "linear.json"
# All models with the rule (Qwen3-Next, Qwen3.5) have it in three of four layers, with two of its heads per query head.
MODEL = "Qwen/Qwen3.5-397B-A17B"
_HEAD_DIM = 256  # head size of the attention layers beside it; profiles without fits for it use those for any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRuleKernel:
    """One engine's gated delta rule for a prompt on one architecture, in one layer.

    ``flop`` is relative to the GPU's 16-bit peak. ``mape`` is the error on the rows of the fit.
    """

    architecture: str
    engine: str
    fixed_s: float
    token_s: float
    flop: float
    num_points: int
    mape: float
    origin: str


def linear_fits(gpu: GpuType, profile: Profile, engine: str) -> Iterator[Fit]:
    """Yield the fits of prefill attention for models with gated delta rules; Hopper's rule if its own was not measured.

    A fit's time is that of a model's mean layer: attention in some of them, the rule in the others.
    """
    kernels = [kernel for kernel in shipped() if kernel.engine == engine]
    own = [kernel for kernel in kernels if kernel.architecture == gpu.architecture]
    for kernel in own or [kernel for kernel in kernels if kernel.architecture == NEAREST]:
        for fit in profile.fits:
            if fit.op is Op.PREFILL_ATTENTION and fit.scope.head_dim in (None, _HEAD_DIM):
                yield _with_rule(fit, kernel, gpu)


def _with_rule(fit: Fit, kernel: DeltaRuleKernel, gpu: GpuType) -> Fit:
    """Return the fit of attention with the rule in the layers that have no attention.

    Only the FLOPs of the rule depend on the GPU; what a prompt waits for is the same on all of an architecture.
    """
    model = linear_model()
    share, head_flops = model.kv_share, model.state_flops() / model.q_heads
    pieces = tuple(
        replace(
            piece,
            fixed_s=rounded(share * piece.fixed_s + (1.0 - share) * kernel.fixed_s),
            token_s=rounded(share * piece.token_s + (1.0 - share) * kernel.token_s),
            # `flop_s` charges the rule's FLOPs at attention's rate already. FLOPs and bytes are of the mean layer.
            head_s=rounded(share * piece.head_s + head_flops * max(0.0, kernel.flop / gpu.fp16_flops - piece.flop_s)),
        )
        for piece in fit.pieces
    )
    rule = provenance_of(kernel, gpu)
    return Fit(
        op=fit.op,
        pieces=pieces,
        provenance=replace(rule, origin=f"{fit.provenance.origin}; {rule.origin}"),
        scope=replace(fit.scope, state_flops=head_flops),
    )


@functools.cache
def shipped() -> tuple[DeltaRuleKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, DeltaRuleKernel)


@functools.cache
def linear_model() -> ModelSpec:
    return catalogue.find_model(MODEL).model
