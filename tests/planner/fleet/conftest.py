"""A world to start from."""

from __future__ import annotations

import pytest

from tests.planner.fleet.world import World


@pytest.fixture
def world() -> World:
    """A world with a serving replica."""
    world = World()
    world.serve()
    return world
