"""Parts that several verbs share: options, files, profiles and GPU types by name, tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hetis.commands.terminal import Terminal
    from hetis.formats.measurements import Measurements
    from hetis.solver.cluster import GpuType
    from hetis.solver.profile import Profile

_TABLES = (".csv", ".parquet", ".tsv")  # ends of the names of other tools' tables
RawOutOption = Annotated[
    Path, typer.Option("--out", metavar="RAW", help="Measurements file to write; compressed if its name ends in .gz.")
]
ProfileOutOption = Annotated[
    Path, typer.Option("--out", metavar="PROFILE", help="Profile to write; .yaml or .yml for YAML, else JSON.")
]
ClusterOption = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        "-c",
        metavar="FILE",
        show_default=False,
        help="Cluster file that defines the GPU type if the catalogue lacks it.",
    ),
]
GpuOrFileArgument = Annotated[
    str, typer.Argument(metavar="PROFILE|GPU", help="A profile file, or a GPU type: its profile in plans without one.")
]


def duration(text: str) -> float:
    """Parse seconds: ``90s``, ``2min``, ``90``."""
    from hetis.formats.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def require_outputs(*paths: Path | None) -> None:
    """Refuse paths that cannot be written, before the work. Paths that are None are skipped. Raises DocumentError with
    a problem for each.
    """
    from hetis.formats.errors import DocumentError, Problem

    problems = []
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            reason = "is a folder, expected the name of a file" if path.is_dir() else f"no folder {path.parent}"
            problems.append(Problem(file=str(path), message=f"cannot be written: {reason}"))
    if problems:
        raise DocumentError(problems)


def load_all(paths: Sequence[Path]) -> list[Measurements]:
    """Return the measurements in all files, which are of one GPU type.

    Raises DocumentError with the problems of all files; a file that is given twice is one.
    """
    from hetis.formats.errors import DocumentError, Problem
    from hetis.formats.measurements import load_measurements

    found, problems = list["Measurements"](), list[Problem]()
    places = [path.resolve() for path in paths]
    twice = [path for number, path in enumerate(paths) if places[number] in places[:number]]
    problems += [Problem(file=str(path), message="is given twice") for path in dict.fromkeys(twice)]
    for path in paths:
        try:
            found.append(load_measurements(path))
        except DocumentError as error:
            is_table = path.is_file() and path.name.removesuffix(".gz").endswith(_TABLES)
            hint = "is a table, expected measurements: convert it with `hetis-profile import`"
            problems += [Problem(file=str(path), message=hint)] if is_table else error.problems
    if not problems:
        wanted = found[0].gpu
        why = f"that of {paths[0]} is {wanted}: a profile is for one GPU type"
        problems = [
            Problem(file=str(path), path="gpu", message=f"is {one.gpu}, {why}")
            for path, one in zip(paths, found, strict=True)
            if one.gpu != wanted
        ]
    if problems:
        raise DocumentError(problems)
    return found


def profile_of(name: str) -> Profile:
    """Return the profile in a file, or the one of a GPU type of the catalogue that plans use without a file.

    It has the times of vLLM, as in plans for any engine. Raises DocumentError if the name is neither a file nor a GPU
    type, or the file is not a profile, and InvalidProblemError if nothing is known about the GPU type.
    """
    from hetis.formats.catalogue import UnknownNameError, find_gpu
    from hetis.formats.errors import single_problem
    from hetis.formats.profile import load_profile

    if name == "-" or Path(name).is_file():
        return load_profile(name)
    try:
        gpu = find_gpu(name).gpu
    except UnknownNameError as error:
        if Path(name).suffix or "/" in name:
            return load_profile(name)  # explains why it cannot be read
        raise single_problem(name, f"is neither a file nor a GPU type: {error}") from None
    from hetis.profiler.defaults import default_profile

    return default_profile(gpu)[1]


def gpu_type(name: str, cluster: Path | None) -> GpuType:
    """Return the GPU type ``name`` of a cluster file, or else of the catalogue. Raises DocumentError if the file cannot
    be read, or neither has the type. The message says what to do.
    """
    from hetis.formats.catalogue import UnknownNameError, find_gpu
    from hetis.formats.cluster import load_cluster
    from hetis.formats.errors import single_problem

    types = {} if cluster is None else load_cluster(cluster).gpu_types
    try:
        return types.get(name) or find_gpu(name).gpu
    except UnknownNameError as error:
        if cluster is not None:
            raise single_problem(str(cluster), f"does not define GPU type {name}, nor does the catalogue") from None
        hint = "give the cluster file that defines it with --cluster (`run --cluster-out` writes one)"
        raise single_problem(name, f"{error}; {hint}") from None


def unchecked(gpu: str) -> str:
    """Return the warning about a profile of a type whose peaks nobody states."""
    return f"{gpu} is not in the catalogue: rates and memory were not checked (--cluster FILE)"


def save_profile(path: Path, profile: Profile) -> None:
    """Write the whole file or nothing. Raises DocumentError if it cannot be written."""
    from hetis.formats.documents import dump
    from hetis.formats.files import write_atomically

    write_atomically(path, dump(profile, "yaml" if path.suffix in (".yaml", ".yml") else "json"))


@contextmanager
def waiting(terminal: Terminal, what: str) -> Iterator[None]:
    """Show ``what`` while the block runs."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0 or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(what):
        yield


def table_of(texts: Iterable[str], numbers: Iterable[str], **settings: Any) -> Table:
    """Return a table without rows, with columns of text before those of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", **settings)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def seconds_text(value: float) -> str:
    """Return ``12.3 us``, ``4.56 ms``, ``1.2 s``."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def percent_text(value: float | None) -> str:
    """Return ``4.2%``, or a dash if the value is unknown."""
    return "-" if value is None else f"{value:.1%}"
