"""TLS: certificates of both sides, names in them, and new files under a running server."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from hetis.commands.x509 import ends_of_certificates, is_for_host, names_of_certificate
from hetis.formats.errors import DocumentError
from hetis.planner.service.calls import Calls
from hetis.planner.service.identity.certificates import (
    Certificates,
)
from hetis.planner.service.identity.credentials import Credentials, NoCredentials, Tokens
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.running import problems_of_names
from hetis.planner.service.server import PlannerServer
from hetis.planner.service.settings import LeadershipPart, PlannerConfig, TlsPart
from hetis.v1 import agent_service_pb2 as agents
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.certificates import Authority, Signed, write
from tests.planner.service.fakes import FakePlanner
from tests.planner.service.serving import channel_to, failure_of, reason_of, served


def certificates(folder: Path, authority: Authority, *, asks_clients: bool = False) -> Certificates:
    certificate, key = write(folder, authority.server())
    (folder / "ca.pem").write_bytes(authority.pem)
    return Certificates(
        TlsPart(certificate=certificate, key=key, client_ca=str(folder / "ca.pem") if asks_clients else None)
    )


def of_client(authority: Authority, signed: Signed | None = None) -> grpc.ChannelCredentials:
    if signed is None:
        return grpc.ssl_channel_credentials(authority.pem)
    return grpc.ssl_channel_credentials(authority.pem, signed.key, signed.certificate)


def by_certificate(domain: str = "hetis") -> Credentials:
    return Credentials(tokens=None, trust_domain=domain, clock=time.time)


async def name_of_caller(channel: grpc.aio.Channel) -> str:
    answer = await PlanServiceStub(channel).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=5)
    return str(answer.plan.labels["by"])


async def test_a_client_that_trusts_the_authority_is_served(tmp_path: Path) -> None:
    authority = Authority()
    credentials = certificates(tmp_path, authority).credentials()
    async with served(server_credentials=credentials, channel_credentials=of_client(authority)) as planner:
        assert await name_of_caller(planner.channel) == "local"
        async with channel_to(planner.address, of_client(Authority("another"))) as stranger:
            with pytest.raises(grpc.aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
                await name_of_caller(stranger)
        async with channel_to(planner.address) as plain:
            with pytest.raises(grpc.aio.AioRpcError):
                await name_of_caller(plain)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("spiffe://hetis/orchestrator/ci", "spiffe://hetis/orchestrator/ci"),
        ("spiffe://hetis/clusters/c/nodes/n", None),
    ],
)
async def test_a_certificate_names_its_bearer(uri: str, name: str | None, tmp_path: Path) -> None:
    authority = Authority()
    credentials = certificates(tmp_path, authority, asks_clients=True).credentials()
    channel_credentials = of_client(authority, authority.client(uri))
    async with served(
        authenticator=by_certificate(), server_credentials=credentials, channel_credentials=channel_credentials
    ) as planner:
        if name is not None:
            assert await name_of_caller(planner.channel) == name
            return
        error = await failure_of(PlanServiceStub(planner.channel).GetPlan(plans.GetPlanRequest(), timeout=5))
        assert reason_of(error) == "ROLE"
        stream = AgentServiceStub(planner.channel).ConnectNode()
        await stream.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node="clusters/c/nodes/n")))
        assert (await stream.read()).WhichOneof("message") == "welcome"
        other = AgentServiceStub(planner.channel).ConnectNode()
        await other.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node="clusters/c/nodes/m")))
        assert reason_of(await failure_of(other)) == "WRONG_NODE"


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (("spiffe://elsewhere/admin/x",), "has no URI spiffe://hetis/..."),
        (("spiffe://hetis/wizard/x",), "names spiffe://hetis/wizard/x, expected"),
        (("spiffe://hetis/admin/a", "spiffe://hetis/admin/b"), "has more than one URI"),
        ("dns", "has no URI spiffe://hetis/..."),
    ],
)
async def test_a_certificate_of_nobody_is_unauthenticated(
    client: tuple[str, ...] | str, message: str, tmp_path: Path
) -> None:
    authority = Authority()
    signed = authority.client_with_dns("spiffe.hetis") if isinstance(client, str) else authority.client(*client)
    credentials = certificates(tmp_path, authority, asks_clients=True).credentials()
    async with served(
        authenticator=by_certificate(),
        server_credentials=credentials,
        channel_credentials=of_client(authority, signed),
    ) as planner:
        error = await failure_of(PlanServiceStub(planner.channel).GetPlan(plans.GetPlanRequest(), timeout=5))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS")
        assert message in (error.details() or "")


async def test_without_a_certificate_there_is_no_connection_where_one_is_asked_for(tmp_path: Path) -> None:
    authority = Authority()
    credentials = certificates(tmp_path, authority, asks_clients=True).credentials()
    async with served(
        authenticator=by_certificate(),
        server_credentials=credentials,
        channel_credentials=of_client(authority),
    ) as planner:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await name_of_caller(planner.channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with channel_to(
            planner.address, of_client(authority, Authority("x").client("spiffe://hetis/admin/a"))
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await name_of_caller(channel)


def test_a_token_goes_before_the_certificate() -> None:
    credentials = Credentials(tokens=lambda: Tokens({}), trust_domain="hetis", clock=time.time)
    connection = {"peer_uri": [b"spiffe://hetis/admin/a"]}
    assert credentials.identify((), connection, "").name == "spiffe://hetis/admin/a"
    with pytest.raises(Exception, match="unknown"):
        credentials.identify((("authorization", "Bearer hetis_" + "a" * 43),), connection, "")


def test_a_name_in_another_field_of_the_certificate_is_not_looked_at() -> None:
    connection = {"x509_subject_alternative_name": [b"spiffe://hetis/admin/a"], "x509_common_name": [b"admin"]}
    with pytest.raises(Exception, match="has no URI"):
        by_certificate().identify((), connection, "")


async def test_new_connections_get_the_new_certificate_and_a_bad_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Authority("old"), Authority("new")
    files = certificates(tmp_path, old)
    async with served(server_credentials=files.credentials(), channel_credentials=of_client(old)) as planner:
        await name_of_caller(planner.channel)
        assert not files.files.refresh()  # nothing has changed

        (tmp_path / "planner.pem").write_bytes(new.server().certificate)  # without its key: half a rotation
        assert not files.files.refresh()
        assert "does not match the certificate" in caplog.text
        async with channel_to(planner.address, of_client(old)) as channel:
            await name_of_caller(channel)

        write(tmp_path, new.server())
        assert files.files.refresh()
        await name_of_caller(planner.channel)  # an established connection stays open
        async with channel_to(planner.address, of_client(new)) as channel:
            await name_of_caller(channel)
        async with channel_to(planner.address, of_client(old)) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await name_of_caller(channel)

        os.unlink(tmp_path / "planner.pem")
        assert not files.files.refresh()
        async with channel_to(planner.address, of_client(new)) as channel:
            await name_of_caller(channel)


async def test_each_address_has_the_certificate_and_its_successor(tmp_path: Path) -> None:
    old, new = Authority("old"), Authority("new")
    files = certificates(tmp_path, old)
    planner = FakePlanner()
    calls = Calls(NoCredentials(), Telemetry(ServiceMetrics("0")))
    server = PlannerServer(planner.servicings, calls, credentials=files.credentials)
    addresses = [server.listen("127.0.0.1:0") for _ in range(2)]
    await server.start()
    try:
        for authority in (old, new):
            if authority is new:
                write(tmp_path, new.server())
                assert files.files.refresh()
            for address in addresses:
                async with channel_to(address, of_client(authority)) as channel:
                    await name_of_caller(channel)
    finally:
        await server.stop_at_once()


def test_an_expired_certificate_is_refused_and_replaces_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority()
    files = certificates(tmp_path, authority).files
    in_force = files.value
    ended = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    write(tmp_path, authority.server(until=ended))
    assert not files.refresh()
    assert files.value is in_force
    assert f"planner.pem: expired at {ended.isoformat()}" in caplog.text
    with pytest.raises(DocumentError, match="no client would accept it"):
        Certificates(TlsPart(certificate=str(tmp_path / "planner.pem"), key=str(tmp_path / "planner.key")))


def test_a_certificate_that_is_not_valid_yet_is_refused_and_put_in_force_once_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority()
    files = certificates(tmp_path, authority).files
    in_force = files.value
    begins = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=1)
    write(tmp_path, authority.server(since=begins))
    for _ in range(2):
        assert not files.refresh()
    assert files.value is in_force
    assert len(caplog.records) == 1  # not one per round
    assert f"planner.pem: is not valid before {begins.isoformat()}" in caplog.text
    tls = TlsPart(certificate=str(tmp_path / "planner.pem"), key=str(tmp_path / "planner.key"))
    with pytest.raises(DocumentError, match="no client would accept it until then"):
        Certificates(tls)
    monkeypatch.setattr(time, "time", lambda: begins.timestamp())
    assert files.refresh()
    assert files.value is not in_force
    assert not files.refresh()
    Certificates(tls)


def test_a_key_that_everybody_may_write_is_refused_and_one_that_everybody_may_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = certificates(tmp_path, Authority())
    key, in_force = tmp_path / "planner.key", found.files.value
    for mode in (0o600, 0o640, 0o660):
        key.chmod(mode)
        assert found.warnings == []
    key.chmod(0o644)
    assert found.warnings == [
        f"{key}: is readable by all users, who could impersonate the planner: chmod 600, or 640 for a group"
    ]
    assert found.files.refresh()
    key.chmod(0o666)
    assert not found.files.refresh()
    assert "planner.key: is writable by all users, who could substitute their own key: chmod 600" in caplog.text
    with pytest.raises(DocumentError, match="is writable by all users"):
        Certificates(TlsPart(certificate=str(tmp_path / "planner.pem"), key=str(key)))
    key.chmod(0o600)  # which changes neither time nor size
    assert found.files.refresh()
    assert found.files.value is not in_force


async def test_a_new_authority_takes_the_clients_of_the_old_one_no_more(tmp_path: Path) -> None:
    old, new = Authority("old"), Authority("new")
    files = certificates(tmp_path, old, asks_clients=True)
    credentials = files.credentials()
    client = of_client(old, old.client("spiffe://hetis/viewer/v"))
    async with served(
        authenticator=by_certificate(), server_credentials=credentials, channel_credentials=client
    ) as planner:
        await name_of_caller(planner.channel)
        (tmp_path / "ca.pem").write_bytes(new.pem)
        assert files.files.refresh()
        renewed = new.client("spiffe://hetis/viewer/v")
        both = grpc.ssl_channel_credentials(old.pem, renewed.key, renewed.certificate)
        async with channel_to(planner.address, both) as channel:
            await name_of_caller(channel)
        async with channel_to(planner.address, client) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await name_of_caller(channel)


def test_unusable_files_are_refused_with_every_problem(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("not a certificate")
    (tmp_path / "ca.pem").write_text("nor an authority")
    tls = TlsPart(certificate=str(tmp_path / "a.pem"), key=str(tmp_path / "a.key"), client_ca=str(tmp_path / "ca.pem"))
    with pytest.raises(DocumentError) as caught:
        Certificates(tls)
    assert str(caught.value) == f"{tmp_path}/a.key: no such file"
    (tmp_path / "a.key").write_text("not a key")
    with pytest.raises(DocumentError) as caught:
        Certificates(tls)
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert lines[:2] == [
        "a.pem: contains no certificate in PEM format",
        "a.key: contains no private key in PEM format",
    ]
    assert lines[2].startswith("ca.pem: contains no certificate authority in PEM format")


HOSTS = ("planner-1.example", "PLANNER-2.example", "a.hetis.example", "a.b.hetis.example", "hetis.example", "a.example")
ADDRESSES = ("10.0.0.7", "10.0.0.8", "fd00::7", "fd00::8")


@pytest.mark.parametrize(
    ("names", "common_name"),
    [
        (("planner-1.example", "planner-2.example", "10.0.0.7"), "a.example"),
        (("*.hetis.example", "fd00::7"), "planner"),
        (("*.example", "10.0.0.8"), "hetis.example"),
        (("spiffe://hetis/planner",), "planner-1.example"),
        ((), "planner-1.example"),
        ((), "10.0.0.7"),
    ],
)
async def test_a_certificate_is_for_the_hosts_for_which_clients_accept_it(
    names: tuple[str, ...], common_name: str, tmp_path: Path
) -> None:
    authority = Authority()
    signed = authority.server_for(*names, common_name=common_name)
    certificate, key = write(tmp_path, signed)
    credentials = Certificates(TlsPart(certificate=certificate, key=key)).credentials()
    found = names_of_certificate((signed.certificate + authority.pem).decode())
    async with served(server_credentials=credentials) as planner:
        for host in (*HOSTS, *ADDRESSES):
            options = [("grpc.ssl_target_name_override", host), ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(planner.address, of_client(authority), options) as channel:
                called = await asyncio.gather(name_of_caller(channel), return_exceptions=True)
            if called != ["local"]:
                assert "Hostname Verification Check failed" in str(called)
            assert is_for_host(found, host) is (called == ["local"]), host


def test_an_advertised_address_for_which_the_certificate_is_not_is_found(tmp_path: Path) -> None:
    certificate, key = write(tmp_path, Authority().server_for("planner-1.example", "10.0.0.7", "fd00::7"))
    tls = TlsPart(certificate=certificate, key=key)

    def problems(*addresses: str, tls: TlsPart | None = tls) -> list[str]:
        leadership = LeadershipPart(advertise=list(addresses))
        config = PlannerConfig(apiVersion="hetis/v1", kind="PlannerConfig", tls=tls, leadership=leadership)
        return list(map(str, problems_of_names(config)))

    assert problems("planner-1.example:8470", "10.0.0.7:8470", "[fd00::7]:8470", "unix:/run/hetis.sock") == []
    assert problems("planner-2.example:8470", "planner-2.example:8480", "planner-1.example:8470") == [
        f"{certificate}: is not for planner-2.example, which leadership.advertise names: clients that are sent there"
        " would refuse it; it is for planner-1.example, 10.0.0.7, fd00::7"
    ]
    assert problems("planner-2.example:8470", tls=None) == []
    Path(certificate).write_text("no certificate")
    assert problems("planner-2.example:8470") == []  # reported as such
    Path(certificate).unlink()
    assert problems("planner-2.example:8470") == []


async def test_a_certificate_that_expires_ends_its_streams_while_its_connection_stands(tmp_path: Path) -> None:
    authority, now_s = Authority(), [time.time()]
    credentials = Credentials(tokens=None, trust_domain="hetis", clock=lambda: now_s[0])
    async with served(
        authenticator=credentials,
        server_credentials=certificates(tmp_path, authority, asks_clients=True).credentials(),
        channel_credentials=of_client(authority, authority.client("spiffe://hetis/admin/a")),
    ) as planner:
        stream = PlanServiceStub(planner.channel).WatchPlan(plans.WatchPlanRequest(name="plans/p"))
        await stream.read()
        planner.calls.end_revoked_streams()
        assert await name_of_caller(planner.channel) == "spiffe://hetis/admin/a"
        now_s[0] += 2 * 86_400  # test certificates are valid for a day
        planner.calls.end_revoked_streams()
        error = await failure_of(stream.read())
        assert reason_of(error) == "CREDENTIALS"
        assert "the client certificate has expired" in (error.details() or "")
        again = PlanServiceStub(planner.channel).GetPlan(plans.GetPlanRequest(), timeout=5)
        assert reason_of(await failure_of(again)) == "CREDENTIALS"


def test_the_files_tell_when_their_certificates_end(tmp_path: Path) -> None:
    found = certificates(tmp_path, Authority(), asks_clients=True)
    ends_s = {Path(path).name: end_s for path, end_s in found.expiries_s.items()}
    assert ends_s.keys() == {"planner.pem", "ca.pem"}
    for name, end_s in ends_s.items():
        certificate = x509.load_pem_x509_certificate((tmp_path / name).read_bytes())
        assert end_s == certificate.not_valid_after_utc.timestamp()


def test_of_a_chain_every_certificate_counts_and_what_is_none_is_left_out(tmp_path: Path) -> None:
    authority = Authority()
    chain = (authority.server().certificate + authority.pem).decode()
    assert len(ends_of_certificates(chain)) == 2
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert len(ends_of_certificates(broken + chain)) == 2


@pytest.mark.parametrize("end", [datetime(2049, 12, 31, tzinfo=UTC), datetime(2050, 1, 1, 12, 30, 5, tzinfo=UTC)])
def test_ends_before_and_after_2050_are_written_in_two_ways(end: datetime) -> None:
    signed = Authority().server(until=end)
    assert ends_of_certificates(signed.certificate.decode()) == [end.timestamp()]
