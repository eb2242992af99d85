"""Rates of the gated delta rule under each engine: derived from the engines' published tables.

``python -m hetis.profiler.linear --tables DIR --out FILE`` reads ``SYSTEM/linear_attention/ENGINE/VERSION/
gdn_perf.parquet`` of aiconfigurator-core 0.12.0 (Apache-2.0; ``systems/data`` in its package) and writes the package's
``linear.json``. A row is one kernel of one layer in Qwen3.5; a prompt takes two, the convolution and the rule itself.
Their time for one prompt is one piece: ``fixed + token T + flop F``. ``token`` is there because every 64 tokens wait
for the state that those before them leave. Prompts of one iteration do not wait for one another, but the cost model
has no more than the iteration's tokens and counts them as one prompt: too long where an iteration has many short ones.
In decode a state is read and written about as fast as KV is, and the fits stay as they are. The same tables always
give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.profiler.engine_tables import NEAREST, PUBLISHER, SYSTEMS, kernels_in, make_file, provenance_of, rows_in
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.solver.cluster import GpuType
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.profile import Fit, Op, Profile

FILE = "linear.json"
# All models with the rule (Qwen3-Next, Qwen3.5) have it in three of four layers, with two of its heads per query head.
MODEL, _VALUE_HEADS = "Qwen/Qwen3.5-397B-A17B", 64
_SYSTEMS = ("h100_sxm", "b200_sxm", "l40s", "rtx_pro_6000_server")  # the table of a100_sxm lacks the rule itself
_VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
_CONVOLUTION, _RULE = "causal_conv1d", "chunk_gated_delta_rule"  # how the names of their kernels begin
_HEAD_DIM = 256  # head size of the attention layers beside it; profiles without fits for it use those for any
_LEAST_TOKENS, _MOST_TOKENS = 16, 32768


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
    model = _model()
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
def _model() -> ModelSpec:
    return catalogue.find_model(MODEL).model


def derived(tables: Path) -> Iterator[DeltaRuleKernel]:
    """Yield the kernel of every system and engine."""
    rule = next(mixer for mixer, _ in _model().mixers if mixer.kernel is Kernel.RECURRENT)
    for system, (engine, version) in itertools.product(_SYSTEMS, _VERSIONS.items()):
        gpu = catalogue.find_gpu(SYSTEMS[system]).gpu
        rows = rows_in(tables / system / "linear_attention" / engine / version / "gdn_perf.parquet")
        prompts = list(_prompts(rows))
        head_s = rule.token_flops() / _VALUE_HEADS / gpu.fp16_flops
        features = np.array([(1.0, tokens * 1e-9, tokens * heads * head_s) for tokens, heads, _ in prompts])
        found = fit_pieces(features, np.array([seconds for *_, seconds in prompts]), num_pieces=1)
        fixed_s, token_ns, flop = found.pieces[0]
        yield DeltaRuleKernel(
            architecture=gpu.architecture, engine=engine, fixed_s=rounded(fixed_s), token_s=rounded(token_ns * 1e-9),
            flop=rounded(flop), num_points=len(prompts), mape=rounded(found.mape),
            origin=f"{PUBLISHER}, {engine} {version} on {gpu.name}, gated delta rule",
        )  # fmt: skip


def _prompts(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, float]]:
    """Yield tokens, value heads of a rank, and seconds of both kernels, for single prompts."""
    seconds = defaultdict[tuple[str, int, int], dict[str, float]](dict)
    for row in rows:
        tokens = row["seq_len"]
        if row["phase"] == "context" and row["batch_size"] == 1 and _LEAST_TOKENS <= tokens <= _MOST_TOKENS:
            kernel = next(name for name in (_CONVOLUTION, _RULE) if row["kernel_source"].startswith(name))
            seconds[row["model_name"], row["num_v_heads"], tokens][kernel] = row["latency"] * 1e-3
    for (_, heads, tokens), kernels in sorted(seconds.items()):
        if len(kernels) == 2:
            yield tokens, heads, sum(kernels.values())


def main(arguments: Sequence[str] | None = None) -> int:
    return make_file("linear", __doc__ or "", derived, arguments)


if __name__ == "__main__":
    sys.exit(main())
