"""Every metric, option, setting and alert that the shipped deployment files name exists."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hetis.planner.fleet.settings import FleetCounters
from hetis.planner.service.command import app as planner_app
from hetis.planner.service.exit_codes import ServiceExitCode as PlannerExit
from hetis.planner.service.observability.metrics import FleetCollector, ServiceMetrics, StoreCollector
from hetis.planner.service.settings import load_config, variables
from hetis.planner.store.health import StoreHealth
from hetis.planner.store.lease import Lease
from hetis.runtime.agent.launched.parts import EngineSettingsDocument
from hetis.runtime.agent.main import app as agent_app
from hetis.runtime.agent.metrics import AgentMetrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
RULES: Any = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD: Any = json.loads((DEPLOY / "grafana" / "hetis.json").read_text(encoding="utf-8"))
CHART = DEPLOY / "helm" / "hetis"
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in (CHART / "templates").iterdir()}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def metrics() -> dict[str, str]:
    """Return every name that can be scraped, with the kind of its family."""
    planner, agent = ServiceMetrics("0").registry, AgentMetrics(version="0").registry
    store = StoreCollector(StoreHealth(clock=lambda: 0.0), Lease(5.0))
    found = [*planner.collect(), *agent.collect(), *FleetCollector(FleetCounters()).collect()]
    names = dict[str, str]()
    for family in [*found, *store.collect()]:
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + suffix: family.type for suffix in suffixes}
    return names


def expressions() -> Iterator[str]:
    for alert in ALERTS:
        yield alert["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["query"]


def test_every_metric_of_alerts_and_dashboard_is_one_of_the_code() -> None:
    known = metrics()
    used = {name for text in expressions() for name in re.findall(r"\b(?:hetis|process)_[a-z_]+\b", text)}
    assert len(used) > 30
    assert used <= known.keys()
    for text in expressions():
        for name in re.findall(r"\b(?:rate|increase)\((\w+)", text):
            assert known[name] in ("counter", "histogram"), f"{name} goes up and down: {text}"


def test_every_counter_of_the_fleet_can_be_scraped() -> None:
    counters = FleetCounters()
    for number, field in enumerate(fields(counters), 1):
        value = Counter({"one": number}) if isinstance(getattr(counters, field.name), Counter) else number
        setattr(counters, field.name, value)
    scraped = [sample.value for family in FleetCollector(counters).collect() for sample in family.samples]
    assert sorted(scraped) == list(range(1, len(fields(counters)) + 1))


def test_every_metric_of_the_code_is_in_the_document_with_the_labels_that_are_used() -> None:
    document = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    for name in metrics():
        if name.startswith("hetis_planner_"):
            assert re.sub(r"_(bucket|count|sum)$", "", name) in document, name
    ours = {"job", "instance", "le"}
    for text in expressions():
        for name, labels in re.findall(r"(hetis_planner_\w+)\{([^}]*)\}", text):
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            (told,) = re.findall(rf"`{base}(?:\{{([^}}]*)\}})?`", document)[:1] or [""]
            used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", labels)) - ours
            assert used <= set(told.split(",")), f"{name} has no {used - set(told.split(','))}"


def test_every_alert_says_how_bad_it_is_and_has_a_page_of_the_runbook() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"]["summary"]
        assert f"`{alert['alert']}`" in OPERATIONS, alert["alert"]


def test_installations_in_one_prometheus_are_told_apart_by_their_namespace() -> None:
    """Sums over all of them would find two leaders where there are two installations."""
    of_planners = [panel for panel in DASHBOARD["panels"] if panel["title"] in ("Planners that lead", "Epoch")]
    assert len(of_planners) == 2
    texts = [alert["expr"] for alert in ALERTS] + [panel["targets"][0]["expr"] for panel in of_planners]
    for text in texts:
        for labels in re.findall(r"\b(?:sum|max|min|avg|count|on)\b(?: by)? ?\(([^)]*)", text):
            assert labels.split(", ")[0] == "namespace", text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="NOT CHECKED: promtool is not installed")
def test_the_rules_do_what_their_tests_say() -> None:
    subprocess.run(["promtool", "test", "rules", "alerts_test.yaml"], cwd=DEPLOY / "prometheus", check=True)


# --- units


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_services_start_again_but_where_only_a_person_can_help() -> None:
    for name in ("hetis-planner.service", "hetis-agent.service"):
        unit = settings_of(DEPLOY / "systemd" / name)
        assert unit["Restart"] == ["on-failure"]
        assert unit["RestartPreventExitStatus"] == [str(PlannerExit.INVALID.value)]
        assert int(unit["LimitNOFILE"][0]) >= 4096
        assert unit["NoNewPrivileges"] == ["yes"]


def test_engines_that_the_agent_started_have_time_for_their_requests() -> None:
    """systemd's own signals would end them at once, and its limit before their requests have ended."""
    unit = settings_of(DEPLOY / "systemd" / "hetis-agent.service")
    assert unit["KillMode"] == ["mixed"]
    default = EngineSettingsDocument.model_fields["drain_timeout"].default
    assert int(unit["TimeoutStopSec"][0]) >= 2 * default + 30


def test_engines_that_the_agent_started_can_write_their_caches() -> None:
    """The rest of the file system is read-only, and vLLM ends if it cannot make its folder of compiled graphs."""
    unit = settings_of(DEPLOY / "systemd" / "hetis-agent.service")
    assert unit["ProtectSystem"] == ["strict"]
    assert f"HOME=/var/cache/{unit['CacheDirectory'][0]}" in unit["Environment"]


def commands(app: typer.Typer) -> dict[str, set[str]]:
    """Return the verbs of a command line with the options of each."""
    root: Any = typer.main.get_command(app)
    found = getattr(root, "commands", {}) | {"": root}
    return {name: {option for one in command.params for option in one.opts} for name, command in found.items()}


def test_units_use_options_that_exist() -> None:
    for unit in UNITS:
        for line in settings_of(unit).get("ExecStart", ()):
            if match := re.search(r"/opt/hetis/bin/hetis-planner( [a-z]+)?(.*)", line):
                known = commands(planner_app)[(match[1] or "").strip()]
                assert set(re.findall(r"--[a-z-]+", match[2])) <= known, line
            else:
                assert line == "/opt/hetis/bin/hetis-agent", line


def test_old_backups_and_what_killed_ones_have_left_are_deleted(tmp_path: Path) -> None:
    day_s, now_s = 86_400, time.time()
    kept = {"planner-1.db": 29, ".planner-2.db.7.tmp": 0, "other.db": 99}
    gone = {"planner-3.db": 32, ".planner-4.db.7.tmp": 2, ".planner-4.db.7.tmp-journal": 2}
    for name, days in (kept | gone).items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now_s - (days + 0.5) * day_s,) * 2)
    (line,) = settings_of(DEPLOY / "systemd" / "hetis-backup.service")["ExecStartPost"]
    subprocess.run([word.replace("${STATE_DIRECTORY}", str(tmp_path)) for word in shlex.split(line)], check=True)
    assert {file.name for file in tmp_path.iterdir()} == set(kept)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="NOT CHECKED: systemd-analyze is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = re.sub(r"/opt/hetis/bin/hetis-\w+", "/bin/true", unit.read_text(encoding="utf-8"))
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    paths = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- the chart


def references(text: str) -> Iterator[str]:
    """Yield the full paths of the values that a template reads."""
    yield from re.findall(r"\.Values\.([\w.]+)", text)
    for variable, path in re.findall(r"\$(\w) := \.Values\.(\w+)", text):
        yield from (f"{path}.{rest}" for rest in re.findall(rf"\${variable}\.([\w.]+)", text))


def test_the_chart_reads_values_that_there_are() -> None:
    values: Any = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]
    used = {path for text in TEMPLATES.values() for path in references(text)}
    assert len(used) > 25
    for path in used:
        found = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]
    for room, found in values.items():
        assert schema[room]["properties"].keys() == found.keys()


def test_the_chart_sets_variables_that_are_read() -> None:
    agent = {
        variable
        for parameter in typer.main.get_command(agent_app).params
        for variable in ([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ())
    }
    set_there = {name for text in TEMPLATES.values() for name in re.findall(r"\bHETIS_[A-Z_]+", text)}
    assert set_there
    assert set_there <= agent | variables().keys()


def rendered(**values: Any) -> list[Any]:
    """Return the chart's manifests, rendered by Helm's Python library (helm-python-sdk) or its command."""
    try:
        helm = importlib.import_module("helm_python")
    except ImportError:
        if shutil.which("helm") is None:
            pytest.skip("NOT CHECKED: neither helm nor helm-python-sdk is installed")
        command = ["helm", "template", "h", str(CHART), "--namespace", "ml", "--values", "-"]
        text = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True, check=True).stdout
        return [found for found in yaml.safe_load_all(text) if found]
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values=values, name="h", namespace="ml").values()
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


HA = {"replicas": 3, "store": {"urlSecret": "pg"}, "clientCertificates": True, "config": {"solver": {"queue": 7}}}


@pytest.mark.parametrize("planner", [{}, HA], ids=["sqlite", "postgresql"])
def test_what_helm_makes_of_the_chart_fits_together(planner: dict[str, Any], tmp_path: Path) -> None:
    found = rendered(planner=planner, agents={"cluster": "night"}, monitoring={"enabled": True})
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(by_kind) == len(found)
    assert all(name.startswith("h-") for _, name in by_kind), "a second release in the namespace would have this name"
    config = tmp_path / "planner.yaml"
    config.write_text(by_kind["ConfigMap", "h-planner"]["data"]["planner.yaml"], encoding="utf-8")
    loaded = load_config(config, environment={})
    assert loaded.requires_credentials
    assert loaded.solver.queue == (7 if planner else 32)
    pods = by_kind["StatefulSet", "h-planner"]["spec"]["template"]
    for service in ("h-planner", "h-planners"):
        assert by_kind["Service", service]["spec"]["selector"].items() <= pods["metadata"]["labels"].items()
    mounted = {mount["mountPath"] for mount in pods["spec"]["containers"][0]["volumeMounts"]}
    assert loaded.tls is not None
    for path in filter(None, (loaded.tls.certificate, loaded.tls.key, loaded.tls.client_ca, loaded.tokens)):
        assert str(Path(path).parent) in mounted
    claims = by_kind["StatefulSet", "h-planner"]["spec"].get("volumeClaimTemplates", ())
    volumes = {one["name"] for one in (*pods["spec"]["volumes"], *(claim["metadata"] for claim in claims))}
    assert {mount["name"] for mount in pods["spec"]["containers"][0]["volumeMounts"]} == volumes
    agent = by_kind["DaemonSet", "h-agent"]["spec"]["template"]["spec"]
    variables_of_agent = {one["name"]: one.get("value") for one in agent["containers"][0]["env"]}
    assert variables_of_agent["HETIS_AGENT_SERVER"] == "h-planners.ml.svc:8470"
    assert variables_of_agent["HETIS_AGENT_NODE"] == "clusters/night/nodes/$(NODE_NAME)"
    assert (("PodDisruptionBudget", "h-planner") in by_kind) == bool(planner)


@pytest.mark.parametrize("are_created", [False, True])
def test_directories_of_the_host_are_there_for_the_agents_user_or_the_pod_does_not_start(are_created: bool) -> None:
    """The kubelet makes missing ones for root, where the agent cannot write its state."""
    found = rendered(agents={"cluster": "night", "createDirectories": are_created, "user": 10002})
    (agent,) = [one["spec"]["template"]["spec"] for one in found if one["kind"] == "DaemonSet"]
    hosts = {one["name"]: one["hostPath"] for one in agent["volumes"] if "hostPath" in one}
    assert {host["type"] for host in hosts.values()} == {"DirectoryOrCreate" if are_created else "Directory"}
    assert agent["securityContext"]["runAsNonRoot"]
    inits = agent.get("initContainers", [])
    assert len(inits) == are_created
    for init in inits:
        mounted = {mount["mountPath"] for mount in init["volumeMounts"] if mount["name"] in hosts}
        assert init["command"][:2] == ["chown", "10002:10002"]
        assert set(init["command"][2:]) == mounted
        assert len(mounted) == len(hosts)
        assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    conf = re.findall(r"^d (\S+) +\d+ (\d+) (\d+)$", OPERATIONS, re.MULTILINE)
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["agents"]
    owner = str(values["user"])
    assert conf == [(values[key], owner, owner) for key in ("socketDirectory", "stateDirectory")]
