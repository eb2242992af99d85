"""Files as resources: created or updated, and never over somebody else's change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hetis.formats.documents import Value, dump
from hetis.planner.cli.resource_names import id_of
from hetis.planner.client import CallError, Client, document_of_file
from hetis.solver.cluster import Cluster
from hetis.solver.profile import Profile
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    document_pb2,
    profile_pb2,
    profile_service_pb2,
    view_pb2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """The outcome for a file: ``what`` is created, updated or unchanged."""

    resource: Any
    what: str


def document(path: str, value: Value, kind: document_pb2.DocumentKind.ValueType) -> document_pb2.Document:
    """Return the file read as ``value``, as it is, so that the planner's messages have its lines.

    Standard input cannot be read twice, so its value is serialised.
    """
    if path != "-":
        return document_of_file(path, kind)
    return document_pb2.Document(kind=kind, content=dump(value, "json").encode("utf-8"), source_name="stdin")


def put_cluster(client: Client, path: str, value: Cluster, *, dry_run: bool) -> Put:
    """Create or update the cluster of a file, under an id made from its name."""
    wanted = cluster_pb2.Cluster(document=document(path, value, document_pb2.DOCUMENT_KIND_CLUSTER))
    wanted.name = f"clusters/{id_of(value.name)}"
    present = _present_cluster(client, wanted.name)
    if present is None:
        made = client.clusters.CreateCluster(
            cluster_service_pb2.CreateClusterRequest(
                cluster_id=id_of(value.name), cluster=wanted, validate_only=dry_run
            )
        )
        return Put(resource=made.cluster, what="created")
    wanted.etag = present.etag
    changed = client.clusters.UpdateCluster(
        cluster_service_pb2.UpdateClusterRequest(cluster=wanted, validate_only=dry_run)
    ).cluster
    return Put(resource=changed, what=_what(present, changed))


def put_profile(client: Client, path: str, value: Profile, *, dry_run: bool) -> Put:
    """Create or update the profile of a file, under an id made from its GPU type."""
    wanted = profile_pb2.Profile(document=document(path, value, document_pb2.DOCUMENT_KIND_PROFILE))
    wanted.name = f"profiles/{id_of(value.gpu)}"
    present = _present_profile(client, wanted.name)
    if present is None:
        made = client.profiles.CreateProfile(
            profile_service_pb2.CreateProfileRequest(profile_id=id_of(value.gpu), profile=wanted, validate_only=dry_run)
        )
        return Put(resource=made.profile, what="created")
    wanted.etag = present.etag
    changed = client.profiles.UpdateProfile(
        profile_service_pb2.UpdateProfileRequest(profile=wanted, validate_only=dry_run)
    ).profile
    return Put(resource=changed, what=_what(present, changed))


def _what(present: Any, changed: Any) -> str:
    same = present.document.digest and present.document.digest == changed.document.digest
    return "unchanged" if same else "updated"


def _present_cluster(client: Client, name: str) -> cluster_pb2.Cluster | None:
    try:
        request = cluster_service_pb2.GetClusterRequest(name=name, view=view_pb2.VIEW_BASIC)
        return client.clusters.GetCluster(request).cluster
    except CallError as error:
        if error.reason != "NOT_FOUND":
            raise
    return None


def _present_profile(client: Client, name: str) -> profile_pb2.Profile | None:
    try:
        request = profile_service_pb2.GetProfileRequest(name=name, view=view_pb2.VIEW_BASIC)
        return client.profiles.GetProfile(request).profile
    except CallError as error:
        if error.reason != "NOT_FOUND":
            raise
    return None
