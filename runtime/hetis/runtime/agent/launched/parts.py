"""A node's part of a replica: `hetis.engines` turns the planner's assignment into the processes that run here, with the
settings of ``--engine launch:FILE``.

    apiVersion: hetis/v1
    kind: EngineSettings
    engine: vllm
    model: /models/{name}
    addresses: {gpu1: 10.0.0.1, gpu2: 10.0.0.2}
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from google.protobuf.json_format import MessageToDict
from pydantic import AfterValidator, BeforeValidator, Field

from hetis.commands.endpoints import host_of, is_host, joined
from hetis.engines.commands import WORKER_PORT, WORKER_STEP, Addresses, Command, commands_of
from hetis.engines.errors import LayoutError
from hetis.engines.gpus import GpuKind
from hetis.engines.layout import ProcessKind, layout_of_replica
from hetis.engines.planned import KvPartner
from hetis.engines.serving import (
    KV_PORT,
    MASTER_PORT,
    PORT_STEP,
    Serving,
    checkpoint_model,
    decided_in,
    missing_kv_option,
    names_of,
    program_of,
)
from hetis.engines.versions import Engine
from hetis.formats.documents import from_data
from hetis.formats.errors import DocumentError
from hetis.formats.fields import Document, Duration, value_of
from hetis.formats.kinds import read_data, validated
from hetis.formats.models.dtypes import weights_of
from hetis.runtime.moves.refusals import refusal
from hetis.solver.model import ModelSpec
from hetis.solver.plan import ReplicaPlan, Role
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, ReplicaRole
from hetis.v1.replica_pb2 import ReplicaPlan as ReplicaMessage

_MOST_GPUS = 64  # GPUs per node for which the port ranges have room
LONGEST_SOCKET = 107  # bytes of the path of a Unix socket, from sockaddr_un
_TOO_LONG = f"{{}} is too long for the path of a socket, which has at most {LONGEST_SOCKET} bytes: see `folder`"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Port = Annotated[int, Field(ge=1, le=65_535 - _MOST_GPUS)]
SteppedPort = Annotated[int, Field(ge=1, le=65_535 - _MOST_GPUS * PORT_STEP)]
_ROLES = {ReplicaRole.REPLICA_ROLE_PREFILL: Role.PREFILL, ReplicaRole.REPLICA_ROLE_DECODE: Role.DECODE}


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _template(*names: str, said: str) -> AfterValidator:
    """Return a validator of texts whose only placeholders are ``names``, which ``said`` describes in its message."""

    def check(value: str) -> str:
        try:
            value.format(**dict.fromkeys(names, ""))
        except (KeyError, IndexError, ValueError, AttributeError):
            braces = " and ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"{value!r} may only have {braces} in braces: {said}") from None
        return value

    return AfterValidator(check)


def _valid(is_valid: Callable[[str], object], said: str) -> AfterValidator:
    """Return a validator of texts; ``said`` completes its message ``... is no ...``."""

    def check(value: str) -> str:
        if not is_valid(value):
            raise ValueError(f"{value!r} is not a valid {said}")
        return value

    return AfterValidator(check)


Named = Annotated[str, Field(min_length=1), _template("name", said="the model's name in the plan")]
Checkpoint = Annotated[
    str,
    Field(min_length=1),
    _template("name", "weights", said="the model's name and the precision of the replica's weights in the plan"),
]
Host = Annotated[str, _valid(is_host, "address, must be an IP address or a name")]
Backend = Annotated[str, _valid(re.compile(r"\w*").fullmatch, "name of an attention backend")]
Variable = Annotated[str, _valid(_VARIABLE.fullmatch, "name of an environment variable")]


class EngineSettingsDocument(Document):
    """The settings of engines that a node's agent starts."""

    kind: Literal["EngineSettings"]
    engine: Literal["vllm", "vllm-hetis", "sglang"]
    # Command that starts the engine, as a list of words or a shell command line. Empty: the engine's own.
    program: Annotated[list[str], BeforeValidator(_words)] = Field(default_factory=list)
    # Folder of the model, or a name that the engine knows; ``{name}`` is the model's name in the plan and ``{weights}``
    # the precision of the replica's weights
    model: Checkpoint
    served_name: Named = "{name}"  # model name that clients use
    device: Literal["cuda", "cpu"] = "cuda"  # ``cpu`` to try a plan without GPUs
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # dtype of the model and its KV
    # Attention backend of replicas that only prefill or only decode, in place of the one that runs on all GPUs that
    # exchange KV
    attention_backend: Backend = ""
    # Where head groups of new requests go, with `vllm-hetis`: as its dispatcher decides, or to the primary while it has
    # room, so that only the planner moves them
    dispatch: Literal["solver", "local"] = "solver"
    encrypt: bool = False  # whether what vLLM and attention workers on other hosts exchange is encrypted
    # Further options of the engine, passed unchanged
    options: Annotated[list[str], BeforeValidator(_words)] = Field(default_factory=list)
    environment: dict[Variable, str] = Field(default_factory=dict)  # further environment variables of the engine
    # Hosts at which other nodes and clients reach each node. A node that is not listed is reached at the address that
    # its agent reports, or else by its own name.
    addresses: dict[str, Host] = Field(default_factory=dict)
    port: Port = 8000  # port of the front end of a replica whose first GPU is 0; with first GPU i, it is i higher
    # master_port, kv_port: likewise, but 20 higher for each i, the ports where stages on several nodes meet, and where
    # the copies of a prefill replica serve their KV
    master_port: SteppedPort = MASTER_PORT
    kv_port: SteppedPort = KV_PORT
    # Port of the attention worker on GPU 0; on GPU i it is 64 i higher, and workers that share a GPU have the next ones
    worker_port: Annotated[int, Field(ge=1, le=65_535 - _MOST_GPUS * WORKER_STEP)] = WORKER_PORT
    # Key file of vLLM and its attention workers. None: a key is generated if the whole replica is on one node.
    key_file: str | None = None
    folder: str | None = None  # for logs and files of the engine. None: `engines` in the agent's state directory.
    # KV capacity in tokens in place of the plan's, for smaller machines
    kv_tokens: Annotated[int, Field(ge=1)] | None = None
    # An engine that has not answered this long after its start is killed and started again
    ready_timeout: Annotated[Duration, Field(ge=1, le=86_400)] = 900.0
    # An engine that has answered, and then stops answering for this long, is killed and started again, too
    silence_timeout: Annotated[Duration, Field(ge=1, le=3600)] = 60.0
    # Once assigned to drain, a replica reports only this much later that it takes no new requests: routers keep sending
    # them until they have learnt of it
    router_delay: Annotated[Duration, Field(ge=0, le=3600)] = 5.0
    # How long running requests may take to end before the engine is stopped
    drain_timeout: Annotated[Duration, Field(ge=0, le=3600)] = 120.0

    @property
    def served_by(self) -> Engine:
        return Engine(self.engine)

    @property
    def words(self) -> tuple[str, ...]:
        """The words that start the engine."""
        return tuple(self.program) or program_of(self.served_by)


def load_settings(path: Path) -> EngineSettingsDocument:
    """Read the settings in a file. Raises DocumentError with every problem and its position."""
    data, source = read_data(path)
    return validated(EngineSettingsDocument, data, source, to_value=lambda settings: settings, check=_contradictions)


def _contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield what is wrong with fields that are well-formed, as (path, message)."""
    try:
        words = _words(data.get("options"))
    except ValueError:
        return  # it has already been reported that the text cannot be split into words
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        for name in sorted(decided_in(words)):
            yield ("options",), f"{name} cannot be passed to the engine: the plan or these settings set it"
        for name in sorted(names_of(words)):
            if name.startswith(("--ssl", "--uds")):
                yield ("options",), f"{name} cannot be passed to the engine: the agent asks it by HTTP, at a port"
        if words and not words[0].startswith("-"):
            yield ("options",), f"{words[0]!r} is not an engine option, options begin with -"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedPart:
    """The processes of a replica on one node."""

    commands: tuple[Command, ...]  # how each process is started, the front end first if it is here
    gpus: frozenset[int]  # indices of the GPUs that they use on this node
    ranks: tuple[int, ...]  # the GPUs among these that compute the model's layers
    endpoint: str  # ``host:port`` where clients reach the replica. Empty: its front is on another node.
    is_whole: bool  # whether no process of the replica is on another node
    folder: Path  # folder for its files and logs
    # Where its front end serves `ExecutorService`. None: it is on another node, or its heads cannot move.
    socket: Path | None = None
    why_unsteered: str = ""  # why a front end with attention workers has no socket


def part_of(assignment: Assignment, settings: EngineSettingsDocument, *, node: str, folder: Path) -> LaunchedPart:
    """Return the part of a replica on a node.

    Ports follow from the replica's first GPU, so no two replicas of a node share one, and every node knows them without
    asking the others, even while one replica starts and another one stops. Raises RefusedError (ENGINE_CANNOT) with all
    the reasons if the engine cannot run the replica like this. ``node``: id of this node, the part of a device's name
    before the slash; ``folder``: where the files of all replicas are.
    """
    try:
        planned = json.loads(assignment.model.content)
        replica = replica_of(assignment.shape)
        model, checkpoint, stated_kv = _model_of(planned, replica, settings)
        engine, dtype, tokens = settings.served_by, settings.dtype, settings.kv_tokens
        layout = layout_of_replica(
            replica, model, planned=planned, engine=engine, dtype=dtype, kv_tokens=tokens,
            partners=[KvPartner(_role(one.role), tuple(one.gpu_types), one.tp) for one in assignment.kv_partners],
            own_types={
                one.gpu_type: GpuKind(one.vendor, one.compute_capability or None) for one in assignment.gpu_kinds
            },
            most_seats=assignment.shape.seats_limit or None,
            limits_blocks=assignment.shape.kv_blocks_limited,
            utilisation=assignment.shape.gpu_memory_utilization or None,
        )  # fmt: skip
        if settings.attention_backend and layout.role is not Role.UNIFIED:
            layout = replace(layout, attention_backend=settings.attention_backend)
        if len(layout.servers) > 1 and settings.words[-1] != "serve":
            raise LayoutError("only `vllm serve` and `sglang serve` start stages on several nodes: see `program`")
        serving = _serving(settings, model.name, checkpoint)
        if why := missing_kv_option(layout, serving, stated=stated_kv):
            raise LayoutError(why)
    except (LayoutError, DocumentError, ValueError) as error:
        raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, f"{assignment.replica}: {error}") from None
    own = folder / assignment.replica.rpartition("/")[2]
    first = layout.servers[0].gpus[0]
    hosts = {peer.node: host_of(peer.address) for peer in assignment.peers} | settings.addresses
    addresses = Addresses(
        hosts=hosts,
        worker_port=settings.worker_port,
        worker_step=WORKER_STEP,
        master_port=settings.master_port + PORT_STEP * first,
        kv_port=settings.kv_port + PORT_STEP * first,
        config_file=str(own / "workers.yaml"),
        key_file=settings.key_file or str(own / "worker.key"),
    )
    front = layout.servers[0].node
    steered = bool(layout.workers) and front == node
    socket = own / "engine.sock" if steered and len(os.fsencode(own / "engine.sock")) <= LONGEST_SOCKET else None
    host, port = addresses.host(front), settings.port + first
    serving = replace(serving.at(host, port), executor=str(socket) if socket else "")
    commands = commands_of(layout, serving, addresses)
    ours, own_variables = [one for one in commands if one.process.node == node], settings.environment
    here = tuple(replace(one, environment={**own_variables, **one.environment}) for one in ours)
    servers = [one.process for one in here if one.process.kind is not ProcessKind.ATTENTION_WORKER]
    return LaunchedPart(
        commands=here,
        gpus=frozenset(gpu for one in here for gpu in one.process.gpus),
        ranks=tuple(gpu for process in servers for gpu in process.gpus),
        endpoint=joined(host, port) if front == node else "",
        is_whole=len(here) == len(commands),
        folder=own,
        socket=socket,
        why_unsteered=_TOO_LONG.format(own) if steered and socket is None else "",
    )


def _model_of(
    planned: Mapping[str, Any], replica: ReplicaPlan, settings: EngineSettingsDocument
) -> tuple[ModelSpec, str, str]:
    """Return the served model in the replica's precision, its folder or its name for the engine, and the quantised KV
    that its checkpoint states.

    The model's shape is that of the folder if it exists, with KV in the plan's precision.
    """
    document = from_data(planned, name="model")
    if not isinstance(document, ModelSpec):
        raise LayoutError("the assignment has no model")
    own = document.on(replica.stages[0].gpu)
    checkpoint = settings.model.format(name=own.name, weights=weights_of(own))
    found, stated_kv = Path(checkpoint), ""
    if found.is_dir():
        own, stated_kv = checkpoint_model(found, own)
    elif found.is_absolute():
        raise LayoutError(f"{own.name}: there is no folder {found} on this node")
    return own, checkpoint, stated_kv


def _serving(settings: EngineSettingsDocument, name: str, checkpoint: str) -> Serving:
    options = list(settings.options)
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
        dispatch="" if settings.dispatch == "solver" else settings.dispatch,
        encrypts=settings.encrypt,
    )


def _role(role: ReplicaRole.ValueType) -> Role:
    return _ROLES.get(role, Role.UNIFIED)


def replica_of(message: ReplicaMessage) -> ReplicaPlan:
    """Return the replica of a message. The planner has its own conversion, since neither may import the other."""
    data = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    def parts(name: str) -> list[dict[str, Any]]:
        return [{**part, "gpu": part["gpu_type"]} for part in data[name]]

    return value_of(
        ReplicaPlan,
        data,
        rate=message.rate_rps,
        role=_role(message.role),
        stages=parts("stages"),
        attention_workers=parts("attention_workers"),
    )
