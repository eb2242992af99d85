"""A stage of a placement plan as an empty state for dispatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hetis.formats import catalogue
from hetis.formats.errors import single_problem
from hetis.formats.saved_state import AttentionPiece, InlineHeads, SavedDevice, SavedState, blocks_in
from hetis.planner.use_cases.grouping import abbreviate
from hetis.planner.use_cases.sources import PlanAndProblem, load_plan_and_problem
from hetis.planner.use_cases.stage_sources import LoadedStage, attention_pieces, with_costs
from hetis.profiler.defaults import default_profile
from hetis.solver.cluster import Link
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.profile import Fit, Op, Profile


def load_stage_of_plan(path: str, *, replica: int, stage: int) -> LoadedStage:
    """Return the first copy of a stage, with nothing running.

    Attention costs, links and KV memory are those that the plan was made with. KV memory is the share of one
    micro-batch: dispatch handles one, and a copy of the stage holds the KV of several.

    Args:
        path: the plan's file.
        replica: counted from 0, as plans number them.
        stage: counted from 1, as plans draw them.

    Raises:
        DocumentError: the plan is not usable, has no such replica or stage, or the replica decodes nothing.
        InvalidProblemError: the plan contradicts its inputs.
    """
    found = load_plan_and_problem(path)
    replicas = found.plan.replicas
    if replica >= len(replicas):
        raise single_problem(path, f"has no replica {replica}, its {len(replicas)} replicas are counted from 0")
    if replicas[replica].role is Role.PREFILL:
        raise single_problem(
            path, f"replica {replica} is a prefill replica: it decodes nothing, so nothing is dispatched"
        )
    num_stages = len(replicas[replica].stages)
    if not 1 <= stage <= num_stages:
        raise single_problem(path, f"replica {replica} has no stage {stage}, its {num_stages} are counted from 1")
    return with_costs(state_of_stage(found, replica, stage - 1), path, {})


def state_of_stage(found: PlanAndProblem, number: int, position: int) -> SavedState:
    """Return the state of a stage as `load_stage_of_plan`, from a loaded plan; ``position`` is counted from 0.

    Raises:
        InvalidProblemError: the plan contradicts its inputs.
    """
    from hetis.solver.placement.explanation.replica_view import replica_views

    plan, problem = found.plan, found.problem
    one, model = plan.replicas[number], problem.model
    view = replica_views(replace(plan, replicas=(one,)), problem)[0]
    stage, shape = one.stages[position], view.shape.stages[position]
    num_layers = view.layers(position)
    micro_batches = -(-one.in_flight // stage.copies)
    room = {
        bar.role: max(0, bar.kv_bytes + bar.free_bytes) // micro_batches
        for bar in view.memory()
        if bar.stage == position
    }
    empty = _empty_stage(f"{model.name}, replica {number}, stage {position + 1}", model, num_layers)

    def blocks(role: str, tp: int) -> int:
        return blocks_in(tp * room[role], heads=empty.heads, num_layers=num_layers, tp=tp)

    link = (0.0, 0.0)
    if shape.pool is not None:
        link = _exchange(problem.profiles[stage.gpu], model, stage.tp, shape.pool.link)
    devices = [
        SavedDevice(
            name=abbreviate(stage.devices[: stage.tp]),
            role="primary",
            tp=stage.tp,
            gpu=stage.gpu,
            link_byte_s=link[0],
            link_s=link[1],
            total_blocks=blocks("primary", stage.tp),
        )
    ]
    for pool in one.attention_workers:
        if pool.stage == position and shape.pool is not None:
            byte_s, seconds = _exchange(problem.profiles[pool.gpu], model, 1, shape.pool.link)
            devices += [
                SavedDevice(
                    name=name,
                    role="worker",
                    gpu=pool.gpu,
                    link_byte_s=byte_s,
                    link_s=seconds,
                    total_blocks=blocks("attention worker", 1),
                )
                for name in pool.devices[: len(pool.devices) // stage.copies]
            ]
    return _with_given_costs(replace(empty, devices=tuple(devices)), problem.profiles, model)


def _empty_stage(name: str, model: ModelSpec, num_layers: int) -> SavedState:
    """Return a state without devices, with the model's name if the catalogue has the same model, else its sizes."""
    nobody = (SavedDevice(name="none", role="worker", attention=(AttentionPiece(),), total_blocks=0),)
    try:
        if catalogue.find_model(model.name).model == model:
            return SavedState(name=name[:200], model=model.name, num_layers=num_layers, devices=nobody)
    except catalogue.UnknownNameError:
        pass
    inline = InlineHeads(
        groups=model.head_groups,
        queries_per_group=model.queries_per_group,
        kv_bytes_per_token=model.kv_bytes_per_token_group(),
        exchange_bytes_per_head=model.exchange_bytes_per_head(),
    )
    return SavedState(name=name[:200], inline=inline, num_layers=num_layers, devices=nobody)


def _exchange(profile: Profile, model: ModelSpec, tp: int, link: Link) -> tuple[float, float]:
    """Return seconds per byte and per exchange over a link, as in the cost model of placement."""
    fit = profile.fit(Op.TRANSFER, model, tp)
    assert fit is not None, "Profile guarantees a fit for transfers"
    byte_s = max(piece.byte_s + piece.wire / link.bytes_per_s for piece in fit.pieces)
    return byte_s, max(piece.fixed_s for piece in fit.pieces) + 2.0 * link.latency_s


def _with_given_costs(saved: SavedState, profiles: Mapping[str, Profile], model: ModelSpec) -> SavedState:
    """Store the costs of GPU types that the catalogue would not reproduce."""
    flops = model.decode_attention_flops(1.0, model.queries_per_group)

    def device(one: SavedDevice) -> SavedDevice:
        assert one.gpu is not None
        profile = profiles[one.gpu]
        fit = profile.fit(Op.DECODE_ATTENTION, model, one.tp)
        if saved.model is not None and fit == _default_fit(profile.gpu, model, one.tp):
            return one
        assert fit is not None, "Profile guarantees a fit for decode attention"
        pieces = attention_pieces(fit, saved.heads, group_flops=flops, tp=one.tp)
        return replace(one, gpu=_known(one.gpu), attention=pieces)

    return replace(saved, devices=tuple(map(device, saved.devices)))


def _default_fit(gpu: str, model: ModelSpec, tp: int) -> Fit | None:
    try:
        return default_profile(catalogue.find_gpu(gpu).gpu)[1].fit(Op.DECODE_ATTENTION, model, tp)
    except (catalogue.UnknownNameError, InvalidProblemError):
        return None


def _known(gpu: str) -> str | None:
    """Return the name if the catalogue has it: a state file may name no other."""
    try:
        return catalogue.find_gpu(gpu).gpu.name
    except catalogue.UnknownNameError:
        return None
