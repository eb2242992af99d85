"""The demo's model, made once, and a server for those tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.server.live import Live, demo_model, engine_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with Live(engine_of(folder), folder) as server:
        yield server
