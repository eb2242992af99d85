"""Kernels are compiled before the clock of a look runs: on a new machine that takes longer than a look may."""

from __future__ import annotations

import pytest

from hetis.planner.fleet.redispatching.planning import compile_kernels


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    compile_kernels()
