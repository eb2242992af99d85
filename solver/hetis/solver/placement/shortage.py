"""The reason why no replica fits in memory: the most telling shortage of the fleet for the smallest replica."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hetis.solver.placement.explanation.wording import in_bytes
from hetis.solver.placement.tables import CostTables
from hetis.solver.plan import Role


def why_nothing_fits(costs: CostTables) -> str:
    """Return one sentence for a problem whose family holds no replica even without limits."""
    if not costs.ranks:
        model, sizes = costs.problem.model, "/".join(map(str, costs.problem.family.tp_sizes))
        return f"{model.name}: its {model.q_heads} query heads cannot be split by any of TP {sizes} on this fleet"
    return next(_shortages(costs))


def _shortages(costs: CostTables) -> Iterator[str]:
    """Yield shortages, from the plainest to the one that remains if all others are excluded."""
    problem, model = costs.problem, min(costs.problem.models(), key=lambda model: model.weight_bytes)
    room, whose = _usable_by_a_replica(costs)
    weights = model.params() * model.weight_bytes
    kv = model.num_layers * model.head_groups * model.kv_bytes_per_token_group() * _fewest_kv_tokens(costs)
    kv += model.num_layers * _least_state_bytes(costs)
    batch = min(problem.family.micro_batches)
    requests = f"{batch} request{'' if batch == 1 else 's'}, the smallest batch"
    if weights > room:
        yield f"{model.name} needs {in_bytes(weights)} for weights alone; {whose} has {in_bytes(room)} usable"
    apart, fleet_room = Role.UNIFIED not in problem.family.roles, sum(_rooms(costs))
    if apart and weights <= room and 2.0 * weights > fleet_room:
        yield (
            f"{model.name} needs {in_bytes(weights)} for weights twice, to prefill and to decode; this fleet has "
            f"{in_bytes(fleet_room)} usable"
        )
    if weights + kv > room:
        yield (
            f"{model.name} needs {in_bytes(weights + kv)}: {in_bytes(weights)} for weights and {in_bytes(kv)} for the "
            f"KV of {requests}; {whose} has {in_bytes(room)} usable"
        )
    held, tp, gpu, needed, usable = _largest_share(costs)
    if held < 1:
        yield (
            f"a layer of {model.name} needs {in_bytes(needed)} on each of {tp} GPUs, activations included; "
            f"{gpu} has {in_bytes(usable)} usable"
        )
    layers, most = model.num_layers - model.prefix_layers, _most_layers(costs)
    if most < layers:
        yield (
            f"the GPUs that a replica may use hold at most {most} of {layers} layers of {model.name}, KV left out: a "
            f"layer needs {in_bytes(needed)} on each of {tp} {gpu}, which have {in_bytes(usable)} usable"
        )
    where = "every GPU of a prefill and a decode replica side by side" if apart else "every GPU"
    yield (
        f"{model.name} needs {in_bytes(weights)} for weights and {in_bytes(kv)} for the KV of {requests}; {whose} has "
        f"{in_bytes(room)} usable, but no split into stages of whole layers keeps {where} within its memory"
    )


def _rooms(costs: CostTables) -> list[float]:
    """Return the bytes besides the engine's on all GPUs of every class."""
    rooms = costs.scopes[-1].tables.worker_room_bytes
    return [float(room) * c.available for room, c in zip(rooms, costs.classes, strict=True)]


def _usable_by_a_replica(costs: CostTables) -> tuple[float, str]:
    """Return the bytes besides the engine's on all GPUs that one replica may use together, and who has them."""
    rooms = _rooms(costs)
    if costs.problem.family.mixed_types or len(rooms) == 1:
        return sum(rooms), "this fleet"
    largest = int(np.argmax(rooms))
    c = costs.classes[largest]
    return rooms[largest], f"a replica of one device class, at most {c.available} {c.gpu},"


def _fewest_kv_tokens(costs: CostTables) -> float:
    """Return the fewest tokens of KV that a copy of a decoding replica must have room for under any mix."""
    decodes = [mix.micro_batch > 0 for mix in costs.mixes]
    return float(costs.scopes[-1].tables.kv_tokens[decodes].min())


def _least_state_bytes(costs: CostTables) -> float:
    """Return the same of the bytes of states in a layer."""
    decodes = [mix.micro_batch > 0 for mix in costs.mixes]
    return float(costs.scopes[-1].tables.state_bytes[decodes].min())


def _largest_share(costs: CostTables) -> tuple[float, int, str, float, float]:
    """Return the best place for a layer: layers per rank (below 1 if none), TP size, GPU, needed and usable bytes."""
    t = costs.scopes[-1].tables
    found = []
    for s, (device_class, tp) in enumerate(costs.ranks):
        needed = float(t.layer_bytes[s] + t.act_bytes[:, s].min())
        held = (float(t.room_bytes[s]) - float(t.act_bytes[:, s].min())) / float(t.layer_bytes[s])
        found.append((held, tp, costs.classes[device_class].gpu, needed, float(t.room_bytes[s])))
    return max(found)


def _most_layers(costs: CostTables) -> int:
    """Return an upper bound on the repeated layers that a replica holds, ignoring KV and embeddings."""
    t = costs.scopes[-1].tables
    most = [0] * len(costs.classes)
    for s, (device_class, tp) in enumerate(costs.ranks):
        on_rank = max(0.0, float(t.room_bytes[s]) - float(t.act_bytes[:, s].min())) // float(t.layer_bytes[s])
        groups = costs.classes[device_class].available // tp
        most[device_class] = max(most[device_class], int(on_rank) * groups)
    return sum(most) if costs.problem.family.mixed_types else max(most)
