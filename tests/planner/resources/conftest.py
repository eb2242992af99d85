"""A planner whose services are called through a real server."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.planner.resources.served import Served, served


@pytest.fixture
def planner(tmp_path: Path) -> AbstractAsyncContextManager[Served]:
    return served(tmp_path)
