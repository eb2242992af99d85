"""Clusters, through a real server: every call as the contract defines it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import uuid
from pathlib import Path

import grpc
import pytest

from hetis.formats import documents
from hetis.planner.store import PlanRecord, ReplicaRecord, Transaction
from hetis.v1 import cluster_pb2, plan_pb2, replica_pb2
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1.view_pb2 import VIEW_BASIC
from tests.planner.resources.served import CLUSTER, Served, document, live_replica, refused, served
from tests.planner.store import samples


def new(cluster_id: str = "night", text: str = CLUSTER, **fields: object) -> pb.CreateClusterRequest:
    cluster = cluster_pb2.Cluster(document=document(text))
    return pb.CreateClusterRequest(cluster_id=cluster_id, cluster=cluster, **fields)  # type: ignore[arg-type]


async def test_a_cluster_is_made_read_and_listed(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        made = (await planner.clusters.CreateCluster(new())).cluster
        assert (made.name, made.num_nodes, made.num_gpus, made.etag) == ("clusters/night", 4, 8, "v1")
        assert made.create_time.seconds == made.update_time.seconds == 1000
        assert made.document.source_name == "fleet.yaml"
        assert not made.HasField("policy")
        assert planner.fleet.changed == ["clusters/night"]
        assert (await planner.clusters.GetCluster(pb.GetClusterRequest(name="clusters/night"))).cluster == made
        basic = pb.GetClusterRequest(name="clusters/night", view=VIEW_BASIC)
        short = (await planner.clusters.GetCluster(basic)).cluster
        assert short.document.content == b""
        assert short.document.digest == made.document.digest
        assert list((await planner.clusters.ListClusters(pb.ListClustersRequest())).clusters) == [short]


async def test_the_answer_has_canonical_json_and_its_digest(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        answer = (await planner.clusters.CreateCluster(new())).cluster.document
        value = documents.from_data(json.loads(answer.content))
        assert answer.digest == documents.digest(value) == f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
        as_json = documents.dump(value, "json")
        again = (await planner.clusters.CreateCluster(new("other", as_json))).cluster.document
        assert (again.content, again.digest) == (answer.content, answer.digest)


async def test_every_wrong_field_is_reported_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        request = new("Night-", CLUSTER.replace("L4", "L44"), request_id="7")
        request.cluster.policy.high_water = 1.5
        request.cluster.policy.placement = 99
        request.cluster.policy.redispatch = -1
        request.cluster.policy.deviation_ratio = float("nan")
        request.cluster.policy.prepare_timeout.seconds = 601
        request.cluster.policy.redispatch_interval.seconds = -1
        request.cluster.policy.placement_patience.nanos = 2_000_000_000
        request.cluster.policy.traffic = 7
        request.cluster.policy.traffic_changes_per_hour = 61
        request.cluster.policy.traffic_cool_down.seconds = 86401
        refusal = await refused(planner.clusters.CreateCluster(request))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert set(refusal.fields) == {
            "cluster_id",
            "request_id",
            "cluster.policy.high_water",
            "cluster.policy.placement",
            "cluster.policy.redispatch",
            "cluster.policy.deviation_ratio",
            "cluster.policy.prepare_timeout",
            "cluster.policy.redispatch_interval",
            "cluster.policy.placement_patience",
            "cluster.policy.traffic",
            "cluster.policy.traffic_changes_per_hour",
            "cluster.policy.traffic_cool_down",
            "cluster.document#nodes[1].gpus[0].type",
        }
        assert refusal.fields["cluster.policy.placement"] == "is 99, must be one of OFF, ADVISORY, AUTOMATIC"
        assert refusal.fields["cluster.policy.prepare_timeout"] == "is 601 s, must be 100 ms to 10 minutes"


async def test_every_problem_of_a_document_is_reported_with_its_line(tmp_path: Path) -> None:
    text = CLUSTER.replace("A100-SXM-80GB", "A100-SXN-80GB").replace("20us", "20").replace("count: 3", "count: 0")

    async with served(tmp_path) as planner:
        refusal = await refused(planner.clusters.CreateCluster(new(text=text)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_DOCUMENT")
        assert list(refusal.fields) == [
            "cluster.document#nodes[0].gpus[0].type",
            "cluster.document#nodes[1].count",
            "cluster.document#network.latency",
        ]
        assert refusal.fields["cluster.document#nodes[0].gpus[0].type"].startswith("fleet.yaml:5: ")
        assert "A100-SXM-80GB" in refusal.fields["cluster.document#nodes[0].gpus[0].type"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a: \0", "zero byte"),
        (b"{", "YAML"),
        (b"[1, 2]", "holds a list"),
        (b"kind: Workload\napiVersion: hetis/v1\n", "Workload"),
        (b"x" * (3 * 2**20 + 1), "at most 3145728 are allowed"),
        (b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n" * 1, "apiVersion"),
    ],
)
async def test_what_is_no_document_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    async with served(tmp_path) as planner:
        request = new()
        request.cluster.document.content = content
        refusal = await refused(planner.clusters.CreateCluster(request))
        assert refusal.reason == "INVALID_DOCUMENT"
        assert message in " ".join(refusal.fields.values())


async def test_a_document_of_another_kind_or_without_content_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        request = new()
        request.cluster.document.kind = 4
        refusal = await refused(planner.clusters.CreateCluster(request))
        assert "kind is Profile, expected Cluster" in refusal.fields["cluster.document"]
        request.cluster.ClearField("document")
        refusal = await refused(planner.clusters.CreateCluster(request))
        assert refusal.fields == {"cluster.document": "is required"}


async def test_checking_only_changes_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        would_be = (await planner.clusters.CreateCluster(new(validate_only=True))).cluster
        assert (would_be.name, would_be.num_gpus, would_be.etag) == ("clusters/night", 8, "")
        assert not would_be.HasField("create_time")
        missing = await refused(planner.clusters.GetCluster(pb.GetClusterRequest(name="clusters/night")))
        assert (missing.code, missing.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert missing.metadata == {"name": "clusters/night"}
        made = (await planner.clusters.CreateCluster(new())).cluster
        assert (await refused(planner.clusters.CreateCluster(new(validate_only=True)))).reason == "ALREADY_EXISTS"
        wanted = cluster_pb2.Cluster(name=made.name, policy=cluster_pb2.ClusterPolicy(high_water=0.5))
        update = pb.UpdateClusterRequest(cluster=wanted, validate_only=True)
        assert (await planner.clusters.UpdateCluster(update)).cluster.policy.high_water == 0.5
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name=made.name, validate_only=True))
        assert (await planner.clusters.GetCluster(pb.GetClusterRequest(name=made.name))).cluster == made


async def test_a_repeated_request_is_done_once(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        request = new(request_id=str(uuid.uuid4()))
        answers = await asyncio.gather(*(planner.clusters.CreateCluster(request) for _ in range(5)))
        assert all(answer == answers[0] for answer in answers)
        assert planner.fleet.changed == ["clusters/night"]
        assert (await refused(planner.clusters.CreateCluster(new()))).reason == "ALREADY_EXISTS"
        other = new("day", request_id=request.request_id)
        refusal = await refused(planner.clusters.CreateCluster(other))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        assert refusal.metadata == {"request_id": request.request_id}
        delete = pb.DeleteClusterRequest(name="clusters/night", request_id=str(uuid.uuid4()))
        await planner.clusters.DeleteCluster(delete)
        await planner.clusters.DeleteCluster(delete)
        assert (await planner.clusters.CreateCluster(request)) == answers[0]  # the first answer, not a new cluster
        assert list((await planner.clusters.ListClusters(pb.ListClustersRequest())).clusters) == []


async def test_of_writers_at_once_only_those_that_compare_etags_are_refused(tmp_path: Path) -> None:
    num_writers = 8
    async with served(tmp_path) as planner:
        first = (await planner.clusters.CreateCluster(new())).cluster

        async def write(number: int, etag: str) -> str:
            text = CLUSTER.replace("20us", f"{20 + number}us")
            wanted = cluster_pb2.Cluster(name=first.name, etag=etag, document=document(text))
            return (await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=wanted))).cluster.etag  # type: ignore[no-any-return]

        made = await asyncio.gather(*(write(number, "") for number in range(1, num_writers + 1)))
        assert sorted(made) == sorted(f"v{number}" for number in range(2, num_writers + 2))
        last = max(made, key=lambda etag: int(etag[1:]))
        raced = [write(number, last) for number in range(num_writers + 1, 2 * num_writers + 1)]
        answers = await asyncio.gather(*raced, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, str)] == [f"v{num_writers + 2}"]
        assert {error.code() for error in answers if isinstance(error, grpc.RpcError)} == {grpc.StatusCode.ABORTED}


async def test_an_update_changes_what_its_mask_says(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        request = new()
        request.cluster.policy.high_water = 0.8
        request.cluster.policy.redispatch = cluster_pb2.REACTION_MODE_OFF
        made = (await planner.clusters.CreateCluster(request)).cluster
        planner.now_s[0] = 2000.0
        wanted = cluster_pb2.Cluster(name=made.name, policy=cluster_pb2.ClusterPolicy(deviation_ratio=0.0))

        async def update(*paths: str) -> cluster_pb2.Cluster:
            call = pb.UpdateClusterRequest(cluster=wanted)
            call.update_mask.paths.extend(paths)
            found: cluster_pb2.Cluster = (await planner.clusters.UpdateCluster(call)).cluster
            return found

        one = await update("policy.deviation_ratio", "policy.redispatch")
        assert (one.policy.high_water, one.policy.redispatch) == (0.8, 0)
        assert one.policy.HasField("deviation_ratio")
        assert (one.etag, one.update_time.seconds, one.create_time.seconds) == ("v2", 2000, 1000)
        assert one.document == made.document
        whole = await update("policy")
        assert (whole.policy.high_water, whole.policy.HasField("deviation_ratio")) == (0.0, True)
        wanted.document.CopyFrom(document(CLUSTER.replace("count: 3", "count: 5")))
        both = await update()
        assert (both.num_nodes, both.etag) == (6, "v4")
        wanted.ClearField("document")
        wanted.ClearField("policy")
        assert (await update()).etag == "v4"
        assert not (await update("policy")).HasField("policy")
        call = pb.UpdateClusterRequest(cluster=wanted)
        call.update_mask.paths.extend(["document", "etag", "policy.colour", "*"])
        refusal = await refused(planner.clusters.UpdateCluster(call))
        assert set(refusal.fields) == {"cluster.document", *(f"update_mask.paths[{number}]" for number in (1, 2, 3))}
        call = pb.UpdateClusterRequest(cluster=wanted)
        call.update_mask.paths.extend([""] * 101)
        refusal = await refused(planner.clusters.UpdateCluster(call))
        assert refusal.fields["update_mask.paths"] == "has 101, at most 100 are allowed"
        assert "update_mask.paths[0]" not in refusal.fields


async def test_a_change_of_what_has_changed_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        made = (await planner.clusters.CreateCluster(new())).cluster
        wanted = cluster_pb2.Cluster(name=made.name, etag=made.etag, policy=cluster_pb2.ClusterPolicy(high_water=0.5))
        await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=wanted))
        for call in (
            planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=wanted)),
            planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=wanted, validate_only=True)),
            planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name=made.name, etag=made.etag)),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
            assert refusal.metadata == {"name": made.name, "etag": "v2"}
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name=made.name, etag="v2"))


async def test_a_cluster_in_use_is_not_deleted_and_an_idle_one_goes_with_its_plans(tmp_path: Path) -> None:
    plan, replica = samples.plan("plans/p", cluster="clusters/night"), samples.replica("clusters/night/replicas/0")

    async with served(tmp_path) as planner:
        await planner.clusters.CreateCluster(new())
        delete = pb.DeleteClusterRequest(name="clusters/night")
        await _use(planner, plan, replica)
        refusal = await refused(planner.clusters.DeleteCluster(delete))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RESOURCE_IN_USE")
        assert refusal.metadata == {"name": "clusters/night", "user": "plans/p"}
        await planner.store.write(
            lambda tx: tx.clusters.update(dataclasses.replace(tx.clusters.require("clusters/night"), active_plan=""))
        )
        refusal = await refused(planner.clusters.DeleteCluster(delete))
        assert refusal.metadata == {"name": "clusters/night", "user": "clusters/night/replicas/0"}
        await planner.store.write(lambda tx: tx.replicas.delete(replica.name))
        await planner.clusters.DeleteCluster(delete)
        left = await planner.store.read(
            lambda tx: (tx.clusters.all(), tx.plans.all(), tx.plan_documents.get("plans/p"))
        )
        assert left == ([], [], None)


async def _use(planner: Served, plan: PlanRecord, replica: ReplicaRecord) -> None:
    def work(tx: Transaction) -> None:
        tx.plans.insert(plan)
        tx.plan_documents.put(plan.name, b"{}")
        tx.replicas.insert(replica)
        tx.clusters.update(dataclasses.replace(tx.clusters.require(plan.cluster), active_plan=plan.name))

    await planner.store.write(work)


async def test_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        for name in ("", "clusters/", "clusters/A", "clusters/a/b", "night", "clusters/" + "a" * 64, "clusters/a\0"):
            refusal = await refused(planner.clusters.GetCluster(pb.GetClusterRequest(name=name)))
            assert (refusal.reason, set(refusal.fields)) == ("INVALID_FIELD", {"name"})
        assert (await refused(planner.clusters.ListClusters(pb.ListClustersRequest(page_size=-1)))).fields == {
            "page_size": "is -1, must not be below 0"
        }


async def test_replicas_and_redispatches_are_read_and_listed(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await planner.clusters.CreateCluster(new())
        first = samples.replica("clusters/night/replicas/a")
        first.body.shape.rate_rps = 3.0
        second = samples.replica("clusters/night/replicas/b", plan="plans/q")
        moves = [samples.redispatch(f"clusters/night/redispatches/{i}", time_s=float(i)) for i in range(3)]
        moves[2].body.change.change_id = "2"

        def fill(tx: Transaction) -> None:
            tx.replicas.insert(first)
            tx.replicas.insert(second)
            for move in moves:
                tx.redispatches.insert(dataclasses.replace(move, replica=(first, second)[move.name[-1] == "1"].name))

        await planner.store.write(fill)
        planner.fleet.replicas[first.name] = live_replica(
            state=replica_pb2.REPLICA_STATE_SERVING, generation=7, report_time_s=9.0, redispatch=moves[0].name
        )
        replica = (await planner.clusters.GetReplica(pb.GetReplicaRequest(name=first.name))).replica
        assert (replica.state, replica.generation, replica.shape.rate_rps) == (2, 7, 3.0)
        assert (replica.report_time.seconds, replica.redispatch) == (9, moves[0].name)
        listed = (await planner.clusters.ListReplicas(pb.ListReplicasRequest(parent="clusters/night"))).replicas
        assert [each.name for each in listed] == [first.name, second.name]
        assert not listed[0].HasField("shape")
        of_plan = pb.ListReplicasRequest(parent="clusters/night", plan="plans/q")
        assert [each.name for each in (await planner.clusters.ListReplicas(of_plan)).replicas] == [second.name]
        request = pb.ListRedispatchesRequest(parent="clusters/night", page_size=2)
        page = await planner.clusters.ListRedispatches(request)
        assert [each.name[-1] for each in page.redispatches] == ["2", "1"]
        assert not page.redispatches[0].HasField("change")
        request.page_token = page.next_page_token
        page = await planner.clusters.ListRedispatches(request)
        assert ([each.name[-1] for each in page.redispatches], page.next_page_token) == (["0"], "")
        of_one = pb.ListRedispatchesRequest(parent="clusters/night", replica=second.name)
        assert [each.name[-1] for each in (await planner.clusters.ListRedispatches(of_one)).redispatches] == ["1"]
        whole = (await planner.clusters.GetRedispatch(pb.GetRedispatchRequest(name=moves[2].name))).redispatch
        assert whole.change.change_id == "2"
        for call in (
            planner.clusters.ListReplicas(pb.ListReplicasRequest(parent="clusters/x")),
            planner.clusters.ListRedispatches(pb.ListRedispatchesRequest(parent="clusters/x")),
            planner.clusters.GetReplica(pb.GetReplicaRequest(name="clusters/night/replicas/z")),
            planner.clusters.GetRedispatch(pb.GetRedispatchRequest(name="clusters/night/redispatches/z")),
        ):
            assert (await refused(call)).reason == "NOT_FOUND"


async def test_a_plan_that_was_deleted_with_its_cluster_is_told(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await planner.clusters.CreateCluster(new())
        await planner.store.write(lambda tx: tx.plans.insert(samples.plan("plans/p", cluster="clusters/night")))
        planner.hubs.plans.publish("plans/p", plan_pb2.Plan(), now_s=1.0)
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name="clusters/night"))
        async for events in planner.hubs.plans.watch():
            assert [(event.key, event.value) for event in events] == [("plans/p", None)]
            break


async def test_an_update_that_changes_nothing_leaves_the_etag(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        policy = cluster_pb2.ClusterPolicy(high_water=0.8)
        cluster = cluster_pb2.Cluster(document=document(), policy=policy)
        made = (
            await planner.clusters.CreateCluster(pb.CreateClusterRequest(cluster_id="night", cluster=cluster))
        ).cluster
        planner.now_s[0] += 5
        planner.fleet.changed.clear()
        cluster.name = made.name
        again = (await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=cluster))).cluster
        assert again == made
        assert planner.fleet.changed == []
        cluster.policy.high_water = 0.9
        changed = (await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=cluster))).cluster
        assert (changed.etag, changed.update_time.seconds) == ("v2", 1005)


async def test_a_document_is_kept_byte_for_byte_beside_what_it_means(tmp_path: Path) -> None:
    text = "# night shift\n" + CLUSTER.replace("count: 3,", "count: 3,   # three of them\n   ")
    other = text.replace("night shift", "day shift")

    async with served(tmp_path) as planner:
        await planner.clusters.CreateCluster(new(text=text))
        made = (await planner.clusters.GetCluster(pb.GetClusterRequest(name="clusters/night"))).cluster
        assert made.document.text == text.encode()
        assert json.loads(made.document.content)["name"] == "fleet"
        basic = pb.GetClusterRequest(name="clusters/night", view=VIEW_BASIC)
        assert not (await planner.clusters.GetCluster(basic)).cluster.document.text
        cluster = cluster_pb2.Cluster(name="clusters/night", document=document(other), etag=made.etag)
        changed = (await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=cluster))).cluster
        assert (changed.document.text, changed.document.digest) == (other.encode(), made.document.digest)
        assert changed.etag != made.etag
