"""Profiles as callers see them."""

from __future__ import annotations

from hetis.formats import catalogue
from hetis.planner.convert import documents
from hetis.planner.convert.clusters import BASIC
from hetis.planner.convert.times import timestamp
from hetis.planner.store import ProfileRecord, etag_of
from hetis.solver.profile import Profile, Source
from hetis.v1 import document_pb2, profile_pb2, view_pb2

_SOURCES = {
    Source.MEASURED: profile_pb2.PROFILE_SOURCE_MEASURED,
    Source.IMPORTED: profile_pb2.PROFILE_SOURCE_IMPORTED,
    Source.FITTED: profile_pb2.PROFILE_SOURCE_FITTED,
    Source.MODELLED: profile_pb2.PROFILE_SOURCE_MODELLED,
}


def profile_document(source: document_pb2.Document) -> tuple[document_pb2.Document, Profile]:
    """Return the canonical document of a profile, and its content. Raises as `documents.read_document`."""
    value = documents.read_profile(source)
    return documents.document_of(value, source_name=source.source_name, text=source.content), value


def profile_body(name: str, document: document_pb2.Document, value: Profile) -> profile_pb2.Profile:
    """Return the stored body of a profile. ``document`` is canonical, and ``value`` is its content."""
    used = {fit.provenance.source for fit in value.fits}
    errors = [fit.provenance.held_out_mape for fit in value.fits if fit.provenance.held_out_mape is not None]
    return profile_pb2.Profile(
        name=name,
        document=document,
        gpu_type=gpu_type_name(value.gpu),
        usable_bytes=value.usable_bytes,
        sources=[number for source, number in _SOURCES.items() if source in used],
        held_out_mape=max(errors) if errors else None,
    )


def profile_message(record: ProfileRecord, *, view: view_pb2.View.ValueType) -> profile_pb2.Profile:
    message = profile_pb2.Profile()
    message.CopyFrom(record.body)
    if view == BASIC:
        message.document.ClearField("content")
        message.document.ClearField("text")
    message.etag = etag_of(record)
    message.create_time.CopyFrom(timestamp(record.create_time_s))
    message.update_time.CopyFrom(timestamp(record.update_time_s))
    return message


def gpu_type_name(text: str) -> str:
    """Return the catalogue's name of a GPU type that it knows by this or another name, else the text itself."""
    try:
        return catalogue.find_gpu(text).gpu.name
    except catalogue.UnknownNameError:
        return text
