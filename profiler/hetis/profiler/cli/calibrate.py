"""``hetis-profile calibrate``: corrects a profile by the times that a running vLLM reports, and reports its error."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hetis.commands.groups import group, option
from hetis.commands.terminal import Terminal
from hetis.commands.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.shared import (
    ClusterOption,
    duration,
    gpu_type,
    require_outputs,
    save_profile,
    seconds_text,
    table_of,
    unchecked,
    waiting,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.formats.traces.latencies import TimedRequest
    from hetis.formats.vllm_logs import IterationLog
    from hetis.profiler.calibrate.correction import CalibrationResult, Parameter
    from hetis.profiler.calibrate.observed import Observed
    from hetis.profiler.calibrate.replica import CalibratedReplica
    from hetis.solver.model import ModelSpec
    from hetis.solver.profile import Profile

CALIBRATE_EXAMPLES = (
    "Examples: vllm serve meta-llama/Llama-3.1-8B --enable-logging-iteration-details > vllm.log · then: hetis-profile "
    "calibrate --from-vllm vllm.log --model Llama-3.1-8B --gpu H100-SXM-80GB --out profile.json · of a server in use: "
    "hetis-profile calibrate --from-vllm http://node1:8000 --for 2min -m Llama-3.1-8B --gpu L40S --out profile.json"
)
_USUAL_S = 60.0
_SHORTEST_S, _LONGEST_S = 10.0, 24 * 3600.0
_INTERVALS = 24
_LEAST_INTERVAL_S = 1.0
_WORDS = {"kernels": "time of kernels, times", "step": "host, each iteration", "sequence": "host, each sequence"}


def _seconds(text: str) -> float:
    seconds = duration(text)
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise typer.BadParameter(f"is {text}, must be 10s to 24h")
    return seconds


@group
class CalibrateOptions:
    source: str = option(
        "--from-vllm LOG|REPORT|URL: Log of a server with --enable-logging-iteration-details (preferred; .gz or - for "
        "stdin), a report of vllm bench serve --save-detailed (FILE.json), or the URL of a server.",
        ...,
    )
    model: str = option("--model -m NAME|FILE: Model that it serves: a name, a ModelSpec, or a config.json.", ...)
    out: Path = option("--out PROFILE: Corrected profile to write; .yaml or .yml for YAML, else JSON.", ...)
    gpu: str = option("--gpu NAME: GPU type of the server.", "", shown="the profile's")
    profile: Path | None = option("--profile FILE: The profile to correct.", shown="the GPU's, as plans use")
    tp: int | None = option("--tp: Tensor-parallel degree of the server.", min=1, shown="the log's, or 1")
    weights: str | None = option(
        "--weights P: Precision of the weights: bf16, fp8, int8, ...", shown="the checkpoint's"
    )
    kv: str | None = option("--kv P: Precision of the KV cache: bf16 or fp8.", shown="bf16, or the file's")
    context: float | None = option(
        "--context TOKENS: Mean context of decoding requests.", min=1.0, max=1e9, shown="by the use of its KV cache"
    )
    watch_s: float | None = option("--for TIME: How long to watch a URL.", parser=_seconds, shown="60s")


@verb()
def calibrate(terminal: Terminal, *, wanted: CalibrateOptions, cluster: ClusterOption = None) -> ProfileExitCode:
    """Correct a profile with the times of a running vLLM, and report the error before and after.

    A factor on kernels, seconds per iteration and seconds per sequence are fitted, as far
    as the load tells them apart, to half of what was seen, and judged on the other half.
    If that error gets no smaller or stays huge, or no GPU of the type can be like that,
    nothing is written and the exit code is 5.

    A log with --enable-logging-iteration-details says most. A report of vllm bench serve
    has a client's latencies: of times in which requests only decode, which tell the host's
    time, and no prompts. Of a URL, /metrics is read every few seconds, which tells one
    parameter.
    """
    from hetis.formats.files import file_label
    from hetis.profiler.calibrate.correction import calibrate as corrected
    from hetis.profiler.calibrate.latencies import observed_in_latencies

    base, spec, source = _inputs(wanted, cluster)
    replica_of = partial(_replica, spec, base, cluster=cluster)
    if source is None:
        replica_of(wanted.tp or 1)  # a check before a minute is spent on it
        observed = _watched(terminal, wanted.source, wanted.context, wanted.watch_s or _USUAL_S)
    elif isinstance(source, list):
        observed = observed_in_latencies(file_label(wanted.source), source)
    else:
        observed = _logged(wanted, source, spec)
    replica = replica_of(wanted.tp or observed.tp or 1)
    found = _possible(terminal, corrected(observed, replica), base, cluster)
    for note in observed.notes:
        terminal.warn(note)
    if found.profile is not None:
        save_profile(wanted.out, found.profile)
    terminal.emit(lambda: _document(found, observed, replica, wanted.out), lambda: _table(found, observed, replica))
    if found.profile is None:
        terminal.line(f"{found.refusal}: {wanted.out} was not written")
        return ProfileExitCode.MISSED
    terminal.say(f"written to {wanted.out}")
    return ProfileExitCode.OK


def _inputs(
    wanted: CalibrateOptions, cluster: Path | None
) -> tuple[Profile, ModelSpec, IterationLog | list[TimedRequest] | None]:
    """Return the profile to correct, the model as served, and the log or the requests of a report unless a URL is
    watched. Raises DocumentError with the problems of all of them.
    """
    from hetis.formats.errors import DocumentError, Problem, attempt
    from hetis.formats.models.document import load_model
    from hetis.formats.models.dtypes import KV_PRECISIONS, PRECISIONS, with_precision
    from hetis.formats.traces.latencies import load_latencies
    from hetis.formats.vllm_logs import load_iteration_log

    if not wanted.gpu and wanted.profile is None:
        raise typer.BadParameter("give --gpu, the type that the server runs on, or --profile")
    problems: list[Problem] = []
    base = attempt(lambda: _profile(wanted.gpu, wanted.profile, cluster), problems)
    if base is not None and cluster is not None:
        attempt(partial(gpu_type, base.gpu, cluster), problems)
    model = attempt(lambda: load_model(wanted.model), problems)
    source: IterationLog | list[TimedRequest] | None = None
    if "://" in wanted.source:
        pass
    elif wanted.source.endswith((".json", ".json.gz")):
        source = attempt(lambda: load_latencies(wanted.source), problems)
    else:
        source = attempt(lambda: load_iteration_log(wanted.source), problems)
    attempt(lambda: _precision("--weights", wanted.weights, PRECISIONS), problems)
    attempt(lambda: _precision("--kv", wanted.kv, KV_PRECISIONS), problems)
    attempt(lambda: require_outputs(wanted.out), problems)
    if problems or base is None or model is None:
        raise DocumentError(problems)
    return base, with_precision(model, weights=wanted.weights, kv=wanted.kv).on(base.gpu), source


def _profile(gpu: str, path: Path | None, cluster: Path | None) -> Profile:
    """Return the profile to correct: that of a file, or the one of the GPU type in plans for vLLM."""
    from hetis.formats.errors import single_problem
    from hetis.formats.profile import load_profile
    from hetis.profiler.defaults import default_profile

    kind = gpu_type(gpu, cluster) if gpu else None
    if path is not None:
        found = load_profile(path)
        if kind is not None and found.gpu != kind.name:
            raise single_problem(str(path), f"is the profile of {found.gpu}, --gpu is {kind.name}")
        return found
    assert kind is not None, "one of both is given"
    return default_profile(kind)[1]


def _precision(option: str, given: str | None, known: Collection[str]) -> None:
    """Refuse a choice of precisions that are not known."""
    from hetis.formats.errors import single_problem
    from hetis.formats.models.dtypes import chosen_precision

    try:
        chosen_precision(given, known) if given is not None else None
    except ValueError as error:
        raise single_problem(option, f"precision: {error}") from None


def _replica(spec: ModelSpec, profile: Profile, tp: int, cluster: Path | None) -> CalibratedReplica:
    """Return the server's replica. Only several GPUs have a link, which is that of the GPU's type."""
    from hetis.profiler.calibrate.replica import CalibratedReplica
    from hetis.solver.cluster import Link
    from hetis.solver.cost import intra_link

    link = intra_link(gpu_type(profile.gpu, cluster), None) if tp > 1 else Link(bytes_per_s=1.0, latency_s=0.0)
    return CalibratedReplica(spec, profile, tp=tp, link=link)


def _possible(
    terminal: Terminal, found: CalibrationResult, base: Profile, cluster: Path | None
) -> CalibrationResult:  # fmt: skip
    """Return the result, without its profile if the correction made that impossible for its GPU type."""
    from hetis.profiler.calibrate.correction import CHECK
    from hetis.profiler.possible import impossible
    from hetis.solver.errors import HetisError

    if found.profile is None:
        return found
    try:
        gpu = gpu_type(base.gpu, cluster)
    except HetisError:  # a GPU type that only the user's profile names: nothing is known of it
        terminal.warn(unchecked(base.gpu))
        return found
    broken = next(impossible(found.profile, gpu), "")
    if not broken or any(impossible(base, gpu)):
        return found
    return replace(found, profile=None, refusal=f"no GPU is like the corrected profile ({broken}): {CHECK}")


def _logged(wanted: CalibrateOptions, log: IterationLog, spec: ModelSpec) -> Observed:
    """Return what the log says. Raises InvalidProblemError if it is of another degree than --tp."""
    from hetis.formats.files import file_label
    from hetis.profiler.calibrate.iterations import contradictions, observed_in_log
    from hetis.solver.errors import InvalidProblemError

    label = file_label(wanted.source)
    observed = observed_in_log(label, log, context_tokens=wanted.context, max_tokens=spec.max_position)
    if wanted.tp is not None and observed.tp is not None and wanted.tp != observed.tp:
        raise InvalidProblemError(f"--tp is {wanted.tp}, that of the server in the log is {observed.tp}")
    return replace(observed, notes=(*contradictions(log.servers, spec), *observed.notes))


def _watched(terminal: Terminal, url: str, context: float | None, watch_s: float) -> Observed:
    from hetis.profiler.calibrate.scraping import observed_in_scrapes, watch

    every_s = max(_LEAST_INTERVAL_S, watch_s / _INTERVALS)
    with waiting(terminal, f"watching {url} for {watch_s:g} s"):
        scrapes = watch(url, for_s=watch_s, every_s=every_s)
    return observed_in_scrapes(url, scrapes, context_tokens=context)


def _document(found: CalibrationResult, observed: Observed, replica: CalibratedReplica, out: Path) -> dict[str, Any]:
    """Return all numbers; ``errors`` has kind ``all`` last, ``margin`` is half of a 95% interval or null."""
    return {
        "out": None if found.profile is None else str(out),
        "gpu": replica.profile.gpu,
        "model": replica.model.name,
        "tp": replica.tp,
        "engine": observed.origin,
        "observed": observed.what,
        "fitted": found.num_fitted,
        "judged": found.judged[-1].count,
        "left_out": dict(found.left_out),
        "errors": [asdict(one) | {"kind": one.kind or "all"} for one in found.judged],
        "parameters": [asdict(one) for one in found.parameters],
        "refusal": found.refusal or None,
        "notes": list(observed.notes),
    }


def _table(found: CalibrationResult, observed: Observed, replica: CalibratedReplica) -> RenderableType:
    """Return the held-out errors before and after by kind, the parameters, and what was left out."""
    from rich.console import Group
    from rich.text import Text

    title = f"{replica.profile.gpu}, {replica.model.name} at TP {replica.tp}, {observed.origin}"
    numbers = (observed.what, "mean", "MAPE", "bias", "p90", "-> MAPE", "bias", "p90")
    errors = table_of(("held out",), numbers, padding=(0, 2, 0, 0))
    for one in found.judged:
        cells = [text for e in (one.before, one.after) for text in (f"{e.mape:.1%}", f"{e.bias:+.1%}", f"{e.p90:.1%}")]
        errors.add_row(one.kind or "all", f"{one.count:,}", seconds_text(one.mean_s), *cells)
    parameters = table_of(("parameter",), ("before", "after", "95% interval"), padding=(0, 2, 0, 0))
    for each in found.parameters:
        parameters.add_row(_WORDS[each.name], _shown(each, each.before), _shown(each, each.after), _interval(each))
    left_out = [
        f"left out: {count:,}: {reason}" for reason, count in sorted(found.left_out.items(), key=lambda x: -x[1])
    ]
    said = [
        f"fitted to {found.num_fitted:,} {observed.what}, evaluated on {found.judged[-1].count:,} others",
        *left_out,
    ]
    if any(each.margin is None for each in found.parameters):
        said.append("not fitted: this load does not determine it, or it has no effect; kept as in the profile")
    return Group(Text(title, style="bold"), errors, Text(), parameters, Text("\n".join(said)))


def _shown(one: Parameter, value: float) -> str:
    return f"{value:.3g}" if one.name == "kernels" else seconds_text(value)


def _interval(one: Parameter) -> str:
    if one.margin is None:
        return "not fitted"
    return f"±{one.margin:.2g}" if one.name == "kernels" else f"±{seconds_text(one.margin)}"
