"""Profile files: the operator times of a GPU type, with the provenance of every number."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats import units
from hetis.formats.fields import API_VERSION, DocumentPart, SizeOrBytes, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.solver.profile import REGION_FIELDS, Fit, FitRegion, FitScope, Op, Piece, Profile, Provenance, Source

Coefficient = Annotated[float, Field(ge=0)]
_REQUIRED = ("dense", "prefill_attention", "decode_attention", "all_reduce", "transfer")


class ProvenancePart(DocumentPart):
    """The origin of a fit. ``held_out_mape`` is its mean error on points it never saw; 0.1 is 10%.

    With a ``range_error`` of 0.5, nine in ten true times lie within 1/1.5 and 1.5 times those of the fit. Fits that are
    modelled for a GPU nobody measured have one.
    """

    source: Literal["measured", "imported", "fitted", "modelled"]
    origin: str
    held_out_mape: Annotated[float, Field(ge=0)] | None = None
    range_error: Annotated[float, Field(ge=0)] | None = None


class PiecePart(DocumentPart):
    """One affine piece: seconds, and seconds per FLOP, byte, token, query head and second of nominal wire time."""

    fixed_s: Coefficient = 0.0
    flop_s: Coefficient = 0.0
    byte_s: Coefficient = 0.0
    token_s: Coefficient = 0.0
    head_s: Coefficient = 0.0
    wire: Coefficient = 0.0


class ScopePart(DocumentPart):
    """What a fit is for; a field left out means any."""

    model: str | None = None
    tp: Annotated[int, Field(ge=1)] | None = None
    head_dim: Annotated[int, Field(ge=1)] | None = None
    queries_per_group: Annotated[int, Field(ge=1)] | None = None
    weight_bytes: Annotated[float, Field(gt=0)] | None = None


Range = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]


class RegionPart(DocumentPart):
    """What was measured, as ``[least, most]``: outside of it the fit is a guess. A field left out is not limited."""

    tokens: Range | None = None
    batch: Range | None = None
    past_tokens: Range | None = None
    context_tokens: Range | None = None
    kv_bytes: Range | None = None
    num_bytes: Range | None = None


class FitPart(DocumentPart):
    """The time of one operator: the maximum of its pieces."""

    op: Literal["dense", "experts", "prefill_attention", "decode_attention", "all_reduce", "transfer", "step", "sample"]
    scope: ScopePart | None = None
    region: RegionPart | None = None
    provenance: ProvenancePart
    pieces: Annotated[list[PiecePart], Field(min_length=1)]


class ProfileDocument(DocumentPart):
    """Operator times and usable memory of one GPU type. Memory is ``76GiB`` or a number of bytes."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["Profile"]
    gpu: Title
    usable_bytes: Annotated[SizeOrBytes, Field(gt=0)]
    reserve_bytes: SizeOrBytes
    fits: list[FitPart]


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Return the profile in a YAML or JSON file (``-``: standard input).

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_profile(*read_data(path))


def parse_profile(data: Any, source: Text) -> Profile:
    """Return the profile in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(ProfileDocument, data, source, to_value=_to_profile, check=_check_profile)


def profile_to_data(profile: Profile) -> dict[str, Any]:
    """Return a profile's document as plain data. Reading it again gives an equal profile."""
    return {
        "apiVersion": API_VERSION,
        "kind": "Profile",
        "gpu": profile.gpu,
        "usable_bytes": units.format_bytes(profile.usable_bytes),
        "reserve_bytes": units.format_bytes(profile.reserve_bytes),
        "fits": [_fit_data(fit) for fit in profile.fits],
    }


def _to_profile(document: ProfileDocument) -> Profile:
    return Profile(
        gpu=document.gpu,
        usable_bytes=document.usable_bytes,
        reserve_bytes=document.reserve_bytes,
        fits=tuple(_to_fit(part) for part in document.fits),
    )


def _to_fit(part: FitPart) -> Fit:
    provenance = part.provenance
    return Fit(
        op=Op(part.op),
        pieces=tuple(Piece(**dict(piece)) for piece in part.pieces),
        provenance=Provenance(
            source=Source(provenance.source),
            origin=provenance.origin,
            held_out_mape=provenance.held_out_mape,
            range_error=provenance.range_error,
        ),
        scope=FitScope(**dict(part.scope)) if part.scope else FitScope(),
        region=_to_region(part.region) if part.region else None,
    )


def _to_region(part: RegionPart) -> FitRegion:
    limits = {name: value for name in REGION_FIELDS if (value := getattr(part, name)) is not None}
    return FitRegion(**{name: (low, high) for name, (low, high) in limits.items()})


def _fit_data(fit: Fit) -> dict[str, Any]:
    provenance: dict[str, Any] = {"source": fit.provenance.source.value, "origin": fit.provenance.origin}
    if fit.provenance.held_out_mape is not None:
        provenance["held_out_mape"] = fit.provenance.held_out_mape
    if fit.provenance.range_error is not None:
        provenance["range_error"] = fit.provenance.range_error
    scope = {name: value for name in ScopePart.model_fields if (value := getattr(fit.scope, name)) is not None}
    pieces = [{name: value for name in PiecePart.model_fields if (value := getattr(p, name))} for p in fit.pieces]
    region = {name: list(value) for name in REGION_FIELDS if fit.region and (value := getattr(fit.region, name))}
    return {
        "op": fit.op.value,
        **({"scope": scope} if scope else {}),
        **({"region": region} if fit.region is not None else {}),
        "provenance": provenance,
        "pieces": pieces,
    }


def _check_profile(data: Any) -> list[tuple[tuple[str | int, ...], str]]:
    fits = data.get("fits")
    if not isinstance(fits, list):
        return []
    given = {fit.get("op") for fit in fits if isinstance(fit, dict) and isinstance(fit.get("op"), str)}
    missing = [op for op in _REQUIRED if op not in given]
    return [(("fits",), f"has no fit for {', '.join(missing)}")] if missing else []
