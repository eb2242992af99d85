"""A node's part of a replica: `hetis.engines` turns the planner's assignment into the processes that run here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetis.engines.commands import Addresses, Command, commands_of
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Layout, ProcessKind, layout_of_replica
from hetis.engines.serving import Serving, joined, names_of
from hetis.engines.versions import Engine
from hetis.formats.documents import from_data
from hetis.formats.dtypes import weights_of
from hetis.formats.endpoints import host_of
from hetis.formats.errors import DocumentError
from hetis.formats.model import load_model
from hetis.runtime.agent.launched.settings import MASTER_STEP, EngineSettings
from hetis.runtime.moves.refusals import refusal
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, ReplicaPlan, Role, StagePlan
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, ReplicaRole
from hetis.v1.replica_pb2 import ReplicaPlan as ReplicaMessage

_ROLES = {ReplicaRole.REPLICA_ROLE_PREFILL: Role.PREFILL, ReplicaRole.REPLICA_ROLE_DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePart:
    """The processes of a replica on one node.

    Attributes:
        commands: how each is started, the front first where it is here.
        gpus: of this node, that they use.
        ranks: those of them that compute the model's layers.
        endpoint: ``host:port`` where clients reach the replica. Empty: its front is on another node.
        is_whole: no process of the replica is elsewhere.
        folder: for its files and logs.
    """

    commands: tuple[Command, ...]
    gpus: frozenset[int]
    ranks: tuple[int, ...]
    endpoint: str
    is_whole: bool
    folder: Path


def part_of(assignment: Assignment, settings: EngineSettings, *, node: str, folder: Path) -> NodePart:
    """Return the part of a replica on a node.

    Ports follow from the replica's first GPU: no two replicas of a node have one in common, so that all nodes know the
    ports without asking each other, also those of a replica that starts while another one stops.

    Args:
        node: id of this node, as devices have it before the slash.
        folder: for files of all replicas.

    Raises:
        RefusedError: ENGINE_CANNOT; the engine cannot run the replica so, with all the reasons.
    """
    try:
        planned = json.loads(assignment.model.content)
        replica = replica_of(assignment.shape)
        model, checkpoint = _model_of(planned, replica, settings)
        layout = layout_of_replica(
            replica,
            model,
            planned=planned,
            engine=settings.served_by,
            dtype=settings.dtype,
            kv_tokens=settings.kv_tokens,
        )
        if len(layout.servers) > 1 and settings.words[-1] != "serve":
            raise LayoutError("only `vllm serve` and `sglang serve` start stages on several nodes: see `program`")
    except (LayoutError, DocumentError, ValueError) as error:
        raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, f"{assignment.replica}: {error}") from None
    own = folder / assignment.replica.rpartition("/")[2]
    first = layout.servers[0].gpus[0]
    hosts = {peer.node: host_of(peer.address) for peer in assignment.peers} | settings.addresses
    addresses = Addresses(
        hosts=hosts,
        worker_port=settings.worker_port,
        master_port=settings.master_port + MASTER_STEP * first,
        kv_port=settings.kv_port + first,
        config_file=str(own / "workers.yaml"),
        key_file=settings.key_file or str(own / "worker.key"),
    )
    front = layout.servers[0].node
    endpoint = joined(addresses.host(front), settings.port + first)
    commands = commands_of(layout, _serving(layout, settings, model.name, checkpoint, endpoint), addresses)
    here = tuple(_with_environment(one, settings) for one in commands if one.process.node == node)
    servers = [one.process for one in here if one.process.kind is not ProcessKind.ATTENTION_WORKER]
    return NodePart(
        commands=here,
        gpus=frozenset(gpu for one in here for gpu in one.process.gpus),
        ranks=tuple(gpu for process in servers for gpu in process.gpus),
        endpoint=endpoint if front == node else "",
        is_whole=len(here) == len(commands),
        folder=own,
    )


def _model_of(planned: Mapping[str, Any], replica: ReplicaPlan, settings: EngineSettings) -> tuple[ModelSpec, str]:
    """Return the served model in the replica's precision, and its folder or its name for the engine.

    Its shape is that of the folder if that exists, with KV in the plan's precision.
    """
    document = from_data(planned, name="model")
    if not isinstance(document, ModelSpec):
        raise LayoutError("the assignment has no model")
    own = document.on(replica.stages[0].gpu)
    checkpoint = settings.model.format(name=own.name, weights=weights_of(own))
    found = Path(checkpoint)
    if found.is_dir():
        own = replace(load_model(found / "config.json"), name=own.name, kv_bytes=own.kv_bytes)
    elif found.is_absolute():
        raise LayoutError(f"{own.name}: there is no folder {found} here")
    return own, checkpoint


def _serving(layout: Layout, settings: EngineSettings, name: str, checkpoint: str, endpoint: str) -> Serving:
    host, _, port = endpoint.rpartition(":")
    options = ["--host", host.strip("[]"), "--port", port, *settings.options]
    drains = settings.served_by is not Engine.SGLANG and settings.drain_timeout >= 1
    if drains and "--shutdown-timeout" not in names_of(settings.options):
        options += ["--shutdown-timeout", str(round(settings.drain_timeout))]
    return Serving(
        model=checkpoint,
        program=settings.words,
        options=tuple(options),
        dtype=settings.dtype,
        device=settings.device,
        limits_kv=True,
        served_name=settings.served_name.format(name=name),
    )


def _with_environment(command: Command, settings: EngineSettings) -> Command:
    return replace(command, environment={**settings.environment, **command.environment})


def replica_of(message: ReplicaMessage) -> ReplicaPlan:
    """Return the replica of a message. The planner has its own conversion, since neither may import the other."""
    return ReplicaPlan(
        rate=message.rate_rps,
        ttft_s=message.ttft_s,
        tpot_s=message.tpot_s,
        micro_batch=message.micro_batch,
        in_flight=message.in_flight,
        chunk_tokens=message.chunk_tokens,
        kv_tokens=message.kv_tokens,
        stages=tuple(
            StagePlan(
                gpu=stage.gpu_type,
                tp=stage.tp,
                copies=stage.copies,
                first_layer=stage.first_layer,
                num_layers=stage.num_layers,
                devices=tuple(stage.devices),
                kv_head_groups_kept=stage.kv_head_groups_kept,
            )
            for stage in message.stages
        ),
        attention_workers=tuple(
            AttentionWorkerPool(
                stage=pool.stage,
                gpu=pool.gpu_type,
                devices=tuple(pool.devices),
                kv_head_groups=pool.kv_head_groups,
                shared=pool.shared,
            )
            for pool in message.attention_workers
        ),
        role=_ROLES.get(message.role, Role.UNIFIED),
        kv_zones=tuple(message.kv_zones),
        expert_parallel=message.expert_parallel,
    )
