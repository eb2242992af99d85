"""Profiles: the implementations of the calls on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from hetis.formats import catalogue
from hetis.planner.convert import documents, names
from hetis.planner.convert.clusters import BASIC, FULL, profile_message, without
from hetis.planner.resources.checks import Checks, check, require_etag
from hetis.planner.resources.committing import change_once
from hetis.planner.resources.pages import read_page
from hetis.planner.store import ProfileRecord, Reader, Store, Transaction
from hetis.solver.profile import Profile, Source
from hetis.v1 import profile_pb2
from hetis.v1 import profile_service_pb2 as pb


@dataclass(slots=True, eq=False)
class Profiles:
    """The resource ``profiles/{profile}``."""

    _store: Store

    async def create(self, request: pb.CreateProfileRequest) -> pb.CreateProfileResponse:
        checks = Checks()
        checks.new_id("profile_id", request.profile_id)
        checks.request(request)
        name = f"profiles/{request.profile_id}"
        body = await _read_body(checks, name, request.profile)
        now_s = self._store.clock()
        record = ProfileRecord(name=name, gpu_type=body.gpu_type, body=body, create_time_s=now_s, update_time_s=now_s)
        if request.validate_only:
            await self._store.read(lambda tx: tx.profiles.require_free(name))
            profile = without(profile_message(record, view=FULL), "etag", "create_time", "update_time")
            return pb.CreateProfileResponse(profile=profile)

        def insert(tx: Transaction) -> tuple[pb.CreateProfileResponse, None]:
            return pb.CreateProfileResponse(profile=profile_message(tx.profiles.insert(record), view=FULL)), None

        return await change_once(self._store, request, pb.CreateProfileResponse, insert)

    async def get(self, request: pb.GetProfileRequest) -> pb.GetProfileResponse:
        check(request, name=names.PROFILE)
        record = await self._store.require(Reader.profiles, request.name)
        return pb.GetProfileResponse(profile=profile_message(record, view=request.view or FULL))

    async def list(self, request: pb.ListProfilesRequest) -> pb.ListProfilesResponse:
        checks = Checks()
        checks.request(request)
        checks.require(request.gpu_type.isprintable(), "gpu_type", "holds characters that cannot be printed")
        checks.raise_if_wrong()
        gpu_type = catalogue.gpu_name(request.gpu_type) if request.gpu_type else ""
        records, token = await read_page(self._store, request, Reader.profiles, gpu_type=gpu_type)
        profiles = [profile_message(record, view=BASIC) for record in records]
        return pb.ListProfilesResponse(profiles=profiles, next_page_token=token)

    async def update(self, request: pb.UpdateProfileRequest) -> pb.UpdateProfileResponse:
        checks = Checks()
        name = request.profile.name
        checks.name("profile.name", name, names.PROFILE)
        checks.request(request)
        checks.update_mask(request.update_mask.paths, ("document",), "document")
        body = await _read_body(checks, name, request.profile)
        now_s = self._store.clock()

        def changed(record: ProfileRecord) -> ProfileRecord:
            """Return the changed record, or the same object if nothing changes."""
            require_etag(record, request.profile.etag)
            if body == record.body:
                return record
            return replace(record, gpu_type=body.gpu_type, body=body, update_time_s=now_s)

        def respond(record: ProfileRecord) -> pb.UpdateProfileResponse:
            return pb.UpdateProfileResponse(profile=profile_message(record, view=FULL))

        if request.validate_only:
            return respond(await self._store.read(lambda tx: changed(tx.profiles.require(name))))

        def update(tx: Transaction) -> tuple[pb.UpdateProfileResponse, None]:
            before = tx.profiles.require(name)
            after = changed(before)
            return respond(after if after is before else tx.profiles.update(after)), None

        return await change_once(self._store, request, pb.UpdateProfileResponse, update)

    async def delete(self, request: pb.DeleteProfileRequest) -> pb.DeleteProfileResponse:
        check(request, name=names.PROFILE)

        def require(tx: Reader) -> None:
            require_etag(tx.profiles.require(request.name), request.etag)

        if request.validate_only:
            await self._store.read(require)
            return pb.DeleteProfileResponse()

        def delete(tx: Transaction) -> tuple[pb.DeleteProfileResponse, None]:
            require(tx)
            tx.profiles.delete(request.name)
            return pb.DeleteProfileResponse(), None

        return await change_once(self._store, request, pb.DeleteProfileResponse, delete)


async def _read_body(checks: Checks, name: str, profile: profile_pb2.Profile) -> profile_pb2.Profile:
    """Return the body to store for a caller's profile; raises all errors that ``checks`` has found so far."""
    parsed = None
    if checks.require(profile.HasField("document"), "profile.document", "is required"):
        read = partial(documents.canonical_document, kind=Profile)
        parsed = await checks.document("profile.document", profile.document, read)
    checks.raise_if_wrong()
    assert parsed is not None
    document, value = parsed
    used = {fit.provenance.source for fit in value.fits}
    errors = [fit.provenance.held_out_mape for fit in value.fits if fit.provenance.held_out_mape is not None]
    return profile_pb2.Profile(
        name=name,
        document=document,
        gpu_type=catalogue.gpu_name(value.gpu),
        usable_bytes=value.usable_bytes,
        sources=[number for source, number in _SOURCES.items() if source in used],
        held_out_mape=max(errors) if errors else None,
    )


_SOURCES = {source: profile_pb2.ProfileSource.Value(f"PROFILE_SOURCE_{source.name}") for source in Source}
