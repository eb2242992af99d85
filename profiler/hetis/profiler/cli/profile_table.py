"""A profile as a table of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hetis.formats.profile import profile_to_data
from hetis.profiler.cli.words import percent, seconds
from hetis.solver.profile import Fit, FitScope, Piece, Profile

if TYPE_CHECKING:
    from rich.console import RenderableType

LEGEND = (
    "Seconds are the largest piece of: F FLOPs, B bytes, T tokens, H query heads, W seconds of wire.\n"
    "Error: mean on points the fit never saw. Region: what was measured. -v: origins."
)


def profile_document(profile: Profile) -> dict[str, Any]:
    """Return the profile in its file format."""
    return profile_to_data(profile)


def profile_table(profile: Profile, *, title: str) -> RenderableType:
    """Return one row per fit, with its pieces below each other."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("scope", overflow="fold")
    table.add_column("pieces", overflow="fold", min_width=22)
    table.add_column("source", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("region", overflow="fold")
    for fit in profile.fits:
        table.add_row(
            fit.op.value.replace("_attention", ""),
            "\n".join(scope_words(fit.scope)) or "any",
            "\n".join(piece_words(piece) for piece in fit.pieces),
            fit.provenance.source.value,
            percent(fit.provenance.held_out_mape),
            "\n".join(region_words(fit)) or "-",
        )
    memory = f"usable {_gib(profile.usable_bytes)}, of it {_gib(profile.reserve_bytes)} the engine's"
    return Group(Text(title, style="bold"), Text(memory), table, Text(LEGEND, style="dim"))


def piece_words(piece: Piece) -> str:
    """Return ``12.6 us + B/3.1 TB/s + H x 1.5 ns``: coefficients as rates."""
    parts = []
    if piece.fixed_s:
        parts.append(seconds(piece.fixed_s))
    if piece.flop_s:
        parts.append(f"F/{_rate(1 / piece.flop_s)}FLOP/s")
    if piece.byte_s:
        parts.append(f"B/{_rate(1 / piece.byte_s)}B/s")
    if piece.token_s:
        parts.append(f"T x {_tiny(piece.token_s)}")
    if piece.head_s:
        parts.append(f"H x {_tiny(piece.head_s)}")
    if piece.wire:
        parts.append(f"{piece.wire:.3g} W")
    return " + ".join(parts) or "0"


def scope_words(scope: FitScope) -> Iterator[str]:
    """Yield the conditions of a fit's scope."""
    if scope.model is not None:
        yield scope.model.rpartition("/")[2]
    if scope.tp is not None:
        yield f"TP {scope.tp}"
    if scope.head_dim is not None:
        yield f"head {scope.head_dim}"
    if scope.queries_per_group is not None:
        yield f"{scope.queries_per_group} q/group"
    if scope.weight_bytes is not None:
        yield f"{scope.weight_bytes:g} B/weight"


def region_words(fit: Fit) -> Iterator[str]:
    """Yield the ranges of a fit's region, such as ``batch 4-256``."""
    if fit.region is None:
        return
    for name, word in (("tokens", "T"), ("batch", "batch"), ("context_tokens", "ctx"), ("num_bytes", "B")):
        limits = getattr(fit.region, name)
        if limits is not None:
            yield f"{word} {_count(limits[0])}-{_count(limits[1])}"


def origins(profile: Profile) -> Iterator[str]:
    """Yield a line per fit with the origin of its numbers."""
    for fit in profile.fits:
        yield f"{fit.op.value} ({', '.join(scope_words(fit.scope)) or 'any'}): {fit.provenance.origin}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.4g} GiB"


def _rate(value: float) -> str:
    for limit, factor, unit in ((1e15, 1e-15, "P"), (1e12, 1e-12, "T"), (1e9, 1e-9, "G"), (1e6, 1e-6, "M")):
        if value >= limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} "


def _tiny(value: float) -> str:
    return f"{value * 1e9:.3g} ns" if value < 1e-6 else seconds(value)


def _count(value: float) -> str:
    for limit, unit in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"
