"""Random share problems."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hetis.solver.shares.share_problem import GpuShare, ShareJob, ShareProblem, ShareTenant


def random_problem(generator: np.random.Generator, *, most_tenants: int = 6, most_types: int = 4) -> ShareProblem:
    """Two to six tenants with one or two jobs, two to four types; now and then a job that cannot run on one."""
    types = int(generator.integers(2, most_types + 1))
    return ShareProblem(
        gpus=tuple(GpuShare(gpu=f"g{j}", count=int(generator.integers(1, 17))) for j in range(types)),
        tenants=tuple(
            ShareTenant(
                name=f"t{i}",
                weight=float(generator.choice([0.5, 1.0, 1.0, 2.0])),
                jobs=tuple(
                    ShareJob(name=f"j{k}", speedups=_speedups(generator, types), min_gpus=int(generator.integers(1, 3)))
                    for k in range(int(generator.choice([1, 1, 2])))
                ),
            )
            for i in range(int(generator.integers(2, most_tenants + 1)))
        ),
    )


def _speedups(generator: np.random.Generator, types: int) -> tuple[float, ...]:
    speedups = generator.uniform(1.0, 10.0, types)
    if generator.random() < 0.15:
        speedups[int(generator.integers(types))] = 0.0
    return tuple(speedups.tolist())


problems = st.integers(0, 2**32 - 1).map(lambda seed: random_problem(np.random.default_rng(seed)))
