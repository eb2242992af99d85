"""Ctrl-C during a call ends the command once, and says what goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from hetis.commands.terminal import Terminal
from hetis.planner.cli.server.waiting import wait_for_plan
from hetis.planner.client import Client
from hetis.v1 import plan_pb2


@pytest.mark.parametrize("tells", [True, False])
def test_only_a_plan_of_which_a_planner_has_told_is_said_to_go_on(
    capsys: pytest.CaptureFixture[str], tells: bool
) -> None:
    class Interrupted:
        def wait(self, name: str, *, on_change: Callable[[plan_pb2.Plan], None]) -> plan_pb2.Plan:
            if tells:
                on_change(plan_pb2.Plan(name=name))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_for_plan(Terminal(), cast(Client, Interrupted()), "plans/x", exists=False)
    assert ("plans/x continues on the planner" in capsys.readouterr().err) is tells
