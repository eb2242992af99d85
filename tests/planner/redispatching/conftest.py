"""Kernels are compiled before the clock of a look runs: on a new machine that takes longer than a look may."""

from __future__ import annotations

import pytest

from hetis.solver.redispatch.solve import compile_redispatch


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    compile_redispatch()
