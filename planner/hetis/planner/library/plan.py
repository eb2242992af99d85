"""Plans and simulations for programs: values, and operations on them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from hetis.formats.documents import dump, to_data
from hetis.formats.files import write_atomically
from hetis.planner.export import ExportTarget
from hetis.planner.export.settings import ExportOptions, ExportSettings
from hetis.planner.export.targets import Export, export_wanted, folder_refusals, write_export
from hetis.planner.library.arguments import checked, spread
from hetis.planner.report.figures import digits, percent, plural, seconds, with_unit
from hetis.planner.report.promises import misses_as_planned
from hetis.planner.report.simulation.text import level_words, simulation_document
from hetis.planner.use_cases.comparing.plan_figures import Figures, figures_of
from hetis.planner.use_cases.record.parts import MadeFrom, Verified
from hetis.planner.use_cases.request import (
    Count,
    CountOrZero,
    File,
    Rate,
    Share,
    StatisticName,
    Target,
)
from hetis.planner.use_cases.saved_plans import inputs_from_documents
from hetis.planner.use_cases.service_level import DEFAULT, Statistic, share_within
from hetis.planner.use_cases.simulation import simulate as simulating
from hetis.planner.use_cases.simulation.engine_settings import at_settings
from hetis.planner.use_cases.simulation.judging import level_to_hold, simulated_latencies
from hetis.planner.use_cases.sources import engine_settings
from hetis.planner.use_cases.verification.outcome import rate_to_simulate
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Summary
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver import plan as solved
from hetis.solver.budget import Budget
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.explanation.facts import Explanation
from hetis.solver.problem import PlacementProblem

_FRAME_HEIGHT = 720  # height of the page in a notebook, in pixels


@dataclass(frozen=True, kw_only=True)
class SimulateArguments:
    """The arguments of `Plan.simulate`."""

    rate: Rate | None = None
    requests: Count | None = None
    seeds: Count = 1
    seed: CountOrZero = 0
    sweep: bool = False
    tolerance: Share = 0.02
    max_num_seqs: Count | None = None
    chunk_tokens: Count | None = None
    kv_blocks: Count | None = None
    ttft_statistic: StatisticName | None = None
    tpot_statistic: StatisticName | None = None
    attainment: Share | None = None


@dataclass(frozen=True)
class ExportArguments(ExportOptions):
    """The arguments of `Plan.export`: settings, and where the files go."""

    target: Target
    folder: File | None = None
    _: KW_ONLY
    force: bool = False
    engine_options: Sequence[str] = ()
    node_address: Mapping[str, str] | None = None

    @property
    def settings(self) -> ExportSettings:
        return ExportSettings.of(self, engine_options=tuple(self.engine_options), hosts=self.node_address or {})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Simulation:
    """The result of a plan under traffic; ``simulated`` contains all of it."""

    simulated: simulating.Simulated
    plan: solved.Plan

    @property
    def summary(self) -> Summary:
        """Throughput, latencies, attainment and events, with intervals; for a sweep, at its goodput."""
        return self.simulated.summary

    @property
    def goodput_rps(self) -> float | None:
        """The highest rate within the limits that a sweep found, 0 if none is; None without a sweep."""
        return None if self.simulated.sweep is None else self.simulated.sweep.goodput_rps

    @property
    def kept(self) -> bool:
        """Return whether the load was carried and the service level kept, the plan's own unless another was given."""
        return self.simulated.kept is True

    def to_dict(self) -> Mapping[str, Any]:
        """Return the simulation as plain data, as ``hetis-plan simulate -o json`` prints it."""
        return simulation_document(self.simulated, self.plan)

    def __repr__(self) -> str:
        found, question = self.summary, self.simulated.question
        level, verdict = question.service_level, self.simulated.verdict
        latencies = ", ".join(
            f"{one.name} {seconds(one.estimate.value)}" for one in simulated_latencies(found, verdict)
        )
        attained, share = percent(found.attainment), None if verdict is None else verdict.of(None)
        if share is not None:
            attained = share_within(share.estimate.value, share.limit)
        if level == DEFAULT:
            limits = "within the limits" if self.kept else "not within the limits"
        else:
            limits = f"{'kept' if self.kept else 'not kept'}: {level_words(level, question.limits)}"
        served = found.throughput_rps.value  # 0 or NaN: no request finished before the last one arrived
        rate = f"{digits(served, 4)} requests/s" if served > 0 else "too short for a rate"
        return f"<hetis.Simulation: {rate}, {latencies}, {attained} attained, {limits}>"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """Replicas on named GPUs with a proof of optimality: ``value`` has everything, ``problem`` is what it solves.

    ``value`` is a `hetis.solver.plan.Plan`, no number: that is ``result.value``, by the cost model. Both classes have
    the name because users know this one as ``hetis.Plan``.
    """

    value: solved.Plan
    problem: PlacementProblem

    @property
    def result(self) -> solved.SolveResult:
        """The quality of the plan by the cost model: value (a number), bound, gap, status, unit."""
        return self.value.result

    @property
    def replicas(self) -> tuple[solved.ReplicaPlan, ...]:
        return self.value.replicas

    @property
    def figures(self) -> Figures:
        """Requests/s, tokens/s, USD/h, USD per million tokens, latencies by the cost model; GPUs in use."""
        return figures_of(self.value, self.problem)

    def explain(self) -> Explanation:
        """Explain where memory and time go, what limits every replica, and why GPUs idle."""
        from hetis.solver.placement.explanation import explain_plan

        return explain_plan(self.value, self.problem)

    @checked
    def report(self, path: File | None = None, *, simulate: bool = False) -> str:
        """Return the plan as one page of HTML that needs no network, and save it at ``path`` if given.

        ``simulate`` adds its simulated latencies at rates up to and above the planned one.
        """
        from hetis.planner.report.page.pages import ShownPlan, plans_page
        from hetis.planner.use_cases.verification.latency_curve import latency_curve

        curve = None
        if simulate:
            curve = latency_curve(self.value, self.problem, budget=Budget(), report=silent)
        page = plans_page([ShownPlan(name="The plan", plan=self.value, problem=self.problem, curve=curve)])
        if path is not None:
            write_atomically(Path(path), page)
        return page

    @spread(SimulateArguments)
    def simulate(self, given: SimulateArguments) -> Simulation:
        """Run the plan under Poisson arrivals of its workload in virtual time, in this process.

        Args:
            rate: requests/s; by default the demanded one or the planned goodput.
            requests: per run; by default 20 times what the plan holds at once, at least 2,000, more for an attainment
                above 97.5%.
            seeds: number of runs, the first with ``seed``.
            sweep: search the highest rate within the limits, to ``tolerance``.
            max_num_seqs, chunk_tokens, kv_blocks: settings that engines are started with instead of the plan's.
            ttft_statistic, tpot_statistic: what of TTFT and TPOT is held to its limit instead of the plan's choice:
                ``mean``, ``p50``, ``p90``, ``p95`` or ``p99``.
            attainment: instead of statistics, the share of requests that have to keep all limits, such as ``"90%"``.

        Raises:
            HetisError: arguments are wrong, or the plan has no replicas or cannot be simulated.
        """
        if not self.value.replicas:
            raise InvalidProblemError("the plan has no replicas to simulate")
        level = level_to_hold(
            self.value,
            self.value.objective,
            ttft=None if given.ttft_statistic is None else Statistic(given.ttft_statistic),
            tpot=None if given.tpot_statistic is None else Statistic(given.tpot_statistic),
            attainment=None if given.attainment is None else float(given.attainment),
        )
        load = Load(
            lengths=inputs_from_documents(MadeFrom.of(self.value).documents, "the plan").workload,  # not clipped
            max_position=self.problem.model.max_position,
            arrivals=Arrivals.DRAWN,
            rate_rps=rate_to_simulate(self.value, self.problem) if given.rate is None else given.rate,
        )
        settings = engine_settings(
            max_num_seqs=given.max_num_seqs, chunk_tokens=(given.chunk_tokens,), kv_blocks=given.kv_blocks
        )
        started = at_settings(self.value, self.problem, settings)
        plan, num_requests = started.plan, given.requests or simulating.default_requests(started.plan, load, level)
        sample_s = None if given.sweep else simulating.sample_spacing_s(plan, load, num_requests)
        question = simulating.Question(
            load=load,
            num_requests=num_requests,
            seeds=tuple(range(given.seed, given.seed + given.seeds)),
            settings=Settings(sample_every_s=sample_s),
            limits=plan.objective,
            service_level=level,
            sweeps=given.sweep,
            tolerance=float(given.tolerance),
            engine_settings=settings,
            changes=started.changes,
        )
        found = simulating.answer(plan, started.problem, question, processes=1, is_cancelled=never, report=silent)
        return Simulation(simulated=found, plan=plan)

    @spread(ExportArguments)
    def export(self, given: ExportArguments) -> Export:
        """Return the plan as the files of an engine or orchestrator; options are those of ``hetis-plan export``.

        Args:
            target: ``vllm``, ``sglang``, ``compose``, ``kubernetes``, ``lws``, ``llm-d``, ``kserve``, ``dynamo``,
                ``ray``, ``slurm`` or ``hetis-launch``.
            folder: new or empty, to which the files are written; by default they are only returned.
            force: write into a folder that is not empty; `Export.left` has the files of a former plan that stay in it.
            engine: ``vllm``, ``vllm-hetis`` or ``sglang``; by default vLLM, with the plugin for attention workers.
            engine_options: of the engine, in the form of its command line.
            model: in the engine's form: a folder, the same on every node, or a name.
            node_address: addresses by node; other nodes are reached by their own names.

        Raises:
            HetisError: an option or the folder cannot be used, all problems at once, or no replica can be launched
                on the target.
        """
        folder = None if given.folder is None else Path(given.folder)
        wrong = [] if folder is None else folder_refusals(folder, force=given.force, option="force=True")
        made = export_wanted(self.value, ExportTarget(given.target), given.settings, more_wrong=wrong)
        return made if folder is None else write_export(folder, made)

    @checked
    def save(self, path: File) -> None:
        """Write the plan with its inputs, as YAML for ``.yaml`` and ``.yml``, else as JSON; `hetis.load_plan` reads it.

        Raises:
            HetisError: the file cannot be written.
        """
        target = Path(path)
        form: Literal["yaml", "json"] = "yaml" if target.suffix in (".yaml", ".yml") else "json"
        write_atomically(target, dump(self.value, form))

    def to_dict(self) -> Mapping[str, Any]:
        """Return the plan as plain data, as ``hetis-plan place -o json`` prints it."""
        return to_data(self.value)

    def __repr__(self) -> str:
        used = sum(len(replica.devices()) for replica in self.replicas)
        gpus = f"{used:,} of {plural(self.problem.cluster.num_gpus(), 'GPU')}"
        return f"<hetis.Plan: {self._worth()}, {plural(len(self.replicas), 'replica')} on {gpus}>"

    def _worth(self) -> str:
        """Return the value, and how it was found."""
        result, found = self.result, Verified.of(self.value)
        value, proof = with_unit(result.value, result.unit), f"{result.status}, gap {percent(result.gap)}"
        if found.model_value is not None:
            return f"{value} kept in simulation, {with_unit(found.model_value, result.unit)} by the model ({proof})"
        simulated = found.verification
        missed = misses_as_planned(self.value) or (simulated is not None and not simulated.kept)
        return f"{value} ({proof}){', limits MISSED in simulation' if missed else ''}"

    def _repr_html_(self) -> str:
        # A document of its own: the page's style must not affect the notebook, nor the notebook's style the page.
        page = html.escape(self.report(), quote=True)
        return (
            f'<iframe title="hetis plan" srcdoc="{page}" sandbox="allow-scripts" '
            f'style="width:100%;height:{_FRAME_HEIGHT}px;border:0"></iframe>'
        )
