"""The commands that messages name as the next ones are run against a fake planner, where they can do no harm."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.docs.test_named_commands import NEXT, VALUE, can_be_typed, messages
from tests.planner.cli_server.conftest import EXAMPLES, Run
from tests.planner.client.fake_planner import FakePlanner

# What may stand for an inserted value: one of them has to, whatever its message means.
NAMES = ("plans/day", "plans/night", "clusters/paper", "clusters/paper/replicas/r-1", "a100-1", "paper", "plan.json")
# A search; words of a sentence; and what needs a plan with its inputs or a planner with nodes, which other tests run.
NOT_RUN = ("place", "convert", "check", "undrain")


def commands() -> list[str]:
    """Return the different commands, without words of their sentences that follow."""
    found = set[str]()
    for _, said in messages():
        for match in NEXT.finditer(said):
            words = shlex.split(match[0].strip().rstrip(".'"))
            if words[0] == "hetis-plan" and words[1] not in NOT_RUN:
                ends = range(len(words), 1, -1)
                found.add(shlex.join(next(words[:end] for end in ends if can_be_typed(shlex.join(words[:end])))))
    return sorted(found)


def runs(hetis_plan: Run, command: str) -> bool:
    """Return whether the command succeeds with any name in the place of what its message inserts."""
    command = command.replace("PLAN", VALUE).replace("--out FILE", "--out new.json").replace("FILE", "plan.json")
    for name in NAMES if VALUE in command else ("",):
        try:
            hetis_plan(*shlex.split(command.replace(VALUE, name))[1:])
        except AssertionError:  # of the exit code
            continue
        return True
    return False


@pytest.fixture(autouse=True)
def files(saved_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the files that messages name."""
    monkeypatch.chdir(saved_plan.parent)
    text = (EXAMPLES / "paper.yaml").read_text()
    Path("cluster.yaml").write_text(text.replace("name: paper\n", "name: another\n"))


@pytest.mark.parametrize("command", commands())
def test_the_next_command_of_a_message_succeeds(command: str, fleet: FakePlanner, hetis_plan: Run) -> None:
    assert runs(hetis_plan, command)


def test_a_command_that_fails_is_found(fleet: FakePlanner, hetis_plan: Run) -> None:
    assert not runs(hetis_plan, f"hetis-plan get {VALUE}-gone")
    assert not runs(hetis_plan, "hetis-plan drain")
    assert len(commands()) > 15
