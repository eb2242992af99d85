"""Images are not built here, but every command, option, variable and file that they name must exist."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hetis.engines.serving import CONNECTOR
from hetis.formats.documents import load_cluster
from hetis.planner.cli.app import app as plan_app
from hetis.planner.service.command import app as planner_app
from hetis.runtime.agent.devices import discover
from hetis.runtime.agent.main import app as agent_app
from hetis.runtime.transport.keys import VARIABLE as HETIS_WORKER_KEY
from hetis.runtime.vllm.plugin import VERSIONS
from hetis.runtime.vllm.settings import VARIABLE as HETIS_VLLM_CONFIG
from hetis.runtime.worker.main import VARIABLES as WORKER_OPTIONS

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
VLLM = ROOT / "docker" / "vllm.Dockerfile"  # based on vLLM's image
APPS = {"hetis-plan": plan_app, "hetis-planner": planner_app, "hetis-agent": agent_app}
WORKER = "hetis-worker"  # its options can be given as environment variables
COMMANDS = {*APPS, WORKER}


def compose() -> Any:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return every instruction of a Dockerfile with its arguments, with continued lines joined and no comments."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in text.replace("\\\n", " ").splitlines() if line.strip())
    ]


def commands() -> Iterator[list[str]]:
    """Yield all our command lines in the Dockerfiles, the compose file and the README."""
    for path in DOCKERFILES:
        for name, rest in instructions(path):
            found = re.search(r"\[.*\]", rest)
            if name in ("CMD", "HEALTHCHECK") and found:
                yield json.loads(found[0])
    for service in compose()["services"].values():
        if "command" in service:
            yield service["command"]
    readme = (ROOT / "docker" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in readme.splitlines():
        words = line.split()
        starts = [place for place, word in enumerate(words) if word in COMMANDS]
        if words[:1] == ["docker"] and words[1] != "build" and starts:
            yield words[starts[-1] :]


def parsed_options(command: list[str]) -> None:
    """Fail unless the command and all its options exist."""
    if command[0] == WORKER:
        assert {word for word in command if word.startswith("--")} <= set(WORKER_OPTIONS), " ".join(command)
        return
    target: Any = typer.main.get_command(APPS[command[0]])
    rest = command[1:]
    if rest and rest[0] in getattr(target, "commands", {}):
        target, rest = target.commands[rest[0]], rest[1:]
    known = {name for parameter in target.params for name in parameter.opts}
    unknown = [word for word in rest if word.startswith("--") and word not in known]
    assert not unknown, f"{' '.join(command)}: {unknown}"


def test_every_command_and_option_exists() -> None:
    ours = [command for command in commands() if command[0] in COMMANDS]
    assert {command[0] for command in ours} == COMMANDS
    for command in ours:
        parsed_options(command)


def test_every_command_of_ours_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) >= COMMANDS


def test_every_variable_is_one_that_a_command_reads() -> None:
    named = set()
    for path in [*DOCKERFILES, ROOT / "docker" / "compose.yaml", ROOT / "docker" / "README.md"]:
        named |= set(re.findall(r"\bHETIS_[A-Z_]+", path.read_text(encoding="utf-8")))
    known = {
        "HETIS_STORE",
        HETIS_WORKER_KEY,
        HETIS_VLLM_CONFIG,
        *WORKER_OPTIONS.values(),
    }  # the first is in the planner's configuration
    for app in APPS.values():
        group = typer.main.get_command(app)
        for command in (group, *getattr(group, "commands", {}).values()):
            for parameter in command.params:
                names = getattr(parameter, "envvar", None) or []
                known |= {names} if isinstance(names, str) else set(names)
    assert named <= known


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_small_labelled_watched_and_nobodys_root(path: Path) -> None:
    steps = instructions(path)
    names = [name for name, _ in steps]
    assert names.count("FROM") == 2
    bases = [rest for name, rest in steps if name == "FROM"]
    assert all("-slim" in base for base in (bases[:1] if path == VLLM else bases))
    last = dict(steps[len(names) - 1 - names[::-1].index("FROM") :])
    assert last["USER"] == "10001:10001"
    assert "org.opencontainers.image.title" in last["LABEL"]
    assert "HEALTHCHECK" in last
    assert "cuda" not in last["RUN"].lower()
    extras = re.search(r"(?:'\.|\.whl\))\[([\w,]+)\]", path.read_text(encoding="utf-8"))
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_the_image_of_vllm_is_of_the_newest_version_that_is_tested_and_keeps_what_it_has() -> None:
    steps = instructions(VLLM)
    base = [rest for name, rest in steps if name == "FROM"][-1]
    assert re.fullmatch(rf"vllm/vllm-openai:v{re.escape(VERSIONS[-1])}\.\d+", base)
    assert "ENTRYPOINT" not in dict(steps)
    install = [rest for name, rest in steps if name == "RUN"][-1]
    assert "--constraint /wheels/of-vllm.txt" in install
    assert json.dumps(CONNECTOR) in (ROOT / "docker" / "README.md").read_text(encoding="utf-8")


def test_the_build_gets_every_source_root_and_what_the_package_needs() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["hatch"]["build"]["dev-mode-dirs"]) <= kept
    assert {"pyproject.toml", "constraints.txt", settings["project"]["readme"]} <= kept
    assert set(settings["project"]["license-files"]) <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_demo_is_the_example_it_says() -> None:
    services = compose()["services"]
    cluster = load_cluster(ROOT / "examples" / "paper.yaml")
    nodes = {}
    for service in services.values():
        command = service.get("command", [])
        if command[:1] == ["hetis-agent"]:
            node = command[command.index("--node") + 1]
            devices = discover(f"simulated:{command[command.index('--simulated-devices') + 1]}").devices
            assert node.startswith(f"clusters/{cluster.name}/nodes/")
            nodes[node.rpartition("/")[2]] = len(devices)
    assert nodes == {"a100": 4, "r3090-0": 2, "r3090-1": 2, "p100": 4}
    ports = [service["environment"]["HETIS_AGENT_METRICS"] for service in services.values() if "environment" in service]
    assert len(set(ports)) == len(ports) == 4  # they share one network


def test_services_wait_for_services_that_are_there() -> None:
    services = compose()["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        if "build" in service:
            assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
