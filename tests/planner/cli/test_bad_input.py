"""Whatever a file holds, the answer is a message and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats.documents import dump
from hetis.planner.cli.app import run
from hetis.planner.use_cases.sources import load_inputs
from tests.planner import plans
from tests.planner.command_line import EXAMPLES

BAD_FILES = sorted(
    path
    for path in (Path(__file__).parents[2] / "bad_input").rglob("*")
    if path.is_file() and path.suffix != ".expected"
)
# Verbs that read plans alone refuse other kinds of files in the same way: every fifth of those is enough.
ABOUT_PLANS = [path for i, path in enumerate(BAD_FILES) if path.name.startswith("plan_") or i % 5 == 0]
LOADED = load_inputs(cluster=str(EXAMPLES / "paper.yaml"), model="Llama-2-70B", workload="1024/256")
GOOD = replace(
    plans.plan(plans.paper_replica()),
    inputs={
        "documents": LOADED.inputs.documents(),
        "digests": LOADED.inputs.digests(),
        "engine": {"name": "vllm-hetis", "max_gpus": None, "max_nodes": None},
    },
)


def messages(*arguments: str) -> tuple[int, str]:
    """Return exit code and stderr of a run in this process."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        code = run(arguments)
    return code, err.getvalue()


@pytest.mark.parametrize("verb", ["check", "explain"])
@pytest.mark.parametrize("path", ABOUT_PLANS, ids=lambda path: path.name)
def test_no_verb_about_plans_stumbles_over_a_broken_file(verb: str, path: Path) -> None:
    code, err = messages(verb, str(path))
    assert code == 2
    assert "internal error" not in err


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_plan_with_one_part_replaced_is_judged_not_crashed_on(data: st.DataObject) -> None:
    document = json.loads(dump(GOOD, "json"))
    path = data.draw(st.sampled_from(_paths(document)))
    _replace(document, path, data.draw(json_values))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        code, err = messages("check", file.name)
    assert code in (0, 2)
    assert "internal error" not in err


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "inputs.documents must hold cluster, model, workload, profiles"),
        ({"documents": "elsewhere"}, "inputs.documents must hold cluster, model, workload, profiles"),
        (
            {"documents": {**LOADED.inputs.documents(), "model": LOADED.inputs.documents()["cluster"]}},
            "inputs.documents.model: is a Cluster, expected a ModelSpec",
        ),
    ],
)
def test_a_plan_without_its_inputs_cannot_be_looked_into(inputs: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(dump(replace(GOOD, inputs=inputs), "json"))
    for verb in ("check", "explain"):
        code, err = messages(verb, str(tmp_path / "plan.json"))
        assert code == 2
        assert message in err


def test_inputs_that_were_changed_after_planning_are_noticed(tmp_path: Path) -> None:
    document = json.loads(dump(GOOD, "json"))
    document["inputs"]["documents"]["model"]["hidden"] *= 2
    (tmp_path / "plan.json").write_text(json.dumps(document))
    _, err = messages("check", str(tmp_path / "plan.json"))
    assert "warning: the inputs saved in the plan differ from those it was made from" in err


def test_a_goal_without_its_demand_names_the_plan(tmp_path: Path) -> None:
    document = json.loads(dump(GOOD, "json"))
    document["objective"]["kind"] = "cost"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    code, err = messages("check", str(tmp_path / "plan.json"))
    assert code == 2
    assert "plan.json: objective cost needs a demanded rate" in err


def _paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Yield every place in a document, except the document itself."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:3]))
    return [path for key, child in items for path in [(*prefix, key), *_paths(child, (*prefix, key))]]


def _replace(document: Any, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value
