"""Plans in a chosen precision: that of the model's weights and KV, and the GPUs on which the engine supports it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from hetis.engines.attention import KV_VENDORS, common_backend
from hetis.engines.gpus import VENDORS, kind_of_type
from hetis.engines.precision import SUPPORT, Refusal, refusal_of, remarks
from hetis.engines.serving import TELL_KV
from hetis.engines.workers import why_no_workers
from hetis.formats.catalogue.names import UnknownNameError, resolve_gpu
from hetis.formats.models import dtypes
from hetis.formats.models.document import drafts
from hetis.planner.use_cases.sources import Inputs, LoadedInputs
from hetis.solver.cluster import Cluster, GpuType
from hetis.solver.constraints import Constraint, Duty, Exclude, RestrictRole, Selection, Unit, WithoutWorkers
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

FOR_WEIGHTS = 0.8  # of the memory: what engines take less KV for some requests
WORKERS = "vllm-hetis"  # the engine with attention workers, which keep KV in 16 bits and compute no layers


def in_precision(loaded: LoadedInputs, *, weights: str | None, kv: str | None, mtp: str | None = None) -> LoadedInputs:
    """Return the inputs with the model's weights or KV in another precision, or with drafts.

    None for any of them leaves what the model's file specifies.

    Args:
        loaded: the inputs.
        weights, kv: precisions such as ``fp8`` or ``fp8,V100=bf16`` (`dtypes.chosen_precision`).
        mtp: drafted tokens and their acceptance (`hetis.formats.models.document.drafts`).

    Raises:
        InvalidProblemError: a precision or a GPU type is unknown.
    """
    inputs = loaded.inputs
    try:
        model = dtypes.with_precision(
            inputs.model,
            weights=_on_types_of(inputs.cluster, weights, dtypes.PRECISIONS),
            kv=_on_types_of(inputs.cluster, kv, dtypes.KV_PRECISIONS),
        )
    except (ValueError, UnknownNameError) as error:
        raise InvalidProblemError(f"precision: {error}") from None
    if mtp is not None:
        model = replace(model, draft=drafts(mtp))
    notes = loaded.notes
    gpus = list(gpu_types_of(inputs.cluster))
    unlike = [gpu for gpu in gpus if inputs.model.on(gpu).kv_bytes < 2 == model.on(gpu).kv_bytes]
    if unlike:
        where = "in the plan" if unlike == gpus else f"on {', '.join(unlike)}"
        notes = (*notes, f"KV {dtypes.kv_of(inputs.model)} in the model's file, bf16 {where}: {TELL_KV}")
    return replace(loaded, inputs=replace(inputs, model=model), notes=notes)


def _on_types_of(cluster: Cluster, text: str | None, known: Collection[str]) -> dtypes.Chosen | None:
    """Return the precisions in a text, with the GPU types under the names that the cluster has for them."""
    if text is None:
        return None
    chosen = dtypes.chosen_precision(text, known)
    on = {_type_of(gpu, cluster): name for gpu, name in chosen.on.items()}
    if len(on) < len(chosen.on):
        raise ValueError(f"{text!r} names a GPU type twice")
    return dtypes.Chosen(chosen.everywhere, on)


def _type_of(gpu: str, cluster: Cluster) -> str:
    types = tuple(gpu_types_of(cluster))
    try:
        return gpu if gpu in types else resolve_gpu(gpu, types)
    except UnknownNameError as error:
        has = f"cluster {cluster.name} has no GPU type {gpu!r}, it has {', '.join(types)}"
        raise error if error.ambiguous else ValueError(has) from None


def for_engine(loaded: LoadedInputs, engine: EngineRules | None) -> LoadedInputs:
    """Return the inputs without the GPUs on which the engine cannot run the model in its precision.

    Notes explain why. The function is idempotent.

    Raises:
        InvalidProblemError: no GPU is left; the message contains the reasons.
    """
    if engine is None or engine.name not in SUPPORT:
        return loaded
    inputs, name = loaded.inputs, engine.name
    refused = refused_by(inputs.model, inputs.cluster, name)
    gpus = gpu_types_of(inputs.cluster)
    if len(refused) == len(gpus):
        raise InvalidProblemError("; ".join((*_shared(refused.values()), *_instead(inputs, name))))
    has_workers = _has_workers(inputs.model, inputs.cluster, name)
    notes = [f"{gpu} {'only as attention workers' if has_workers else 'left out'}: {refused[gpu]}" for gpu in refused]
    if name == WORKERS and not has_workers:
        notes.append(f"no attention workers: {_why_no_workers(inputs.model)}")
    vendors = dict[str, list[str]]()
    for gpu, kind in gpus.items():
        if gpu not in refused:
            vendors.setdefault(kind.vendor, []).append(gpu)
    without = _beside_exported(inputs.model, inputs.cluster, name)
    notes += [
        f"{', '.join(its)}{' left out' if its[0] in without else ''}: hetis starts no processes on GPUs of {vendor}, "
        "and exports leave out their replicas"
        for vendor, its in vendors.items()
        if vendor not in VENDORS
    ]
    vendors = {vendor: its for vendor, its in vendors.items() if its[0] not in without}
    if len(vendors) > 1:
        listed = "; ".join(f"{vendor}: {', '.join(its)}" for vendor, its in vendors.items())
        also = ", and the KV that it exchanges," if not engine.kv_vendors else ""
        notes.append(f"a replica{also} stays with GPUs of one vendor ({listed}){_kv_between(engine)}")
    for model in dict.fromkeys(map(inputs.model.on, gpus)):
        runs = {gpu: kind for gpu, kind in gpus.items() if gpu not in refused and inputs.model.on(gpu) == model}
        notes += remarks(model, runs, name)
    constraints = tuple(dict.fromkeys((*constraints_of(inputs.model, inputs.cluster, name), *inputs.constraints)))
    return replace(
        loaded, inputs=replace(inputs, constraints=constraints), notes=tuple(dict.fromkeys((*loaded.notes, *notes)))
    )


def _kv_between(engine: EngineRules) -> str:
    """Return what the note on vendors says of KV that goes between them."""
    if engine.kv_vendors:
        return (
            f"; KV of 16 bits may go between {', '.join(engine.kv_vendors)}: others have shown it, hetis has not "
            "run it, and times are those of each GPU's usual kernels"
        )
    return "; --kv-between-vendors lets KV go between them" if engine.name in KV_VENDORS else ""


def _shared(refusals: Iterable[Refusal]) -> Iterator[str]:
    """Yield the reasons. Those that differ only in what a GPU has are one, with what all of them have."""
    had = dict[Refusal, list[str]]()
    for refusal in refusals:
        had.setdefault(refusal._replace(has=""), []).append(refusal.has)
    for refusal, each in had.items():
        yield str(refusal._replace(has=", ".join(dict.fromkeys(each))))


def _instead(inputs: Inputs, engine: str) -> Iterator[str]:
    """Yield the options with which there are GPUs that run the model, if an engine runs it on none."""
    num_gpus = len(gpu_types_of(inputs.cluster))
    for other in SUPPORT:
        if other != engine and len(refused_by(inputs.model, inputs.cluster, other)) < num_gpus:
            yield f"{other} runs it here: --engine {other}"


def notes_on_exchange(plan: Plan, problem: PlacementProblem) -> list[str]:
    """Return notes on what the engines of replicas that exchange KV must be configured with."""
    rules = problem.family.engine
    if rules is None:
        return []
    notes = dict[str, None]()
    for group in plan.joined_by_routes():
        gpus = {stage.gpu: problem.cluster.gpu_types[stage.gpu] for i in group for stage in plan.replicas[i].stages}
        model = problem.of_replica(plan.replicas[group[0]]).model
        told = common_backend(model, map(kind_of_type, gpus.values()), rules.name)
        if told != "":
            which = "none runs on all of them" if told is None else f"{told} (exports and agents tell it)"
            notes[f"KV goes between {', '.join(sorted(gpus))}, which needs one attention backend: {which}"] = None
    return list(notes)


def refused_by(model: ModelSpec, cluster: Cluster, engine: str | None) -> dict[str, Refusal]:
    """Return the GPU types on which an engine cannot run the model in its precision, with the reason for each.

    Empty for None, as for plans of published heuristics.
    """
    if engine is None or engine not in SUPPORT:
        return {}
    refusals = ((name, refusal_of(model.on(name), gpu, engine)) for name, gpu in gpu_types_of(cluster).items())
    return {name: refusal for name, refusal in refusals if refusal is not None}


def constraints_of(model: ModelSpec, cluster: Cluster, engine: str | None) -> tuple[Constraint, ...]:
    """Return the constraints that keep GPUs out of roles that an engine cannot give them."""
    has_workers = _has_workers(model, cluster, engine)
    constraints = [_without(gpu, engine or "", has_workers=has_workers) for gpu in refused_by(model, cluster, engine)]
    constraints += [_without(gpu, engine or "", has_workers=False) for gpu in _beside_exported(model, cluster, engine)]
    return (*constraints, WithoutWorkers(by=WORKERS)) if engine == WORKERS and not has_workers else tuple(constraints)


def _beside_exported(model: ModelSpec, cluster: Cluster, engine: str | None) -> list[str]:
    """Return the GPU types that exports leave out, if all others together have room for the model's weights.

    Empty for None: plans of published heuristics are for no engine.
    """
    refused, room, kinds = refused_by(model, cluster, engine), 0.0, gpu_types_of(cluster)
    for group in cluster.node_groups:
        for slots in group.gpus:
            if slots.gpu not in refused and kinds[slots.gpu].vendor in VENDORS:
                free = kinds[slots.gpu].memory_bytes - slots.reserved_bytes
                room += group.count * slots.count * free / model.on(slots.gpu).weight_bytes
    unstarted = [gpu for gpu, kind in kinds.items() if gpu not in refused and kind.vendor not in VENDORS]
    return unstarted if engine in SUPPORT and FOR_WEIGHTS * room > model.params() else []


def gpu_types_of(cluster: Cluster) -> dict[str, GpuType]:
    """Return the GPU types of a cluster by name."""
    return {gpu: cluster.gpu_types[gpu] for gpu in cluster.types_used()}


def _has_workers(model: ModelSpec, cluster: Cluster, engine: str | None) -> bool:
    """Return whether heads can move and the plugin places them, and any GPU type holds KV as attention workers do."""
    has_kv = any(model.on(gpu).kv_bytes == 2 for gpu in gpu_types_of(cluster))
    return engine == WORKERS and model.heads_can_move and why_no_workers(model) is None and has_kv


def _why_no_workers(model: ModelSpec) -> str:
    if why := why_no_workers(model):
        return why
    if not model.heads_can_move:
        return "vLLM frees KV outside the sliding window, but workers keep it (windows_free_kv of a model file)"
    return "they keep KV in 16 bits (--kv bf16)"


def _without(gpu: str, engine: str, *, has_workers: bool) -> Constraint:
    selection = Selection(unit=Unit.TYPE, name=gpu)
    if has_workers:
        return RestrictRole(gpus=selection, duty=Duty.PRIMARY, only=False, by=engine)
    return Exclude(gpus=selection, by=engine)
