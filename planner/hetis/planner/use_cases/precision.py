"""Plans in a given precision: the model's weights and KV, and the GPUs on which the engine supports it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetis.engines.precision import SUPPORT, remarks, why_not
from hetis.formats import dtypes
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.cluster import Cluster, GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import EngineRules, PlacementProblem
from hetis.solver.will import Duty, Keep, LeaveOut, Selection, Unit, Wish, WithoutWorkers

WORKERS = "vllm-hetis"  # the engine with attention workers, which keep KV in 16 bits and compute no layers


def in_precision(loaded: LoadedInputs, *, weights: str | None, kv: str | None) -> LoadedInputs:
    """Return the inputs with the model's weights or KV in another precision; None: as in its checkpoint."""
    model = dtypes.with_precision(loaded.inputs.model, weights=weights, kv=kv)
    asked = loaded.has_precision or weights is not None or kv is not None
    return replace(loaded, inputs=replace(loaded.inputs, model=model), has_precision=asked)


def for_engine(loaded: LoadedInputs, engine: EngineRules | None) -> LoadedInputs:
    """Return the inputs without the GPUs on which the engine cannot run the model in its precision.

    Notes give the reasons. A model in 16 bits keeps all GPUs unless its precision was requested. The function is
    idempotent.

    Raises:
        InvalidProblemError: no GPU is left; with the reason.
    """
    inputs = loaded.inputs
    model, is_plain = inputs.model, inputs.model.weights in ("", "bf16") and inputs.model.kv_bytes == 2
    if engine is None or engine.name not in SUPPORT or (is_plain and not loaded.has_precision):
        return loaded
    gpus = gpu_types_of(inputs.cluster)
    refused = {name: why for name, gpu in gpus.items() if (why := why_not(model, gpu, engine.name)) is not None}
    if len(refused) == len(gpus):
        raise InvalidProblemError("; ".join(dict.fromkeys(refused.values())))
    has_workers = engine.name == WORKERS and model.kv_bytes == 2
    wishes: list[Wish] = [_without(name, has_workers=has_workers) for name in refused]
    notes = [
        f"{name} {'only as attention workers' if has_workers else 'left out'}: {refused[name]}" for name in refused
    ]
    if engine.name == WORKERS and not has_workers:
        wishes.append(WithoutWorkers())
        notes.append("no attention workers: they keep KV in 16 bits")
    notes += remarks(model, {name: gpu for name, gpu in gpus.items() if name not in refused}, engine.name)
    will = tuple(dict.fromkeys((*wishes, *inputs.will)))
    return replace(loaded, inputs=replace(inputs, will=will), notes=tuple(dict.fromkeys((*loaded.notes, *notes))))


def stages_that_do_not_start(plan: Plan, problem: PlacementProblem) -> Iterator[str]:
    """Yield the GPUs of a plan's stages on which its engine does not run, whatever the precision."""
    engine, gpus = problem.family.engine, gpu_types_of(problem.cluster)
    for name in dict.fromkeys(stage.gpu for replica in plan.replicas for stage in replica.stages):
        if engine is not None and engine.name in SUPPORT and (why := why_not(problem.model, gpus[name], engine.name)):
            yield f"stages on {name} do not start: {why}"


def gpu_types_of(cluster: Cluster) -> dict[str, GpuType]:
    """Return the GPU types of a cluster by name."""
    return {slots.gpu: cluster.gpu_types[slots.gpu] for group in cluster.node_groups for slots in group.gpus}


def _without(gpu: str, *, has_workers: bool) -> Wish:
    selection = Selection(unit=Unit.TYPE, name=gpu)
    return Keep(gpus=selection, duty=Duty.PRIMARY, only=False) if has_workers else LeaveOut(gpus=selection)
