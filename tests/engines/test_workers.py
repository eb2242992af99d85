"""Attention workers are planned only beside models for which the plugin accepts them."""

from __future__ import annotations

import pytest

from hetis.engines.errors import LayoutError
from hetis.engines.layout import layout_of
from hetis.engines.workers import CHUNKS, SINKS, why_no_workers
from hetis.formats import catalogue
from hetis.solver.model import DraftShape, ModelSpec
from tests.engines.plans import MODEL, POOL, plan_of, stage_of
from tests.models import replace, shape_of

KEPT_WINDOWS = replace(MODEL, sliding_window=64, sliding_layers=3, windows_free_kv=False)
LLAMA_4 = replace(KEPT_WINDOWS, moe=shape_of(num_experts=4, active_experts=1, expert_intermediate=64, shared_experts=1))


def test_of_the_catalogue_only_llama_4_attends_to_chunks_and_only_gpt_oss_has_sinks() -> None:
    found = {entry.model.name: why_no_workers(entry.model) or "" for entry in catalogue.models()}
    assert {name for name, why in found.items() if CHUNKS in why} == {
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    }
    assert {name for name, why in found.items() if SINKS in why} == {"openai/gpt-oss-20b", "openai/gpt-oss-120b"}
    assert found["meta-llama/Llama-2-70b-hf"] == ""


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (LLAMA_4, f"the model {CHUNKS}"),
        (replace(KEPT_WINDOWS, sliding_window=128), f"the model has {SINKS}"),
        (replace(MODEL, draft=DraftShape(tokens=1, acceptance=0.5)), "the plugin does not support draft tokens"),
    ],
)
def test_a_replica_with_workers_that_the_plugin_refuses_is_not_started(model: ModelSpec, why: str) -> None:
    plan = plan_of(stage_of(), pools=(POOL,))
    with pytest.raises(LayoutError, match=f"it has attention workers, which tiny cannot have: {why}"):
        layout_of(plan, 0, model)
    assert layout_of(plan, 0, KEPT_WINDOWS).workers
    assert not layout_of(plan_of(stage_of(kv_head_groups_kept=8)), 0, model).workers
