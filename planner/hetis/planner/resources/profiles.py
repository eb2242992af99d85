"""Profiles: the implementation of the calls about them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from hetis.formats import catalogue
from hetis.planner.convert import documents, names
from hetis.planner.convert.clusters import BASIC, FULL
from hetis.planner.convert.names import timestamp
from hetis.planner.failures import Reason, ServiceError, etag_mismatch
from hetis.planner.resources.requests import Checks, once, read_page_request, to_the_end
from hetis.planner.store import ProfileRecord, Reader, Store, Transaction, etag_of
from hetis.solver.profile import Profile, Source
from hetis.v1 import document_pb2, profile_pb2, view_pb2
from hetis.v1 import profile_service_pb2 as service_pb2


class Profiles:
    """The resource ``profiles/{profile}``."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def create(self, request: service_pb2.CreateProfileRequest) -> service_pb2.CreateProfileResponse:
        checks = Checks()
        checks.new_id("profile_id", request.profile_id)
        checks.request_id(request.request_id)
        name = f"profiles/{request.profile_id}"
        body = await _read_body(checks, name, request.profile)
        now_s = self._clock()
        record = ProfileRecord(name=name, gpu_type=body.gpu_type, body=body, create_time_s=now_s, update_time_s=now_s)
        if request.validate_only:
            await self._store.read(lambda tx: _must_be_free(tx, name))
            profile = profile_message(record, view=FULL)
            for field in ("etag", "create_time", "update_time"):
                profile.ClearField(field)
            return service_pb2.CreateProfileResponse(profile=profile)

        def insert(tx: Transaction) -> service_pb2.CreateProfileResponse:
            return service_pb2.CreateProfileResponse(profile=profile_message(tx.profiles.insert(record), view=FULL))

        work = self._store.write(lambda tx: once(tx, request, service_pb2.CreateProfileResponse, lambda: insert(tx)))
        return (await to_the_end(work)).response

    async def get(self, request: service_pb2.GetProfileRequest) -> service_pb2.GetProfileResponse:
        checks = Checks()
        checks.name("name", request.name, names.PROFILE)
        checks.raise_if_wrong()
        record = await self._store.read(lambda tx: tx.profiles.require(request.name))
        return service_pb2.GetProfileResponse(profile=profile_message(record, view=request.view or FULL))

    async def list(self, request: service_pb2.ListProfilesRequest) -> service_pb2.ListProfilesResponse:
        checks = Checks()
        checks.page_size(request.page_size)
        checks.require(request.gpu_type.isprintable(), "gpu_type", "holds characters that cannot be printed")
        checks.raise_if_wrong()
        page = read_page_request(request)
        of_type = {"gpu_type": gpu_type_name(request.gpu_type)} if request.gpu_type else {}
        found = await self._store.read(lambda tx: tx.profiles.page(page.after, page.num_read, **of_type))
        records, token = page.cut(found, lambda record: record.name)
        profiles = [profile_message(record, view=BASIC) for record in records]
        return service_pb2.ListProfilesResponse(profiles=profiles, next_page_token=token)

    async def update(self, request: service_pb2.UpdateProfileRequest) -> service_pb2.UpdateProfileResponse:
        checks = Checks()
        name = request.profile.name
        checks.name("profile.name", name, names.PROFILE)
        checks.request_id(request.request_id)
        for number, path in enumerate(request.update_mask.paths):
            checks.require(path == "document", f"update_mask.paths[{number}]", f"is {path[:80]!r}, must be document")
        body = await _read_body(checks, name, request.profile)
        now_s = self._clock()

        def changed(tx: Reader) -> ProfileRecord:
            record = tx.profiles.require(name)
            _must_have(record, request.profile.etag)
            return dataclasses.replace(record, gpu_type=body.gpu_type, body=body, update_time_s=now_s)

        if request.validate_only:
            record = await self._store.read(changed)
            return service_pb2.UpdateProfileResponse(profile=profile_message(record, view=FULL))

        def update(tx: Transaction) -> service_pb2.UpdateProfileResponse:
            record = tx.profiles.update(changed(tx))
            return service_pb2.UpdateProfileResponse(profile=profile_message(record, view=FULL))

        work = self._store.write(lambda tx: once(tx, request, service_pb2.UpdateProfileResponse, lambda: update(tx)))
        return (await to_the_end(work)).response

    async def delete(self, request: service_pb2.DeleteProfileRequest) -> service_pb2.DeleteProfileResponse:
        checks = Checks()
        checks.name("name", request.name, names.PROFILE)
        checks.request_id(request.request_id)
        checks.raise_if_wrong()

        def check(tx: Reader) -> None:
            _must_have(tx.profiles.require(request.name), request.etag)

        if request.validate_only:
            await self._store.read(check)
            return service_pb2.DeleteProfileResponse()

        def delete(tx: Transaction) -> service_pb2.DeleteProfileResponse:
            check(tx)
            tx.profiles.delete(request.name)
            return service_pb2.DeleteProfileResponse()

        work = self._store.write(lambda tx: once(tx, request, service_pb2.DeleteProfileResponse, lambda: delete(tx)))
        return (await to_the_end(work)).response


async def _read_body(checks: Checks, name: str, profile: profile_pb2.Profile) -> profile_pb2.Profile:
    """Return the body to store for a profile that a caller sent; raises what ``checks`` has found so far."""
    parsed = None
    if checks.require(profile.HasField("document"), "profile.document", "is required"):
        parsed = await checks.document("profile.document", profile.document, profile_document)
    checks.raise_if_wrong()
    assert parsed is not None
    return profile_body(name, *parsed)


def _must_be_free(tx: Reader, name: str) -> None:
    if tx.profiles.get(name) is not None:
        raise ServiceError(Reason.ERROR_REASON_ALREADY_EXISTS, f"{name} exists already", metadata={"name": name})


def _must_have(record: ProfileRecord, etag: str) -> None:
    if etag and etag != etag_of(record):
        raise etag_mismatch(record.name, given=etag, present=etag_of(record))


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
