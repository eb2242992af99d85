"""``hetis-profile run``: measures this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import RawOutOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.profiler.measure.session import RunResult

RUN_EXAMPLES = (
    "Example: hetis-profile run --device cuda:0 --model Llama-3.1-8B --out raw.json · then: hetis-profile fit raw.json "
    "--out profile.json"
)
_QUICK_S, _FULL_S = 35.0, 1800.0
_CPU_MODEL, _CUDA_MODEL = "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"


@verb()
def run(
    terminal: Terminal,
    out: RawOutOption,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="What to measure.")] = "cpu",
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FILE",
            show_default=f"{_CPU_MODEL}; CUDA: {_CUDA_MODEL}",
            help="Whose shapes to measure: a catalogue name, a ModelSpec file or a config.json.",
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: fewer points, each less often.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            min=1.0,
            metavar="SECONDS",
            show_default="1800; --quick: 35",
            help="Choose no new points after this long.",
        ),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option("--gpu", metavar="NAME", show_default="the device's own", help="GPU type in the result."),
    ] = "",
    cluster_out: Annotated[
        Path | None,
        typer.Option(
            "--cluster-out",
            metavar="FILE",
            show_default=False,
            help="Also write a cluster of this one device, with its measured peaks, to plan on.",
        ),
    ] = None,
) -> ProfileExitCode:
    """Measure this host with torch: where the fit is least certain first, until it is certain enough.

    What was measured is kept in RAW.journal until the run is complete: Ctrl-C loses one point at most.
    """
    from hetis.formats.errors import single_problem
    from hetis.formats.measurements import save_measurements
    from hetis.formats.model import load_model
    from hetis.profiler.cli.files import require_outputs
    from hetis.profiler.cli.run_progress import run_progress
    from hetis.profiler.measure.journal import journal_of, points_in
    from hetis.profiler.measure.request import RunRequest
    from hetis.profiler.measure.session import measure

    require_outputs((out, cluster_out))
    spec = load_model(model or (_CPU_MODEL if device == "cpu" else _CUDA_MODEL))
    journal = journal_of(out)
    if journal.exists() and not resume and points_in(journal) != 0:
        raise single_problem(str(journal), "is left of an interrupted run: go on with --resume, or delete it")
    try:
        with run_progress(terminal) as report:
            result = measure(
                RunRequest(
                    device=device,
                    gpu=gpu,
                    model=spec,
                    quick=quick,
                    limit_s=time_limit or (_QUICK_S if quick else _FULL_S),
                    journal=journal,
                    resume=resume,
                ),
                report,
            )
    except KeyboardInterrupt:
        kept = (points_in(journal) if journal.exists() else None) or 0
        if kept:
            terminal.line(f"interrupted: {kept} points are kept in {journal}; the same command with --resume goes on")
        else:
            journal.unlink(missing_ok=True)
            terminal.line("interrupted before the first point: nothing is kept")
        return ProfileExitCode.INTERRUPTED
    save_measurements(out, result.measurements)
    journal.unlink(missing_ok=True)
    for note in result.measurements.notes:
        (terminal.warn if note in result.disturbances else terminal.detail)(note)
    if cluster_out is not None:
        _write_cluster(cluster_out, result)
    if result.num_known:
        terminal.say(f"{result.num_known} points were known from the interrupted run")
    terminal.emit(lambda: _document(result, out), lambda: _table(result, out))
    return ProfileExitCode.OK


def _write_cluster(path: Path, result: RunResult) -> None:
    import yaml

    from hetis.formats.documents import write_atomically
    from hetis.profiler.measure.host_cluster import host_cluster

    write_atomically(path, yaml.safe_dump(host_cluster(result), sort_keys=False))


def _document(result: RunResult, out: Path) -> dict[str, Any]:
    value = result.measurements
    return {
        "gpu": value.gpu,
        "out": str(out),
        "uncertainty": round(result.uncertainty, 4),
        "tables": [{"op": table.op.value, "kernel": table.kernel, "points": len(table)} for table in value.tables],
        "notes": list(value.notes),
    }


def _table(result: RunResult, out: Path) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from hetis.profiler.cli.words import seconds

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "kernel", "cache"):
        table.add_column(name)
    for name in ("points", "shortest", "longest", "spread"):
        table.add_column(name, justify="right")
    for one in result.measurements.tables:
        times = one.seconds
        spread = float(sorted(one.numbers("spread"))[len(one) // 2])
        table.add_row(
            one.op.value,
            one.kernel,
            "cold" if one.cold else "warm",
            str(len(one)),
            seconds(times.min()),
            seconds(times.max()),
            f"{spread:.1%}",
        )
    return Group(Text(f"{result.measurements.gpu} -> {out}"), table, Text(_what_is_left(result.uncertainty)))


def _what_is_left(uncertainty: float) -> str:
    if uncertainty >= 1:
        return "time was up before every operator had enough points: --time-limit allows more"
    if uncertainty > 0:
        return f"an error of {uncertainty:.0%} is still expected somewhere: time was up, or times vary as much"
    return "every operator is known as well as was asked for"
