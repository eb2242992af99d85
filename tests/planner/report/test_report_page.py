"""Pages of HTML: they show the plan, need no network, and are well-formed whatever names are in them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats.documents import load_cluster, load_plan
from hetis.planner.report.alternatives import reason_words, shape_words
from hetis.planner.report.blocks import Waterfalls
from hetis.planner.report.figures import digits
from hetis.planner.report.goals import differences, is_one_question
from hetis.planner.report.page.fleet_map import fleet_map
from hetis.planner.report.page.pages import ShownPlan, plans_page
from hetis.planner.report.page.plan_section import plan_blocks
from hetis.planner.use_cases.comparing.plan_figures import figures_of
from hetis.planner.use_cases.saved_plans import inputs_from_documents, load_plan_and_problem
from hetis.solver.cluster import Link
from hetis.solver.constraints import Exclude, Selection, Unit
from hetis.solver.engine_rules import EngineRules, EngineSettings
from hetis.solver.placement.explanation.facts import Explanation, IdleGpus
from tests.fleets import fleet
from tests.planner import plans
from tests.planner.command_line import EXAMPLES, hetis_plan_here, invoke
from tests.planner.html_pages import ReadPage

CLUSTER = fleet("two-types", "a100: 2 A100-PCIe-80GB", "2 t4: 1 T4")
INPUTS = ("-c", "cluster.yaml", "-m", "Llama-2-7B", "-w", "500/100", "--time-limit", "60s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster, its plan and the page that `place` made beside it."""
    path = tmp_path_factory.mktemp("pages")
    (path / "cluster.yaml").write_text(CLUSTER)
    done = hetis_plan_here("place", *INPUTS, "--out", "plan.json", "--html", "placed.html", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def whole(page: str) -> ReadPage:
    """Return the page, which is well-formed and fetches nothing."""
    read = ReadPage(page)
    assert len(set(read.names)) == len(read.names), "a name is used twice"
    assert all(address.startswith(("#", "data:,")) for address in read.addresses), read.addresses
    assert "url(" not in page
    assert "@import" not in page
    return read


def test_a_page_says_what_the_plan_says(folder: Path) -> None:
    text = whole((folder / "placed.html").read_text()).text
    plan = load_plan(str(folder / "plan.json"))
    figures = figures_of(plan, inputs_from_documents(plan.inputs["documents"], "plan.json"))
    assert figures.usd_per_hour is not None
    assert figures.usd_per_million_output_tokens is not None
    for figure in (
        figures.rate_rps, figures.output_tokens_per_s, figures.usd_per_hour, figures.usd_per_million_output_tokens,
        plan.inputs["equal_stages_value"],
    ):  # fmt: skip
        assert digits(figure) in text, figure
    assert f"{digits(plan.result.bound, 4)} requests/s" in text
    assert "limits kept" in text
    for price in plan.prices:
        assert price.gpu in text
    for note in plan.notes:
        assert note in text


def test_report_makes_the_page_that_place_makes(folder: Path) -> None:
    done = hetis_plan_here("report", "plan.json", "--out", "-", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "placed.html").read_text()


def test_plans_are_compared_before_each_is_shown(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["result"]["value"] /= 2
    (folder / "worse.json").write_text(json.dumps(plan))
    done = hetis_plan_here("report", "plan.json", "worse.json", "--out", "-", cwd=folder)
    assert done.returncode == 0, done.stderr
    read = whole(done.stdout)
    assert read.text.index("Side by side") < read.text.index("How good it is")
    assert {"plan-1", "plan-2", "beside"} <= set(read.names)


def test_plans_that_answer_different_questions_are_not_ranked(folder: Path) -> None:
    """Under laxer limits, a worse plan serves more; the limits are beside the latencies and the rest is in words."""
    found = load_plan_and_problem(str(folder / "plan.json"))
    objective = replace(found.plan.objective, ttft_limit_s=0.7, tpot_limit_s=None)
    other = replace(found.problem, objective=objective, workload=replace(found.problem.workload, name="night"))
    strict = ShownPlan(name="strict", plan=replace(found.plan, objective=objective), problem=other)
    page = plans_page([ShownPlan(name="lax", plan=found.plan, problem=found.problem), strict])
    text = whole(page).text
    assert "The plans differ in latency limits and workload, so none is marked as the best." in text
    assert "TTFT s TTFT limit TPOT ms TPOT limit" in text
    assert "700 ms" in text
    assert (
        "Latency limits TTFT p95 up to 2 s, TPOT up to 100 ms: lax; TTFT p95 up to 0.7 s, TPOT unlimited: strict"
        in text
    )
    assert "Workload 500/100: lax; night: strict" in text
    beside = page[: page.index('id="plan-1"')]
    assert 'class="strong"' not in beside
    assert "by the model, requests/s" in beside


def test_differences_of_problems_are_found_wherever_they_are(folder: Path) -> None:
    same = load_plan_and_problem(str(folder / "plan.json")).problem
    assert differences([("a", same), ("b", same)]) == {}
    family, profiles = same.family, dict(same.profiles)
    profiles["T4"] = replace(profiles["T4"], reserve_bytes=1)
    nodes = same.cluster.node_groups
    others = {
        "fleet": replace(same, cluster=replace(same.cluster, node_groups=nodes[:1])),
        "model": replace(same, model=replace(same.model, name="other")),
        "engine": replace(same, family=replace(family, engine=EngineRules(name="vllm"))),
        "engine settings": replace(same, family=replace(family, engine_settings=EngineSettings(kv_blocks=9))),
        "constraints": replace(same, constraints=(Exclude(gpus=Selection(unit=Unit.NODE, name="t4-0")),)),
        "profiles": replace(same, profiles=profiles),
    }
    for subject, other in others.items():
        found = differences([("a", same), ("b", same), ("c", other)])
        assert found.keys() == {subject}
        assert is_one_question(found) == (subject != "model")
    assert differences([("a", same), ("c", others["fleet"])])["fleet"] == "two-types (4 GPUs): a; two-types (2 GPUs): c"
    speed = replace(same.cluster, network=replace(same.cluster.network, default=Link(bytes_per_s=1e9, latency_s=0.0)))
    fleet = differences([("a", same), ("c", replace(same, cluster=speed))])["fleet"]
    assert fleet == "two-types (4 GPUs): a; two-types (4 GPUs), different in detail: c"


def test_a_change_has_a_page(folder: Path) -> None:
    verb = ("replan", "--from", "plan.json", "-c", "cluster.yaml", "--time-limit", "5s")
    done = hetis_plan_here(*verb, "--html", "page.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "From the running plan" in whole((folder / "page.html").read_text()).text


def test_names_of_documents_cannot_write_html(folder: Path) -> None:
    found = load_plan_and_problem(str(folder / "plan.json"))
    evil = "<script>alert(1)</script>"
    cluster = replace(found.problem.cluster, name=evil)
    plan = replace(found.plan, notes=(evil,))
    page = plans_page([ShownPlan(name=evil, plan=plan, problem=replace(found.problem, cluster=cluster))])
    assert evil not in page
    assert evil in whole(page).text


def test_a_missed_limit_is_said_first(folder: Path) -> None:
    found = load_plan_and_problem(str(folder / "plan.json"))
    missed = {**found.plan.inputs["verification"], "kept": False, "ttft_p95_s": 9.5, "kept_rps": None}
    plan = replace(found.plan, inputs={**found.plan.inputs, "verification": missed, "model_value": 9.0})
    page = plans_page([ShownPlan(name="The plan", plan=plan, problem=found.problem)])
    text = whole(page).text
    assert "MISSED" in text[: text.index("How good it is")]
    assert "TTFT p95 9.5 s of 2 s" in text
    assert 'class="text bad"' in page
    assert "By the model" in text


def test_a_loss_of_more_than_half_is_red_and_rungs_stand_side_by_side(folder: Path) -> None:
    found = load_plan_and_problem(str(folder / "plan.json"))
    rung = {"value": 8.0, "bound": 8.5, "rate_rps": 8.0, "usd_per_hour": 4.0, "gpus": 4, "shapes": 2, "nodes": 1}
    rungs = [
        {**rung, "name": "node", "of": "node", "left_rps": 6.0, "targets": ["vllm", "llm-d"], "is_chosen": True},
        {**rung, "name": "pipelines", "of": "pipelines", "value": 9.0, "rate_rps": 9.0, "left_rps": 1.8, "nodes": 2},
    ]
    for rate, tone in ((0.49, "bad"), (0.51, "")):
        losses = {"node": {"name": "l4-0", "rate": rate, "whole": 1.0}}
        inputs = {**found.plan.inputs, "losses": losses, "rungs": rungs}
        shown = ShownPlan(name="The plan", plan=replace(found.plan, inputs=inputs), problem=found.problem)
        page = plans_page([shown])
        assert re.search(r'After losing any one node</dt>\s*<dd class="value (\w*)">', page)[1] == tone  # type: ignore[index]
        text = whole(page).text
        assert "node, the plan 8.000 8.500 4.00 4 75% 1 2 vllm, llm-d" in text
        assert "pipelines 9.000 8.500 4.00 4 20% 2 2" in text


def test_the_map_shows_every_gpu_with_what_it_does() -> None:
    cluster = load_cluster(str(EXAMPLES / "paper.yaml"))
    plan = plans.plan(plans.paper_replica())
    idle = IdleGpus(gpu="RTX-3090", zone="default", count=4, reason="too slow")
    drawn = fleet_map(
        plan, cluster, Explanation(memory=(), stage_times=(), bottlenecks=(), idle=(idle,), attention_workers="")
    )
    (zone,) = drawn.zones
    nodes = {node.name: node.cells for node in zone.nodes}
    assert list(nodes) == ["a100", "r3090-0", "r3090-1", "p100"]
    assert sum(map(len, nodes.values())) == cluster.num_gpus()
    assert [cell.role for cell in nodes["p100"]] == ["stage", "stage", "worker", "worker"]
    assert [cell.index for cell in nodes["a100"]] == ["0", "1", "2", "3"]
    assert nodes["a100"][0].lines == ("R0 stage 1", "layers 0–51", "TP4, 1 of 2 heads")
    assert nodes["p100"][3].lines == ("R0 stage 1", "attention, 2 cards", "1 of 2 heads")
    assert drawn.idle == (("4 × RTX-3090", "too slow"),)


def test_many_replicas_are_called_by_their_shape() -> None:
    """Equal replicas share the name of their first and a colour; a row of the map has four GPUs, whatever it shows."""
    cluster = load_cluster(str(EXAMPLES / "fleet-160.yaml"))
    equal = [
        plans.replica(plans.stage("A100-SXM-80GB", tp=1, first=0, layers=80, devices=(f"a100-0/{i}",)))
        for i in range(6)
    ]
    other = [
        plans.replica(plans.stage("L4", tp=1, first=0, layers=80, devices=(f"l4-{i}/0",))) for i in range(4)
    ]  # fmt: skip
    explanation = Explanation(memory=(), stage_times=(), bottlenecks=(), idle=(), attention_workers="")
    drawn = fleet_map(plans.plan(*equal, *other), cluster, explanation)
    assert [name for name, _ in drawn.legend] == ["R0: 6 equal replicas", "R6: 4 equal replicas"]
    nodes = {node.name: node.cells for zone in drawn.zones for node in zone.nodes}
    assert [(cell.index, cell.lines[0]) for cell in nodes["a100-0"]] == [
        ("0–3", "R0 stage 1"), ("4–5", "R0 stage 1"), ("6–7", "idle"),
    ]  # fmt: skip


def test_memory_falls_to_what_is_free(folder: Path) -> None:
    """Every step begins where the one before ended, and the last ends with the card."""
    found = load_plan_and_problem(str(folder / "plan.json"))
    blocks = plan_blocks(found.plan, found.problem)
    (memory,) = (block for block in blocks if isinstance(block, Waterfalls))
    assert {fall.title for fall in memory.falls} == {price.gpu for price in found.plan.prices if price.used}
    for fall in memory.falls:
        ends = [step.begin + step.share for step in fall.steps]
        assert [step.begin for step in fall.steps] == pytest.approx([0.0, *ends[:-1]])
        assert ends[-1] == pytest.approx(1.0)
        assert fall.steps[-1].label == "free"


def test_shapes_and_reasons_are_said_in_words() -> None:
    shape = "H100-SXM-80GB TP8 x1 L60 | L4 TP1 x2 L20 (+3 T4 attention workers)"
    assert shape_words(shape) == (
        "60 layers on 8 × H100-SXM-80GB in TP8, then 20 layers on one L4 (2 copies) with 3 T4 as attention workers"
    )
    assert shape_words("H200 TP1 x8 EP8 L58") == "58 layers on one H200 (8 copies that share experts)"
    assert shape_words("L4 TP1 x1 L9 | L4 TP1 x1 L9 | L4 TP1 x1 L8") == (
        "2 stages of 9 layers, each on one L4, then 8 layers on one L4"
    )
    assert shape_words("decode: L4 TP1 x1 L1") == "decode only: 1 layer on one L4"
    assert reason_words("its GPUs are worth 2 requests/s elsewhere", 1.7) == (
        "15% less than the 2.00 requests/s its GPUs serve in the plan"
    )
    assert reason_words("would fit, but", 1.0) == "would fit, but"


def test_a_page_that_cannot_be_is_refused_before_the_work(folder: Path) -> None:
    for arguments, words in (
        (("place", *INPUTS, "--html", "-"), "--html needs a file"),
        (("place", *INPUTS, "--html", "x.html", "--out", "x.html"), "cannot both write to"),
        (("place", *INPUTS, "--html", "nowhere/x.html"), "no folder"),
    ):
        done = hetis_plan_here(*arguments, cwd=folder)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.replace("│", " ").split())


def test_a_plan_whose_figures_are_wrong_is_not_shown_without_a_warning(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["result"]["value"] *= 2
    (folder / "changed.json").write_text(json.dumps(plan))
    for name, is_told in (("plan.json", False), ("changed.json", True)):
        for verb in (("explain",), ("report", "--out", str(folder / "checked.html"))):
            result = invoke(verb[0], str(folder / name), *verb[1:])
            assert result.exit_code == 0
            assert ("does not pass `hetis-plan check`: result: value is" in " ".join(result.stderr.split())) == is_told


def test_out_to_standard_output_prints_the_plan_and_no_table(folder: Path) -> None:
    done = hetis_plan_here("place", *INPUTS, "--no-verify", "--out", "-", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "Plan"
    again = hetis_plan_here("replan", "--from", "plan.json", "-c", "cluster.yaml", "--out", "-", cwd=folder)
    assert json.loads(again.stdout)["kind"] == "Plan"
