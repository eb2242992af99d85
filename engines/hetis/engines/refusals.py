"""Why an engine, or the plugin in it, cannot run a replica as planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hetis.engines.gpus import VENDORS, GpuKind
from hetis.engines.kv_room import DTYPE_BYTES, Card, KvRoom
from hetis.engines.planned import DEVICE, KvPartner, pushes_kv
from hetis.engines.precision import why_not_loaded
from hetis.engines.versions import Engine
from hetis.engines.workers import why_no_workers
from hetis.solver.cluster import node_of
from hetis.solver.engine_rules import shares_indexers
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.plan import ReplicaPlan, Role, StagePlan


def unlike_vendors(replica: ReplicaPlan, gpus: Mapping[str, GpuKind], vendors: set[str]) -> Iterator[str]:
    """Yield why the vendors of a replica's GPUs rule it out.

    Args:
        replica: the replica.
        gpus: the kinds of the GPUs that compute its layers or exchange KV with it.
        vendors: vendors of its GPUs, including those of attention workers.
    """
    if others := sorted(vendors - set(VENDORS)):
        yield f"it has GPUs of {', '.join(others)}: hetis only starts processes on GPUs of {' and '.join(VENDORS)}"
    own = dict.fromkeys(gpus[stage.gpu].vendor for stage in replica.stages)
    if len(own) > 1:
        yield f"it has stages on GPUs of {' and '.join(own)}: an engine needs GPUs of a single vendor"


def no_backend(model: ModelSpec, gpus: Mapping[str, GpuKind], backend: str | None, engine: Engine) -> Iterator[str]:
    if backend is None:
        yield (
            f"it exchanges KV between {', '.join(sorted(gpus))}, and no attention backend of {engine.program} runs "
            f"{model.name} on all of them"
        )


def other_model(planned: Mapping[str, Any] | None, replica: ReplicaPlan, model: ModelSpec) -> Iterator[str]:
    """Yield the differences between the planned model and the one to serve."""
    if planned is not None:
        fields = ("num_layers", "hidden", "q_heads", "kv_heads", "head_dim", "vocab")
        other = [
            f"{n} {planned.get(n)}, not {getattr(model, n)}" for n in fields if planned.get(n) != getattr(model, n)
        ]
        if other:
            yield f"the plan is of another model ({planned.get('name', 'without a name')}): {', '.join(other)}"
            return
    layers = sum(stage.num_layers for stage in replica.stages)
    if layers != model.num_layers:
        yield f"the plan's stages have {layers} layers, the model {model.num_layers}"


def impossible(
    replica: ReplicaPlan, partners: Sequence[KvPartner], model: ModelSpec, engine: Engine, dtype: str
) -> Iterator[str]:
    """Yield what the replica requires that the engine, or the plugin in it, does not support."""
    if replica.attention_workers and engine is not Engine.VLLM_HETIS:
        unsupported = "" if engine is Engine.VLLM else f"{engine.program} does not support; "
        yield f"it has attention workers, which {unsupported}vLLM only supports with hetis' plugin (engine vllm-hetis)"
    elif replica.attention_workers and replica.role is not Role.UNIFIED:
        yield (
            f"the replica is to {'prefill' if replica.role is Role.PREFILL else 'decode'} only: the plugin "
            "occupies the vLLM connector that would carry prompts between replicas"
        )
    if reason := why_not_loaded(model, engine.value):
        yield reason
    if engine is not Engine.SGLANG and shares_indexers(model) and len(replica.stages) > 1:
        yield (
            f"it has {len(replica.stages)} stages, and layers share indexers: vLLM's stages do not pass on which "
            "tokens an indexer chose"
        )
    yield from _handed_over(replica, partners, model, engine)
    if replica.role is Role.DECODE and engine is not Engine.SGLANG:
        ranks, senders = replica.stages[0].tp, sorted({one.tp for one in partners if one.role is Role.PREFILL})
        yield from _held_twice(ranks, senders, model, pushes=pushes_kv(replica, partners))
        yield from _unlike_blocks(ranks, senders, model)
    yield from _unshared(replica, model)
    for number, stage in enumerate(replica.stages):
        yield from (f"stage {number + 1}: {why}" for why in _impossible_stage(replica, number, stage, model, engine))
    if replica.attention_workers and (why_not := why_no_workers(model)):
        yield f"it has attention workers, which {model.name} cannot have: {why_not}"
    if dtype == "auto" and model.kv_bytes < 1:
        yield f"the plan needs KV of {model.kv_bytes:g} bytes per element, {engine.program} supports 1 or 2"
    elif replica.attention_workers and dtype == "auto" and model.kv_bytes != DTYPE_BYTES["auto"]:
        yield f"the plan needs KV of {model.kv_bytes:g} bytes per element, workers support 2 or 4: set --dtype"


def _unshared(replica: ReplicaPlan, model: ModelSpec) -> Iterator[str]:
    """Yield why copies of the replica cannot share their experts."""
    if not replica.expert_parallel:
        return
    if len(replica.stages) != 1 or replica.attention_workers:
        yield "its copies share experts: it must have one stage, without attention workers"
        return
    (stage,) = replica.stages
    ranks = stage.tp * stage.copies
    if model.experts is None:
        yield f"its copies share experts, but {model.name} has none"
    elif model.experts.count % ranks:
        yield f"its {ranks} ranks share {model.experts.count} experts, a number that they must divide"
    if stage.copies < 2 or replica.in_flight != stage.copies:
        counts = f"copies is {stage.copies}, in_flight {replica.in_flight}"
        yield f"its copies share experts: {counts}, must be equal and at least 2"
    if len(stage.devices) != ranks:
        yield f"it has {len(stage.devices)} GPUs for {stage.copies} copies of {stage.tp} ranks"


def no_room(replica: ReplicaPlan, room: KvRoom) -> Iterator[str]:
    """Yield why a rank of copies that share experts has no KV; engines keep one page for themselves."""
    if replica.expert_parallel and room.fitting_pages < 2:
        yield (
            f"its copies share experts: vLLM needs {room.taken_bytes} bytes of a rank's planned KV for shared experts "
            "and the workspace of all, which leaves no room for a request"
        )


def _handed_over(
    replica: ReplicaPlan, partners: Sequence[KvPartner], model: ModelSpec, engine: Engine
) -> Iterator[str]:
    """Yield why the KV of prompts cannot be handed over between these stages; see `EngineRules.stages_of`."""
    stages = len(replica.stages)
    if stages == 1:
        return
    if engine is Engine.SGLANG and model.draft is not None and replica.role is not Role.PREFILL:
        yield f"it drafts tokens in {stages} stages: SGLang only supports that in one"
    if engine is Engine.SGLANG:
        from_others = {len(one.gpus) for one in partners if one.role is Role.PREFILL} - {stages}
        if replica.role is Role.DECODE and from_others:
            others = ", ".join(map(str, sorted(from_others)))
            yield f"it decodes in {stages} stages: SGLang needs the same number in prefill replicas, not {others}"
        return
    if replica.role is Role.DECODE:
        yield f"it decodes in {stages} stages: vLLM's NIXL connector only supports decode replicas with one"
    unsupported = {
        "a layer that drafts": model.draft is not None,
        "sliding-window layers": model.sliding_window is not None,
        "layers that keep states": model.state_bytes() > 0.0,
    }
    for what, is_there in unsupported.items() if replica.role is Role.PREFILL else ():
        if is_there:
            yield f"it prefills in several stages: vLLM's NIXL connector does not support this with {what}"


def _held_twice(ranks: int, senders: Sequence[int], model: ModelSpec, *, pushes: bool) -> Iterator[str]:
    """Yield why the KV of prompts cannot come from more ranks than there are KV heads, where ranks hold duplicates.

    Nor can it be written to more (`pushes_kv`). See `_validate_remote_agent_handshake` in vLLM's nixl/base_worker.py.
    Latent attention and states allow it. ``senders``: the numbers of ranks in prefill replicas.
    """
    if model.kernel is not Kernel.GROUPED or model.state_bytes() > 0.0:
        return
    if wider := [str(tp) for tp in senders if tp > max(ranks, model.kv_heads)]:
        yield (
            f"it decodes in TP{ranks}, and prompts come from TP{' and TP'.join(wider)}, where ranks share "
            f"{model.kv_heads} KV heads: vLLM's NIXL connector then needs the same number of ranks on both sides"
        )
    fewer = [str(tp) for tp in senders if ranks > max(tp, model.kv_heads)]
    if fewer and pushes:
        yield (
            f"it decodes in TP{ranks}, where ranks share {model.kv_heads} KV heads, and prompts come from "
            f"TP{' and TP'.join(fewer)}, from several stages: vLLM's NIXL connector then needs the same number of "
            "ranks on both sides"
        )


def _unlike_blocks(ranks: int, senders: Sequence[int], model: ModelSpec) -> Iterator[str]:
    """Yield why states cannot come from ranks whose blocks have other numbers of tokens.

    vLLM makes a block as large as a state (`_align_hybrid_block_size` in platforms/interface.py). Ranks divide a state,
    but share KV heads if there are fewer, and latent KV. Its NIXL connector then refuses blocks that are no multiple of
    those sent (`block_size_ratio` in kv_connector/utils.py) or, with prefix caching, have another number of the
    kernel's (`_validate_remote_agent_handshake` in nixl/base_worker.py); its documents support no others with states.
    """
    if Kernel.RECURRENT not in model.kernels:
        return
    is_latent = model.kernel is Kernel.LATENT
    heads = 1 if is_latent else model.kv_heads
    if unlike := [f"TP{tp}" for tp in senders if max(tp, heads) != max(ranks, heads)]:
        kv = "latent KV" if is_latent else f"{heads} KV heads"
        yield (
            f"it decodes in TP{ranks}, and prompts come from {' and '.join(unlike)}, where ranks share {kv} but divide "
            "states: vLLM's blocks then differ, which its NIXL connector does not support"
        )


def _impossible_stage(
    replica: ReplicaPlan, number: int, stage: StagePlan, model: ModelSpec, engine: Engine
) -> Iterator[str]:
    pools = [pool for pool in replica.attention_workers if pool.stage == number]
    named = (*stage.devices, *(device for pool in pools for device in pool.devices))
    yield from (f"device {name!r} must be NODE/INDEX, such as gpu2/0" for name in named if not DEVICE.fullmatch(name))
    if not stage.devices:
        yield "it has no GPUs"
    if stage.copies > 1 and not replica.expert_parallel:
        yield f"it has {stage.copies} copies, {engine.program} has one of each stage"
    if stage.tp != replica.stages[0].tp:
        ranks = f"it has TP{stage.tp} and stage 1 TP{replica.stages[0].tp}"
        yield f"{ranks}, {engine.program} needs the same in every stage"
    first = replica.groups(stage)[0] if stage.devices else ()
    nodes = dict.fromkeys(map(node_of, first))
    if len(nodes) > 1:
        yield f"it is on several nodes, must be on one: {', '.join(first)}"
    if model.q_heads % stage.tp or (model.kv_heads % stage.tp and stage.tp % model.kv_heads):
        yield f"{stage.tp} ranks do not divide {model.q_heads} query heads and {model.kv_heads} KV heads"
        return
    if not model.divides(stage.tp):
        yield f"{stage.tp} ranks do not divide {model.attention.what_ranks_divide}"
        return
    placed = (stage.kv_head_groups_kept + sum(pool.kv_head_groups for pool in pools)) * stage.tp
    heads = max(model.kv_heads, stage.tp)
    if placed != heads and Kernel.LATENT not in model.kernels:
        yield f"the plan places {placed} KV heads, the model has {heads}"


def uneven(cards: Sequence[Sequence[Card]]) -> Iterator[str]:
    """Yield a problem if stages have different numbers of workers: a worker of the scheduler has a GPU per stage."""
    counts = [len(of_stage) for of_stage in cards]
    if len(set(counts)) > 1:
        yield (
            f"stages have {', '.join(map(str, counts))} attention workers: the plugin needs the same number in "
            "every stage, since a request's heads go to the same worker in all of them"
        )
