"""The audit log records who changed what, and whom the planner refused."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from hetis.planner.callers import CallerRole
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service.audit_refusals import EVERY_S, AuditRefusals
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.identity.credentials import create_token
from hetis.planner.service.observability.telemetry import CallRecord
from hetis.planner.store import AuditedChange, Store
from hetis.v1 import cluster_pb2
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from tests.planner.resources.planned import WAIT as WAITS
from tests.planner.resources.planned import create_request, planner_in
from tests.planner.resources.served import document, live_node, refused
from tests.planner.resources.served import served as served_clusters
from tests.planner.service.process import finished_here
from tests.planner.service.serving import by_tokens, failure_of, reason_of, served


async def lines(store: Store) -> list[AuditedChange]:
    return await store.read(lambda reader: [line.change for line in reader.audit.lines()])


async def test_every_change_is_a_line_in_its_transaction_and_nothing_else_is(tmp_path: Path) -> None:
    request_id = str(uuid.uuid4())

    async with served_clusters(tmp_path) as planner:
        cluster = cluster_pb2.Cluster(document=document())
        create = pb.CreateClusterRequest(cluster_id="night", cluster=cluster, request_id=request_id)
        for _ in range(2):
            await planner.clusters.CreateCluster(create)
        await planner.clusters.GetCluster(pb.GetClusterRequest(name="clusters/night"))
        await planner.clusters.CreateCluster(
            pb.CreateClusterRequest(cluster_id="other", cluster=cluster, validate_only=True)
        )
        await refused(planner.clusters.CreateCluster(pb.CreateClusterRequest(cluster_id="night", cluster=cluster)))
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name="clusters/night/nodes/a100"))
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name="clusters/night"))
        who = {"caller": "local", "role": "admin, agent"}
        assert await lines(planner.store) == [
            AuditedChange(**who, method="CreateCluster", resource="clusters/night", request_id=request_id),
            AuditedChange(
                **who, method="CreateCluster", resource="clusters/night", request_id=request_id, outcome="REPEATED"
            ),
            AuditedChange(**who, method="DrainNode", resource="clusters/night/nodes/a100"),
            AuditedChange(**who, method="DeleteCluster", resource="clusters/night"),
        ]


async def test_an_agent_that_was_disconnected_is_a_line_and_one_that_was_not_there_is_none(tmp_path: Path) -> None:
    async with served_clusters(tmp_path) as planner:
        cluster = cluster_pb2.Cluster(document=document())
        await planner.clusters.CreateCluster(pb.CreateClusterRequest(cluster_id="night", cluster=cluster))
        for node in ("a100", "stranger"):
            request = pb.DisconnectNodeRequest(name=f"clusters/night/nodes/{node}")
            planner.fleet.nodes[request.name] = live_node()
            assert (await planner.clusters.DisconnectNode(request)).node.name == request.name
            assert request.name not in planner.fleet.nodes
            assert (await refused(planner.clusters.DisconnectNode(request))).reason == "NOT_FOUND"
        found = [(line.caller, line.resource, line.outcome) for line in (await lines(planner.store))[1:]]
        assert found == [("local", f"clusters/night/nodes/{node}", "OK") for node in ("a100", "stranger")]


async def test_the_plan_that_was_made_is_named_and_by_whom(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.call("CreatePlan", create_request("p", seed=WAITS))
        # The search may have begun in the meantime, which is another change.
        [found] = [line for line in await lines(planner.store) if line.method == "CreatePlan"]
        assert (found.caller, found.plan) == ("local", "plans/p")
        first = (await lines(planner.store))[0]
        assert (first.caller, first.method) == ("planner", "CreateCluster")  # made by the test itself, outside any call


async def test_what_is_refused_is_told_with_its_caller_and_reason(tmp_path: Path) -> None:
    file = str(tmp_path / "tokens.yaml")
    token = create_token(
        file, name="curious", role=CallerRole.VIEWER, scope=None, expires=datetime.now(UTC) + timedelta(days=1)
    )
    told = list[AuditedChange]()
    async with served(authenticator=by_tokens(file)) as planner:
        planner.calls.answer_for(require_leader=lambda _method: None, on_refusal=told.append)
        stub = ClusterServiceStub(planner.channel)
        metadata = (("authorization", f"Bearer {token}"),)
        delete = pb.DeleteClusterRequest(name="clusters/night")
        error = await failure_of(stub.DeleteCluster(delete, timeout=10, metadata=metadata))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        said = "/hetis.v1.ClusterService/DeleteCluster needs role admin; curious has viewer"
        assert error.details() == f"{said}; the request is for clusters/night"
        await failure_of(stub.DeleteCluster(delete, timeout=10))  # an anonymous caller
        await failure_of(stub.GetCluster(pb.GetClusterRequest(), timeout=10, metadata=metadata))  # not a change
        who = {"caller": "curious", "role": "viewer"}
        assert told == [AuditedChange(**who, method="DeleteCluster", resource="clusters/night", outcome="ROLE")]
        malformed = planner.channel.unary_unary("/hetis.v1.ClusterService/DeleteCluster")
        error = await failure_of(malformed(b"\x0a\xff", timeout=10, metadata=metadata))
        assert error.details() == said  # the role comes first, and such a request has no resource
        assert told[1:] == [AuditedChange(**who, method="DeleteCluster", outcome="ROLE")]
        endless = pb.DeleteClusterRequest(name="\0" * 10**6, request_id="x" * 10**6)
        await failure_of(stub.DeleteCluster(endless, timeout=10, metadata=metadata))
        assert (told[2].resource, told[2].request_id) == ("\\u0000" * 200, "x" * 64)

        def stand_by(_method: str) -> None:
            raise ServiceError(Reason.ERROR_REASON_NOT_LEADER, "another planner leads")

        # A standby cannot write a refusal down, so it is the leader that has to refuse.
        planner.calls.answer_for(require_leader=stand_by, on_refusal=told.append)
        error = await failure_of(stub.DeleteCluster(delete, timeout=10, metadata=metadata))
        assert reason_of(error) == "NOT_LEADER"
        assert len(told) == 3


def test_what_a_caller_wrote_is_printable_in_the_line_of_its_refusal() -> None:
    record = CallRecord("/hetis.v1.ClusterService/DeleteCluster", "", is_stream=False)
    record.requests(pb.DeleteClusterRequest(name="clusters/a\0b\x1b[2J", request_id="\u202ex\n"))
    line = record.refused_change()
    assert (line.resource, line.request_id) == ("clusters/a\\u0000b\\u001b[2J", "\\u202ex\\u000a")


def test_what_was_to_be_created_has_its_whole_name_in_the_line_of_its_refusal() -> None:
    record = CallRecord("/hetis.v1.ClusterService/CreateCluster", "", is_stream=False)
    record.requests(pb.CreateClusterRequest(cluster_id="night", cluster=cluster_pb2.Cluster(document=document())))
    assert record.refused_change().resource == "clusters/night"


async def test_a_line_that_cannot_be_written_ends_no_loop_and_holds_up_no_other() -> None:
    written = list[str]()

    async def append(changes: Sequence[AuditedChange]) -> None:
        if any(change.caller == "bad" for change in changes):
            raise ValueError("no such text")
        written.extend(change.caller for change in changes)

    refusals = AuditRefusals(append)
    for caller in ("a", "bad", "b"):
        refusals.note(AuditedChange(caller=caller, role="viewer", method="DeletePlan", outcome="ROLE"))
    assert await refusals.step() is None
    assert written == ["a", "b"]


async def test_many_equal_refusals_are_few_lines_that_count_them() -> None:
    written, now_s = list[list[AuditedChange]](), [0.0]

    async def append(changes: Sequence[AuditedChange]) -> None:
        written.append(list(changes))

    def change(caller: str) -> AuditedChange:
        return AuditedChange(caller=caller, role="viewer", method="DeletePlan", outcome="ROLE")

    refusals = AuditRefusals(append, clock=lambda: now_s[0])
    assert await refusals.step() is None
    refusals.note(change("a"))
    assert await refusals.step() is None
    for caller in "aaab":
        refusals.note(change(caller))
    now_s[0] = 20.0
    assert await refusals.step() == EVERY_S - 20.0
    now_s[0] = EVERY_S
    assert await refusals.step() is None
    assert [[(one.caller, one.times) for one in found] for found in written] == [[("a", 1)], [("b", 1)], [("a", 3)]]


async def test_a_store_that_is_away_ends_no_loop() -> None:
    async def append(changes: Sequence[AuditedChange]) -> None:
        raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "away")

    refusals = AuditRefusals(append)
    refusals.note(AuditedChange(caller="a", role="viewer", method="DeletePlan", outcome="ROLE"))
    assert await refusals.step() is None


async def test_the_command_filters_lines_and_finds_a_changed_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hetis.db"
    store = await Store.open(url)
    await store.leadership.grant("test")

    def append(tx: object) -> None:
        for n, (caller, outcome) in enumerate((("ci", "OK"), ("eve", "ROLE"), ("ci", "OK"))):
            made = AuditedChange(
                caller=caller, role="orchestrator", method="ActivatePlan", plan="plans/p", outcome=outcome
            )
            tx.audit.append(made, time_s=1_800_000_000.0 + n)  # type: ignore[attr-defined]

    await store.write(append)
    await store.close()

    def audit(*options: str) -> tuple[int, str]:
        code, out, err = finished_here(["audit", "--store", url, *options], folder=tmp_path)
        return code, out + err

    code, out = audit("--caller", "ci", "--since", "2027-01-15T08:00:01Z", "--json")
    assert code == ServiceExitCode.OK
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert (line["number"], line["caller"], line["plan"], line["time"]) == (
        3,
        "ci",
        "plans/p",
        "2027-01-15T08:00:02.000+00:00",
    )
    assert audit("--outcome", "ROLE")[1].split()[:3] == ["2", "2027-01-15T08:00:01.000+00:00", "ROLE"]
    code, out = audit("--check")
    assert (code, out.partition(";")[0]) == (ServiceExitCode.OK, "3 lines, intact")
    with sqlite3.connect(tmp_path / "hetis.db") as connection:
        connection.execute("UPDATE audit SET caller = 'adam' WHERE number = 2")
    connection.close()
    code, out = audit("--check")
    assert code == ServiceExitCode.STORE
    assert out == "error: line 2 of the audit log was altered or is missing\n"
