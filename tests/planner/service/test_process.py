"""The command as users run it: signals, exit codes, messages, tokens, help."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hetis.planner.service.command import run
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.running import run_planner
from hetis.planner.service.settings import Given, PlannerConfig, load_config
from hetis.planner.service.succession import Succession
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.certificates import Authority, Signed, write
from tests.planner.service.fakes import open_fake
from tests.planner.service.process import REAL, Process, finished, finished_here

LOCAL = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json")


def test_it_says_where_it_listens_and_stops_when_asked_to(tmp_path: Path) -> None:
    with Process(LOCAL, folder=tmp_path) as planner:
        ready = planner.ready()
        assert ready["status_page"].startswith("http://127.0.0.1:")
        assert ready["store"] == f"sqlite:///{tmp_path}/hetis/planner.db"
        with grpc.insecure_channel(ready["listen"][0]) as channel:
            answer = PlanServiceStub(channel).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=10)
            assert answer.plan.name == "plans/p"
        planner.signal(signal.SIGTERM)
        code, stderr = planner.end()
    assert code == ServiceExitCode.OK
    lines = stderr.splitlines()
    assert lines[0] == (
        f"hetis-planner listens on {ready['listen'][0]} (plain), status page {ready['status_page']},"
        f" store {ready['store']}"
    )
    logged = [json.loads(line) for line in lines[1:]]
    assert [line["message"] for line in logged] == ["call", "stopping", "stopped"]
    assert logged[0]["method"] == "/hetis.v1.PlanService/GetPlan"


def test_a_full_disk_of_the_log_does_not_keep_it_from_serving(tmp_path: Path) -> None:
    within = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh")
    with Process(LOCAL, folder=tmp_path, within=within) as planner:
        assert planner.ready()["listen"]
        planner.signal(signal.SIGTERM)
        assert planner.end()[0] == ServiceExitCode.OK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with Process((*LOCAL, "--set", "drain_timeout=50s"), folder=tmp_path) as planner:
        address = planner.ready()["listen"][0]
        with grpc.insecure_channel(address) as channel:
            stub = PlanServiceStub(channel)
            slow = stub.GetPlan.future(plans.GetPlanRequest(name="plans/slow"), timeout=50)
            stub.GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=10)  # the slow call was sent before
            planner.signal(number)
            for _ in range(500):  # until the planner drains
                try:
                    stub.GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=10)
                except grpc.RpcError:
                    break
                time.sleep(0.01)
            began = time.monotonic()
            planner.signal(number)
            code, _ = planner.end()
            assert time.monotonic() - began < 30  # less than the 50 s of the slow call
            assert not slow.cancelled()
    assert code == {signal.SIGTERM: ServiceExitCode.TERMINATED, signal.SIGINT: ServiceExitCode.INTERRUPTED}[number]


def test_a_port_in_use_is_exit_8_and_the_store_is_not_touched(tmp_path: Path) -> None:
    with Process(LOCAL, folder=tmp_path) as first:
        ready = first.ready()
        for option, address in (("--listen", ready["listen"][0]), ("--status-page", ready["status_page"][7:-1])):
            held = {"FAKE_STORE": "held"} if option == "--listen" else {}  # opening it would fail
            there = LOCAL.index(option) + 1
            with Process((*LOCAL[:there], address, *LOCAL[there + 1 :]), folder=tmp_path, environment=held) as second:
                code, stderr = second.end()
            assert f"error: cannot listen on {address}: address already in use" in stderr
            assert code == ServiceExitCode.ADDRESS
            assert "Traceback" not in stderr
            assert "add_port" not in stderr  # a line of gRPC's own log


def test_a_planner_that_still_compiles_stops_when_asked_to(tmp_path: Path) -> None:
    empty = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    with Process(LOCAL, folder=tmp_path, module=REAL, environment=empty) as planner:
        planner.ready()
        time.sleep(3)  # in the middle of the call
        *_, user, system = os.times()[:4]
        spent = Path(f"/proc/{planner.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        planner.signal(signal.SIGTERM)
        code, stderr = planner.end()
        assert sum(os.times()[2:4]) - user - system - sum(map(int, spent)) / os.sysconf("SC_CLK_TCK") < 10
    assert code == ServiceExitCode.OK, stderr
    assert '"stopped"' in stderr


@pytest.mark.parametrize(("limit", "processes", "least"), [(6, 1, 256), (1000, 200, 1024)])
def test_a_planner_with_too_few_descriptors_says_how_many_it_needs(
    limit: int, processes: int, least: int, tmp_path: Path
) -> None:
    """In the past it aborted or segfaulted, or served until connections had taken them all."""
    within = ("bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash")
    options = (*LOCAL, "--set", f"solver.processes={processes}")
    with Process(options, folder=tmp_path, module=REAL, within=within) as planner:
        code, stderr = planner.end()
    assert code == ServiceExitCode.INVALID
    assert stderr.startswith(
        f"error: ulimit -n: hetis-planner may have at most {limit} files and connections open, and"
    )
    assert f"needs at least {least}: raise the hard limit" in stderr
    assert len(stderr.splitlines()) == 1


def test_check_finds_bad_certificates_and_tokens_without_starting(tmp_path: Path) -> None:
    certificate, key = write(tmp_path, Authority().server())
    options = (
        "--check",
        "--set",
        f"tls.certificate={certificate}",
        "--set",
        f"tls.key={key}",
        "--set",
        "tokens=t.yaml",
    )
    assert finished_here(options, folder=tmp_path) == (ServiceExitCode.INVALID, "", "error: t.yaml: no such file\n")
    made = finished(("token", "create", "--file", "t.yaml", "--role", "admin"), folder=tmp_path)
    assert re.fullmatch(r"hetis_[\w-]{43}\n", made[1])
    checked = finished_here(options, folder=tmp_path)
    assert checked == (ServiceExitCode.OK, "configuration: ok, certificate, 1 tokens\n", "")
    Path(key).chmod(0o644)
    code, _, stderr = finished_here(options, folder=tmp_path)
    assert code == ServiceExitCode.OK
    assert stderr.startswith(f"warning: {key}: is readable by all users")
    write(tmp_path, Authority().server(), name="other")
    code, _, stderr = finished_here((*options[:3], "--set", f"tls.key={tmp_path}/other.key"), folder=tmp_path)
    assert code == ServiceExitCode.INVALID
    assert f"other.key: does not match the certificate {certificate}" in stderr


def test_everything_wrong_is_said_at_once_also_of_files(tmp_path: Path) -> None:
    settings = ("x=1", "tls.certificate=c.pem", "tls.key=k.pem", "tokens=t.yaml", "listen=0.0.0.0:1", "agents.lease=1s")
    options = tuple(part for text in settings for part in ("--set", text))
    for code, _, stderr, *_ in (
        finished(options, folder=tmp_path),  # in a process, because it would serve if it missed the errors
        finished_here((*options, "--check"), folder=tmp_path),
    ):
        assert code == ServiceExitCode.INVALID
        for said in ("x is not a setting", "c.pem: no such", "k.pem: no such", "t.yaml: no such", "at least twice"):
            assert said in stderr, stderr


def test_a_handshake_that_fails_is_logged_with_the_peer_and_the_reason_and_counted(tmp_path: Path) -> None:
    ours, other = Authority(), Authority("other")
    certificate, key = write(tmp_path, ours.server())
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    files = {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}
    settings = [word for name, path in files.items() for word in ("--set", f"tls.{name}={path}")]
    options = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--store", f"sqlite:///{tmp_path}/hetis.db")
    late = datetime.now(UTC) - timedelta(minutes=10)
    name = "spiffe://hetis/viewer/me"
    peers = {
        "EXPIRED": grpc.ssl_channel_credentials(ours.pem, *pair(ours.client(name, until=late))),
        "UNKNOWN_AUTHORITY": grpc.ssl_channel_credentials(ours.pem, *pair(other.client(name))),
        "NO_CERTIFICATE": grpc.ssl_channel_credentials(ours.pem),
        "NOT_TLS": None,
    }
    with Process((*options, *settings, "--ready-json"), folder=tmp_path, module=REAL) as process:
        ready = process.ready()
        (address,) = ready["listen"]
        call = health_pb2.HealthCheckRequest()
        for reason, credentials in peers.items():
            channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
            with channel, pytest.raises(grpc.RpcError):
                health_pb2_grpc.HealthStub(channel).Check(call, timeout=5)
            process.until_said(f'"reason": "{reason}"')
        honest = grpc.secure_channel(address, grpc.ssl_channel_credentials(ours.pem, *pair(ours.client(name))))
        with honest:
            assert health_pb2_grpc.HealthStub(honest).Check(call, timeout=30).status == 1
        with urllib.request.urlopen(f"{ready['status_page']}metrics", timeout=30) as page:
            metrics = page.read().decode()
        process.signal(signal.SIGTERM)
        _, stderr = process.end()
    for reason in peers:
        assert re.search(rf'hetis_planner_handshakes_failed_total{{reason="{reason}"}} [1-9]', metrics)
    (said, *others) = [line for line in stderr.splitlines() if not line.startswith("{")]
    assert said.startswith("hetis-planner listens on")
    assert not others, "lines in the form of gRPC's core"
    logged = [json.loads(line) for line in stderr.splitlines() if "handshake failed" in line]
    assert [(one["host"], one["reason"]) for one in logged] == [("127.0.0.1", reason) for reason in peers]
    assert all(one["meaning"].startswith("the peer") for one in logged)


def pair(signed: Signed) -> tuple[bytes, bytes]:
    return signed.key, signed.certificate


def test_without_credentials_it_does_not_listen_for_other_machines(tmp_path: Path) -> None:
    code, _, stderr, _ = finished(("--listen", "0.0.0.0:0"), folder=tmp_path)
    assert code == ServiceExitCode.INVALID
    assert stderr.startswith("error: --listen: 0.0.0.0:0 can be reached from other machines, which requires")


def test_the_configuration_in_force_is_printed_without_secrets(tmp_path: Path) -> None:
    code, stdout, _ = finished_here(
        ("--print-config", "--store", "postgresql://me:secret@db/hetis"), folder=tmp_path, HETIS_SOLVER__QUEUE="9"
    )
    assert code == ServiceExitCode.OK
    assert "secret" not in stdout
    assert "store: postgresql://me:***@db/hetis" in stdout
    assert "queue: 9" in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--role", "agent"), "--role agent: needs either --node or --cluster"),
        (("--role", "admin", "--node", "clusters/c/nodes/n"), "--role admin: takes neither --node nor --cluster"),
        (("--role", "agent", "--node", "n1"), "--node: 'n1' does not have the form clusters/CLUSTER/nodes/NODE"),
        (
            ("--role", "agent", "--cluster", "clusters/c/nodes/n"),
            "--cluster: 'clusters/c/nodes/n' does not have the form clusters/",
        ),
        (("--role", "admin", "--valid", "0"), "--valid: is 0, must be a number of days above 0, at most 3650"),
        (("--role", "admin", "--file", "none/t.yaml"), "none/t.yaml: no such file"),
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run in this process; the output and files of a process that creates tokens are tested above."""
    monkeypatch.chdir(tmp_path)
    file = () if "--file" in options else ("--file", "t.yaml")
    code = run(["token", "create", *file, *options])
    printed = capsys.readouterr()
    assert (code, printed.out) == (ServiceExitCode.INVALID, "")
    assert message in printed.err
    assert not (tmp_path / "t.yaml").exists()


def test_nothing_heavy_is_imported_for_help() -> None:
    import subprocess
    import sys

    heavy = "{'grpc', 'pydantic', 'sqlalchemy', 'starlette', 'uvicorn', 'highspy', 'numba', 'google.protobuf', 'yaml'}"
    script = f"import sys, hetis.planner.service.command; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_new_tokens_and_certificates_are_taken_while_it_serves(tmp_path: Path) -> None:
    old, new = Authority("old"), Authority("new")
    certificate, key = write(tmp_path, old.server())

    def make(name: str) -> str:
        command = ("token", "create", "--file", "t.yaml", "--role", "viewer", "--name", name)
        return finished_here(command, folder=tmp_path)[1]

    def call(authority: Authority, token: str) -> str:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.pem), options) as channel:
            metadata = (("authorization", f"Bearer {token.strip()}"),)
            try:
                PlanServiceStub(channel).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]
            return "OK"

    def becomes(expected: str, authority: Authority, token: str) -> None:
        end = time.monotonic() + 60
        while (seen := call(authority, token)) != expected:
            assert time.monotonic() < end, seen
            time.sleep(0.05)

    first = make("first")
    environment = {"HETIS_TLS__CERTIFICATE": certificate, "HETIS_TLS__KEY": key, "HETIS_TOKENS": "t.yaml"}
    with Process((*LOCAL, "--set", "reload=50ms"), folder=tmp_path, environment=environment) as planner:
        address = planner.ready()["listen"][0].replace("127.0.0.1", "localhost")
        assert call(old, first) == "OK"
        second = make("second")
        becomes("OK", old, second)
        file = tmp_path / "t.yaml"
        text = file.read_text()
        file.write_text("this is no token file")
        planner.until_said("tokens: the new files are invalid, the old ones remain in use")
        assert call(old, first) == "OK"
        start, end = text.index("- name: first"), text.index("- name: second")
        file.write_text(text[:start] + text[end:])
        becomes("UNAUTHENTICATED", old, first)
        assert call(old, second) == "OK"
        write(tmp_path, new.server())
        becomes("OK", new, second)
        assert call(old, second) == "UNAVAILABLE"
        planner.signal(signal.SIGINT)
        code, stderr = planner.end()
    assert code == ServiceExitCode.OK, stderr
    assert first.strip() not in stderr


def test_what_was_made_before_it_was_ready_is_never_collected(tmp_path: Path) -> None:
    """Otherwise full collections would block the process for a second with thousands of agents."""
    given = ("listen", "127.0.0.1:0"), ("status_page.address", "off"), ("store", f"sqlite:///{tmp_path}/h.db")
    config = load_config(None, environment={}, flags=[Given(name=n, text=text, by=n) for n, text in given])
    before, interval_s = gc.get_threshold(), sys.getswitchinterval()
    gc.unfreeze()  # undo the tests' own freeze, see conftest.py

    async def scenario() -> None:
        serving = asyncio.create_task(run_planner(config, open_fake, version="0", descriptors=1024, ready_json=False))
        while not gc.get_freeze_count():
            await asyncio.sleep(0.01)
        assert gc.get_threshold()[2] > before[2]
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    try:
        asyncio.run(asyncio.wait_for(scenario(), 30))
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*before)
        sys.setswitchinterval(interval_s)


async def test_a_signal_ends_a_planner_whose_store_does_not_open(tmp_path: Path) -> None:
    given = ("listen", "127.0.0.1:0"), ("status_page.address", "off"), ("store", f"sqlite:///{tmp_path}/h.db")
    config = load_config(None, environment={}, flags=[Given(name=n, text=text, by=n) for n, text in given])
    opening = asyncio.Event()
    ended = list[str]()

    async def open_for_ever(_: PlannerConfig) -> Succession:
        opening.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("opening")
        raise AssertionError

    serving = asyncio.create_task(run_planner(config, open_for_ever, version="0", descriptors=1024, ready_json=False))
    await opening.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
    assert ended == ["opening"]
