"""docs/cli.md names every verb, every option of the connection, and every environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from hetis.planner.cli.app import app
from hetis.planner.cli.failures import ADVICE
from hetis.v1 import failure_pb2

DOCS = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
GROUP: Any = typer.main.get_command(app)
SERVER_VERBS = [
    "agents",
    "apply",
    "audit",
    "cancel",
    "delete",
    "disconnect",
    "drain",
    "get",
    "rollback",
    "status",
    "undrain",
    "upstreams",
    "watch",
]


def test_every_verb_is_documented() -> None:
    for verb in GROUP.commands:
        assert f"`{verb}" in DOCS, verb


@pytest.mark.parametrize("verb", SERVER_VERBS)
def test_every_verb_that_calls_a_planner_takes_the_same_connection(verb: str) -> None:
    variables = {
        name: parameter.envvar
        for parameter in GROUP.commands[verb].params
        for name in parameter.opts
        if parameter.envvar
    }
    assert variables == {
        "--server": "HETIS_SERVER",
        "--ca": "HETIS_CA",
        "--cert": "HETIS_CERT",
        "--key": "HETIS_KEY",
        "--token-file": "HETIS_TOKEN_FILE",
    }
    for option, variable in variables.items():
        assert f"`{option} " in DOCS
        assert f"`{variable}`" in DOCS


def test_advice_is_for_reasons_that_exist() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in failure_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert set(ADVICE) <= reasons
