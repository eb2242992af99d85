"""Puts the parts of `hetis-serve` together: model, engine, desk, routes."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.handover.messages import key_of
from hetis.runtime.kv.memory import free_memory_bytes
from hetis.runtime.launch.compute import on_devices, refuse_missing, torch_devices
from hetis.runtime.launch.engine import EngineFolder, start_engine, warm_up
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import Layout, StageLayout, layout_of, one_device, pages_of
from hetis.runtime.launch.room import Compute, DeviceRoom
from hetis.runtime.launch.workers import Workers
from hetis.runtime.measured.metrics import CostMetrics
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.moving.redispatch import Redispatch
from hetis.runtime.server.app import AppOptions, Front
from hetis.runtime.server.asked import ExecutorAddress, PromptAddresses, RedispatchMode
from hetis.runtime.server.chat import ChatTemplate
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.errors import ServeError
from hetis.runtime.server.measuring import Measured, measure_engine
from hetis.runtime.server.moving import Moving
from hetis.runtime.server.prompts import PromptMetrics, listen_for_prompts, share_prompts
from hetis.runtime.server.running import Told, answering, serve
from hetis.runtime.server.starting import Door, Starting
from hetis.runtime.server.text import Tokens
from hetis.runtime.steering.engine import RealEngine
from hetis.solver.plan import Plan, Role

if TYPE_CHECKING:
    from hetis.runtime.server.executing import ExecutorServer

_log = logging.getLogger(__name__)
# Seconds per byte of KV that moves, where nothing was measured: a copy in memory, and one to another process.
_LOCAL_BYTE_S, _AWAY_BYTE_S = 1e-10, 1e-9
_FIRST = "once on this machine: a minute or two"
_SEATS, _CHUNK_TOKENS = 64, 1024  # where neither options nor plan say


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of `hetis-serve`, each of them valid; ``rooms`` empty: the plan's devices, or one,
    which ``compute`` says where they compute.

    ``stages`` are processes, and the number of the stage that each of them runs. ``redispatch`` None: whoever is there.
    """

    folder: Path
    name: str
    plan: Path | None
    replica: int
    kv_tokens: int | None
    rooms: tuple[DeviceRoom, ...]
    compute: Compute
    workers: tuple[str, ...]
    stages: tuple[tuple[str, int], ...]
    store: str
    worker_s: float
    start_s: float
    absence_s: float
    executor: ExecutorAddress | None
    prompts: PromptAddresses
    redispatch: RedispatchMode | None
    dtype: str | None
    context_tokens: int | None
    seats: int | None
    chunk_tokens: int | None
    page_tokens: int
    threads: int | None
    api_key: str | None
    max_waiting: int
    body_bytes: int
    answer_s: float
    write_s: float
    drain_s: float
    version: str


async def run_server(asked: Asked, listening: socket.socket) -> bool:
    """Loads, serves until told to end; returns False where the engine failed.

    Raises:
        DocumentError: the plan's file cannot be used.
        ModelError: the model's folder cannot be used.
        LayoutError: the plan or the memory does not allow it.
        ChannelError, DeviceError: the workers' store cannot be opened, or a worker did not come.
        ServeError: the agent's address, or that of decoding engines, is taken.
    """
    executor = _executor(asked.executor)
    decoding = listen_for_prompts(asked.prompts.listens)
    starting = Starting()
    door = Door(starting)
    async with answering(door, listening) as serving:
        return await _serve(asked, executor, decoding, listening, starting, door, serving)


async def _serve(
    asked: Asked,
    executor: ExecutorServer | None,
    decoding: socket.socket | None,
    listening: socket.socket,
    starting: Starting,
    door: Door,
    serving: asyncio.Task[None],
) -> bool:
    """``decoding``: where engines connect that have their prompts computed here."""
    _set_threads(asked.threads)
    tokens, chat = Tokens.from_folder(asked.folder), ChatTemplate.from_folder(asked.folder)
    layout = _layout(asked)
    workers = _workers(asked)
    with starting.phase("reading the model" + (" and meeting its workers" if workers else "")):
        engine = await asyncio.to_thread(_engine, asked, layout, tokens, workers)
    await asyncio.to_thread(_prepare, engine, starting)
    with starting.phase("timing the devices"):
        measured = await asyncio.to_thread(measure_engine, engine, planned=layout.costs if layout else None)
    moving = await asyncio.to_thread(_moving, asked, engine, measured, starting)
    desk = Desk(
        engine,
        model=asked.name,
        version=asked.version,
        most_open=engine.options.most_running + asked.max_waiting,
        predictor=measured.predictor,
        tend=_tend(engine, workers, moving),
        moving=moving,
    )
    labels = {"model_name": asked.name, "engine": "0"}
    desk.metrics.registry.register(CostMetrics(labels, measured.costs))
    key = key_of(asked.folder, asked.api_key)
    prompts = share_prompts(engine, desk, decoding, asked.prompts.peers, key=key, silent_s=asked.worker_s)
    desk.metrics.registry.register(PromptMetrics(labels, prompts))
    options = AppOptions(body_bytes=asked.body_bytes, answer_s=asked.answer_s, write_s=asked.write_s)
    front = Front(desk, tokens, chat, model=asked.name, options=options)
    _tell_devices(engine)

    app = front.app(api_key=asked.api_key)

    def ready() -> None:
        door.open(app)
        host, port = listening.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        _log.info("serving %s at http://%s", asked.name, where)

    told = Told()
    with told.by_signals():
        beside = executor.serving(desk, moving.steered) if executor is not None and moving.steered is not None else None
        went_well = await serve(desk, serving, told, drain_s=asked.drain_s, ready=ready, beside=beside)
    prompts.close()
    if workers is not None:
        workers.close(engine)
    engine.close()
    return went_well


def _layout(asked: Asked) -> Layout | None:
    if asked.plan is None:
        return None
    from hetis.formats.documents import load_plan

    config = read_config(asked.folder)
    plan = load_plan(asked.plan)
    wrong = _other_role(plan, asked)
    try:
        layout = layout_of(plan, asked.replica, config, page_tokens=asked.page_tokens, kv_tokens=asked.kv_tokens)
    except LayoutError as error:
        raise LayoutError(*wrong, *error.messages) from None
    planned = layout.attention_workers
    wrong += [f"--worker {name} is no attention worker of the plan" for name in asked.workers if name not in planned]
    num = len(layout.stages)
    wrong += [
        f"--stage {name}={number}: the plan's replica has {num} stages, counted from 0, copies one after another"
        for name, number in asked.stages
        if number >= num
    ]
    if wrong:
        raise LayoutError(*wrong)
    return layout


def _other_role(plan: Plan, asked: Asked) -> list[str]:
    """What the replica's role needs of the options."""
    role = plan.replicas[asked.replica].role if asked.replica < len(plan.replicas) else Role.UNIFIED
    if role is Role.PREFILL and asked.prompts.listens is None:
        return ["the replica computes prompts for others: give --kv-listen HOST:PORT, where they connect"]
    if role is Role.DECODE and not asked.prompts.peers:
        return ["the replica decodes what others prefill: give --prefill HOST:PORT for each prefill replica"]
    return []


def _engine(asked: Asked, layout: Layout | None, tokens: Tokens, workers: Workers | None) -> Engine:
    seats = asked.seats or (layout.seats if layout else 0) or _SEATS
    # A decode replica, which has no chunks, computes a prompt only where no other does.
    chunk_tokens = asked.chunk_tokens or (layout.chunk_tokens if layout else 0) or _CHUNK_TOKENS
    # Steps on their way at the same time are of use where stages are processes, which work at the same time.
    in_flight = min(layout.in_flight, seats) if layout and asked.stages else 1
    options = EngineOptions(
        most_running=seats,
        chunk_tokens=chunk_tokens,
        max_tokens=asked.context_tokens,
        in_flight=in_flight,
        patience_s=asked.absence_s,
    )

    made_of = EngineFolder(folder=asked.folder, dtype=asked.dtype, page_tokens=asked.page_tokens, options=options)

    processes = {number: name for name, number in asked.stages}

    def choose(config: ModelConfig) -> tuple[StageLayout, ...]:
        if layout is not None:
            return on_devices(layout.stages, asked.compute, workers=asked.workers, elsewhere=processes)
        every = range(config.layers)
        shape = made_of.shape(config, every)
        longest = min(asked.context_tokens or config.max_tokens, config.max_tokens)
        refuse_missing(room.device for room in asked.rooms)
        devices = pages_of(asked.rooms, shape)
        if not devices:
            (device,) = torch_devices(asked.compute, 1)
            free = free_memory_bytes(device)
            room = {"seats": seats, "max_tokens": longest, "chunk_tokens": chunk_tokens, "free_bytes": free}
            one = one_device(config, shape, **room, device=device)
            devices = (one,)
        return (StageLayout(layers=every, ranks=1, devices=devices),)

    return start_engine(made_of, choose, tokens, workers, processes)


def _prepare(engine: Engine, starting: Starting) -> None:
    """Compiles what the first request would have to wait for; on a machine that has done so before, loads it."""
    if any(part.num_devices > 1 for part in engine.stages):
        from hetis.solver.dispatch.tables import running_load
        from hetis.solver.dispatch.warming import compile_dispatch

        with starting.phase(_making_ready("the dispatcher", running_load)):
            compile_dispatch()
    with starting.phase("making a first step"):
        warm_up(engine)


def _making_ready(what: str, kernel: Callable[..., object]) -> str:
    """How the start calls it; ``kernel``: of those that are compiled, or loaded."""
    from hetis.solver.compiled import is_cached

    return f"loading {what}" if is_cached(kernel) else f"compiling {what}, {_FIRST}"


def _workers(asked: Asked) -> Workers | None:
    if not asked.workers and not asked.stages:
        return None
    # Seconds grow, and a later engine is obeyed rather than an earlier one that still runs.
    return Workers(asked.store, asked.workers, epoch=int(time.time()), timeout_s=asked.worker_s, start_s=asked.start_s)


def _executor(address: ExecutorAddress | None) -> ExecutorServer | None:
    """Listens before anything is loaded, so that an address that is taken is told at once."""
    if address is None:
        return None
    from hetis.runtime.server.executing import ExecutorServer

    try:
        return ExecutorServer(address)
    except OSError as error:
        raise ServeError(f"--executor {address}: {error}") from None


def _moving(asked: Asked, engine: Engine, measured: Measured, starting: Starting) -> Moving:
    """What moves heads, ready to do so; may take a minute the first time, for what is compiled."""
    movable = [part for part in engine.stages if part.placement.group.num_places > 1]
    usual = RedispatchMode.PLANNER if asked.executor else RedispatchMode.OWN if movable else RedispatchMode.OFF
    mode, hauler = asked.redispatch or usual, Hauler(engine=engine)
    redispatch: tuple[Redispatch, ...] = ()
    steered: RealEngine | None = None
    if mode is RedispatchMode.OWN and movable:
        from hetis.solver.redispatch.local_search import improve
        from hetis.solver.redispatch.warming import compile_redispatch

        with starting.phase(_making_ready("re-dispatch", improve)):
            compile_redispatch()
        redispatch = tuple(_own_redispatch(hauler, part, measured) for part in movable)
    if asked.executor is not None:
        steered = RealEngine(
            hauler,
            clock=time.monotonic,
            takes_moves=mode is RedispatchMode.PLANNER,
            observed=lambda part: part.placement.costs if measured.following else None,
        )
    _log.info("heads of running requests are moved by: %s", mode)
    return Moving(mode=mode, hauler=hauler, redispatch=redispatch, steered=steered)


def _own_redispatch(hauler: Hauler, part: StageHeads, measured: Measured) -> Redispatch:
    links = np.array([_LOCAL_BYTE_S if isinstance(d, LocalDevice) else _AWAY_BYTE_S for d in part.stage.devices])
    found = measured.copy_byte_s.get(part.number)
    if found is not None:
        links = np.where(found > 0, found, links)
    return Redispatch(hauler=hauler, link_byte_s=links, stage=part.number)


def _tend(engine: Engine, workers: Workers | None, moving: Moving) -> Callable[[], None] | None:
    """What is looked after now and then, also where nothing runs."""
    if workers is None and moving.steered is None:
        return None

    def tend() -> None:
        if workers is not None:
            workers.bring_back(engine)
        engine.tend()

    return tend


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _tell_devices(engine: Engine) -> None:
    pairs = [(device, len(part.stage.homes)) for part in engine.stages for device in part.stage.devices]
    for device, heads in pairs:
        tokens = device.num_pages * device.shape.page_tokens // heads
        size = device.num_pages * device.shape.page_bytes / 2**20
        _log.info(
            "device %s: %d KV pages (%.0f MiB), %d tokens of all heads, %s",
            *(device.name, device.num_pages, size, tokens),
            f"on {device.pool.k.device}" if isinstance(device, LocalDevice) else "in a process of its own",
        )
