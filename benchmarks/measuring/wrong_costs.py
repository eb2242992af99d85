"""Dispatch with wrong coefficients: head groups are placed by wrong costs and timed by the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import load_model
from hetis.profiler.roofline import modelled_profile
from hetis.solver.dispatch.problem import (
    DeviceLoad,
    DispatchProblem,
    HeadShape,
    IntArray,
    Primary,
    Requests,
    Stage,
)
from hetis.solver.dispatch.solve import solve_dispatch
from hetis.solver.dispatch.tables import costs_of, empty_placement, makespan, running_load
from hetis.solver.profile import Op

MODEL = "Llama-2-70B"
LINK_BYTES_PER_S, LINK_S = 12.5e9, 4e-5  # 100 Gb/s; round trip
PLENTY = 10**7  # KV blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """A stage: a primary of ``tp`` cards, and attention workers by GPU type."""

    primary: str
    tp: int
    workers: Sequence[str]


def stage_of(cards: Cards) -> Stage:
    """Return an idle stage of catalogue GPUs on a 100 Gb/s network, with modelled costs."""
    model = load_model(MODEL)
    heads = HeadShape.of_model(model)
    names = [cards.primary, *cards.workers]
    flops_per_byte = model.decode_attention_flops(1.0, heads.queries_per_group) / heads.kv_bytes_per_token
    pieces, hops = [], []
    for name in names:
        profile = modelled_profile(find_gpu(name).gpu)
        attention, transfer = profile.fit(Op.DECODE_ATTENTION, model, 1), profile.fit(Op.TRANSFER, model, 1)
        assert attention is not None
        assert transfer is not None
        piece, hop = attention.pieces[0], transfer.pieces[0]
        pieces.append((piece.head_s, piece.byte_s + piece.flop_s * flops_per_byte, piece.fixed_s))
        hops.append((hop.byte_s + hop.wire / LINK_BYTES_PER_S, hop.fixed_s + LINK_S))
    attention_costs, exchange_costs = np.array(pieces), np.array(hops)
    return Stage(
        heads=heads,
        devices=tuple(f"{name} {number}" for number, name in enumerate(names)),
        head_s=attention_costs[:, :1],
        kv_byte_s=attention_costs[:, 1:2],
        call_s=attention_costs[:, 2:],
        transfer_byte_s=exchange_costs[:, 0],
        transfer_s=exchange_costs[:, 1],
        primary=Primary(
            device=0, tp=cards.tp, nic_byte_s=float(exchange_costs[0, 0]), nic_s=float(exchange_costs[0, 1])
        ),
    )


def wrong_stage(stage: Stage, error: float, rng: np.random.Generator) -> Stage:
    """Multiply every coefficient of every GPU type by a separate factor between ``1 - error`` and ``1 + error``."""
    types = [name.split()[0] for name in stage.devices]
    factors = {name: rng.uniform(1.0 - error, 1.0 + error, 5) for name in dict.fromkeys(types)}
    by = np.array([factors[name] for name in types])
    return replace(
        stage,
        head_s=stage.head_s * by[:, :1],
        kv_byte_s=stage.kv_byte_s * by[:, 1:2],
        call_s=stage.call_s * by[:, 2:3],
        transfer_byte_s=stage.transfer_byte_s * by[:, 3],
        transfer_s=stage.transfer_s * by[:, 4],
    )


def batch(rng: np.random.Generator, size: int) -> Requests:
    """Return requests like those of a chat service: about 1,500 tokens on average, with a long tail."""
    return Requests(
        ids=tuple(f"r{j}" for j in range(size)),
        context_tokens=np.clip(rng.lognormal(6.7, 1.1, size), 16, 30_000).astype(np.int64),
        growth_tokens=np.full(size, 200),
    )


def slowdown(right: Stage, wrong: Stage, requests: Requests) -> tuple[float, bool]:
    """Return how much longer a layer's attention takes when placed by ``wrong``, and whether the placement differs."""
    num = right.num_devices
    idle = DeviceLoad(heads=np.zeros(num, np.int64), kv_bytes=np.zeros(num), free_blocks=np.full(num, PLENTY))
    best, taken = (
        solve_dispatch(DispatchProblem(stage=stage, load=idle, requests=requests)).groups for stage in (right, wrong)
    )
    loss = seconds_of(right, taken, requests) / seconds_of(right, best, requests) - 1.0
    return loss, not np.array_equal(best, taken)


def seconds_of(stage: Stage, groups: IntArray, requests: Requests) -> float:
    """Return the seconds of the slowest device if ``groups`` [J, D] were running there."""
    heads = groups.sum(axis=0) * stage.heads.queries_per_group
    kv_bytes = (requests.context_tokens @ groups).astype(np.float64) * stage.heads.kv_bytes_per_token
    costs = costs_of(stage)
    loaded, nothing = running_load(costs, heads, kv_bytes), np.zeros(0, np.int64)
    return float(makespan(loaded, empty_placement(loaded, np.zeros(stage.num_devices, np.int64), nothing, nothing)))
