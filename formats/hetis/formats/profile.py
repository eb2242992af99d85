"""Profile files: the operator times of a GPU type, with the provenance of every number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats import units
from hetis.formats.fields import Document, DocumentPart, Found, SizeOrBytes, Title, entries, plain, present, value_of
from hetis.formats.kinds import kind_of
from hetis.solver.profile import MOST_MIXED_FACTOR, Fit, Mixed, Op, Profile

Coefficient = Annotated[float, Field(ge=0)]
RelativeError = Annotated[float, Field(ge=0, le=100)]
_REQUIRED = ("dense", "prefill_attention", "decode_attention", "all_reduce", "transfer")


class ProvenancePart(DocumentPart):
    """The origin of a fit. ``held_out_mape`` is its mean error on held-out points; 0.1 is 10%.

    With a ``range_error`` of 0.5, nine in ten true times lie within 1/1.5 and 1.5 times those of the fit. Fits that are
    modelled for a GPU without measurements have one. No error is above 100: a fit that is a hundred times too fast or
    too slow says nothing.
    """

    source: Literal["measured", "imported", "fitted", "modelled"]
    origin: str
    held_out_mape: RelativeError | None = None
    range_error: RelativeError | None = None


class PiecePart(DocumentPart):
    """One affine piece: seconds, and seconds per FLOP, byte, token, query head and second of nominal wire time."""

    fixed_s: Coefficient = 0.0
    flop_s: Coefficient = 0.0
    byte_s: Coefficient = 0.0
    token_s: Coefficient = 0.0
    head_s: Coefficient = 0.0
    wire: Coefficient = 0.0


class ScopePart(DocumentPart):
    """The scope of a fit; a field left out matches any value. `weights` is the number format of the weights, `int4`
    whoever packed them. `state_flops` is the number of FLOPs of linear attention for one token and query head, averaged
    over all layers.
    """

    model: str | None = None
    tp: Annotated[int, Field(ge=1)] | None = None
    head_dim: Annotated[int, Field(ge=1)] | None = None
    queries_per_group: Annotated[int, Field(ge=1)] | None = None
    weights: Literal["bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4"] | None = None
    weight_bytes: Annotated[float, Field(gt=0)] | None = None
    state_flops: Annotated[float, Field(gt=0)] | None = None


Range = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]


class RegionPart(DocumentPart):
    """The measured range, as ``[least, most]``; outside it the fit is a guess. A field left out is not limited."""

    tokens: Range | None = None
    batch: Range | None = None
    past_tokens: Range | None = None
    context_tokens: Range | None = None
    kv_bytes: Range | None = None
    num_bytes: Range | None = None


class MixedPart(DocumentPart):
    """The time of decode attention in an iteration with a prefill chunk: ``factor`` times its time alone. The error of
    its provenance is that of such iterations' attention, both parts together.
    """

    factor: Annotated[float, Field(ge=0, le=MOST_MIXED_FACTOR)]
    provenance: ProvenancePart


class FitPart(DocumentPart):
    """The time of one operator: the maximum of its pieces. Only fits of ``decode_attention`` may have ``mixed``: its
    default is a factor of 1.
    """

    op: Literal["dense", "experts", "prefill_attention", "decode_attention", "all_reduce", "transfer", "step", "sample"]
    scope: ScopePart | None = None
    region: RegionPart | None = None
    provenance: ProvenancePart
    pieces: Annotated[list[PiecePart], Field(min_length=1)]
    mixed: MixedPart | None = None


class ProfileDocument(Document):
    """Operator times and usable memory of one GPU type. Memory is a size such as ``76GiB`` or a number of bytes."""

    kind: Literal["Profile"]
    gpu: Title
    usable_bytes: Annotated[SizeOrBytes, Field(gt=0)]
    reserve_bytes: SizeOrBytes
    fits: list[FitPart]


def _to_profile(document: ProfileDocument) -> Profile:
    fits = [fit.model_dump() | ({} if fit.scope else {"scope": {}}) for fit in document.fits]
    return value_of(Profile, document, fits=fits)


def _profile_data(profile: Profile) -> dict[str, Any]:
    return {
        "gpu": profile.gpu,
        "usable_bytes": units.format_bytes(profile.usable_bytes),
        "reserve_bytes": units.format_bytes(profile.reserve_bytes),
        "fits": [_fit_data(fit) for fit in profile.fits],
    }


def _fit_data(fit: Fit) -> dict[str, Any]:
    scope = present(plain(fit.scope))
    return {
        "op": fit.op.value,
        **({"scope": scope} if scope else {}),
        **({"region": present(plain(fit.region))} if fit.region is not None else {}),
        "provenance": present(plain(fit.provenance)),
        "pieces": [{name: value for name, value in plain(piece).items() if value} for piece in fit.pieces],
        **({"mixed": _mixed_data(fit.mixed)} if fit.mixed is not None else {}),
    }


def _mixed_data(mixed: Mixed) -> dict[str, Any]:
    return {"factor": mixed.factor, "provenance": present(plain(mixed.provenance))}


def _check_profile(data: Mapping[str, Any]) -> Found:
    fits = data.get("fits")
    given = {fit.get("op") for _, fit in entries(fits) if isinstance(fit.get("op"), str)}
    if isinstance(fits, list) and (missing := [op for op in _REQUIRED if op not in given]):
        yield ("fits",), f"has no fit for {', '.join(missing)}"
    for i, fit in entries(fits):
        if fit.get("mixed") is not None and fit.get("op") in list(Op) and fit["op"] != Op.DECODE_ATTENTION:
            yield ("fits", i, "mixed"), f"is of {fit['op']}, but only {Op.DECODE_ATTENTION} has such a factor"


PROFILE = kind_of(ProfileDocument, Profile, to_value=_to_profile, to_data=_profile_data, check=_check_profile)
load_profile, parse_profile, profile_to_data = PROFILE.load, PROFILE.parse, PROFILE.to_data
