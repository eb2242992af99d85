"""Waiting for a plan with news on stderr; Ctrl-C ends only the waiting, and the outcome becomes an exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.progress import PLAIN_INTERVAL_S, describe
from hetis.planner.cli.resource_names import word
from hetis.planner.client import CallError, Client
from hetis.solver.budget import Progress
from hetis.v1 import failure_pb2, plan_pb2


def wait_for_plan(terminal: Terminal, client: Client, name: str) -> plan_pb2.Plan:
    """Wait for the plan until nothing about it can change by itself.

    Raises:
        KeyboardInterrupt: Ctrl-C; the plan goes on, and the user was told how to come back to it.
        CallError: the planner has been gone for long; the same holds.
    """
    try:
        with news_on_stderr(terminal) as news:
            return client.wait(name, news=news)
    except (KeyboardInterrupt, CallError) as error:
        if isinstance(error, KeyboardInterrupt) or error.is_unreachable:
            terminal.say(f"{name} goes on without you")
            terminal.say(f"  come back: hetis-plan watch {name}")
            terminal.say(f"  stop it:   hetis-plan cancel {name}")
        raise


@contextmanager
def news_on_stderr(terminal: Terminal) -> Iterator[Callable[[plan_pb2.Plan], None]]:
    """Yield a function to call with every state of a plan: one live line on a terminal, a few plain lines elsewhere."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield lambda plan: None
    elif console.is_terminal and not console.is_dumb_terminal:
        with console.status("asking the planner", spinner="dots") as status:
            yield lambda plan: status.update(line_of(plan))
    else:
        yield _PlainLines(terminal.say)


class _PlainLines:
    """News as one line when the state or the phase changes, and otherwise at most every `PLAIN_INTERVAL_S` seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: tuple[int, int, str] | None = None
        self._said_s = 0.0

    def __call__(self, plan: plan_pb2.Plan) -> None:
        now = (plan.state, plan.activation, plan.progress.phase)
        if now == self._last and time.monotonic() < self._said_s + PLAIN_INTERVAL_S:
            return
        self._last, self._said_s = now, time.monotonic()
        self._say(line_of(plan))


def line_of(plan: plan_pb2.Plan) -> str:
    """Return how far a plan is, in one line."""
    if plan.state == plan_pb2.PLAN_STATE_QUEUED:
        return f"{plan.name} waits for a solver process"
    if plan.state == plan_pb2.PLAN_STATE_SOLVING:
        return describe(_progress(plan.progress), plan.progress.unit)
    if plan.activation != plan_pb2.ACTIVATION_STATE_INACTIVE and plan.HasField("activation_progress"):
        far = plan.activation_progress
        counts = {"serve": far.num_serving, "start": far.num_starting, "failed": far.num_failed} | {
            "drain": far.num_draining
        }
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{plan.name} {word(plan_pb2.ActivationState, plan.activation)}: {said or 'no replica yet'}"
    return f"{plan.name} {word(plan_pb2.PlanState, plan.state)}"


def _progress(said: plan_pb2.SolveProgress) -> Progress:
    return Progress(
        phase=said.phase or "starting",
        elapsed_s=said.elapsed_s,
        incumbent=said.incumbent if said.HasField("incumbent") else None,
        bound=said.bound if said.HasField("bound") else None,
        gap=said.gap if said.HasField("gap") else None,
    )


def outcome(terminal: Terminal, plan: plan_pb2.Plan, *, activated: bool = False) -> ExitCode:
    """Return the exit code for a plan's outcome, and print the reason on stderr unless it is success.

    Args:
        activated: whether it was also to come into force.
    """
    if plan.state == plan_pb2.PLAN_STATE_INFEASIBLE:
        terminal.error(f"no plan exists ({plan.name})", [f"- {reason}" for reason in plan.infeasible_reasons])
        return ExitCode.INFEASIBLE
    if plan.state == plan_pb2.PLAN_STATE_FAILED:
        terminal.error(f"{plan.name} failed: {plan.failure.message} ({_reason(plan.failure)})")
        no_plan = plan.failure.reason == failure_pb2.ERROR_REASON_NO_PLAN_FOUND
        return ExitCode.NO_PLAN if no_plan else ExitCode.INTERNAL
    if plan.state == plan_pb2.PLAN_STATE_CANCELLED and not plan.HasField("result"):
        terminal.error(f"{plan.name} was cancelled before any plan was found")
        return ExitCode.NO_PLAN
    if activated and plan.activation == plan_pb2.ACTIVATION_STATE_FAILED:
        failure = plan.activation_progress.failure
        terminal.error(
            f"{plan.name} could not come up: {failure.message} ({_reason(failure)})",
            ["what served before still serves", f"go back: hetis-plan rollback {plan.name}"],
        )
        return ExitCode.INTERNAL
    return ExitCode.OK


def _reason(failure: failure_pb2.Failure) -> str:
    return failure_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
