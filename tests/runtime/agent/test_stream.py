"""The stream to the planner over a real channel: TLS, certificates, tokens, and the effect of a bug."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from pathlib import Path

import pytest

from hetis.runtime.agent.options import MOST_WAIT_FOR_LEADER_S, MOST_WAIT_S, PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.stream import PlannerStream
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse, Hello, StateRequest
from hetis.v1.failure_pb2 import ErrorReason, Failure
from tests.runtime.agent.builders import NODE
from tests.runtime.agent.certificates import CertificateAuthority
from tests.runtime.agent.planner_double import PlannerDouble

WAIT_S = 20.0


class Listener:
    """Sends a Hello and records what it receives; raises ``breaks`` times at a state request."""

    def __init__(self, *, breaks: int = 0) -> None:
        self.heard_kinds: list[str | None] = []
        self.ends: list[str] = []
        self._breaks = breaks

    async def hello(self) -> ConnectNodeRequest:
        return ConnectNodeRequest(sequence=1, hello=Hello(node=NODE + "p"))

    def received(self, message: ConnectNodeResponse) -> None:
        self.heard_kinds.append(message.WhichOneof("message"))
        if message.HasField("state_request") and self._breaks:
            self._breaks -= 1
            raise ZeroDivisionError("a bug")

    def ended(self, reason: str) -> None:
        self.ends.append(reason)


class Soon(ReconnectBackoff):
    """A backoff without a pause."""

    def __init__(self, seed: random.Random) -> None:
        super().__init__(seed)
        self.limits_s = list[float]()

    def next_s(self, most_s: float = MOST_WAIT_S) -> float:
        self.limits_s.append(most_s)
        return min(super().next_s(most_s), 0.05)


async def until_ends(listener: Listener, number: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(listener.ends) < number:
            await asyncio.sleep(0.02)


def connect(address: PlannerAddress, listener: Listener) -> asyncio.Task[None]:
    return asyncio.create_task(PlannerStream(address, listener, Soon(random.Random(0))).run())


async def stop(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_node_shows_its_certificate_and_its_token_over_tls(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path, "ca")
    node, token = authority.sign("node-p"), tmp_path / "token"
    token.write_text("secret\n", encoding="utf-8")
    server = authority.server("planner", asks_clients=True)
    async with PlannerDouble(credentials=server, token="secret") as planner:
        address = PlannerAddress(
            server=planner.address, ca=authority.cert, cert=node.cert, key=node.key, token_file=token
        )
        running = connect(address, Listener())
        await planner.connected(1)
        assert planner.peer["x509_common_name"] == ["node-p"]
        assert planner.metadata["authorization"] == "Bearer secret"
        await stop(running)


async def test_a_planner_on_this_machine_is_reached_without_the_proxy_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with PlannerDouble() as planner:
        running = connect(PlannerAddress(server=planner.address, is_plain=True), Listener())
        await planner.connected(1)
        await stop(running)


@pytest.mark.parametrize("content", [b"half\xff\xfe", b"one\ntwo\n", b" \n"], ids=["no text", "two lines", "empty"])
async def test_a_token_file_that_holds_no_token_costs_an_attempt_and_not_the_agent(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_bytes(content)
    async with PlannerDouble(token="good") as planner:
        listener = Listener()
        running = connect(PlannerAddress(server=planner.address, token_file=token, is_plain=True), listener)
        await until_ends(listener, 1)
        token.write_text("good", encoding="utf-8")
        await planner.connected(1)
        await stop(running)
    assert "token holds no token" in caplog.text


async def test_a_token_that_rotates_is_read_again(tmp_path: Path) -> None:
    authority, token = CertificateAuthority(tmp_path, "ca"), tmp_path / "token"
    token.write_text("old", encoding="utf-8")
    server = authority.server("planner", asks_clients=False)
    async with PlannerDouble(credentials=server, token="new") as planner:
        listener = Listener()
        running = connect(PlannerAddress(server=planner.address, ca=authority.cert, token_file=token), listener)
        await until_ends(listener, 1)
        assert planner.hellos == 0
        token.write_text("new", encoding="utf-8")
        await planner.connected(1)
        await stop(running)


@pytest.mark.parametrize("wrong", ["ca", "no certificate", "plain text", "expired", "expired planner"])
def test_wrong_credentials_are_one_clear_line_and_the_agent_keeps_trying(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        authority, other = CertificateAuthority(tmp_path, "ca"), CertificateAuthority(tmp_path, "other")
        node = authority.sign("node-p")
        expired = authority.sign("node-q", has_expired=True)
        credentials = authority.server("planner", asks_clients=True, has_expired=wrong == "expired planner")
        async with PlannerDouble(credentials=credentials) as planner:
            address = {
                "ca": PlannerAddress(server=planner.address, ca=other.cert, cert=node.cert, key=node.key),
                "no certificate": PlannerAddress(server=planner.address, ca=authority.cert),
                "plain text": PlannerAddress(server=planner.address, is_plain=True),
                "expired": PlannerAddress(
                    server=planner.address, ca=authority.cert, cert=expired.cert, key=expired.key
                ),
                "expired planner": PlannerAddress(
                    server=planner.address, ca=authority.cert, cert=node.cert, key=node.key
                ),
            }[wrong]
            listener = Listener()
            running = connect(address, listener)
            await until_ends(listener, 4)
            assert planner.hellos == 0
            assert not running.done()
            if wrong == "ca":  # the file is corrected
                other.cert.write_bytes(authority.cert.read_bytes())
                await planner.connected(1)
            await stop(running)

    with caplog.at_level(logging.INFO):
        asyncio.run(story())
    (line,) = [record.getMessage() for record in caplog.records if "stream to" in record.getMessage()]
    assert "\n" not in line
    assert "TLS" in line
    if wrong == "ca":
        assert "--tls-ca" in line
    if wrong == "expired":
        assert re.search(r"the certificate \S+node-q.pem expired at \S+: renew it", line)
    if wrong == "expired planner":
        assert "the planner's certificate has expired: renew it" in line


async def test_a_message_that_meets_a_bug_ends_the_stream_and_not_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    async with PlannerDouble() as planner:
        listener = Listener(breaks=1)
        running = connect(PlannerAddress(server=planner.address, is_plain=True), listener)
        await planner.connected(1)
        planner.send(ConnectNodeResponse(epoch=1, state_request=StateRequest(request_id="q")))
        await planner.connected(2)
        assert listener.ends == ["internal"]
        assert not running.done()
        await stop(running)
    assert "ZeroDivisionError: a bug" in caplog.text


@pytest.mark.parametrize("has_stood", [True, False])
async def test_options_are_advised_only_where_no_stream_came_up(
    has_stood: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past a planner that was killed after minutes was said to require TLS."""
    closed = Failure(reason=ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, message="Socket closed")

    async def once(stream: PlannerStream, *_: object) -> tuple[None, Failure]:
        stream._welcome_s = 0.0 if has_stood else None
        return None, closed

    monkeypatch.setattr(PlannerStream, "_once", once)
    listener = Listener()
    running = connect(PlannerAddress(server="127.0.0.1:1", is_plain=True), listener)
    await until_ends(listener, 1)
    await stop(running)
    assert "Socket closed" in caplog.text
    assert ("--tls-ca" in caplog.text) != has_stood


def test_a_stream_that_stood_makes_the_next_wait_short(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(stood_s: float) -> int:
        monkeypatch.setattr("hetis.runtime.agent.stream.STOOD_S", stood_s)
        waiting = Soon(random.Random(0))
        async with PlannerDouble() as planner:
            listener = Listener(breaks=3)
            stream = PlannerStream(PlannerAddress(server=planner.address, is_plain=True), listener, waiting)
            running = asyncio.create_task(stream.run())
            for times in range(3):
                await planner.connected(times + 1)
                planner.send(ConnectNodeResponse(epoch=1, state_request=StateRequest(request_id="q")))
            await until_ends(listener, 3)
            await stop(running)
        return waiting._attempts

    assert asyncio.run(story(stood_s=0.0)) == 1
    assert asyncio.run(story(stood_s=60.0)) == 3


def not_leader(leader: str) -> Failure:
    return Failure(
        reason=ErrorReason.ERROR_REASON_NOT_LEADER, message="another planner leads", metadata={"leader_address": leader}
    )


async def test_an_agent_goes_to_the_leader_that_a_standby_names_and_comes_back_when_that_is_gone() -> None:
    listener = Listener()
    async with PlannerDouble() as standby:
        async with PlannerDouble() as leader:
            standby.end_with = not_leader(leader.address)
            address = PlannerAddress(server=f"{standby.address},127.0.0.1:1", is_plain=True)
            running = asyncio.create_task(PlannerStream(address, listener, Soon(random.Random(0))).run())
            await leader.connected(1)
            first = standby.hellos
        await standby.connected(1)  # the standby now leads
        await stop(running)
        assert [first, leader.hellos] == [0, 1]


async def test_an_agent_waits_seconds_and_not_half_a_minute_where_a_planner_is_about_to_lead() -> None:
    waiting = Soon(random.Random(0))
    async with PlannerDouble() as standby:
        standby.end_with = not_leader("127.0.0.1:1")
        address = PlannerAddress(server=standby.address, is_plain=True)
        running = asyncio.create_task(PlannerStream(address, Listener(), waiting).run())
        await standby.connected(1)
        await stop(running)
    assert waiting.limits_s == [MOST_WAIT_FOR_LEADER_S]


async def test_an_agent_of_several_planners_waits_seconds_whatever_went_wrong() -> None:
    waiting = Soon(random.Random(0))
    async with PlannerDouble() as planner:
        planner.end_with = Failure(reason=ErrorReason.ERROR_REASON_INTERNAL, message="Internal error from Core")
        address = PlannerAddress(server=f"{planner.address},127.0.0.1:1", is_plain=True)
        running = asyncio.create_task(PlannerStream(address, Listener(), waiting).run())
        await planner.connected(1)
        await stop(running)
    assert waiting.limits_s == [MOST_WAIT_FOR_LEADER_S]
