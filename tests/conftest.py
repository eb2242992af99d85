"""One thread per process, the effort of hypothesis, tests that are coroutines, and the work of the garbage collector.

The profile `ci` is quick and deterministic; HYPOTHESIS_PROFILE=thorough (`make soak-properties`) searches at random.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# torch's threads busy-wait for each other, which wastes CPU time with several test processes per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What shells and containers set, and tests do not expect. Streams of users are buffered, so that a write may fail only
# when the process ends; a proxy does not reach the loopback addresses of tests.
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
for _name in ("PYTHONUNBUFFERED", "FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", *_PROXIES):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

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


ASYNC_LIMIT_S = 180.0  # where a test waits for ever; a solver may have to be compiled first


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a test that is a coroutine function in an event loop of its own, with a time limit.

    Fixtures that are exit stacks are closed in the same loop. The test fails if a task of our packages ends with an
    error that nobody retrieves.
    """
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):
        orphans = list[str]()

        def note_orphan(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            work = getattr(context.get("future"), "get_coro", lambda: None)()
            is_ours = "/hetis/" in getattr(getattr(work, "cr_code", None), "co_filename", "")
            if is_ours and "never retrieved" in context["message"]:
                orphans.append(f"{context['message']}: {context.get('exception')!r}")
            loop.default_exception_handler(context)

        async def limited(**fixtures: Any) -> None:
            asyncio.get_running_loop().set_exception_handler(note_orphan)
            async with asyncio.timeout(ASYNC_LIMIT_S), contextlib.AsyncExitStack() as stack:
                for fixture in fixtures.values():
                    if isinstance(fixture, contextlib.AsyncExitStack):
                        await stack.enter_async_context(fixture)
                await test(**fixtures)

        def run(**fixtures: Any) -> None:
            asyncio.run(limited(**fixtures))
            assert not orphans

        pyfuncitem.obj = run
    return (yield)
