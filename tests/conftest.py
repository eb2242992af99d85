"""One thread per process, the effort of hypothesis, and the objects that the garbage collector need not traverse.

The profile `ci` is quick and deterministic; HYPOTHESIS_PROFILE=thorough searches at random.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, Phase, settings

# torch's threads busy-wait for each other, which wastes CPU time with several test processes per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Problems are large values, and first calls compile; neither is a fault of a test.
_ACCEPTED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)

# Examples are small already, and shrinking takes minutes of solving, so only `thorough` does it.
_NO_SHRINKING = (Phase.explicit, Phase.generate)

settings.register_profile(
    "ci",
    max_examples=18,
    deadline=None,
    derandomize=True,
    database=None,
    phases=_NO_SHRINKING,
    suppress_health_check=_ACCEPTED,
)
settings.register_profile("thorough", max_examples=1000, deadline=None, suppress_health_check=_ACCEPTED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep thousands of tests out of garbage collections: each full one takes half a second with them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
