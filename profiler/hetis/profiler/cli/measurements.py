"""The verbs that write measurement files: ``run`` measures this host, ``import`` reads other tools' tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetis.commands.groups import group, option
from hetis.commands.terminal import Terminal
from hetis.commands.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.shared import RawOutOption, duration, require_outputs, seconds_text, table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.formats.measurements import Measurements
    from hetis.profiler.measure.adaptive import RunRequest
    from hetis.profiler.measure.session import RunProgress, RunResult

RUN_EXAMPLES = (
    "Example: hetis-profile run --device cuda:0 --model Llama-3.1-8B --out raw.json · then: hetis-profile fit raw.json "
    "--out profile.json"
)
_QUICK_S, _FULL_S = 35.0, 1800.0
_CPU_MODEL, _CUDA_MODEL = "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"
_LINE_INTERVAL_S = 5.0  # interval between lines of progress, where there is no bar


def _limit(text: str) -> float:
    limit_s = duration(text)
    if limit_s < 1:
        raise typer.BadParameter(f"is {text}, must be >= 1s")
    return limit_s


@group
class RunOptions:
    device: str = option("--device cpu|cuda|cuda:N: Device to measure.", "cpu")
    model: str = option(
        "--model -m NAME|FILE: Model whose shapes to measure: a catalogue name, a ModelSpec file or a config.json.",
        "",
        shown=f"{_CPU_MODEL}; CUDA: {_CUDA_MODEL}",
    )
    quick: bool = option("--quick: Finish within a minute: fewer points, each measured fewer times.", False)
    time_limit: float | None = option(
        "--time-limit TIME: Time after which no new points are chosen.", parser=_limit, shown="30min; --quick: 35s"
    )
    gpu: str = option("--gpu NAME: GPU type to write to the result.", "", shown="the device's own")
    cluster_out: Path | None = option(
        "--cluster-out FILE: Also write a cluster file of this one device with its measured peaks, for planning."
    )


@verb()
def run(terminal: Terminal, out: RawOutOption, *, wanted: RunOptions) -> ProfileExitCode:
    """Measure this host with torch, starting where the fit is least certain, until it is certain enough."""
    from hetis.formats.documents import dump, write_atomically
    from hetis.formats.measurements import save_measurements
    from hetis.profiler.measure.host_cluster import host_cluster
    from hetis.profiler.measure.session import measure

    require_outputs(out, wanted.cluster_out)
    request = _request(wanted)
    try:
        with _progress(terminal) as report:
            result = measure(request, report)
    except KeyboardInterrupt:
        terminal.line("interrupted: nothing was saved")
        return ProfileExitCode.INTERRUPTED
    save_measurements(out, result.measurements)
    for note in result.measurements.notes:
        (terminal.warn if note in result.disturbances else terminal.detail)(note)
    if wanted.cluster_out is not None:
        write_atomically(wanted.cluster_out, dump(host_cluster(result)))
    terminal.emit(lambda: _run_document(result, out), lambda: _run_table(result, out))
    return ProfileExitCode.OK


def _request(wanted: RunOptions) -> RunRequest:
    from hetis.formats.models.document import load_model
    from hetis.profiler.measure.adaptive import RunRequest

    return RunRequest(
        device=wanted.device,
        gpu=wanted.gpu,
        model=load_model(wanted.model or (_CPU_MODEL if wanted.device == "cpu" else _CUDA_MODEL)),
        quick=wanted.quick,
        limit_s=wanted.time_limit or (_QUICK_S if wanted.quick else _FULL_S),
    )


@contextmanager
def _progress(terminal: Terminal) -> Iterator[Callable[[RunProgress], None]]:
    """Yield the function to pass to `measure`: it shows a bar on a terminal, otherwise a line every few seconds."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield lambda _: None
    elif console.is_terminal and not console.is_dumb_terminal:
        from rich.progress import BarColumn, Progress, TextColumn

        # Ten wide: with the longest description and the time left that makes 80 columns.
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting torch", total=None, left="")

            def update(news: RunProgress) -> None:
                # An adaptive run ends when it knows enough: the bar follows whichever limit is nearer.
                what, left = _progress_words(news)
                progress.update(task, description=what, completed=news.done, total=news.total, left=left)

            yield update
    else:
        next_s = time.monotonic()

        def say(news: RunProgress) -> None:
            nonlocal next_s
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _LINE_INTERVAL_S
                terminal.say(", ".join(_progress_words(news)))

        yield say


def _progress_words(news: RunProgress) -> tuple[str, str]:
    """Return ``37 points, next GEMM (known to 12%)`` and ``at most 3:07 left``."""
    known = "new" if news.uncertainty >= 1 else f"known to {news.uncertainty:.0%}"
    left = f"at most {int(news.left_s) // 60}:{int(news.left_s) % 60:02d} left"
    return f"{news.done} points, next {news.what} ({known})", left


def _run_document(result: RunResult, out: Path) -> dict[str, Any]:
    return {
        "gpu": result.measurements.gpu,
        "out": str(out),
        "uncertainty": round(result.uncertainty, 4),
        "tables": _tables_document(result.measurements),
        "notes": list(result.measurements.notes),
    }


def _tables_document(value: Measurements) -> list[dict[str, Any]]:
    return [{"op": table.op.value, "kernel": table.kernel, "points": len(table)} for table in value.tables]


def _run_table(result: RunResult, out: Path) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    table = table_of(("op", "kernel", "cache"), ("points", "shortest", "longest", "spread"))
    for one in result.measurements.tables:
        shortest, longest = (seconds_text(s) for s in (one.seconds.min(), one.seconds.max()))
        spread = float(sorted(one.numbers("spread"))[len(one) // 2])
        cache = "cold" if one.cold else "warm"
        table.add_row(one.op.value, one.kernel, cache, str(len(one)), shortest, longest, f"{spread:.1%}")
    if result.uncertainty >= 1:
        left = "the time limit was reached before every operator had enough points: increase --time-limit"
    elif result.uncertainty > 0:
        left = (
            f"an error of {result.uncertainty:.0%} is still expected somewhere: the time limit was reached, or the "
            "times vary that much"
        )
    else:
        left = "every operator is known to the requested accuracy"
    return Group(Text(f"{result.measurements.gpu} -> {out}"), table, Text(left))


# Tools that wrote tables; a test keeps this in step with `hetis.profiler.importers.READERS`.
Format = Literal["aiconfigurator"]


@verb()
def import_tables(
    terminal: Terminal,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Tables: .csv, .csv.gz or .parquet.")],
    form: Annotated[Format, typer.Option("--format", help="Tool that made the tables.")],
    out: RawOutOption,
) -> ProfileExitCode:
    """Import tables of other tools as measurements.

    Tables of several GPUs, engines or hosts become a file each: raw.json, raw-2.json, ...
    """
    from hetis.formats.measurements import save_measurements
    from hetis.profiler.importers import import_tables as read

    require_outputs(out)
    found = dict(zip(_paths(out), read(form, files), strict=False))
    for path, measurements in found.items():
        save_measurements(path, measurements)
    terminal.emit(lambda: _import_document(found), lambda: _import_table(found))
    return ProfileExitCode.OK


def _paths(out: Path) -> list[Path]:
    """Return ``raw.json.gz``, ``raw-2.json.gz``, ...: more than a table can have GPUs."""
    suffix = "".join(out.suffixes[-2:]) if out.suffix == ".gz" else out.suffix
    stem = out.name.removesuffix(suffix)
    return [out, *(out.with_name(f"{stem}-{number}{suffix}") for number in range(2, 1000))]


def _import_document(found: Mapping[Path, Measurements]) -> list[dict[str, Any]]:
    return [
        {
            "out": str(path),
            "gpu": value.gpu,
            "origin": _origin(value),
            "tables": _tables_document(value),
            "notes": list(value.notes),
        }
        for path, value in found.items()
    ]


def _import_table(found: Mapping[Path, Measurements]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for path, value in found.items():
        table = table_of(("op", "kernel"), ("points",))
        for one in value.tables:
            table.add_row(one.op.value, one.kernel, f"{len(one):,}")
        notes = Text("".join(f"note: {note}\n" for note in value.notes), end="")
        parts += [Text(f"{value.gpu} -> {path}", style="bold"), Text(_origin(value)), table, notes]
    return Group(*parts)


def _origin(value: Measurements) -> str:
    """Return who measured, and on which host: measurements of one GPU type may differ in nothing else."""
    return ", ".join(part for part in (str(value.provenance), value.provenance.host) if part)
