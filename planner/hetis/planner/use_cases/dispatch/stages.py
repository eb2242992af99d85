"""A stage with its costs: from a state file or a plan, with new requests, and the times of its devices by cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from hetis.formats import catalogue
from hetis.formats.dispatch.dispatch_state import load_state
from hetis.formats.dispatch.new_requests import NewRequestPart, NewRequests, load_requests, requests_from_words
from hetis.formats.dispatch.saved_state import (
    AttentionPiece,
    HeadsPart,
    Pieces,
    SavedDevice,
    SavedState,
    blocks_in,
)
from hetis.formats.errors import DocumentError, Problem, attempt, did_you_mean, single_problem
from hetis.formats.fields import mapping
from hetis.planner.use_cases.grouping import abbreviate
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.saved_plans import PlanAndProblem, load_plan_and_problem
from hetis.planner.use_cases.sources import impossible_profiles, load_profiles
from hetis.profiler.defaults import default_profile
from hetis.solver.cluster import Link
from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, IntArray, Stage
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.profile import Fit, FitScope, Op, Profile

# --- times of every device by cause, for reports and explanations


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """Seconds per layer and decode step of a device, on the slowest affine piece; all 0 if it holds no heads.

    ``heads_s`` is for query heads and their exchange with the primary, ``kv_s`` for reading KV, ``call_s`` for the
    fixed cost of calls and exchanges.
    """

    heads: int
    kv_bytes: float
    call_s: float
    heads_s: float
    kv_s: float

    @property
    def seconds(self) -> float:
        return self.call_s + self.heads_s + self.kv_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The times of every device, and of the primary's network card, which is 0 while no worker holds heads."""

    devices: tuple[DeviceTime, ...]
    card_s: float

    @property
    def makespan_s(self) -> float:
        return max([self.card_s, *(device.seconds for device in self.devices)])

    @property
    def bottleneck(self) -> int | None:
        """The index of the slowest device, or None if that is the network card or nothing runs."""
        seconds = [device.seconds for device in self.devices]
        slowest = max(range(len(seconds)), key=lambda i: seconds[i])
        return slowest if seconds[slowest] >= self.card_s and seconds[slowest] > 0 else None


def stage_times(stage: Stage, heads: IntArray, kv_bytes: FloatArray) -> StepTimes:
    """Return the times under a load: query heads and KV bytes read per layer on each device, shape [D]."""
    from hetis.solver.dispatch.loaded_stage import costs_of

    costs = costs_of(stage)
    parts = np.stack([costs.call_s, costs.head_s * heads[:, None], costs.byte_s * kv_bytes[:, None]])  # [3, D, K]
    slowest = parts.sum(axis=0).argmax(axis=1)
    devices = []
    for i, k in enumerate(slowest):
        call_s, heads_s, kv_s = (float(part) if heads[i] else 0.0 for part in parts[:, i, k])
        devices.append(
            DeviceTime(heads=int(heads[i]), kv_bytes=float(kv_bytes[i]), call_s=call_s, heads_s=heads_s, kv_s=kv_s)
        )
    on_workers = int(heads.sum()) - (int(heads[costs.primary]) if costs.primary >= 0 else 0)
    card_s = costs.nic_s + costs.nic_head_s * on_workers if costs.primary >= 0 and on_workers else 0.0
    return StepTimes(devices=tuple(devices), card_s=card_s)


def times_of(snapshot: StateSnapshot, *, arrived: bool = False) -> StepTimes:
    """Return the times of the running requests; with ``arrived``, moving head groups count at their targets."""
    groups = arrived_groups(snapshot) if arrived else snapshot.groups
    heads = snapshot.stage.heads
    kv_bytes = (snapshot.context_tokens @ groups).astype(np.float64) * heads.kv_bytes_per_token
    return stage_times(snapshot.stage, groups.sum(axis=0) * heads.queries_per_group, kv_bytes)


def arrived_groups(snapshot: StateSnapshot) -> IntArray:
    """Return the head groups of each request on each device after all moves in progress, shape [N, D]."""
    groups = snapshot.groups + snapshot.incoming()
    index = {name: j for j, name in enumerate(snapshot.ids)}
    for move in snapshot.moves:
        groups[index[move.request], move.source] -= move.groups
    return groups


def expected_blocks(snapshot: StateSnapshot) -> IntArray:
    """Return the KV blocks per layer on each device once its requests have all their expected tokens, shape [D]."""
    blocks: IntArray = snapshot.expected_blocks() @ (snapshot.groups + snapshot.incoming())
    return blocks


# --- inputs: a DispatchState file, the costs of the GPU types it names, and new requests


GIVEN = "given"  # costs are in the state file


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedStage:
    """A stage with known costs: its name in messages, its state as saved, and its state for the solver.

    ``origins`` are those of each device's costs: `GIVEN`, `MODELLED`, or the file of a profile.
    ``model`` is None if only its heads are known.
    """

    file: str
    saved: SavedState
    snapshot: StateSnapshot
    origins: Mapping[str, str]
    model: ModelSpec | None = None


def load_stage(path: str, *, profiles: Sequence[str] = ()) -> CostedStage:
    """Read a state. GPU types without a profile file get a modelled profile.

    Raises:
        DocumentError: contains the problems of all files.
        InvalidProblemError: a GPU type has no profile and none can be modelled.
    """
    problems: list[Problem] = []
    saved = attempt(partial(load_state, path), problems)
    measured = load_profiles(profiles, problems)
    if saved is not None:
        used = {device.gpu for device in saved.devices if device.gpu is not None and device.attention is None}
        problems += [
            Problem(
                file=file, path="gpu", message=f"no device of {path} needs a profile of {gpu}{did_you_mean(gpu, used)}"
            )
            for gpu, (file, _) in measured.items()
            if gpu not in used
        ]
        problems += impossible_profiles(measured, catalogue.gpu_types())
    if problems or saved is None:
        raise DocumentError(problems)
    return with_costs(saved, path, measured)


def with_costs(saved: SavedState, file: str, measured: Mapping[str, tuple[str, Profile]]) -> CostedStage:
    """Add the costs of the GPU types to a state. ``measured``: file and profile by GPU type.

    Raises:
        InvalidProblemError: a GPU type has no profile and none can be modelled.
    """
    costs, origins = dict[str, Pieces](), dict[str, str]()
    for device in saved.devices:
        if device.attention is not None or device.gpu is None:
            origins[device.name] = GIVEN
            continue
        origin, profile = measured.get(device.gpu) or default_profile(catalogue.find_gpu(device.gpu).gpu)
        origins[device.name] = origin
        costs[device.name] = _pieces_of(saved, device, profile)
    model = None if saved.model is None else catalogue.find_model(saved.model).model
    return CostedStage(file=file, saved=saved, snapshot=saved.snapshot(costs), origins=origins, model=model)


def attention_pieces(fit: Fit, heads: HeadShape, *, group_flops: float, tp: int) -> Pieces:
    """Return the pieces of decode attention, per query head, per KV byte and per call, on one of ``tp`` cards.

    FLOPs grow with the KV that is read: ``group_flops`` is their number for one head group per token of context.
    """
    # If there are more cards than head groups, the cards that hold a group share its query heads.
    flops_per_byte = group_flops / heads.kv_bytes_per_token / max(1, tp // heads.head_groups)
    return tuple(
        AttentionPiece(
            head_s=piece.head_s, kv_byte_s=piece.byte_s + piece.flop_s * flops_per_byte, call_s=piece.fixed_s
        )
        for piece in fit.pieces
    )


def load_new_requests(stage: CostedStage, *, file: str | None, words: Sequence[str]) -> NewRequests:
    """Return the requests in a file, followed by those specified as ``CONTEXT/OUTPUT``.

    Raises:
        DocumentError: contains every problem, including requests that are already running, and those that are longer
            than the model's context.
    """
    problems: list[Problem] = []
    listed = attempt(partial(load_requests, file), problems) if file is not None else None
    first = () if listed is None else listed.requests
    taken = {*stage.snapshot.ids, *(request.id for request in first)}
    spoken = attempt(lambda: requests_from_words(words, taken), problems)
    problems += _impossible(stage, first, str(file))
    problems += _impossible(stage, () if spoken is None else spoken.requests, "--request")
    if problems or spoken is None:
        raise DocumentError(problems)
    return NewRequests(requests=(*first, *spoken.requests))


def require_new(stage: CostedStage, requests: NewRequests, file: str) -> None:
    """Raise DocumentError, with every problem, if requests run already or are longer than the model's context."""
    if problems := list(_impossible(stage, requests.requests, file)):
        raise DocumentError(problems)


def _impossible(stage: CostedStage, requests: Sequence[NewRequestPart], file: str) -> Iterator[Problem]:
    """Yield a problem for every request that runs already, or that no engine of the stage's model would accept."""
    running, model = set(stage.snapshot.ids), stage.model
    for j, request in enumerate(requests):
        if request.id in running:
            yield Problem(file=file, path=f"requests[{j}].id", message=f"request {request.id!r} is running already")
    for request in requests:
        tokens = request.context_tokens + request.output_tokens
        if model is not None and tokens > model.max_position:
            yield Problem(
                file=file,
                message=f"request {request.id!r} has {tokens:,} tokens with its output, "
                f"and the context of {model.name} has {model.max_position:,}",
            )


def _pieces_of(saved: SavedState, device: SavedDevice, profile: Profile) -> Pieces:
    flops = saved.group_flops_per_token
    if flops is None or saved.heads.kv_bytes_per_token <= 0:
        raise InvalidProblemError(
            f"{device.name}: {device.gpu} cannot be modelled because the size of the heads is unknown"
        )
    if saved.model is not None:
        fit = profile.fit(Op.DECODE_ATTENTION, catalogue.find_model(saved.model).model, device.tp)
    else:
        fits = (fit for fit in profile.fits if fit.op is Op.DECODE_ATTENTION and fit.scope == FitScope())
        fit = next(fits, None)
    if fit is None:
        raise InvalidProblemError(f"the profile of {profile.gpu} has no decode attention for these heads")
    return attention_pieces(fit, saved.heads, group_flops=flops, tp=device.tp)


# --- a stage of a placement plan as an empty state


def load_stage_of_plan(path: str, *, replica: int, stage: int) -> CostedStage:
    """Return the first copy of a stage, with nothing running.

    Attention costs, links and KV memory are those with which the plan was made. KV memory is the share of one
    micro-batch: dispatch handles one, and a copy of the stage holds the KV of several. Replicas are counted from 0, as
    plans number them, and stages from 1, as plans draw them.

    Raises:
        DocumentError: the plan is not usable, has no such replica or stage, or the replica decodes nothing.
        InvalidProblemError: the plan contradicts its inputs.
    """
    found = load_plan_and_problem(path)
    replicas = found.plan.replicas
    if replica >= len(replicas):
        raise single_problem(path, f"has no replica {replica}: its replicas are 0 to {len(replicas) - 1}")
    if replicas[replica].role is Role.PREFILL:
        raise single_problem(
            path, f"replica {replica} is a prefill replica, which does not decode, so there is nothing to dispatch"
        )
    num_stages = len(replicas[replica].stages)
    if not 1 <= stage <= num_stages:
        raise single_problem(path, f"replica {replica} has no stage {stage}: its stages are 1 to {num_stages}")
    loaded = with_costs(state_of_stage(found, replica, stage - 1), path, {})
    known = mapping(MadeFrom.of(found.plan).origins.get("profiles"))
    origins = {device.name: str(known.get(device.gpu or "", GIVEN)) for device in loaded.saved.devices}
    return replace(loaded, model=found.problem.model, origins=origins)


def state_of_stage(found: PlanAndProblem, number: int, position: int) -> SavedState:
    """Return the state of a stage as `load_stage_of_plan` does, from a loaded plan; ``position`` is counted from 0.

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
    flops, heads = model.decode_attention_flops(1.0, model.queries_per_group), HeadShape.of_model(model)

    def device(name: str, role: Literal["primary", "worker"], gpu: str, tp: int = 1) -> SavedDevice:
        byte_s, seconds = 0.0, 0.0
        if shape.pool is not None:
            byte_s, seconds = _exchange(problem.profiles[gpu], model, tp, shape.pool.link)
        own = room["primary" if role == "primary" else "attention worker"]
        fit = problem.profiles[gpu].fit(Op.DECODE_ATTENTION, model, tp)
        assert fit is not None, "Profile guarantees a fit for decode attention"
        return SavedDevice(
            name=name, role=role, tp=tp, gpu=gpu, link_byte_s=byte_s, link_s=seconds,
            attention=attention_pieces(fit, heads, group_flops=flops, tp=tp),
            total_blocks=blocks_in(tp * own, heads=heads, num_layers=num_layers, tp=tp),
        )  # fmt: skip

    devices = [device(abbreviate(stage.devices[: stage.tp]), "primary", stage.gpu, stage.tp)]
    for pool in one.attention_workers:
        if pool.stage == position:
            own = pool.devices[: len(pool.devices) // stage.copies]
            devices += [device(name, "worker", pool.gpu) for name in own]
    name = f"{model.name}, replica {number}, stage {position + 1}"[:200]
    inline = HeadsPart(
        groups=heads.head_groups,
        queries_per_group=heads.queries_per_group,
        kv_bytes_per_token=heads.kv_bytes_per_token,
        exchange_bytes_per_head=heads.exchange_bytes_per_head,
    )
    return SavedState(name=name, inline=inline, num_layers=num_layers, devices=tuple(devices))


def _exchange(profile: Profile, model: ModelSpec, tp: int, link: Link) -> tuple[float, float]:
    """Return the seconds per byte and per exchange over a link, as in the cost model of placement."""
    fit = profile.fit(Op.TRANSFER, model, tp)
    assert fit is not None, "Profile guarantees a fit for transfers"
    byte_s = max(piece.byte_s + piece.wire / link.bytes_per_s for piece in fit.pieces)
    return byte_s, max(piece.fixed_s for piece in fit.pieces) + 2.0 * link.latency_s
