"""What `tests.runtime.checkpoints` wrote goes when the tests end."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_checkpoints_stay() -> Iterator[None]:
    yield
    checkpoints = sys.modules.get("tests.runtime.checkpoints")
    if checkpoints is not None:
        checkpoints.remove_checkpoints()
