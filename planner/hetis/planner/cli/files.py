"""Verbs for files: ``init``, ``convert``, ``validate``, ``schema`` and ``catalog``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from hetis.commands.terminal import OutputFormat, Terminal
from hetis.commands.verb import one_of
from hetis.formats.errors import did_you_mean, single_problem
from hetis.formats.files import write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.outputs import refuse_overwriting, write_out
from hetis.planner.cli.parameters import values
from hetis.planner.cli.parameters.options import group, option, panel, verb
from hetis.planner.report.figures import plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.formats.traces.rates import Measured


CLUSTER = """\
# The fleet. `hetis-plan schema cluster` has every field, `hetis-plan catalog gpus` every GPU type.
apiVersion: hetis/v1
kind: Cluster
name: my-fleet
nodes:
  # `count` equal nodes are called l4-0, l4-1, ...; a node may hold several GPU types.
  - {name: h100, gpus: [{type: H100-SXM-80GB, count: 2}]}
  - {name: l4, count: 2, gpus: [{type: L4, count: 4}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""

WORKLOAD = """\
# The traffic: here mean lengths. A `histogram` or the path of a CSV `trace` tells more, and `hetis-plan catalog
# workloads` lists traces that need no file at all.
apiVersion: hetis/v1
kind: Workload
name: my-traffic
mean_prompt_tokens: 2000
mean_output_tokens: 300
"""

SAMPLES = {"cluster.yaml": CLUSTER, "workload.yaml": WORKLOAD}
EXAMPLE_MODEL = "Llama-2-70B"
EXAMPLE_LENGTHS = "2000/300"  # within the context of that model


@verb()
def init(
    terminal: Terminal,
    directory: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to; created if missing.")] = Path(
        "."
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> ExitCode:
    """Write a sample cluster and workload file."""
    targets = {directory / name: text for name, text in SAMPLES.items()}
    refuse_overwriting(*targets, force=force)
    if not directory.is_dir():
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise single_problem(str(directory), f"cannot be created: {error.strerror}") from None
        terminal.say(f"created the folder {directory}")
    for path, text in targets.items():
        write_atomically(path, text)
    names = [str(path) for path in targets]
    terminal.emit(lambda: names, lambda: "\n".join(names))
    cluster, workload = targets
    terminal.say(f"next: hetis-plan place --cluster {cluster} --model {EXAMPLE_MODEL} --workload {workload}")
    return ExitCode.OK


CONVERT_EXAMPLES = """Examples:\n
hetis-plan convert profile_export.jsonl --out trace.csv\n
hetis-plan convert ShareGPT_V3_unfiltered_cleaned_split.json --tokenizer /models/llama --rate 4 --out trace.jsonl.gz\n
hetis-plan convert vllm-server.log --out trace.csv\n
hetis-plan convert http://prometheus:9090 --out workload.yaml"""


@group
class ConvertOptions:
    out: str = option(
        "--out FILE|-: A .csv or .jsonl file, optionally .gz, or a .yaml file if there are no single requests; - is "
        "stdout.",
        "-",
    )
    window: str = option("--window DURATION: Time before now of which a Prometheus is asked: 7d, 12h.", "7d")
    characters_per_token: float | None = option(
        "--characters-per-token: Characters that count as one token where the file has texts but no token counts.",
        min=0.1,
        max=100.0,
        shown="4",
    )
    tokenizer: str | None = option(
        "--tokenizer FILE|DIR: Tokenizer that counts the tokens of texts: a tokenizer.json or its folder."
    )
    rate: float | None = option("--rate RPS: Requests per second, for files without arrival times.", parser=values.rate)


@verb(prints_data=False)
def convert(
    terminal: Terminal,
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE|URL",
            help="A .csv, .jsonl, .json or .log file, with .gz if compressed, whose content decides the format; or the "
            "URL of a Prometheus or of an engine's /metrics.",
        ),
    ],
    *,
    given: ConvertOptions,
) -> ExitCode:
    """Convert a trace of an engine, benchmark, gateway or data set to hetis' format."""
    from hetis.planner.use_cases.files import convert as converted
    from hetis.planner.use_cases.files import trace_file

    if (traffic := _measured(trace, given)) is not None:
        return _write_traffic(terminal, trace, traffic, given)
    out = given.out
    if given.tokenizer is not None and given.characters_per_token is not None:
        raise typer.BadParameter("--tokenizer and --characters-per-token cannot be combined")
    requests, warnings = converted(
        trace, characters_per_token=given.characters_per_token, tokenizer=given.tokenizer, rate_rps=given.rate
    )
    content = trace_file(requests, "trace.csv" if out == "-" else out)
    for line in warnings:
        terminal.warn(line)
    per_second = f"{requests.rate_rps:.4g} requests/s" if requests.rate_rps is not None else "all at once"
    means = f"{requests.prompt_tokens.mean():.0f}/{requests.output_tokens.mean():.0f}"
    left_out = f"; left out: {plural(requests.num_left_out, 'row')} of {requests.left_out}"
    terminal.say(
        f"{trace}: {len(requests.arrival_s)} requests, {per_second}, {means} tokens on average (form: {requests.form})"
        f"{left_out if requests.num_left_out else ''}"
    )
    write_out(terminal, out, content)
    return ExitCode.OK


def _measured(trace: str, given: ConvertOptions) -> Measured | None:
    """Return what a server or a file has measured instead of requests, or None if the file has requests."""
    if trace.startswith(("http://", "https://")):
        from hetis.planner.cli.traffic import traffic_of

        return traffic_of(trace, window=given.window)
    from hetis.formats.traces.rates import measured

    return measured(trace)


def _write_traffic(terminal: Terminal, source: str, traffic: Measured, given: ConvertOptions) -> ExitCode:
    from hetis.formats.documents import dump

    workload, out = traffic.workload, given.out
    if out != "-" and not out.endswith((".yaml", ".yml")):
        raise single_problem(source, "has lengths and rates, but no requests: write a Workload, --out FILE.yaml")
    for note in traffic.notes:
        terminal.warn(note)
    moments = workload.moments()
    rate = "an unknown rate" if workload.rate_rps is None else f"{workload.rate_rps:.4g} requests/s"
    means = f"{moments.mean_prompt:.0f}/{moments.mean_output:.0f}"
    terminal.say(
        f"{source}: {traffic.num_requests:.0f} requests, {rate}, {means} tokens on average (form: {traffic.form})"
    )
    write_out(terminal, out, dump(workload))
    return ExitCode.OK


@verb()
def validate(
    terminal: Terminal,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Documents of any kind, traces, and models; - is standard input."),
    ],
) -> ExitCode:
    """Check files and list every problem with its file, line, path and the nearest valid name."""
    from hetis.planner.use_cases.files import validate_file
    from hetis.planner.use_cases.json_values import json_value

    results = [validate_file(file) for file in files]

    def table() -> RenderableType:
        from rich.text import Text

        from hetis.planner.report.tables import grid

        rows = (
            (
                Text("bad", style="red") if result.problems else Text("ok", style="green"),
                Text(result.file, overflow="fold"),
                result.kind or "",
                plural(len(result.problems), "problem") if result.problems else result.name,
            )
            for result in results
        )
        return grid(True, True, True, True, rows=rows)

    for result in results:
        for problem in result.problems:
            terminal.line(str(problem))
        for warning in result.warnings:
            terminal.warn(f"{result.file}: {warning}")
    terminal.emit(lambda: [{"ok": not result.problems, **json_value(result)} for result in results], table)
    return ExitCode.INVALID if any(result.problems for result in results) else ExitCode.OK


FileKind = Literal[
    "Cluster", "ModelSpec", "Workload", "Profile", "Plan", "DispatchState", "DispatchRequests", "Tenants",
]  # fmt: skip
FILE_KINDS = get_args(FileKind)


def _kind(text: str) -> str:
    known = {kind.lower(): kind for kind in FILE_KINDS}
    return known.get(text.lower()) or one_of(text, FILE_KINDS)


@verb(output=OutputFormat.JSON)
def schema(
    terminal: Terminal,
    kind: Annotated[
        FileKind,
        typer.Argument(parser=_kind, metavar="KIND", help=f"One of {', '.join(FILE_KINDS)}."),
    ],
) -> ExitCode:
    """Print the JSON Schema of a kind of file, for editors and other tools."""
    from rich.json import JSON

    from hetis.formats.documents import json_schema

    document = json_schema(kind)
    terminal.emit(lambda: document, lambda: JSON.from_data(document))
    return ExitCode.OK


Catalogue = Literal["gpus", "models", "workloads", "strategies", "add"]
CATALOG_EXAMPLES = """Examples:\n
hetis-plan catalog gpus\n
hetis-plan catalog models -o json\n
hetis-plan catalog add MYCARD --memory 24GiB --memory-bandwidth 960GB/s --fp16 122TFLOPS --pcie 32GB/s
--architecture RDNA3 --into cluster.yaml"""


_figure = panel("A GPU that is not there (add NAME)")


@group
class FiguresOfGpu:
    memory: str | None = _figure("--memory SIZE: Its memory: 24GiB.")
    memory_bandwidth: str | None = _figure("--memory-bandwidth RATE: Peak bandwidth of its memory: 960GB/s.")
    fp16: str | None = _figure("--fp16 FLOPS: Peak rate of dense 16-bit matrix products: 122TFLOPS.")
    pcie: str | None = _figure("--pcie RATE: Bandwidth of its PCIe in one direction: 32GB/s.")
    architecture: str | None = _figure("--architecture: The architecture of `catalog gpus` that is most like its own.")
    fp8: str | None = _figure("--fp8 FLOPS: Peak rate in 8 bits, if it has such products.")
    nvlink: str | None = _figure("--nvlink RATE: Bandwidth to all others in one direction, if it has such a link.")
    into: str | None = _figure("--into FILE: Cluster file that gets the entry.", shown="print it")


@verb()
def catalog(
    terminal: Terminal,
    which: Annotated[Catalogue, typer.Argument(help="What to list; or add: the `gpu_types` entry of another GPU.")],
    containing: Annotated[
        str,
        typer.Argument(help="Only names that contain this text; the name to add.", show_default=False),
    ] = "",
    *,
    figures: FiguresOfGpu,
) -> ExitCode:
    """List the GPUs, models, workloads or strategies in the catalogue, with their sources (-o json), or add a GPU."""
    given = {name: value for name, value in vars(figures).items() if value is not None}
    if which == "add":
        return _add_gpu(terminal, containing, given)
    if given:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')} is for `catalog add`")
    from hetis.planner.report import catalogue as tables
    from hetis.planner.report.tables import table_of
    from hetis.planner.use_cases.json_values import fields_of, json_value
    from hetis.profiler.defaults import profile_origin
    from hetis.solver.engine_rules import Family

    every = _by_name(which)
    chosen = {name: entry for name, entry in every.items() if containing.lower() in name.lower()}
    if not chosen:  # an empty list without a message would look like the whole catalogue
        terminal.warn(f"no name in the catalogue of {which} contains {containing!r}{did_you_mean(containing, every)}")
    entries = list(chosen.values())
    table: RenderableType
    match which:
        case "gpus":
            profiles = {name: profile_origin(entry.gpu) for name, entry in chosen.items()}
            data = [{**json_value(entry), "profile": profiles[name]} for name, entry in chosen.items()]
            table = tables.gpu_table(entries, profiles, wide=terminal.is_wide)
        case "models":
            data, table = json_value(entries), tables.model_table(entries)
        case "workloads":
            data, table = json_value(entries), tables.workload_table(entries)
        case _:
            data = [
                {**fields_of(one, "name", "summary"), "family": one.restrict(Family()).describe()} for one in entries
            ]
            table = table_of(entries, ("'name", lambda one: one.name), ("'searches", lambda one: one.summary))
    terminal.emit(lambda: data, lambda: table)
    return ExitCode.OK


def _add_gpu(terminal: Terminal, name: str, figures: dict[str, str]) -> ExitCode:
    from hetis.planner.use_cases.files import with_gpu_type

    missing = [each for each in ("memory", "memory_bandwidth", "fp16", "pcie", "architecture") if each not in figures]
    if missing or not name:
        lacking = ", ".join([*([] if name else ["NAME"]), *(f"--{each.replace('_', '-')}" for each in missing)])
        raise typer.BadParameter(f"catalog add needs {lacking}")
    into = figures.pop("into", None)
    text = with_gpu_type(name, figures, into)
    if into is None:
        terminal.write(text)
    else:
        write_atomically(into, text)
        terminal.say(f"{into}: {name} is in gpu_types")
    return ExitCode.OK


def _by_name(which: Catalogue) -> dict[str, Any]:
    from hetis.formats import catalogue
    from hetis.solver.placement.families import STRATEGIES

    match which:
        case "gpus":
            return {entry.gpu.name: entry for entry in catalogue.gpus()}
        case "models":
            return {entry.model.name: entry for entry in catalogue.models()}
        case "workloads":
            return {entry.workload.name: entry for entry in catalogue.workloads()}
        case _:
            return dict(STRATEGIES)
