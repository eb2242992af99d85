"""ProfileService: each call is passed to the resource."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

from typing import Any

import grpc

from hetis.planner.resources.profiles import Profiles
from hetis.v1 import profile_service_pb2 as pb
from hetis.v1 import profile_service_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ProfileServicer(profile_service_pb2_grpc.ProfileServiceServicer):
    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    async def CreateProfile(self, request: pb.CreateProfileRequest, context: Context) -> pb.CreateProfileResponse:
        return await self._profiles.create(request)

    async def GetProfile(self, request: pb.GetProfileRequest, context: Context) -> pb.GetProfileResponse:
        return await self._profiles.get(request)

    async def ListProfiles(self, request: pb.ListProfilesRequest, context: Context) -> pb.ListProfilesResponse:
        return await self._profiles.list(request)

    async def UpdateProfile(self, request: pb.UpdateProfileRequest, context: Context) -> pb.UpdateProfileResponse:
        return await self._profiles.update(request)

    async def DeleteProfile(self, request: pb.DeleteProfileRequest, context: Context) -> pb.DeleteProfileResponse:
        return await self._profiles.delete(request)
