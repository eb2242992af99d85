"""Whole engines in virtual time: `benchmarks.whole_engine` simulates what the formulas predict for such a run."""

from __future__ import annotations

import pytest

from benchmarks.whole_engine import MODEL, Point, points_of, simulated, with_host
from hetis.profiler.defaults import shipped_profile
from hetis.solver.profile import Profile
from tools.whole_engine import EngineTime, predicted_s


def a100() -> Profile:
    profile = shipped_profile("A100-SXM-80GB")
    assert profile is not None
    return profile


def point(*, tp: int, batch: int, prompt: int = 512, output: int = 128) -> Point:
    return Point(
        gpu="A100-SXM-80GB", tp=tp, batch=batch, prompt_tokens=prompt, output_tokens=output, prompt_s=1.0, token_s=1.0
    )


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_a_batch_that_comes_at_once_takes_the_time_of_its_iterations(tp: int, batch: int) -> None:
    profile, asked = a100(), point(tp=tp, batch=batch)
    found = simulated(profile, asked)
    assert found is not None
    assert found.prompt_s == pytest.approx(predicted_s(profile, MODEL, tp, "prompt", batch, 512, 128), rel=0.05)
    # In the middle of the output, contexts are the prompt and half of the output.
    middle_s = predicted_s(profile, MODEL, tp, "token", batch, 512 + 64, 128)
    assert found.token_s == pytest.approx(middle_s, rel=0.01)


def test_the_host_is_charged_once_an_iteration() -> None:
    asked = point(tp=4, batch=2)
    bare, hosted = simulated(a100(), asked), simulated(with_host(a100(), 0.01), asked)
    assert bare is not None
    assert hosted is not None
    assert hosted.prompt_s - bare.prompt_s == pytest.approx(0.01)
    assert hosted.token_s - bare.token_s == pytest.approx(0.01)
    assert hosted.end_to_end_s - bare.end_to_end_s == pytest.approx(128 * 0.01)


def test_runs_that_do_not_fit_at_once_are_not_compared() -> None:
    assert simulated(a100(), point(tp=2, batch=64, prompt=8192)) is None


def test_a_point_needs_both_phases() -> None:
    def time(phase: str, batch: int, seconds: float) -> EngineTime:
        return EngineTime(
            gpu="A100-SXM-80GB", model=MODEL, tp=2, phase=phase, batch=batch, prompt_tokens=512, output_tokens=128,
            measured_s=seconds, predicted_s=1.0,
        )  # fmt: skip

    found = points_of([time("prompt", 1, 0.2), time("token", 1, 0.05), time("token", 2, 0.06)])
    assert [(one.batch, one.prompt_s, one.token_s) for one in found] == [(1, 0.2, 0.05)]
    assert found[0].end_to_end_s == pytest.approx(0.2 + 127 * 0.05)
