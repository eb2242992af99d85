"""``hetis-plan share``: one fleet for several models, as users see it, and errors in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli.sharing import ShareRule
from hetis.planner.use_cases.describing import ONE_TOKEN
from hetis.planner.use_cases.record.parts import Requested
from hetis.solver.tenants.tenancy import TenantRule
from tests.planner.command_line import EXAMPLES, hetis_plan_here, invoke

FLEET = str(EXAMPLES / "h100-l4.yaml")
TWO = """apiVersion: hetis/v1
kind: Tenants
tenants:
  - {name: chat, model: Llama-3.1-8B, workload: 1024/256, weight: 2}
  - {name: drafts, model: Llama-2-7B, workload: 2000/200, objective: throughput, tpot: 50ms}
"""


def written(folder: Path, text: str = TWO) -> str:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return str(path)


def test_every_tenant_gets_a_plan_that_the_checker_passes(tmp_path: Path) -> None:
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "-o", "json", "--out", str(tmp_path / "new"))
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert [rule["rule"] for rule in answer["rules"]] == [
        "max-min",
        "efficiency",
        "equal-throughput",
        "sharing-incentive",
    ]
    first = answer["rules"][0]
    assert first["value"] <= first["bound"] * (1 + 1e-9)
    assert first["level"] <= first["level_bound"] * (1 + 1e-9)
    assert max(rule["value"] for rule in answer["rules"]) == pytest.approx(answer["rules"][1]["value"])
    devices: list[str] = []
    for tenant in first["tenants"]:
        path = str(tmp_path / "new" / f"{tenant['name']}.json")
        checked = hetis_plan_here("check", path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        plan = load_plan(path)
        assert plan.result.value == pytest.approx(tenant["rate"])
        assert any("shares the fleet with" in note for note in plan.notes)
        devices += [device for replica in plan.replicas for device in replica.devices()]
    assert len(devices) == len(set(devices))
    assert_plans_know_of_each_other(tmp_path / "new")


def test_shares_of_oef_are_shown_at_the_rates_that_they_reach(tmp_path: Path) -> None:
    asked = ("share", written(tmp_path), "-c", FLEET, "--oef", "--no-others")
    shown = invoke(*asked).stdout
    assert "OEF: shares by one speed-up per GPU type" in shown
    assert max(map(len, shown.splitlines())) <= 80
    document = json.loads(invoke(*asked, "-o", "json").stdout)
    assert [one["rule"] for one in document["oef"]] == ["oef-cooperative", "oef-non-cooperative"]
    gpus = {"H100-SXM-80GB x2": 2, "L4 x4": 8}
    for one in document["oef"]:
        assert one["value"] == pytest.approx(sum(tenant["normalised"] for tenant in one["tenants"]))
        for gpu, count in gpus.items():
            assert sum(tenant["shares"][gpu] for tenant in one["tenants"]) <= count * (1 + 1e-9)


def assert_plans_know_of_each_other(folder: Path) -> None:
    """Assert that no view of a tenant's plan calls the other's GPUs idle, or takes the bound alone for a gap."""
    plans = {name: load_plan(str(folder / f"{name}.json")) for name in ("chat", "drafts")}
    held = {name: tuple(d for one in plan.replicas for d in one.devices()) for name, plan in plans.items()}
    for name, other in (("chat", "drafts"), ("drafts", "chat")):
        plan, path = plans[name], str(folder / f"{name}.json")
        assert plan.other_tenants() == {other: held[other]}
        free = sum(price.available for price in plan.prices) - sum(map(len, held.values()))
        shown = invoke("explain", path)
        assert f"; {len(held[other])} held by other tenants, {free} idle" in " ".join(shown.stdout.split())
        assert "no plan of the family is over" not in shown.stdout
        assert "with the whole fleet to itself" in shown.stdout
        explained = json.loads(invoke("explain", path, "-o", "json").stdout)
        assert sum(idle["count"] for idle in explained["idle"]) == free
    page = folder / "page.html"
    result = invoke("report", *(str(folder / f"{name}.json") for name in plans), "--out", str(page))
    assert result.exit_code == 0, result.output
    assert f"{len(held['chat'])} held by other tenants" in page.read_text()
    assert "of chat" in page.read_text()
    assert page.read_text().count(" with the fleet to itself") == len(plans)


def test_only_what_is_asked_for_is_computed(tmp_path: Path) -> None:
    result = invoke("share", written(tmp_path), "-c", FLEET, "--no-others", "-q", "-o", "json")
    answer = json.loads(result.stdout)
    assert [rule["rule"] for rule in answer["rules"]] == ["max-min"]


def test_plans_of_tenants_keep_what_was_asked_of_them(tmp_path: Path) -> None:
    """Requests of one output token have no TPOT: its limit is not in the plan's objective, but it was asked for."""
    text = TWO.replace("2000/200", "2000/1")
    asked = ["--no-others", "-q", "--out", str(tmp_path / "new")]
    assert invoke("share", written(tmp_path, text), "-c", FLEET, *asked).exit_code == 0
    chat, drafts = (load_plan(str(tmp_path / "new" / f"{name}.json")) for name in ("chat", "drafts"))
    assert "asked" not in chat.inputs
    assert drafts.objective.tpot_limit_s is None
    assert drafts.inputs["asked"] == {"tpot_limit_s": 0.05}
    assert Requested.of(drafts).objective(drafts.objective).tpot_limit_s == 0.05
    assert ONE_TOKEN in drafts.notes
    assert invoke("check", str(tmp_path / "new" / "drafts.json")).exit_code == 0


def test_the_rules_of_the_command_line_are_those_of_the_solver() -> None:
    assert list(get_args(ShareRule)) == [rule.value for rule in TenantRule]


def test_unknown_models_and_workloads_of_all_tenants_are_told_at_once(tmp_path: Path) -> None:
    text = TWO.replace("Llama-3.1-8B", "Llama-3.1-8").replace("2000/200", "no/where")
    run = hetis_plan_here("share", written(tmp_path, text), "-c", FLEET)
    assert run.returncode == 2
    assert "tenants.yaml:4: tenants[0].model: tenant chat: unknown model 'Llama-3.1-8'" in run.stderr
    assert "tenants.yaml:5: tenants[1].workload: tenant drafts: unknown workload 'no/where'" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_tenant_that_fits_nowhere_makes_the_fleet_infeasible_by_name(tmp_path: Path) -> None:
    cluster = tmp_path / "small.yaml"
    cluster.write_text(
        "apiVersion: hetis/v1\nkind: Cluster\nname: small\nnodes: [{name: a, gpus: [{type: L4, count: 1}]}]\n"
        "network: {bandwidth: 10Gbps, latency: 20us}\n"
    )
    text = TWO.replace("Llama-2-7B", "Llama-2-70B")
    run = hetis_plan_here("share", written(tmp_path, text), "-c", str(cluster))
    assert run.returncode == 3, run.stderr
    assert "tenant drafts can be served by no replica on this fleet, even alone" in run.stderr
    assert "weights" in run.stderr  # with the reasons that a separate placement gives


def test_a_strategy_without_a_family_is_refused(tmp_path: Path) -> None:
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "--strategy", "uniform")
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "hetis, hexgen or hexgen2" in run.stderr


def test_a_folder_that_is_missing_is_said_before_the_search(tmp_path: Path) -> None:
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "--out", str(tmp_path / "nowhere" / "deeper"))
    assert run.returncode == 2
    assert "no folder" in run.stderr
    assert "alone on the whole fleet" not in run.stderr


def test_a_dry_run_creates_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "plans"
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "--out", str(out), "--dry-run")
    assert run.returncode == 0, run.stderr
    assert not out.exists()
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "--out", "-", "--dry-run")
    assert run.returncode == 2
    assert "--out needs a folder" in run.stderr


def test_a_time_limit_that_is_too_short_is_no_plan(tmp_path: Path) -> None:
    run = hetis_plan_here("share", written(tmp_path), "-c", FLEET, "--time-limit", "1us")
    assert run.returncode == 4, run.stderr
    assert "allow more time" in run.stderr
