"""Lines for people fit 80 columns where stdout is no terminal; `-o wide` does not fold them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from tests.planner.command_line import EXAMPLES, invoke

FLEETS = {
    "paper": ["-c", str(EXAMPLES / "paper.yaml"), "-m", "Llama-2-70B", "-w", "8000/300"],
    "fleet-160": ["-c", str(EXAMPLES / "fleet-160.yaml"), "-m", "Llama-2-70B", "-w", "azure_conv_2023"],
    "two-cards": ["-c", str(EXAMPLES / "two-cards.yaml"), "-m", "Llama-3.1-8B", "-w", "1000/200"],
}


class Placed(NamedTuple):
    """A saved plan, and the table that was printed of it."""

    fleet: str
    path: Path
    table: str


@pytest.fixture(scope="module", params=FLEETS)
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Placed:
    path = tmp_path_factory.mktemp(request.param) / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        result = invoke("place", *FLEETS[request.param], "--no-verify", "--out", str(path))
    assert result.exit_code == ExitCode.OK, result.stderr
    return Placed(request.param, path, result.stdout)


@pytest.fixture(autouse=True)
def in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def widest(capsys: pytest.CaptureFixture[str], *words: str) -> int:
    assert run(list(words)) in (ExitCode.OK, ExitCode.INFEASIBLE)
    shown = capsys.readouterr().out
    assert shown
    return max(len(line) for line in shown.splitlines())


@pytest.mark.parametrize("verb", ["diff", "explain", "check", "simulate"])
def test_what_verbs_say_of_a_plan_fits_80_columns(
    placed: Placed, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    plan = str(placed.path)
    options = {"simulate": ["--requests", "200"], "diff": [plan]}
    assert widest(capsys, verb, plan, *options.get(verb, [])) <= 80


def test_a_plan_fits_80_columns_unless_wide(placed: Placed, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 < max(map(len, placed.table.splitlines())) <= 80
    assert widest(capsys, "place", *FLEETS[placed.fleet], "--dry-run") <= 80
    if placed.fleet == "two-cards":  # one search is enough
        assert widest(capsys, "place", *FLEETS[placed.fleet], "--no-verify", "-o", "wide") > 80
