"""The verbs that make profiles, ``fit`` and ``model``, and that look at them, from ``show`` to ``check``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.commands.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.shared import (
    ClusterOption,
    GpuOrFileArgument,
    ProfileOutOption,
    gpu_type,
    load_all,
    percent_text,
    profile_of,
    require_outputs,
    save_profile,
    seconds_text,
    table_of,
    unchecked,
    waiting,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.profiler.fit import FittedProfile
    from hetis.solver.profile import Fit, Piece, Profile

FIT_EXAMPLES = "Example: hetis-profile fit raw.json --out profile.json -o json | jq .held_out_mape"
_SERVING = "errors on held-out points in the serving range (attention: batch >= 4, context 256 to 16k)"
_STAND_IN = "Ampere"
_LEGEND = (
    "Seconds are the largest piece of: F FLOPs, B bytes, T tokens, H query heads,\n"
    "W seconds of wire. Error: mean on held-out points; ±: what plans assume instead.\n"
    "Region: the measured range. -v: origins."
)


@verb()
def fit(
    terminal: Terminal,
    raw: Annotated[list[Path], typer.Argument(metavar="RAW...", help="Measurements of one GPU type.")],
    out: ProfileOutOption,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Fit a profile to measurements and report its error on held-out points.

    -o json has held_out_mape of every operator in the serving range (batch 4 and more, context 256 to 16k) and by
    region.
    """
    from hetis.profiler.fit import fit_profile
    from hetis.profiler.roofline import shipped_efficiencies

    require_outputs(out)
    measurements = load_all(raw)
    gpu = gpu_type(measurements[0].gpu, cluster)
    if gpu.architecture not in shipped_efficiencies().architectures:
        # The processor of a host, or a type that a cluster file defines. Whatever was not measured is then modelled by
        # the ratios of its peaks to those of the most common GPU.
        gpu = replace(gpu, architecture=_STAND_IN)
        terminal.warn(f"what was not measured is modelled as if {gpu.name} were of the {_STAND_IN} architecture")
    with waiting(terminal, f"fitting {gpu.name}"):
        fitted = fit_profile(measurements, gpu)
    save_profile(out, fitted.profile)
    terminal.emit(lambda: {"out": str(out)} | fitted.report.to_data(), lambda: _fitted_table(fitted, out))
    return ProfileExitCode.OK


@verb()
def model(
    terminal: Terminal,
    gpu: Annotated[str, typer.Argument(metavar="GPU", help="A GPU type of the catalogue or of --cluster.")],
    out: ProfileOutOption,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Model an unmeasured GPU from the most similar measured one, scaled by the ratios of their peak rates.

    As in plans, engine times are those of vLLM. The error of an operator is what leaving out one measured GPU at a time
    costs: docs/accuracy.md.
    """
    from hetis.formats.errors import did_you_mean
    from hetis.formats.profile import profile_to_data
    from hetis.profiler.defaults import HOST
    from hetis.profiler.engines import for_engine
    from hetis.profiler.roofline import modelled_profile, shipped_efficiencies
    from hetis.solver.errors import InvalidProblemError

    kind = gpu_type(gpu, cluster)
    try:
        profile = for_engine(modelled_profile(kind), kind, HOST)
    except InvalidProblemError as error:
        near = did_you_mean(kind.architecture, shipped_efficiencies().architectures)
        raise InvalidProblemError(f"{error}{near}") from None
    save_profile(out, profile)
    terminal.emit(
        lambda: {"out": str(out)} | profile_to_data(profile), lambda: _table(profile, f"{profile.gpu} -> {out}")
    )
    return ProfileExitCode.OK


@verb()
def show(terminal: Terminal, profile: GpuOrFileArgument) -> ProfileExitCode:
    """Show a profile: its pieces with their sources, errors and measured regions."""
    from hetis.formats.profile import profile_to_data
    from hetis.profiler.possible import scope_words

    found = profile_of(profile)
    terminal.emit(lambda: profile_to_data(found), lambda: _table(found, found.gpu))
    for fit in found.fits:
        scope = ", ".join(scope_words(fit.scope)) or "any"
        terminal.detail(f"{fit.op.value} ({scope}): {fit.provenance.origin}")
    return ProfileExitCode.OK


@verb()
def check(terminal: Terminal, profile: GpuOrFileArgument, cluster: ClusterOption = None) -> ProfileExitCode:
    """Check a profile: its format, impossible rates, excess memory, errors and regions.

    What is impossible ends with exit code 2; what is merely doubtful is a warning.
    """
    from rich.text import Text

    from hetis.profiler.possible import above_peaks, doubts_of, impossible
    from hetis.solver.errors import HetisError

    found = profile_of(profile)
    doubts = list(doubts_of(found))
    broken: list[str] = []
    try:
        gpu = gpu_type(found.gpu, cluster)
        broken = list(impossible(found, gpu))
        doubts += above_peaks(found, gpu)
    except HetisError:
        if cluster is not None:
            raise
        doubts.append(unchecked(found.gpu))
    for doubt in doubts:
        terminal.warn(doubt)

    def table() -> RenderableType:
        if broken:
            return Text("\n".join(f"violated: {sentence}" for sentence in broken), style="red")
        return Text(f"the profile of {found.gpu} is valid: {len(found.fits)} fits, {len(doubts)} doubts", style="green")

    terminal.emit(lambda: {"ok": not broken, "broken": broken, "doubts": doubts}, table)
    return ProfileExitCode.INVALID if broken else ProfileExitCode.OK


def _fitted_table(fitted: FittedProfile, out: Path) -> RenderableType:
    """Return a row per fit, followed by what was not fitted, in 80 columns."""
    from rich.console import Group
    from rich.text import Text

    from hetis.profiler.possible import scope_words

    report = fitted.report
    numbers = ("points", "held out", "pieces", "MAPE", "p95", "bias", "1 piece")
    table = table_of(("op", "scope"), numbers, padding=(0, 2, 0, 0))
    table.columns[3].no_wrap = False
    for one in report.ops:
        shown = one.serving if one.serving.num_points else one.held_out
        table.add_row(
            one.op.value.replace("_attention", ""),
            "\n".join(scope_words(one.scope)) or "any",
            str(one.num_fitted),
            str(one.num_held_out),
            str(one.num_pieces),
            Text(percent_text(shown.mape), style="" if one.meets_bar else "yellow"),
            percent_text(shown.p95),
            f"{shown.bias:+.1%}",
            percent_text(one.one_piece.mape if one.one_piece.num_points else None),
        )
    notes = [
        f"{one.op.value}: {percent_text(one.serving.mape)} is above the target of {percent_text(one.bar)}"
        + (f": {one.remark}" if one.remark else "")
        for one in report.ops
        if not one.meets_bar
    ]
    notes += [
        f"decode ({', '.join(scope_words(one.scope))}): {one.factor:g} times as long beside a chunk, from "
        f"{one.num_fitted:,} points: {percent_text(one.held_out.mape)} off on {one.held_out.num_points:,} held-out "
        f"ones, and {percent_text(one.summed.mape)} with the sum of both"
        for one in report.mixed
    ]
    notes += list(dict.fromkeys(f"{one.op.value}: {note}" for one in report.ops for note in one.notes))
    most: dict[tuple[str, str], int] = {}
    for one in report.ops:
        for rows in one.left_out:
            key = one.op.value, rows.reason
            most[key] = max(most.get(key, 0), rows.num_rows)
    notes += [f"left out: {op}: {count:,} rows: {reason}" for (op, reason), count in most.items()]
    notes += [f"not fitted: {one.op.value} of {one.origin}: {one.reason}" for one in report.unfitted]
    return Group(
        Text(f"{report.gpu} -> {out}", style="bold"), table, Text(_SERVING, style="dim"), Text("\n".join(notes))
    )


def _table(profile: Profile, title: str) -> RenderableType:
    """Return one row per fit, with its pieces below each other, in 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from hetis.profiler.possible import scope_words

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("scope", overflow="fold")
    table.add_column("pieces", overflow="fold", min_width=22)
    table.add_column("source", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("region", overflow="fold", min_width=6)
    for fit in profile.fits:
        table.add_row(
            fit.op.value.replace("_attention", ""),
            "\n".join(scope_words(fit.scope)) or "any",
            "\n".join(_time_words(fit)),
            fit.provenance.source.value,
            "\n".join(_error_words(fit)),
            "\n".join(_region_words(fit)) or "-",
        )
    usable, reserved = (f"{num_bytes / 2**30:.4g} GiB" for num_bytes in (profile.usable_bytes, profile.reserve_bytes))
    memory = Text(f"usable {usable}, of it {reserved} the engine's")
    return Group(Text(title, style="bold"), memory, table, Text(_LEGEND, style="dim"))


def _time_words(fit: Fit) -> Iterator[str]:
    """Yield the pieces, and the factor beside a chunk if there is one."""
    yield from map(_piece_words, fit.pieces)
    if fit.mixed is not None:
        yield f"x {fit.mixed.factor:g} beside a chunk"


def _piece_words(piece: Piece) -> str:
    """Return ``12.6 us + B/3.1 TB/s + H x 1.5 ns``: coefficients as rates."""
    terms = (
        (piece.fixed_s, seconds_text),
        (piece.flop_s, lambda value: f"F/{_rate(1 / value)}FLOP/s"),
        (piece.byte_s, lambda value: f"B/{_rate(1 / value)}B/s"),
        (piece.token_s, lambda value: f"T x {_tiny(value)}"),
        (piece.head_s, lambda value: f"H x {_tiny(value)}"),
        (piece.wire, lambda value: f"{value:.3g} W"),
    )
    return " + ".join(words(value) for value, words in terms if value) or "0"


def _error_words(fit: Fit) -> Iterator[str]:
    """Yield the mean error, and if plans assume another one, that."""
    from hetis.profiler.ranges import range_factors

    error = fit.provenance.held_out_mape
    yield percent_text(error)
    assumed = 1.0 / range_factors(fit)[0] - 1.0
    if error is None or assumed > error:
        yield f"±{assumed:.0%}"


def _region_words(fit: Fit) -> Iterator[str]:
    """Yield the ranges of a fit's region, such as ``batch 4-256``."""
    for name, word in (("tokens", "T"), ("batch", "batch"), ("context_tokens", "ctx"), ("num_bytes", "B")):
        limits = None if fit.region is None else getattr(fit.region, name)
        if limits is not None:
            yield f"{word} {_size(limits[0])}-{_size(limits[1])}"


def _rate(value: float) -> str:
    for factor, unit in ((1e-15, "P"), (1e-12, "T"), (1e-9, "G"), (1e-6, "M")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} "


def _tiny(value: float) -> str:
    return f"{value * 1e9:.3g} ns" if value < 1e-6 else seconds_text(value)


def _size(value: float) -> str:
    for limit, unit in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"
