"""Profiles, through a real server: every call as the contract defines it."""

from __future__ import annotations

import uuid
from pathlib import Path

import grpc

from hetis.formats import documents
from hetis.solver.profile import Fit, Op, Piece, Profile, Provenance, Source
from hetis.v1 import document_pb2, profile_pb2
from hetis.v1 import profile_service_pb2 as pb
from hetis.v1.view_pb2 import VIEW_BASIC
from tests.planner.resources.served import refused, served


def profile(gpu: str = "L4", *, errors: tuple[float | None, ...] = (0.02, None, 0.05)) -> profile_pb2.Profile:
    sources = (Source.MODELLED, Source.MEASURED, Source.FITTED)
    provenances = [
        Provenance(source=source, origin="test", held_out_mape=error)
        for source, error in zip(sources, errors, strict=True)
    ]
    operators = [op for op in Op if op not in (Op.EXPERTS, Op.STEP, Op.SAMPLE)]  # operators that every profile has
    fits = tuple(
        Fit(op=op, pieces=(Piece(fixed_s=1e-6),), provenance=provenances[number % 3])
        for number, op in enumerate(operators)
    )
    value = Profile(gpu=gpu, usable_bytes=20 * 2**30, reserve_bytes=2**30, fits=fits)
    document = document_pb2.Document(content=documents.dump(value).encode(), source_name="l4.yaml")
    return profile_pb2.Profile(document=document)


async def test_a_profile_is_made_read_listed_changed_and_forgotten(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        create = pb.CreateProfileRequest(profile_id="l4", profile=profile(), request_id=str(uuid.uuid4()))
        would_be = pb.CreateProfileRequest(profile_id="l4", profile=profile(), validate_only=True)
        assert (await planner.profiles.CreateProfile(would_be)).profile.etag == ""
        made = (await planner.profiles.CreateProfile(create)).profile
        assert (await planner.profiles.CreateProfile(create)).profile == made
        assert (made.name, made.gpu_type, made.usable_bytes, made.etag) == ("profiles/l4", "L4", 20 * 2**30, "v1")
        assert list(made.sources) == [
            profile_pb2.PROFILE_SOURCE_MEASURED,
            profile_pb2.PROFILE_SOURCE_FITTED,
            profile_pb2.PROFILE_SOURCE_MODELLED,
        ]
        assert made.held_out_mape == 0.05
        assert (await planner.profiles.GetProfile(pb.GetProfileRequest(name=made.name))).profile == made
        short = (await planner.profiles.GetProfile(pb.GetProfileRequest(name=made.name, view=VIEW_BASIC))).profile
        assert (short.document.content, short.document.digest) == (b"", made.document.digest)
        planner.now_s[0] = 2000.0
        other = profile("A100-SXM-80GB", errors=(None, None, None))
        other.name, other.etag = made.name, made.etag
        newer = (await planner.profiles.UpdateProfile(pb.UpdateProfileRequest(profile=other))).profile
        assert (newer.gpu_type, newer.etag, newer.HasField("held_out_mape")) == ("A100-SXM-80GB", "v2", False)
        assert (newer.create_time.seconds, newer.update_time.seconds) == (1000, 2000)
        planner.now_s[0], other.etag = 3000.0, newer.etag
        assert (await planner.profiles.UpdateProfile(pb.UpdateProfileRequest(profile=other))).profile == newer
        other.etag = made.etag
        stale = await refused(planner.profiles.UpdateProfile(pb.UpdateProfileRequest(profile=other)))
        assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        stale = await refused(planner.profiles.DeleteProfile(pb.DeleteProfileRequest(name=made.name, etag="v1")))
        assert stale.reason == "ETAG_MISMATCH"
        await planner.profiles.DeleteProfile(pb.DeleteProfileRequest(name=made.name, validate_only=True))
        await planner.profiles.DeleteProfile(pb.DeleteProfileRequest(name=made.name, etag="v2"))
        missing = await refused(planner.profiles.GetProfile(pb.GetProfileRequest(name=made.name)))
        assert missing.reason == "NOT_FOUND"


async def test_profiles_are_listed_by_gpu_type_whatever_it_is_called(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        for number, gpu in enumerate(["L4", "NVIDIA L4", "T4"]):
            request = pb.CreateProfileRequest(profile_id=f"p{number}", profile=profile(gpu))
            await planner.profiles.CreateProfile(request)
        for name in ("L4", "nvidia-l4"):
            page = await planner.profiles.ListProfiles(pb.ListProfilesRequest(gpu_type=name))
            assert [each.name for each in page.profiles] == ["profiles/p0", "profiles/p1"]
        assert list((await planner.profiles.ListProfiles(pb.ListProfilesRequest(gpu_type="X9"))).profiles) == []
        refusal = await refused(planner.profiles.ListProfiles(pb.ListProfilesRequest(gpu_type="L4\0", page_size=-2)))
        assert set(refusal.fields) == {"gpu_type", "page_size"}


async def test_every_wrong_field_is_reported_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        wrong = profile()
        wrong.document.content = wrong.document.content.replace(b"decode_attention", b"decode_atention")
        request = pb.CreateProfileRequest(profile_id="-", profile=wrong, request_id="x")
        refusal = await refused(planner.profiles.CreateProfile(request))
        assert refusal.reason == "INVALID_FIELD"
        assert {"profile_id", "request_id", "profile.document#fits[2].op"} <= set(refusal.fields)
        update = pb.UpdateProfileRequest(profile=profile_pb2.Profile(name="l4"))
        update.update_mask.paths.extend(["document", "gpu_type"])
        refusal = await refused(planner.profiles.UpdateProfile(update))
        assert set(refusal.fields) == {"profile.name", "profile.document", "update_mask.paths[1]"}
        only = pb.CreateProfileRequest(profile_id="l4", profile=wrong)
        assert (await refused(planner.profiles.CreateProfile(only))).reason == "INVALID_DOCUMENT"
