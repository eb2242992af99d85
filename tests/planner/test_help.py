"""Help begins with examples, and that of a verb with many options shows the usual ones."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from hetis.commands.verb import click_command
from hetis.planner.cli.app import app
from tests.planner.command_line import invoke


def verbs() -> Iterator[tuple[str, Any]]:
    for name, command in click_command(app).commands.items():
        if not hasattr(command, "commands"):
            yield name, command


@pytest.mark.parametrize(("name", "command"), [*verbs()], ids=lambda one: one if isinstance(one, str) else "")
def test_every_verb_has_two_examples_that_it_understands(name: str, command: Any) -> None:
    examples = [line.strip() for line in (command.epilog or "").splitlines() if "hetis-plan" in line]
    assert len(examples) >= 2
    for example in examples:
        [own] = [part for part in example.split(" | ") if f"hetis-plan {name}" in part]
        _, _, *arguments = itertools.takewhile(lambda word: word != ">", shlex.split(own))
        with command.make_context(name, list(arguments), resilient_parsing=True) as context:
            command.make_parser(context).parse_args(list(arguments))  # raises for options that it lacks


def test_help_begins_with_the_examples() -> None:
    lines = [line.strip() for line in invoke("check", "--help").stdout.splitlines() if line.strip()]
    assert lines[1] == "Examples:"
    assert lines[2] == "hetis-plan check plan.json"


def test_help_of_place_shows_the_usual_options_and_all_where_asked() -> None:
    usual, every = invoke("place", "--help").stdout, invoke("place", "--help-all").stdout
    shown = ("--cluster", "--objective", "--ttft", "--rung", "--for", "--survive", "--engine", "--out", "--help-all")
    assert all(option in usual for option in shown)
    others = ("--max-num-seqs", "--simplest-within", "--seed", "--output")
    assert not any(option in usual for option in others)
    assert all(option in every for option in (*shown, *others))
