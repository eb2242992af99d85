"""Compiles the kernels before any timed check: on a new machine that takes longer than a check may."""

from __future__ import annotations

import pytest

from hetis.solver.redispatch.redispatcher import compile_redispatch


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    compile_redispatch()
