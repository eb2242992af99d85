"""Leaders that are killed, cut off from their store, or stand still: nothing is lost, doubled, or told too late."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.run import Figures, inject

TAKEOVER_S, AGENTS_S = 10.0, 15.0  # what is promised
SLACK = 3  # times as long in CI, where a machine has more to do than to keep promises of time


def assert_well(figures: Figures, *, slack: float = 1) -> None:
    assert figures.findings is not None
    assert figures.findings.violations == (), figures.findings
    assert figures.findings.acknowledged > 10, figures.findings
    assert figures.refused == [], figures.refused
    assert max(figures.takeovers) <= slack * TAKEOVER_S, figures
    assert max(figures.agents) <= slack * AGENTS_S, figures


def test_a_leader_that_is_killed_and_one_that_is_cut_off_are_followed(postgres_url: str, tmp_path: Path) -> None:
    figures = inject(postgres_url, tmp_path, kills=1, partitions=1, stops=1, delays=1, seed=1, lease_s=3.0)
    assert_well(figures, slack=SLACK)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_fifty_leaders_are_killed_and_ten_cut_off(postgres_url: str, tmp_path: Path, seed: int) -> None:
    figures = inject(postgres_url, tmp_path, kills=50, partitions=10, stops=10, delays=10, seed=seed, lease_s=5.0)
    assert_well(figures)
