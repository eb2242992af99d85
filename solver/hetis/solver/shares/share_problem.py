"""The problem of shares (GPU types with counts, tenants with weights and speed-ups) and its solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hetis.solver.errors import InvalidProblemError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """A GPU type to share, and the number of its GPUs."""

    gpu: str
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidProblemError(f"GPU type {self.gpu}: count is {self.count}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareJob:
    """A kind of work of a tenant.

    ``speedups`` [types] is its throughput on one GPU of each type, in any unit; 0 if it cannot run there.
    """

    name: str
    speedups: tuple[float, ...]
    min_gpus: int = 1  # the fewest GPUs it can start on

    def __post_init__(self) -> None:
        for speedup in self.speedups:
            if not (speedup >= 0 and math.isfinite(speedup)):
                raise InvalidProblemError(f"job {self.name}: speed-up is {speedup}, must be finite and >= 0")
        if not any(self.speedups):
            raise InvalidProblemError(f"job {self.name} runs on no GPU type: all its speed-ups are 0")
        if self.min_gpus < 1:
            raise InvalidProblemError(f"job {self.name}: min_gpus is {self.min_gpus}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareTenant:
    """A tenant with a claim to ``weight`` parts of the fleet, which its jobs share equally."""

    name: str
    jobs: tuple[ShareJob, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InvalidProblemError(f"tenant {self.name}: weight is {self.weight}, must be finite and > 0")
        if not self.jobs:
            raise InvalidProblemError(f"tenant {self.name} has no jobs")


@dataclass(frozen=True, kw_only=True)
class ShareProblem:
    """A fleet of a few GPU types and the tenants that share it.

    Every job of a tenant is a *claimant* of its own with an equal part of the tenant's weight (OEF's virtual users):
    rows of all arrays are claimants, tenant by tenant.
    """

    gpus: tuple[GpuShare, ...]
    tenants: tuple[ShareTenant, ...]

    def __post_init__(self) -> None:
        if not self.gpus or not self.tenants:
            raise InvalidProblemError("shares need at least one GPU type and one tenant")
        for tenant in self.tenants:
            for job in tenant.jobs:
                if len(job.speedups) != len(self.gpus):
                    raise InvalidProblemError(
                        f"tenant {tenant.name}, job {job.name}: {len(job.speedups)} speed-ups for {len(self.gpus)} GPU "
                        "types"
                    )

    @cached_property
    def counts(self) -> FloatArray:
        """Return the GPUs of each type, [K]."""
        return np.array([share.count for share in self.gpus], dtype=float)

    @cached_property
    def speedups(self) -> FloatArray:
        """Return each claimant's throughput on one GPU of each type over that on the slowest it runs on, [V, K]."""
        raw = np.array([job.speedups for tenant in self.tenants for job in tenant.jobs])
        return np.asarray(raw / np.where(raw > 0.0, raw, np.inf).min(axis=1, keepdims=True))

    @cached_property
    def weights(self) -> FloatArray:
        """Return the parts of each claimant, [V]."""
        return np.array([tenant.weight / len(tenant.jobs) for tenant in self.tenants for _ in tenant.jobs])

    @cached_property
    def tenant_of(self) -> IntArray:
        """Return the index of each claimant's tenant, [V]."""
        return np.array([i for i, tenant in enumerate(self.tenants) for _ in tenant.jobs], dtype=np.int64)

    @cached_property
    def min_gpus(self) -> IntArray:
        """Return the fewest GPUs on which each claimant can start, [V]."""
        return np.array([job.min_gpus for tenant in self.tenants for job in tenant.jobs], dtype=np.int64)

    @cached_property
    def equal_split(self) -> FloatArray:
        """Return the same part of every GPU type for each claimant, by weight, [V, K]."""
        return np.asarray(np.outer(self.weights / self.weights.sum(), self.counts))

    def values(self, amounts: FloatArray) -> FloatArray:
        """Return the value of each claimant's share, [V]: throughput in GPUs of its slowest type."""
        return np.asarray(np.einsum("vk,vk->v", self.speedups, amounts))


# --- the answer


class FairnessRule(StrEnum):
    """The rule by which shares are chosen."""

    COOPERATIVE = "cooperative"  # OEF: highest total value without envy
    NON_COOPERATIVE = "non-cooperative"  # OEF: highest total value at equal value per part
    MAX_MIN = "gavel"  # Gavel: the least gain over an equal split is largest
    TRADING = "gandiva-fair"  # Gandiva_fair: equal split, then pairs of tenants trade fast GPUs for slow ones
    EQUAL = "equal-split"  # the same part of every type


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of every claimant and type, in GPUs; fractions are shares of time.

    ``value`` is the total; no shares under this rule exceed ``bound`` (infinite for `gandiva-fair`, which is a
    procedure and not an optimum). ``multipliers`` prove the bound: see `check_shares`.
    """

    rule: FairnessRule
    amounts: FloatArray  # [V, K]
    value: float
    bound: float
    multipliers: FloatArray  # [V, V] for cooperative, [V] for non-cooperative, otherwise empty

    @property
    def gap(self) -> float:
        return abs(self.bound - self.value) / self.value if np.isfinite(self.bound) else np.inf


def tenant_values(problem: ShareProblem, amounts: FloatArray) -> FloatArray:
    """Return the value of each tenant: the sum over its jobs, [T]."""
    return np.asarray(np.bincount(problem.tenant_of, problem.values(amounts), len(problem.tenants)), dtype=float)
