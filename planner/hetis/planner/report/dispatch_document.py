"""Dispatch and re-dispatch as JSON values. Devices are given by name; times are seconds per layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hetis.formats.fields import API_VERSION
from hetis.planner.use_cases.dispatch import Dispatched, Redispatched
from hetis.planner.use_cases.stage_sources import LoadedStage
from hetis.planner.use_cases.stage_times import StageTimes, expected_blocks
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.redispatch.problem import Move, Refused


def dispatch_document(found: Dispatched, explanation: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the document of ``kind: Dispatch``."""
    plan, names = found.plan, found.stage.snapshot.stage.devices
    devices = _devices(found.stage, found.before, found.after, found.reached)
    for i, device in enumerate(devices):
        device["new_groups"] = int(plan.groups[:, i].sum())
        device["bound_weight"] = float(plan.prices.piece[i].sum())
        device["block_price_s"] = float(plan.prices.block_s[i])
    return {
        "apiVersion": API_VERSION,
        "kind": "Dispatch",
        "state": _state(found.stage),
        "result": {
            "path": plan.path.value,
            "makespan_before_s": found.before.makespan_s,
            "makespan_s": plan.makespan_s,
            "bound_s": plan.bound_s,
            "gap": _finite(plan.gap),
            "relaxed_s": plan.relaxed_s,
        },
        "requests": [
            {
                "id": request.id,
                "context_tokens": request.context_tokens,
                "output_tokens": request.output_tokens,
                "groups": {names[i]: int(plan.groups[j, i]) for i in np.flatnonzero(plan.groups[j])},
                "group_price_s": _finite(float(plan.prices.request_s[j])),
            }
            for j, request in enumerate(found.requests.requests)
        ],
        "unplaced": [
            {
                "id": one.id,
                "resource": one.resource.value,
                "missing": one.missing,
                "proved": one.proved,
                "message": str(one),
            }
            for one in plan.unplaced
        ],
        "devices": devices,
        "network_card": {
            "before_s": found.before.card_s,
            "after_s": found.after.card_s,
            "bound_weight": plan.prices.nic,
        },
        **_explanation(explanation),
    }


def redispatch_document(found: Redispatched, explanation: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the document of ``kind: Redispatch``."""
    plan, problem, names = found.plan, found.problem, found.stage.snapshot.stage.devices
    return {
        "apiVersion": API_VERSION,
        "kind": "Redispatch",
        "state": _state(found.stage),
        "settings": {
            "budget_bytes": _finite(problem.budget_bytes),
            "least_gain": problem.least_gain,
            "patience": problem.patience,
            "ahead_steps": problem.ahead_steps,
            "refill_token_s": problem.refill_token_s,
        },
        "triggers": [
            {
                "kind": trigger.kind.value,
                "device": trigger.device,
                "value": trigger.value,
                "limit": trigger.limit,
                "message": str(trigger),
            }
            for trigger in found.triggers
        ],
        "result": {
            "makespan_before_s": plan.makespan_before_s,
            "makespan_s": plan.makespan_after_s,
            "short_blocks_before": float(plan.short_before),
            "short_blocks": float(plan.short_after),
            "objective_before_s": float(plan.stay_s),
            "objective_s": float(plan.objective_s),
            "bound_s": float(plan.bound_s),
            "gap": _finite(float(plan.gap)),
            "moved_bytes": plan.num_bytes,
            "move_s": sum(move.seconds for move in plan.moves),
        },
        "moves": [
            _move(move, names)
            | {
                "bytes": move.num_bytes,
                "seconds": move.seconds,
                "payback_steps": move.payback_steps,
                "reason": move.reason.value,
                "wave": move.wave,
                "together": move.together,
            }
            for move in plan.moves
        ],
        "refused": [_move(refused, names) | {"why": refused.why} for refused in plan.refused],
        "devices": _devices(found.stage, found.before, found.after, found.reached),
        "network_card": {"before_s": found.before.card_s, "after_s": found.after.card_s},
        **_explanation(explanation),
    }


def _state(stage: LoadedStage) -> dict[str, Any]:
    return {"name": stage.saved.name, "num_layers": stage.saved.num_layers, "origin": stage.file}


def _devices(
    stage: LoadedStage, before: StageTimes, after: StageTimes, reached: StateSnapshot
) -> list[dict[str, Any]]:  # fmt: skip
    first = stage.snapshot
    used = (first.used_blocks(), reached.used_blocks())
    expected = (expected_blocks(first), expected_blocks(reached))
    return [
        {
            "name": saved.name,
            "role": saved.role,
            "tp": saved.tp,
            "gpu": saved.gpu,
            "costs": stage.origins[saved.name],
            "status": saved.status.value,
            "before_s": before.devices[i].seconds,
            "after_s": after.devices[i].seconds,
            "is_bottleneck": after.bottleneck == i,
            "total_blocks": saved.total_blocks,
            "high_water": saved.high_water,
            "used_blocks_before": int(used[0][i]),
            "used_blocks": int(used[1][i]),
            "expected_blocks_before": int(expected[0][i]),
            "expected_blocks": int(expected[1][i]),
        }
        for i, saved in enumerate(stage.saved.devices)
    ]


def _move(move: Move | Refused, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "request": move.request,
        "groups": move.groups,
        "from": names[move.source],
        "to": names[move.target],
    }


def _explanation(sentences: tuple[str, ...] | None) -> dict[str, Any]:
    return {} if sentences is None else {"explanation": list(sentences)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
