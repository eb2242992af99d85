"""The inputs of dispatch: a DispatchState file, the costs of the GPU types it names, and new requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hetis.formats import catalogue
from hetis.formats.dispatch_state import NewRequests, load_requests, load_state, requests_from_words
from hetis.formats.documents import load_profile
from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.formats.saved_state import AttentionPiece, Pieces, SavedDevice, SavedState, catalogue_model
from hetis.planner.use_cases.sources import attempt
from hetis.profiler.defaults import default_profile
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Profile

GIVEN = "given"  # costs from the state file


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStage:
    """A stage with known costs.

    Attributes:
        file: its name in messages.
        saved: the state as in its file.
        snapshot: the state for the solver.
        origins: of the costs of each device: `GIVEN`, `MODELLED`, or the file of a profile.
    """

    file: str
    saved: SavedState
    snapshot: StateSnapshot
    origins: Mapping[str, str]


def load_stage(path: str, *, profiles: Sequence[str] = ()) -> LoadedStage:
    """Read a state; GPU types without a profile file get a modelled one.

    Raises:
        DocumentError: with the problems of all files together.
        InvalidProblemError: a GPU type has no profile and none can be modelled.
    """
    problems: list[Problem] = []
    saved = attempt(partial(load_state, path), problems)
    given = [(file, attempt(partial(load_profile, file), problems)) for file in profiles]
    measured = {profile.gpu: (file, profile) for file, profile in given if profile is not None}
    if saved is not None:
        used = {device.gpu for device in saved.devices if device.gpu is not None and device.attention is None}
        problems += [
            Problem(file=file, path="gpu", message=f"no device of {path} needs {gpu}{did_you_mean(gpu, used)}")
            for gpu, (file, _) in measured.items()
            if gpu not in used
        ]
    if problems or saved is None:
        raise DocumentError(problems)
    return with_costs(saved, path, measured)


def with_costs(saved: SavedState, file: str, measured: Mapping[str, tuple[str, Profile]]) -> LoadedStage:
    """Add the costs of the GPU types in a state. ``measured``: file and profile by GPU type.

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
    return LoadedStage(file=file, saved=saved, snapshot=saved.snapshot(costs), origins=origins)


def attention_pieces(fit: Fit, heads: HeadShape, *, group_flops: float, tp: int) -> Pieces:
    """Return the pieces of decode attention, per query head, per KV byte and per call, on one of ``tp`` cards.

    FLOPs grow with the KV that is read: ``group_flops`` are those of one head group per token of its context.
    """
    # If cards outnumber head groups, the cards that hold a group share its query heads.
    flops_per_byte = group_flops / heads.kv_bytes_per_token / max(1, tp // heads.head_groups)
    return tuple(
        AttentionPiece(
            head_s=piece.head_s, kv_byte_s=piece.byte_s + piece.flop_s * flops_per_byte, call_s=piece.fixed_s
        )
        for piece in fit.pieces
    )


def load_new_requests(stage: LoadedStage, *, file: str | None, words: Sequence[str]) -> NewRequests:
    """Return the requests of a file, then those given as ``CONTEXT/OUTPUT``.

    Raises:
        DocumentError: with every problem, including requests that are running already.
    """
    problems: list[Problem] = []
    running = set(stage.snapshot.ids)
    listed = attempt(partial(load_requests, file), problems) if file is not None else None
    first = () if listed is None else listed.requests
    problems += [
        Problem(file=str(file), path=f"requests[{j}].id", message=f"request {request.id!r} is running already")
        for j, request in enumerate(first)
        if request.id in running
    ]
    taken = running | {request.id for request in first}
    spoken = attempt(lambda: requests_from_words(words, taken), problems)
    if problems or spoken is None:
        raise DocumentError(problems)
    return NewRequests(requests=(*first, *spoken.requests))


def _pieces_of(saved: SavedState, device: SavedDevice, profile: Profile) -> Pieces:
    flops = saved.group_flops_per_token
    if flops is None or saved.heads.kv_bytes_per_token <= 0:
        raise InvalidProblemError(f"{device.name}: {device.gpu} cannot be modelled for heads of unknown size")
    if saved.model is not None:
        fit = profile.fit(Op.DECODE_ATTENTION, catalogue_model(saved.model), device.tp)
    else:
        fits = (fit for fit in profile.fits if fit.op is Op.DECODE_ATTENTION and fit.scope == FitScope())
        fit = next(fits, None)
    if fit is None:
        raise InvalidProblemError(f"the profile of {profile.gpu} has no decode attention for these heads")
    return attention_pieces(fit, saved.heads, group_flops=flops, tp=device.tp)
