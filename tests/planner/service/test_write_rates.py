"""One caller's writes are limited in rate, without an effect on others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from hetis.planner.callers import CallerRole, Identity
from hetis.planner.failures import ServiceError
from hetis.planner.service.identity.credentials import create_token
from hetis.planner.service.limits import WriteRates
from hetis.planner.service.methods import METHODS, WRITES
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from tests.planner.service.serving import by_tokens, details_of, failure_of, served


def test_every_change_is_limited_and_nothing_else() -> None:
    names = {method.rpartition("/")[2] for method in WRITES}
    assert {"CreateCluster", "DeleteProfile", "ActivatePlan", "CancelPlan", "DrainNode"} <= names
    assert not any(name.startswith(("Get", "List", "Watch", "Read", "Explain", "Diff")) for name in names)
    assert WRITES.isdisjoint({"/hetis.v1.DispatchService/SolveDispatch", "/hetis.v1.AgentService/ConnectNode"})
    assert METHODS.keys() > WRITES


async def test_a_caller_that_changes_too_often_is_told_when_to_go_on(tmp_path: Path) -> None:
    file, now_s = str(tmp_path / "tokens.yaml"), [100.0]
    expires = datetime.now(UTC) + timedelta(days=1)
    greedy, modest = (
        (("authorization", f"Bearer {create_token(file, name=name, role=role, scope=None, expires=expires)}"),)
        for name, role in (("greedy", CallerRole.VIEWER), ("modest", CallerRole.ORCHESTRATOR))
    )
    rates = WriteRates(per_s=0.5, burst=3, clock=lambda: now_s[0])
    async with served(authenticator=by_tokens(file), writes=rates) as planner:
        stub = ClusterServiceStub(planner.channel)

        async def create(who: tuple[tuple[str, str], ...]) -> grpc.aio.AioRpcError:
            return await failure_of(stub.CreateCluster(pb.CreateClusterRequest(), timeout=10, metadata=who))

        denied, implemented = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED
        for _ in range(3):
            assert (await create(greedy)).code() is denied
        refused = await create(greedy)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(refused)
        assert details["ErrorInfo"].reason == "QUOTA_EXCEEDED"
        keys = {"caller": "greedy", "quota": "writes_per_second", "limit": "0.5"}
        assert dict(details["ErrorInfo"].metadata) == keys
        assert details["RetryInfo"].retry_delay.ToSeconds() == 2
        assert details["QuotaFailure"].violations[0].subject == "caller:greedy"
        assert (await create(modest)).code() is implemented
        now_s[0] += 2.0
        assert (await create(greedy)).code() is denied
        text = planner.metrics.text().decode()
        labels = 'caller="greedy",quota="writes_per_second"'
        assert f"hetis_planner_quota_exceeded_total{{{labels}}} 1.0" in text


@pytest.mark.parametrize("idle_s", [0.0, 1.0, 1e9])
def test_a_bucket_never_holds_more_than_a_burst(idle_s: float) -> None:
    now_s, caller = [0.0], Identity(name="a", roles=frozenset())
    rates, method = WriteRates(per_s=10, burst=4, clock=lambda: now_s[0]), next(iter(WRITES))
    for _ in range(4):
        rates.take(method, caller)
    now_s[0] += idle_s
    for _ in range(int(min(4, 10 * idle_s))):
        rates.take(method, caller)
    with pytest.raises(ServiceError, match="exceeded 10 writes per second"):
        rates.take(method, caller)
