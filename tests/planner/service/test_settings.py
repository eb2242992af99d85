"""Settings: which source wins, and the messages about all errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetis.commands.endpoints import is_loopback
from hetis.formats.documents import dump_data
from hetis.formats.errors import DocumentError
from hetis.planner.service.settings import (
    Given,
    PlannerConfig,
    load_config,
    mistaken_variables,
    split_address,
    variables,
    without_password,
)

HEAD = "apiVersion: hetis/v1\nkind: PlannerConfig\n"
EXAMPLE = Path(__file__).parents[3] / "examples" / "service" / "planner.yaml"


def load(tmp_path: Path, text: str | None = None, *flags: Given, **environment: str) -> PlannerConfig:
    file = tmp_path / "planner.yaml"
    if text is None:
        return load_config(None, environment=environment, flags=flags)
    file.write_text(HEAD + text)
    return load_config(file, environment=environment, flags=flags)


def problems_of(tmp_path: Path, text: str | None = None, *flags: Given, **environment: str) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, text, *flags, **environment)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def test_without_anything_it_is_local(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.listen == ["127.0.0.1:8470"]
    assert config.status_page.address == "127.0.0.1:8471"
    assert config.store.startswith("sqlite:///")
    assert config.drain_timeout == 30
    assert not config.requires_credentials


def test_flags_go_before_the_environment_before_the_file_before_defaults(tmp_path: Path) -> None:
    text = "solver: {queue: 1, processes: 7}\nlog: {level: error}\ndrain_timeout: 1min\n"
    flag = Given(name="solver.queue", text="3", by="--set solver.queue")
    config = load(tmp_path, text, flag, HETIS_SOLVER__QUEUE="2", HETIS_LOG__LEVEL="debug")
    assert config.solver.queue == 3
    assert config.log.level == "debug"
    assert config.solver.processes == 7
    assert config.drain_timeout == 60
    assert config.agents.heartbeat == 5


def test_nested_names_make_their_section(tmp_path: Path) -> None:
    config = load(tmp_path, HETIS_TLS__CERTIFICATE="a.pem", HETIS_TLS__KEY="a.key", HETIS_RELOAD="5s")
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.key, config.reload) == ("a.pem", "a.key", 5)


def test_text_stays_text_lists_split_and_empty_is_unset(tmp_path: Path) -> None:
    config = load(tmp_path, HETIS_TOKENS="123", HETIS_LISTEN="127.0.0.1:1, [::1]:2", HETIS_STORE="")
    assert config.tokens == "123"
    assert config.listen == ["127.0.0.1:1", "[::1]:2"]
    assert config.store.startswith("sqlite:///")


def test_one_address_needs_no_list(tmp_path: Path) -> None:
    assert load(tmp_path, "listen: 127.0.0.1:1\n").listen == ["127.0.0.1:1"]


def test_every_problem_of_a_file_is_told_with_line_and_nearest_name(tmp_path: Path) -> None:
    text = (
        "listn: 127.0.0.1:1\n"
        "solver: {processes: 0, queue: many}\n"
        "log: {level: loud}\n"
        "drain_timeout: 30\n"
        "store: mysql://x\n"
        "tls: {certificate: a.pem}\n"
        "listen: [127.0.0.1]\n"
        "status_page: {public: maybe}\n"
    )
    assert problems_of(tmp_path, text) == [
        "planner.yaml:3: listn: unknown field, did you mean listen?",
        "planner.yaml:4: solver.processes: is 0, must be >= 1",
        "planner.yaml:4: solver.queue: 'many' is not a whole number",
        "planner.yaml:5: log.level: 'loud' is not one of debug, info, warning, error",
        "planner.yaml:6: drain_timeout: 30 has no unit: write it like 20us",
        "planner.yaml:7: store: is not a store URL: write sqlite:///hetis.db or postgresql://user@host/database",
        "planner.yaml:8: tls: key is missing",
        "planner.yaml:9: listen[0]: '127.0.0.1' is not an address: write host:port with a port up to 65535, 0 for a"
        " free one",
        "planner.yaml:10: status_page.public: 'maybe' is not true or false",
    ]


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"HETIS_SOLVER__QUEUE": "0"}, "HETIS_SOLVER__QUEUE: is 0, must be >= 1"),
        (
            {"HETIS_LOG__LEVEL": "inf"},
            "HETIS_LOG__LEVEL: 'inf' is not one of debug, info, warning, error, did you mean info?",
        ),
        (
            {"HETIS_TLS__CERTIFICAT": "x"},
            "HETIS_TLS__CERTIFICAT: is not a setting, did you mean HETIS_TLS__CERTIFICATE?",
        ),
        (
            {"HETIS_LISTEN": "127.0.0.1:1,x"},
            "HETIS_LISTEN: 'x' is not an address: write host:port with a port up to 65535, 0 for a free one",
        ),
        (
            {"HETIS_LISTEN": "0.0.0.0:1"},
            "HETIS_LISTEN: 0.0.0.0:1 can be reached from other machines, which requires tls.certificate and tls.key,"
            " and tokens or tls.client_ca to identify callers; without them only loopback is allowed, such as"
            " 127.0.0.1:8470",
        ),
    ],
)
def test_a_problem_of_the_environment_names_the_variable(
    environment: dict[str, str], problem: str, tmp_path: Path
) -> None:
    assert problems_of(tmp_path, None, **environment) == [problem]


def test_a_problem_of_a_flag_names_the_flag(tmp_path: Path) -> None:
    flag = Given(name="solver.que", text="3", by="--set solver.que")
    assert problems_of(tmp_path, "", flag) == [
        "--set solver.que: solver.que is not a setting, did you mean solver.queue?"
    ]


def test_a_value_that_is_not_yaml_hides_no_other_problem(tmp_path: Path) -> None:
    found = problems_of(tmp_path, None, HETIS_RELOAD="[", HETIS_LISTEN="x", HETIS_SOLVER__QUEUE="0")
    assert sorted(one.partition(":")[0] for one in found) == ["HETIS_LISTEN", "HETIS_RELOAD", "HETIS_SOLVER__QUEUE"]


def test_variables_of_others_are_left_alone_and_typing_errors_are_hinted_at() -> None:
    environment = {"HETIS_DEBUG": "1", "HETIS_AGENT_THING": "x", "HETIS_TOKEN": "t", "HETIS_LISTN": "x", "PATH": "y"}
    assert mistaken_variables(environment) == ["HETIS_LISTN is not a setting, did you mean HETIS_LISTEN?"]


TLS = "tls: {certificate: a, key: b}\n"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("listen: 127.0.0.1:0\n", True),
        ("listen: localhost:0\n", True),
        ("listen: '[::1]:0'\n", True),
        ("listen: unix:/run/p.sock\n", True),
        ("listen: 127.0.0.1:0\ntokens: t\n", True),
        ("listen: 0.0.0.0:0\n", False),
        ("listen: '[::]:0'\n", False),
        ("listen: planner.example:0\n", False),
        ("listen: 0.0.0.0:0\n" + TLS, False),
        ("listen: 0.0.0.0:0\ntokens: t\n", False),
        ("listen: 0.0.0.0:0\ntokens: t\n" + TLS, True),
        ("listen: 0.0.0.0:0\ntls: {certificate: a, key: b, client_ca: c}\n", True),
        ("listen: [127.0.0.1:0, 0.0.0.0:0]\n", False),
    ],
)
def test_other_machines_are_served_only_with_credentials_and_tls(text: str, allowed: bool, tmp_path: Path) -> None:
    if allowed:
        load(tmp_path, text)
    else:
        (problem,) = problems_of(tmp_path, text)
        assert "can be reached from other machines, which requires tls.certificate and tls.key" in problem
        assert problem.startswith("planner.yaml:3: listen[")


def test_the_status_page_is_local_unless_it_is_said_to_be_public(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "status_page:\n  address: 0.0.0.0:1\n")
    assert problem.startswith("planner.yaml:4: status_page.address: 0.0.0.0:1 can be reached from other machines")
    assert load(tmp_path, "status_page: {address: 0.0.0.0:1, public: true}\n").status_page.public
    assert load(tmp_path, "status_page: {address: off}\n").status_page.address == "off"


def test_a_lease_is_at_least_two_heartbeats(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "agents: {lease: 6s}\n") == [
        "planner.yaml:3: agents.lease: is 6s, but must be at least twice agents.heartbeat (5s)"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n", "expected a mapping with apiVersion"),
        ("kind: Cluster\n", "is 'Cluster', expected PlannerConfig"),
        ("", "is empty"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "planner.yaml"
    file.write_text(text)
    with pytest.raises(DocumentError, match=problem):
        load_config(file, environment={"HETIS_LOG__LEVEL": "debug"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such file"):
        load_config(tmp_path / "none.yaml", environment={})


def test_what_is_in_force_is_a_document_that_means_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, "tokens: t\nreload: 100ms\ntls: {certificate: a, key: b}\nagents: {lease: 90s}\n")
    again = tmp_path / "again.yaml"
    again.write_text(dump_data(config.to_data()))
    assert load_config(again, environment={}) == config


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///x.db", "sqlite:///x.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://me:se@cret@host/db?sslmode=require", "postgresql://me:***@host/db?sslmode=require"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_every_setting_has_a_variable() -> None:
    named = variables()
    assert named["HETIS_TLS__CERTIFICATE"] == "tls.certificate"
    assert named["HETIS_LISTEN"] == "listen"
    assert named["HETIS_AGENTS__HEARTBEAT"] == "agents.heartbeat"
    assert len(named) == len(set(named.values()))


def test_the_example_is_valid_and_names_every_setting() -> None:
    load_config(EXAMPLE, environment={})
    text = EXAMPLE.read_text(encoding="utf-8")
    for name in variables().values():
        assert f"{name.rsplit('.', 1)[-1]}:" in text, name


@pytest.mark.parametrize(
    ("address", "expected"),
    [("h:1", ("h", 1)), ("[::1]:2", ("::1", 2)), ("::1:2", None), ("h:65536", None), (":1", None)],
)
def test_addresses(address: str, expected: Any) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="is not an address"):
            split_address(address)
    else:
        assert split_address(address) == expected


def test_loopback_is_known() -> None:
    assert all(is_loopback(a) for a in ("127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/x"))
    assert not any(is_loopback(a) for a in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1", "[::ffff:1.2.3.4]:1"))
