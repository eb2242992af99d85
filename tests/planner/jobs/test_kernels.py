"""What a search needs is compiled before its time limit starts to run."""

from __future__ import annotations

import pytest

from hetis.planner.jobs import kernels
from hetis.solver.placement.exact import MAX_GPUS


@pytest.mark.parametrize(
    ("strategies", "for_engine", "loaded"),
    [
        (("hetis",), False, [(3, False)]),
        (("hetis", "uniform"), True, [(3, True)]),
        (("hetis", "splitwise"), True, [(3, True), (MAX_GPUS + 1, False)]),
    ],
)
def test_types_for_roles_are_priced_for_engines_too(
    monkeypatch: pytest.MonkeyPatch, strategies: tuple[str, ...], for_engine: bool, loaded: list[tuple[int, bool]]
) -> None:
    asked = list[tuple[int, bool]]()
    monkeypatch.setattr(
        kernels, "load_kernels", lambda num_gpus, *, for_engine=False, report: asked.append((num_gpus, for_engine))
    )
    kernels.compile_kernels(3, strategies, for_engine=for_engine, report=lambda _: None)
    assert asked == loaded
