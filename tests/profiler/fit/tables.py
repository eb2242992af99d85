"""Tables of measurements that were made up, and their fits."""

from __future__ import annotations

from functools import cache

import numpy as np

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.fit import fit_profile
from hetis.profiler.fit.points import Points
from hetis.solver.profile import Fit, FitScope, Op

A100 = catalogue.find_gpu("A100-SXM-80GB").gpu


def decode_table(*, cold: bool = True, noise: float = 0.0, factor: float = 1.0) -> Table:
    """``max(20 us, 10 us + 0.6 ps per byte + 2 ns per head)`` for heads of 128, four of them per KV head."""
    batches, contexts = (1, 4, 8, 16, 32, 64), 2 ** np.arange(7, 15)
    rows = np.array([(b, c, h) for b in batches for c in contexts for h in (8, 16, 32, 64)])
    batch, context, heads = (rows[:, i].astype(np.float64) for i in range(3))
    num_bytes = 512.0 * batch * context * heads / 4
    seconds = np.maximum(2e-5, 1e-5 + 6e-13 * num_bytes + 2e-9 * batch * heads)
    seconds *= factor * np.exp(noise * np.random.default_rng(1).standard_normal(len(rows)))
    return Table(
        op=MeasuredOp.DECODE_ATTENTION,
        kernel="made up",
        cold=cold,
        columns={
            "batch": batch,
            "context_tokens": context,
            "query_heads": heads,
            "kv_heads": heads / 4,
            "head_dim": np.full(len(rows), 128.0),
            "seconds": seconds,
        },
    )


def of(*tables: Table, gpu: str = A100.name) -> Measurements:
    return Measurements(gpu=gpu, provenance=MeasuredBy(tool="a test"), tables=tables)


def decode_fit(table: Table) -> Fit:
    profile = fit_profile([of(table)], A100).profile
    return next(fit for fit in profile.fits if fit.op is Op.DECODE_ATTENTION and fit.scope.queries_per_group == 4)


@cache
def noisy() -> Fit:
    return decode_fit(decode_table(noise=0.2))


def small_layers(noise: float = 0.0) -> Points:
    """Twenty layers without a shape to hold out: ``10 us + 1 ps per byte``."""
    num_bytes = np.linspace(1e6, 1e8, 20)
    seconds = (1e-5 + 1e-12 * num_bytes) * np.exp(noise * np.random.default_rng(3).standard_normal(20))
    return Points(
        op=Op.DENSE,
        scope=FitScope(),
        features=np.stack([np.ones(20), np.zeros(20), num_bytes], axis=1),
        seconds=seconds,
        shapes=["one"] * 20,
        sizes={"tokens": num_bytes},
        origin="a test",
    )
