"""Verbs about another fleet or another plan: ``what-if``, ``replan``, ``rehearse`` and ``diff``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli import outputs
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters import options, requests, values
from hetis.planner.cli.parameters.options import group, panel, verb
from hetis.planner.cli.parameters.requests import requested
from hetis.planner.cli.place import judge
from hetis.planner.cli.searching import Interruptible, SparseLines
from hetis.planner.use_cases.request import RungName

if TYPE_CHECKING:
    from hetis.planner.loop.curves import TrafficCurve
    from hetis.planner.loop.rehearsal import NodeEvent
    from hetis.planner.use_cases.saved_plans import PlanAndProblem
    from hetis.solver.budget import Report

WHAT_IF_EXAMPLES = """Examples:\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --add 4xL4 --remove r3090-0\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --add 4xA100-PCIe-80GB --node-like a100"""
REPLAN_EXAMPLES = """Examples:\n
  hetis-plan replan --from running.json --cluster fewer-nodes.yaml --out next.json\n
  hetis-plan replan --from running.json --cluster more-nodes.yaml --max-moves 8\n
  hetis-plan replan --from running.json --cluster fleet.yaml --workload 8000/300 --horizon 24h --restart 90s"""
REHEARSE_EXAMPLES = """Examples:\n
  hetis-plan rehearse plan.json --days 2\n
  hetis-plan rehearse plan.json --rate 40 --trace requests.csv --burst 2@30h+20min --longer 1.5@60h\n
  hetis-plan rehearse plan.json --curve rates.csv --fail gpu-3@10h --join gpu-3@14h -o json | jq .followers"""
DIFF_EXAMPLES = """Examples:\n
  hetis-plan diff running.json next.json\n
  hetis-plan diff running.json next.json -o json | jq .change.counts"""

_input, _fleet, _change = map(panel, ("Inputs", "Another fleet", "What a change costs"))


@group
class FleetOptions:
    """The GPUs that join or leave with their nodes."""

    add: list[str] | None = _fleet(
        "--add NxTYPE: GPUs to add, such as 4xL4; repeatable.",
    )
    remove: list[str] | None = _fleet(
        "--remove NODE: A node or group of nodes to remove, such as a100-0 or a100; repeatable."
    )
    node_like: str | None = _fleet(
        "--node-like NODE: Add GPUs in nodes like this one: same number of GPUs, zone, NIC and internal link."
    )
    gpus_per_node: int | None = _fleet(
        "--gpus-per-node N: GPUs in each added node; the last node gets the remainder.", min=1, shown="8"
    )
    zone: str | None = _fleet("--zone ZONE: Zone of the added nodes.", shown="the fleet's first")
    nic: float | None = _fleet(
        "--nic BANDWIDTH: Network card of the added nodes, such as 100Gbps.", shown="the fleet's network"
    )

    def refuse_half_a_question(self) -> None:
        if not self.add and not self.remove:
            raise typer.BadParameter("no change to study: give --add or --remove")
        options.refuse_without("--add", self, "node_like", "gpus_per_node", "zone", "nic", is_given=bool(self.add))


@group
class AnswerOptions:
    dry_run: bool = options.dry_run_option()


@verb()
def what_if(
    terminal: Terminal,
    *,
    request: requests.WhatIfOptions,
    fleet: FleetOptions,
    answer: AnswerOptions,
) -> ExitCode:
    """Solve before and after a change of the fleet, and show what the two proofs imply about the difference.

    Both solves have the full time limit; Ctrl-C once shows the results so far, Ctrl-C twice exits at once.
    """
    from hetis.planner.export.carrying import not_carried
    from hetis.planner.report import what_if as report
    from hetis.planner.use_cases.comparing.compare import Searches
    from hetis.planner.use_cases.other_fleets import what_if as asking
    from hetis.planner.use_cases.other_fleets.additions import read_change
    from hetis.planner.use_cases.place import read_inputs
    from hetis.planner.use_cases.placement_settings import settings_of
    from hetis.solver.cluster import Link

    fleet.refuse_half_a_question()
    settings, loaded, objective = settings_of(request), read_inputs(request), request.goal
    outputs.warn_of_cut_requests(terminal, loaded.inputs)
    cluster, nic = loaded.inputs.cluster, None
    if fleet.nic is not None:
        nic = Link(bytes_per_s=fleet.nic, latency_s=cluster.network.default.latency_s)
    change = read_change(
        cluster, add=fleet.add or (), remove=fleet.remove or (),
        like=fleet.node_like, gpus_per_node=fleet.gpus_per_node, zone=fleet.zone, nic=nic,
    )  # fmt: skip
    asking.changed_inputs(loaded, change)  # refuses what the fleet does not have, before anything is searched
    if answer.dry_run:
        return outputs.say_what_would_be_solved(
            terminal, [(loaded.inputs, objective)], strategies=[request.strategy],
            solves=2, time_limit_s=request.time_limit_s, engine=settings.engine,
        )  # fmt: skip
    long = Interruptible(terminal, time_limit_s=request.time_limit_s)

    def search(news: Report) -> asking.WhatIf:
        searches = Searches(
            loaded=loaded, objective=objective, settings=settings, budget=long.budget, carriers=not_carried, report=news
        )
        return asking.what_if(searches, change)

    found = long.search(search, unit=objective.unit, so_far="the plans")
    terminal.emit(lambda: report.what_if_document(found), lambda: report.render_what_if(found))
    return long.code(judge([found.before.outcome, found.after.outcome]))


# --- replan


@group
class ReplanOptions:
    """The running plan, the fleet to plan for, and the cost of a change."""

    running: str = _input("--from PLAN: The running plan: a plan file, or -.", ...)
    cluster: str = requested("cluster")
    workload: str | None = _input(
        "--workload -w NAME|FILE|P/O: Current traffic.",
        shown="the plan's",
    )
    prefix_hit_rate: Any = requested("prefix_hit_rate")
    model: str | None = _input(
        "--model -m NAME|FILE: Reject a plan for any other model; the plan's own model is always used.",
    )
    profile: list[str] | None = requested("profiles")
    rate: float | None = requested("rate")
    rung: RungName | None = requested("rung", shown="the plan's")
    max_moves: int | None = _change(
        "--max-moves N: Maximum number of GPUs whose work may change.", min=0, shown="any number"
    )
    horizon: float = _change(
        "--horizon TIME: Expected lifetime of the new plan, over which the cost of the change is spread.", "1h"
    )
    restart: float = _change("--restart TIME: Time to restart an engine, excluding loading weights.", "30s")
    load: float = _change("--load BANDWIDTH: Rate at which each GPU loads its weights.", "2GB/s")


@group
class NextPlanOptions:
    out: Path | None = options.out_option()
    html: Path | None = options.html_option()
    verify: bool = requested("verify")
    dry_run: bool = options.dry_run_option()


@verb()
def replan(
    terminal: Terminal, *, chosen: ReplanOptions, search: requests.SearchOptions, answer: NextPlanOptions
) -> ExitCode:
    """Re-plan from a running plan: keep what is worth keeping, include the cost of the change, and order its steps.

    Objective, limits, strategy, engine, roles and constraints are those of the running plan. The cluster is the
    present one: nodes that it lacks have left, new ones have joined. Ctrl-C once takes the best answer so far; Ctrl-C
    twice exits at once.
    """
    from hetis.planner.report.changes import render_replan, replan_document
    from hetis.planner.report.page.pages import replan_page
    from hetis.planner.use_cases.other_fleets import replan as replanning
    from hetis.planner.use_cases.placement_settings import settings_of
    from hetis.solver.replanning.change import ChangeCosts

    outputs.refuse_unwritable(answer.out)
    outputs.refuse_page(answer.html, beside=answer.out)
    posed = replanning.load_replanning(
        running=chosen.running, cluster=chosen.cluster, workload=chosen.workload, model=chosen.model,
        profiles=chosen.profile or (), rate_rps=chosen.rate,
        settings=replace(settings_of(search), rung=chosen.rung or ""),
        prefix_hit_rate=chosen.prefix_hit_rate,
    )  # fmt: skip
    for warning in posed.warnings:
        terminal.warn(warning)
    if answer.dry_run:
        return outputs.say_what_would_be_solved(
            terminal, [(posed.loaded.inputs, posed.problem.objective)], strategies=[posed.settings.strategy],
            time_limit_s=search.time_limit_s, engine=posed.problem.family.engine,
        )  # fmt: skip
    costs = ChangeCosts(horizon_s=chosen.horizon, restart_s=chosen.restart, load_bytes_per_s=chosen.load)
    long = Interruptible(terminal, time_limit_s=search.time_limit_s)
    found = long.search(
        lambda report: replanning.replan(
            posed, costs, chosen.max_moves, verify=answer.verify, budget=long.budget(), report=report
        ),
        unit=posed.problem.objective.unit,
        so_far="the best answer",
    )
    survival = replanning.survival_of(found.plan, posed)
    if survival is not None and not survival.survives:
        terminal.warn(f"the next plan does not survive the loss of any one {survival.place}: {survival}")
    saved = outputs.save_or_tell(
        terminal, found.plan, answer.out, html=answer.html, page=lambda: replan_page(found, posed, costs)
    )
    if answer.out != outputs.STDOUT:
        terminal.emit(lambda: replan_document(found, posed, costs), lambda: render_replan(found, posed, costs))
    return long.code() if saved else ExitCode.INTERNAL


# --- rehearse

_traffic, _follow = map(panel, ("Traffic", "How it is followed"))


@group
class RehearsedTraffic:
    """The traffic of the days to rehearse."""

    curve: Path | None = _traffic(
        "--curve FILE: Rates over time, as CSV with at_s and requests_per_s; its first days are history.",
        shown="a composed week: day shape, weekends, noise",
    )
    rate: float | None = _traffic(
        "--rate R: Requests/s in the busiest hour of a weekday.",
        parser=values.rate,
        shown="80% of what the plan serves",
    )
    days: int = _traffic("--days N: Days to follow.", 7, min=1, max=60)
    history: int = _traffic("--history N: Days of measured traffic before them.", 7, min=0, max=60)
    trace: str | None = _traffic(
        "--trace FILE: Requests with arrival times, whose lengths and unevenness within the hour the traffic has.",
        shown="the plan's lengths, even hours",
    )
    burst: list[str] | None = _traffic("--burst FACTOR@TIME+TIME: Rates rise for a time: 2@30h+20min; repeatable.")
    longer: list[str] | None = _traffic("--longer FACTOR@TIME: Prompts are longer from a time on; repeatable.")
    fail: list[str] | None = _traffic("--fail NODE@TIME: A node is lost, such as a100-0@30h; repeatable.")
    join: list[str] | None = _traffic("--join NODE@TIME: A node that was lost comes back; repeatable.")
    seed: int = _traffic("--seed: Seed of noise and arrivals.", 0, min=0)


@group
class FollowOptions:
    """What the loop may do."""

    every: float = _follow("--every TIME: Time between two regular decisions.", "5min")
    coverage: float = _follow("--coverage SHARE: Probability of keeping what comes within minutes.", "97.5%")
    look_ahead: float = _follow("--look-ahead TIME: Time whose peak a change is made for.", "5min")
    threshold: float = _follow("--threshold SHARE: Utilisation that threshold scaling keeps.", "70%")
    max_moves: int | None = _follow("--max-moves N: Maximum GPUs whose work one change may change.", min=0)
    horizon: float = _follow("--horizon TIME: Time over which the costs of a change are repaid.", "1h")
    restart: float = _follow("--restart TIME: Time to restart an engine, excluding loading weights.", "30s")
    load: float = _follow("--load BANDWIDTH: Rate at which each GPU loads its weights.", "2GB/s")


@verb()
def rehearse(
    terminal: Terminal, plan: options.PlanArgument, *, wanted: RehearsedTraffic, follow: FollowOptions
) -> ExitCode:
    """Follow days of traffic in virtual time, with the decisions that a planner makes, before trusting them.

    The fleet in the plan is the pool: GPUs that are not needed are given back. The objective is the plan's if that is
    cost or gpus, otherwise least cost. The loop is shown beside a static plan for the peak, threshold scaling, and a
    forecast that knows what comes.
    """
    from hetis.planner.loop.rivals import rehearse_all
    from hetis.planner.loop.settings import LoopSettings
    from hetis.planner.report.rehearsals import rehearsals_document, render_rehearsals
    from hetis.planner.use_cases.saved_plans import load_plan_and_problem
    from hetis.solver.replanning.change import ChangeCosts

    found = load_plan_and_problem(plan)
    for warning in found.warnings:
        terminal.warn(warning)
    if not found.plan.replicas:
        terminal.error("the plan has no replicas to begin with")
        return ExitCode.INVALID
    settings = LoopSettings(
        costs=ChangeCosts(horizon_s=follow.horizon, restart_s=follow.restart, load_bytes_per_s=follow.load),
        every_s=follow.every, coverage=follow.coverage, look_ahead_s=follow.look_ahead, max_moves=follow.max_moves,
    )  # fmt: skip
    curve = _curve(found, wanted)
    events = _node_events(found, wanted, curve)
    lines = SparseLines[tuple[str, float]](
        terminal.say, lambda news: f"  {news[0]}: {news[1]:.0%} of the time", state=lambda news: news[0]
    )
    shown = [
        *rehearse_all(
            found, curve, settings, events=events, seed=wanted.seed, utilisations=(follow.threshold,),
            progress=lambda name, share: lines((name, share)),
        )
    ]  # fmt: skip
    terminal.emit(lambda: rehearsals_document(shown, curve), lambda: render_rehearsals(shown, curve))
    return ExitCode.OK


def _curve(found: PlanAndProblem, wanted: RehearsedTraffic) -> TrafficCurve:
    """Return the traffic; raises DocumentError or BadParameter if a file or an option is wrong."""
    from hetis.formats.traces import read_trace
    from hetis.formats.workload import load_workload
    from hetis.planner.loop.curves import composed_curve, read_curve, unevenness
    from hetis.planner.loop.decision import kept_rate

    workload, uneven = found.problem.workload, None
    if wanted.trace is not None:
        uneven, workload = unevenness(read_trace(wanted.trace).arrival_s), load_workload(wanted.trace)
    if wanted.curve is not None:
        if wanted.rate is not None:
            raise typer.BadParameter("the rates are those of --curve", param_hint="'--rate'")
        curve = read_curve(str(wanted.curve), workload, history_s=wanted.history * 86400)
    else:
        rate = wanted.rate or 0.8 * kept_rate(found.plan, found.problem)
        curve = composed_curve(
            workload, days=wanted.days, peak_rps=rate, history_days=wanted.history, seed=wanted.seed, uneven=uneven,
            name=f"composed with {workload.name}",
        )  # fmt: skip
    for text in wanted.burst or ():
        factor, time = _factor_at(text, "--burst")
        at, plus, seconds = time.partition("+")
        if not plus:
            raise typer.BadParameter(f"{text!r} has no duration, such as 2@30h+20min", param_hint="'--burst'")
        curve = curve.with_burst(_seconds(at, text, curve), _seconds(seconds, text), factor)
    for text in sorted(wanted.longer or (), key=lambda one: _seconds(_factor_at(one, "--longer")[1], one)):
        factor, time = _factor_at(text, "--longer")
        curve = curve.with_lengths(_seconds(time, text, curve), prompts=factor, outputs=1.0)
    return curve


def _factor_at(text: str, option: str) -> tuple[float, str]:
    factor, _, time = text.partition("@")
    try:
        number = float(factor)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1000 or not time:
        raise typer.BadParameter(f"{text!r} is no factor and time such as 2@30h", param_hint=f"'{option}'")
    return number, time


def _seconds(time: str, text: str, curve: TrafficCurve | None = None) -> float:
    """Return a duration in seconds; with a curve, the time after its history, which must be in it."""
    seconds = values.duration(time)
    return seconds if curve is None else _of_curve(seconds, text, curve)


def _of_curve(seconds: float, text: str, curve: TrafficCurve) -> float:
    if curve.start_s + seconds >= curve.end_s:
        raise typer.BadParameter(f"{text!r} is after the end of the traffic, {(curve.end_s - curve.start_s) / 3600:g}h")
    return curve.start_s + seconds


def _node_events(found: PlanAndProblem, wanted: RehearsedTraffic, curve: TrafficCurve) -> list[NodeEvent]:
    from hetis.formats.errors import did_you_mean
    from hetis.planner.loop.rehearsal import NodeEvent

    known = {name for name, _ in found.problem.cluster.nodes()}
    events = list[NodeEvent]()
    for option, texts, joins in (("--fail", wanted.fail, False), ("--join", wanted.join, True)):
        for text in texts or ():
            node, at_s = values.device_at(text, option, "a node and a time such as a100-0@30h")
            if node not in known:
                message = f"no node {node!r} in the cluster{did_you_mean(node, known)}"
                raise typer.BadParameter(message, param_hint=f"'{option}'")
            _of_curve(at_s, text, curve)
            if joins and not any(one.node == node and one.at_s < at_s for one in events):
                raise typer.BadParameter(f"{text!r} joins, but is not lost before it", param_hint=f"'{option}'")
            events.append(NodeEvent(at_s=at_s, node=node, joins=joins))
    return events


# --- diff


@verb()
def diff(
    terminal: Terminal,
    before: Annotated[str, typer.Argument(metavar="A", help="The old plan: a plan file, or -.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The new plan: a plan file, or -.")],
) -> ExitCode:
    """Compare two plans: replicas kept, changed, added and removed, weights to load, KV dropped, rate and cost.

    Replicas are matched by the GPUs they hold and the layers on them. Devices of the same name are the same GPU.
    """
    from hetis.planner.report.changes import diff_document, render_diff
    from hetis.planner.use_cases.comparing.plan_differences import diff_plans

    found = diff_plans(before, after)
    terminal.emit(lambda: diff_document(found), lambda: render_diff(found))
    return ExitCode.OK
