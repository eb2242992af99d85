"""``hetis-plan simulate PLAN``: a plan under real traffic, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli import outputs
from hetis.planner.cli.dispatch import announce_compilation
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import refuse
from hetis.planner.cli.parameters import options, values
from hetis.planner.cli.parameters.options import PlanArgument, group, panel, verb
from hetis.planner.cli.parameters.requests import requested
from hetis.planner.cli.searching import Interruptible
from hetis.planner.use_cases.service_level import Statistic

if TYPE_CHECKING:
    from hetis.formats.traces import Trace
    from hetis.planner.use_cases.saved_plans import PlanAndProblem
    from hetis.planner.use_cases.simulation.simulate import Question, Simulated
    from hetis.simulator.values import Fault
    from hetis.solver.plan import Objective, Plan
    from hetis.solver.problem import PlacementProblem
    from hetis.solver.workload import Workload

SIMULATE_EXAMPLES = """Examples:\n
hetis-plan simulate plan.json --seeds 5\n
hetis-plan simulate plan.json --trace requests.csv --rate 2\n
hetis-plan simulate plan.json --attainment 99% --seeds 3\n
hetis-plan simulate plan.json --sweep --ttft 2s --tpot 100ms\n
hetis-plan simulate plan.json --saturate -o json | jq .throughput_rps"""
DEFAULT_TOLERANCE = 0.02  # None if it is not given: other runs would ignore it
MAX_REQUESTS = 10_000_000
LEVELS = "ttft_statistic", "tpot_statistic", "attainment"  # the latencies of a saturated fleet mean nothing
CONTRADICTIONS = (  # pairs of fields, and the message
    *(("saturate", name, "{} and {} cannot be combined") for name in ("rate", "recorded", "sweep", *LEVELS)),
    *(("sweep", name, "{} and {} cannot be combined") for name in ("rate", "recorded")),
    *(("cv", name, "{} applies to random arrivals, not to {}") for name in ("recorded", "saturate")),
    ("requests_csv", "sweep", "{} shows a single run, not {}"),
)
_traffic, _goal, _runs, _fleet, _result = map(panel, ("Traffic", "Goal", "Runs", "Fleet", "Result"))
_setting = partial(_fleet, parser=values.setting)  # one setting for every engine


@group
class SimulateOptions:
    trace: str | None = _traffic(
        "--trace FILE|NAME|P/O: Requests: a CSV or JSONL trace, or lengths drawn from anything that `place "
        "--workload` accepts.",
        shown="the plan's workload",
    )
    prefix_hit_rate: Any = _traffic(  # a share or "trace", which typer's types cannot express
        "--prefix-hit-rate SHARE|trace: "
        "Share of prompt tokens that prefix caches hold: 0.4, 40%, or trace to count it per request by hash ids.",
        shown="that of the requests' source, or 0",
    )
    rate: float | None = _traffic(
        "--rate R: Arrival rate in requests/s.", parser=values.rate, shown="the planned goodput"
    )
    cv: float = _traffic(
        "--cv CV: Coefficient of variation of the gaps between arrivals: 0 even, 1 Poisson, above 1 bursts (gamma).",
        1.0,
        min=0.0,
        max=100.0,
    )
    recorded: bool = _traffic("--recorded: Arrivals as in the trace, stretched to --rate if that is given.", False)
    saturate: bool = _traffic(
        "--saturate: Keep a request waiting at all times, to measure the maximum throughput.", False
    )
    sweep: bool = _goal("--sweep: Find the highest rate within the latency limits.", False)
    tolerance: float | None = _goal(
        "--tolerance SHARE: Relative width to which --sweep brackets that rate.", shown=f"{DEFAULT_TOLERANCE:.0%}"
    )
    ttft: float | None = requested("ttft", shown="the plan's")
    tpot: float | None = requested("tpot", shown="the plan's")
    ttft_statistic: Statistic | None = requested("ttft_statistic", shown="the plan's")
    tpot_statistic: Statistic | None = requested("tpot_statistic", shown="the plan's")
    attainment: float | None = requested("attainment", shown="the plan's")
    requests: int | None = _runs(
        "--requests N: Requests per run.",
        min=1,
        max=MAX_REQUESTS,
        shown="20 times what the plan holds at once, 2000 at least, more for an attainment above 97.5%",
    )
    seeds: int = _runs("--seeds K: Number of runs, each with its own seed.", 1, min=1, max=1000)
    seed: int = _runs("--seed: Seed of the first run.", 0, min=0)
    threads: int = _runs("--threads: Runs to simulate in parallel, as processes; 0 means one per core.", 0, min=0)
    router: Literal[
        "", "nginx", "sglang", "llm-d", "weighted", "weighted-random", "fewest-requests", "fewest-tokens"
    ] = _fleet(
        "--router POLICY: "
        "How requests are routed: nginx, sglang, llm-d, weighted, weighted-random, fewest-requests or fewest-tokens.",
        "",
        shown="as the plan was simulated, or nginx",
    )
    no_dispatch: bool = _fleet(
        "--no-dispatch: Split head groups as planned instead of dispatching each request.", False
    )
    no_redispatch: bool = _fleet("--no-redispatch: Never move head groups of running requests.", False)
    theta: float = _fleet(
        "--theta SHARE: How far a stage may exceed its ideal time before head groups move.",
        "50%",
        parser=values.ratio,
    )
    max_num_seqs: int | None = _setting(
        "--max-num-seqs N: Maximum requests that each engine runs at once (each copy that shares experts).",
        shown="the plan's",
    )
    chunk_tokens: int | None = _setting(
        "--chunk-tokens N: Prompt tokens per iteration: vLLM's --max-num-batched-tokens less what decodes.",
        shown="the plan's",
    )
    kv_blocks: int | None = _setting(
        "--kv-blocks N: Maximum KV blocks of 16 tokens of each engine, as --num-gpu-blocks-override.",
        shown="what memory allows",
    )
    fail: list[str] | None = _fleet("--fail DEVICE@TIME: A device fails, such as a100/0@30s; repeatable.")
    join: list[str] | None = _fleet("--join DEVICE@TIME: A device that failed comes back; repeatable.")
    requests_csv: Path | None = _result("--requests-csv FILE: One row per request of the first run.")

    def without_contradictions(self) -> SimulateOptions:
        """Refuse options that contradict each other, before anything is read.

        An option that only a file of defaults sets gives way to one on the command line.
        """
        unset = dict[str, Any]()
        for one, other, message in CONTRADICTIONS:
            given = [name for name in (one, other) if name not in unset and self._has(name)]
            if len(given) < 2:
                continue
            defaults = [name for name in given if name not in options.given_in(self)]
            if len(defaults) != 1:
                raise typer.BadParameter(message.format(options.spelled(one), options.spelled(other)))
            unset |= {name: getattr(SimulateOptions, name) for name in defaults}
        found = replace(self, **unset)
        if found.recorded and found.trace is None:
            raise typer.BadParameter("--recorded needs --trace: the plan has only request lengths")
        options.refuse_without("--sweep", found, "tolerance", is_given=found.sweep)
        return found

    def _has(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(SimulateOptions, name))

    def refuse_unwritable(self) -> None:
        outputs.refuse_stdout("--requests-csv", self.requests_csv)
        outputs.refuse_unwritable(self.requests_csv)


@verb()
def simulate(terminal: Terminal, plan: PlanArgument, *, wanted: SimulateOptions) -> ExitCode:
    """Run a plan under traffic in virtual time, and compare the result with the plan's promises.

    The plan is held to the service level for which it was made, unless another one is given.

    Ctrl-C once shows the figures of what was simulated so far; Ctrl-C twice exits at once.
    """
    from hetis.planner.use_cases.record.parts import Verified
    from hetis.planner.use_cases.saved_plans import load_plan_and_problem
    from hetis.planner.use_cases.service_level import DEFAULT
    from hetis.planner.use_cases.simulation import simulate as simulating
    from hetis.planner.use_cases.simulation.engine_settings import at_settings
    from hetis.planner.use_cases.simulation.judging import level_to_hold
    from hetis.planner.use_cases.sources import engine_settings
    from hetis.planner.use_cases.verification.outcome import NGINX, rate_to_simulate, settings_of
    from hetis.simulator.arrivals import Arrivals, Load
    from hetis.simulator.values import Settings

    wanted = wanted.without_contradictions()
    wanted.refuse_unwritable()
    found = load_plan_and_problem(plan)
    for warning in found.warnings:
        terminal.warn(warning)
    if not found.plan.replicas:
        terminal.error("the plan has no replicas to simulate")
        return ExitCode.INVALID
    if not wanted.no_dispatch and any(replica.attention_workers for replica in found.plan.replicas):
        announce_compilation(terminal)
    limits = _limits(found.plan.objective, wanted)
    level = DEFAULT
    if not wanted.saturate:
        level = level_to_hold(
            found.plan, limits, ttft=wanted.ttft_statistic, tpot=wanted.tpot_statistic, attainment=wanted.attainment
        )
    drawn = not wanted.recorded and not wanted.saturate
    load = Load(
        lengths=_lengths(terminal, found, wanted),
        max_position=found.problem.model.max_position,
        arrivals=Arrivals.RECORDED if wanted.recorded else Arrivals.SATURATED if wanted.saturate else Arrivals.DRAWN,
        rate_rps=rate_to_simulate(found.plan, found.problem) if drawn and wanted.rate is None else wanted.rate,
        gap_cv=wanted.cv,
    )
    # The traffic remains the one for the plan as it is.
    given = engine_settings(
        max_num_seqs=wanted.max_num_seqs, chunk_tokens=(wanted.chunk_tokens,), kv_blocks=wanted.kv_blocks
    )
    started = at_settings(found.plan, found.problem, given)
    found = replace(found, plan=started.plan, problem=started.problem)
    simulated = Verified.of(found.plan).verification
    num_requests = wanted.requests or simulating.default_requests(found.plan, load, level)
    faults = _faults(wanted, found.plan, found.problem)
    spacing_s = None if wanted.sweep else simulating.sample_spacing_s(found.plan, load, num_requests, faults)
    question = simulating.Question(
        load=load,
        num_requests=num_requests,
        seeds=tuple(range(wanted.seed, wanted.seed + wanted.seeds)),
        settings=Settings(
            router=wanted.router or (NGINX if simulated is None else settings_of(simulated).router),
            dispatch=not wanted.no_dispatch,
            redispatch=not wanted.no_redispatch and not wanted.no_dispatch,
            theta=wanted.theta,
            faults=faults,
            sample_every_s=spacing_s,
        ),
        limits=limits,
        service_level=level,
        sweeps=wanted.sweep,
        tolerance=wanted.tolerance or DEFAULT_TOLERANCE,
        engine_settings=given,
        changes=started.changes,
        keep_run=wanted.requests_csv is not None and not wanted.sweep,
    )
    return _finish(terminal, found, question, wanted)


def _lengths(terminal: Terminal, found: PlanAndProblem, wanted: SimulateOptions) -> Trace | Workload:
    """Return the requests of a trace if one is specified, or else those that the plan was made for."""
    from hetis.formats.workload import with_prefix_hits
    from hetis.planner.use_cases.simulation.simulate import load_lengths

    if wanted.trace is None:
        return with_prefix_hits(found.inputs.workload, wanted.prefix_hit_rate)  # not clipped
    lengths, planned = load_lengths(wanted.trace, wanted.prefix_hit_rate), found.problem.workload.prefix_hit_rate
    if planned and not lengths.prefix_hit_rate and wanted.prefix_hit_rate is None:
        terminal.warn(
            f"{lengths.name} has no prefix hit rate, while the plan expects {planned:.3g} of prompt tokens in "
            "prefix caches:"
            " every prompt is computed in full; see --prefix-hit-rate"
        )
    return lengths


def _limits(objective: Objective, wanted: SimulateOptions) -> Objective:
    given = {"ttft_limit_s": wanted.ttft, "tpot_limit_s": wanted.tpot}
    limits: dict[str, Any] = {
        name: None if limit == values.NO_LIMIT else limit for name, limit in given.items() if limit is not None
    }
    return replace(objective, **limits)


def _faults(wanted: SimulateOptions, plan: Plan, problem: PlacementProblem) -> tuple[Fault, ...]:
    from hetis.planner.use_cases.simulation.simulate import faults_of
    from hetis.simulator.values import Fault

    given = [
        Fault(at_s=at_s, device=device, joins=joins)
        for option, texts, joins in (("--fail", wanted.fail, False), ("--join", wanted.join, True))
        for device, at_s in (values.device_at(text, option) for text in texts or ())
    ]
    named = faults_of(given, plan, problem, source="--fail, --join")
    return tuple(sorted(named, key=lambda fault: fault.at_s))


def _finish(terminal: Terminal, found: PlanAndProblem, question: Question, wanted: SimulateOptions) -> ExitCode:
    """Simulate with progress and Ctrl-C, save, print, and return the exit code, whatever the outcome."""
    from hetis.planner.report.simulation.text import render_simulation, simulation_document
    from hetis.planner.use_cases.simulation.simulate import NothingSimulatedError, answer

    plan, long = found.plan, Interruptible(terminal)
    try:
        simulated = long.simulate(
            lambda news: answer(
                plan, found.problem, question, processes=wanted.threads, is_cancelled=long.cancelled.is_set,
                report=news, begins=news.begins,
            )
        )  # fmt: skip
    except NothingSimulatedError:
        return refuse(terminal, ExitCode.INTERRUPTED, "stopped before the simulation had results")
    saved = _save(terminal, simulated, wanted)
    terminal.emit(lambda: simulation_document(simulated, plan), lambda: render_simulation(simulated, plan))
    if not saved:
        return ExitCode.INTERNAL
    return ExitCode.OK if simulated.complete else ExitCode.INTERRUPTED


def _save(terminal: Terminal, simulated: Simulated, wanted: SimulateOptions) -> bool:
    """Save before printing, so that the file is saved even if the reader of stdout goes away."""
    from hetis.simulator.records import requests_csv

    path, run = wanted.requests_csv, simulated.run
    if path is None or run is None:
        return True
    return outputs.saves(
        terminal, "requests", lambda: outputs.write_out(terminal, str(path), requests_csv(run), said=f"saved {path}")
    )
