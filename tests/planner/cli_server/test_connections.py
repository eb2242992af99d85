"""Verbs that call a planner have the same options and variables for the connection, and advice about its answers."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from hetis.planner.cli.app import app
from hetis.planner.cli.failures import ADVICE
from hetis.v1 import failure_pb2

GROUP: Any = typer.main.get_command(app)
SERVER_VERBS = [
    "agents",
    "apply",
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


def test_advice_is_for_reasons_that_exist() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in failure_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert set(ADVICE) <= reasons
