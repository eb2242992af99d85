"""Every role may call exactly its methods, over a real connection."""

from __future__ import annotations

import errno
import io
import re
import resource
import time
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from hetis.formats.errors import DocumentError
from hetis.planner.callers import CallerRole
from hetis.planner.failures import ServiceError
from hetis.planner.service.actions import make_token, rotate_token
from hetis.planner.service.identity.credentials import Tokens, create_token, digest
from hetis.planner.service.methods import METHODS
from hetis.v1 import agent_service_pb2 as agents
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.service.serving import by_tokens, details_of, failure_of, reason_of, served

PROTOS = Path(__file__).parents[3] / "proto" / "hetis" / "v1"
NODE = "clusters/c/nodes/n"
STREAMS = {"WatchCluster", "WatchPlan", "ReadPlanDocument"}
TOMORROW = datetime.now(UTC) + timedelta(days=1)


def make(
    folder: Path, role: CallerRole, *, scope: str | None = None, name: str = "", expires: datetime = TOMORROW
) -> str:
    if role is CallerRole.AGENT and scope is None:
        scope = NODE
    file = str(folder / "tokens.yaml")
    return create_token(file, name=name or role.value, role=role, scope=scope, expires=expires)


def bearing(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


def roles_in_the_contract() -> dict[str, str]:
    """Return the roles of each method by the comments of the .proto files."""
    found = {}
    for path in PROTOS.glob("*_service.proto"):
        text = path.read_text(encoding="utf-8")
        service = re.search(r"^service (\w+)", text, re.MULTILINE)
        assert service
        for comment, method in re.findall(r"((?:^  //.*\n)+)  rpc (\w+)", text, re.MULTILINE):
            words = re.sub(r"\s*//\s*", " ", comment)
            if said := re.search(r"Role (\w+)", words):
                found[f"/hetis.v1.{service[1]}/{method}"] = said[1]
    return found


def test_the_table_says_what_the_contract_says() -> None:
    said = roles_in_the_contract()
    assert len(said) > 25
    for method, role in said.items():
        assert CallerRole(role) is METHODS[method].role, method
    for method in METHODS.keys() - said.keys():
        assert "DispatchService" in method, f"the contract does not say the role of {method}"


async def test_every_role_may_call_what_it_may_and_nothing_else(tmp_path: Path) -> None:
    tokens = {role: make(tmp_path, role) for role in CallerRole}
    async with served(authenticator=by_tokens(str(tmp_path / "tokens.yaml"))) as planner:
        for method, row in METHODS.items():
            name = method.rsplit("/", 1)[1]
            for role, token in tokens.items():
                channel = planner.channel
                call: Any
                if name == "ConnectNode":
                    call = channel.stream_stream(method)(metadata=bearing(token))
                    await call.done_writing()
                elif name in STREAMS:
                    call = channel.unary_stream(method)(b"\xff", metadata=bearing(token))
                else:
                    call = channel.unary_unary(method)(b"\xff", metadata=bearing(token), timeout=5)
                allowed = row.role in role.includes
                try:
                    error = await failure_of(call)
                except AssertionError:
                    assert allowed, (method, role)
                    continue
                if allowed:  # it was admitted, and failed at bytes that are not a message
                    assert reason_of(error) == "INVALID_FIELD", (method, role)
                else:
                    assert error.code() is grpc.StatusCode.PERMISSION_DENIED, (method, role)
                    assert reason_of(error) == "ROLE"
                    metadata = details_of(error)["ErrorInfo"].metadata
                    assert metadata["role"] == role.value
                    assert metadata["needed"] == row.role


def test_roles_grow_and_agents_stand_apart() -> None:
    assert CallerRole.VIEWER.includes < CallerRole.ORCHESTRATOR.includes < CallerRole.ADMIN.includes
    assert CallerRole.AGENT not in CallerRole.ADMIN.includes
    assert CallerRole.AGENT.includes == {CallerRole.AGENT}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ((), "the call has no credentials: send the metadata `authorization: Bearer TOKEN`"),
        ((("authorization", "Basic abc"),), "the authorization is malformed: write `authorization: Bearer TOKEN`"),
        ((("authorization", "Bearer"),), "the authorization is malformed: write `authorization: Bearer TOKEN`"),
        (
            (("authorization", "Bearer hetis_short"),),
            "the bearer token is malformed: it was not printed by `hetis-planner token create`",
        ),
        (
            (("authorization", "Bearer hetis_" + "a" * 43),),
            "the bearer token is unknown: it was never created, or has been removed from the file",
        ),
        (
            (("authorization", "Bearer a"), ("authorization", "Bearer b")),
            "the call has more than one `authorization` in its metadata",
        ),
    ],
)
async def test_wrong_credentials_are_unauthenticated(
    metadata: tuple[tuple[str, str], ...], message: str, tmp_path: Path
) -> None:
    make(tmp_path, CallerRole.ADMIN)
    async with served(authenticator=by_tokens(str(tmp_path / "tokens.yaml"))) as planner:
        stub = PlanServiceStub(planner.channel)
        error = await failure_of(stub.GetPlan(plans.GetPlanRequest(), timeout=5, metadata=metadata))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, message)
        assert reason_of(error) == "CREDENTIALS"


async def test_an_expired_token_is_unauthenticated(tmp_path: Path) -> None:
    token = make(tmp_path, CallerRole.ADMIN, expires=datetime(2026, 1, 1, tzinfo=UTC))
    async with served(authenticator=by_tokens(str(tmp_path / "tokens.yaml"))) as planner:
        stub = PlanServiceStub(planner.channel)
        error = await failure_of(stub.GetPlan(plans.GetPlanRequest(), timeout=5, metadata=bearing(token)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details() == "the bearer token admin expired at 2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("scope", "node", "allowed"),
    [
        (NODE, NODE, True),
        (NODE, "clusters/c/nodes/n2", False),
        (NODE, "clusters/c2/nodes/n", False),
        ("clusters/c", "clusters/c/nodes/other", True),
        ("clusters/c", "clusters/c2/nodes/n", False),
    ],
)
async def test_an_agent_speaks_for_its_own_nodes(scope: str, node: str, allowed: bool, tmp_path: Path) -> None:
    token = make(tmp_path, CallerRole.AGENT, scope=scope)
    async with served(authenticator=by_tokens(str(tmp_path / "tokens.yaml"))) as planner:
        stream = AgentServiceStub(planner.channel).ConnectNode(metadata=bearing(token))
        await stream.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node=node)))
        if allowed:
            assert (await stream.read()).WhichOneof("message") == "welcome"
        else:
            error = await failure_of(stream)
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "WRONG_NODE")
            assert details_of(error)["ErrorInfo"].metadata["node"] == node


async def test_the_servicer_knows_who_calls(tmp_path: Path) -> None:
    token = make(tmp_path, CallerRole.VIEWER, name="grafana")
    async with served(authenticator=by_tokens(str(tmp_path / "tokens.yaml"))) as planner:
        stub = PlanServiceStub(planner.channel)
        answer = await stub.GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=5, metadata=bearing(token))
        assert answer.plan.labels["by"] == "grafana"


def test_a_token_is_nowhere_but_in_the_hands_of_its_bearer(tmp_path: Path) -> None:
    token = make(tmp_path, CallerRole.VIEWER)
    file = tmp_path / "tokens.yaml"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert token not in text
    assert digest(token) in text
    assert Tokens.load(str(file)).identify(token, now_s=time.time()).name == "viewer"


def test_tokens_are_appended_and_what_people_wrote_stays(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    first = make(tmp_path, CallerRole.VIEWER, name="a")
    file.write_text(file.read_text().rstrip("\n") + "  # of the dashboard")
    second = make(tmp_path, CallerRole.AGENT, name="b")
    assert "# of the dashboard" in file.read_text()
    tokens = Tokens.load(str(file))
    assert len(tokens) == 2
    assert tokens.identify(first, now_s=time.time()).roles == {CallerRole.VIEWER}
    assert tokens.identify(second, now_s=time.time()).scope == NODE


@pytest.mark.parametrize("left", ["tokens:", "tokens: []", "tokens: null", "tokens: [\n]  # all revoked"])
def test_the_last_token_can_be_revoked_and_another_one_made(left: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    revoked = make(tmp_path, CallerRole.VIEWER, name="a")
    file.write_text(f"{file.read_text().partition('tokens:')[0]}{left}\n")
    with pytest.raises(ServiceError, match="unknown"):
        Tokens.load(str(file)).identify(revoked, now_s=time.time())
    made = make(tmp_path, CallerRole.VIEWER, name="b")
    assert Tokens.load(str(file)).identify(made, now_s=time.time()).name == "b"


@pytest.mark.parametrize("num_bytes", [0, 40], ids=["nothing", "a part"])
def test_a_full_disk_leaves_the_token_file_as_it_was(num_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    make(tmp_path, CallerRole.VIEWER)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + num_bytes, limits[1]))
    try:
        with pytest.raises(DocumentError, match=r"tokens\.yaml: cannot be written: File too large"):
            make(tmp_path, CallerRole.ADMIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


class FullDisk(io.StringIO):
    """A buffered output whose disk is full."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("tokens", [None, "[]"], ids=["some", "none left"])
def test_a_token_that_could_not_be_printed_leaves_the_token_file_as_it_was(tokens: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    make(tmp_path, CallerRole.VIEWER)
    if tokens is not None:
        file.write_text(f"{file.read_text().partition('tokens:')[0]}tokens: {tokens}\n")
    before = file.read_bytes()
    with redirect_stdout(FullDisk()), pytest.raises(OSError, match="No space left"):
        make_token(str(file), role=CallerRole.ADMIN, name=None, node=None, cluster=None, valid_days="1")
    assert file.read_bytes() == before


def test_a_wrong_value_creates_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"tokens\[0\].name: 'bad name' is not a name"):
        make(tmp_path, CallerRole.ADMIN, name="bad name")
    assert not (tmp_path / "tokens.yaml").exists()


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    make(tmp_path, CallerRole.VIEWER, name="a")
    before = (tmp_path / "tokens.yaml").read_text()
    with pytest.raises(DocumentError, match=r"tokens\[1\].name: a is already used by tokens\[0\]"):
        make(tmp_path, CallerRole.ADMIN, name="a")
    assert (tmp_path / "tokens.yaml").read_text() == before


def test_a_token_is_rotated_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the past the new token needed another name: logs and quotas took its bearer for someone else."""
    old, file = make(tmp_path, CallerRole.AGENT, name="a", scope=NODE), str(tmp_path / "tokens.yaml")
    with pytest.raises(DocumentError, match=r"make a further one: hetis-planner token rotate --file .* --name a$"):
        make(tmp_path, CallerRole.AGENT, name="a", scope=NODE)
    rotate_token(file, name="a", valid_days="1")
    new = capsys.readouterr().out.strip()
    tokens = Tokens.load(file)
    assert tokens.identify(old, now_s=time.time()) == tokens.identify(new, now_s=time.time())
    first = Path(file).read_text().index("- name: a")
    second = Path(file).read_text().index("- name: a", first + 1)
    Path(file).write_text(Path(file).read_text()[:first] + Path(file).read_text()[second:])
    tokens = Tokens.load(file)
    assert tokens.identify(new, now_s=time.time()).scope == NODE
    with pytest.raises(ServiceError, match="unknown"):
        tokens.identify(old, now_s=time.time())
    with pytest.raises(DocumentError, match="has no token of the name b"):
        rotate_token(file, name="b", valid_days="1")


def test_a_bad_token_file_is_refused_with_every_problem(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(
        "apiVersion: hetis/v1\nkind: PlannerTokens\ntokens:\n"
        f"- {{name: a, role: agent, sha256: {'a' * 64}, expires: 2027-01-01T00:00:00Z}}\n"
        "- {name: b, role: wizard, sha256: abc, expires: tomorrow}\n"
    )
    with pytest.raises(DocumentError) as caught:
        Tokens.load(str(file))
    shown = [str(problem).removeprefix(f"{file}:") for problem in caught.value.problems]
    assert shown[0] == "4: tokens[0]: scope is missing: an agent's token needs a node or a cluster"
    assert shown[1] == "5: tokens[1].role: 'wizard' is not one of viewer, orchestrator, admin, agent"
    assert shown[2].startswith("5: tokens[1].sha256: 'abc' is not valid")
    assert shown[3] == "5: tokens[1].expires: 'tomorrow' is not a time: write it like 2027-01-31T00:00:00Z"


@pytest.mark.parametrize("scope", ["clusters/c/nodes/größe_7.rack", "clusters/c/nodes/N"])
def test_every_node_that_a_cluster_may_have_can_have_a_token(scope: str, tmp_path: Path) -> None:
    token = make(tmp_path, CallerRole.AGENT, scope=scope)
    assert Tokens.load(str(tmp_path / "tokens.yaml")).identify(token, now_s=time.time()).scope == scope


@pytest.mark.parametrize("scope", ["clusters/c.d", "clusters/c/nodes/_n", "clusters/c/nodes/a/b"])
def test_a_node_that_no_cluster_may_have_has_no_token(scope: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="is neither clusters/CLUSTER/nodes/NODE nor clusters/CLUSTER"):
        make(tmp_path, CallerRole.AGENT, scope=scope)


def test_a_token_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    make(tmp_path, CallerRole.VIEWER)
    (tmp_path / "tokens.yaml").chmod(0o666)
    with pytest.raises(DocumentError, match="is writable by all users, who could grant themselves roles: chmod 600"):
        Tokens.load(str(tmp_path / "tokens.yaml"))


def test_a_token_that_is_no_token_is_refused_without_a_look_at_the_file() -> None:
    with pytest.raises(ServiceError, match="malformed"):
        Tokens({}).identify("x" * 1_000_000, now_s=0)
