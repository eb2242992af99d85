"""Puts the parts of `hetis-serve` together: model, engine, desk, routes."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.launch.engine import EngineFolder, start_engine, warm_up
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import Layout, StageLayout, layout_of, one_device, pages_of
from hetis.runtime.launch.memory import free_memory_bytes
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.launch.workers import Workers
from hetis.runtime.measured.metrics import CostMetrics
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.server.app import AppOptions, Front
from hetis.runtime.server.chat import ChatTemplate
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.measuring import measure_engine
from hetis.runtime.server.running import Told, serve
from hetis.runtime.server.text import Tokens

_log = logging.getLogger(__name__)
_SEATS, _CHUNK_TOKENS = 64, 1024  # where neither options nor plan say


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of `hetis-serve`, each of them valid; ``rooms`` empty: the plan's devices, or one.

    ``stages`` are processes, and the number of the stage that each of them runs.
    """

    folder: Path
    name: str
    plan: Path | None
    replica: int
    kv_tokens: int | None
    rooms: tuple[DeviceRoom, ...]
    workers: tuple[str, ...]
    stages: tuple[tuple[str, int], ...]
    store: str
    worker_s: float
    start_s: float
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
    """
    _set_threads(asked.threads)
    tokens, chat = Tokens.from_folder(asked.folder), ChatTemplate.from_folder(asked.folder)
    layout = _layout(asked)
    workers = _workers(asked)
    engine = await asyncio.to_thread(_engine, asked, layout, tokens, workers)
    await asyncio.to_thread(warm_up, engine)
    measured = await asyncio.to_thread(measure_engine, engine, planned=layout.costs if layout else None)
    desk = Desk(
        engine,
        model=asked.name,
        version=asked.version,
        most_open=engine.options.most_running + asked.max_waiting,
        predictor=measured.predictor,
        tend=None if workers is None else lambda: workers.bring_back(engine),
    )
    labels = {"model_name": asked.name, "engine": "0"}
    desk.metrics.registry.register(CostMetrics(labels, measured.costs))
    options = AppOptions(body_bytes=asked.body_bytes, answer_s=asked.answer_s, write_s=asked.write_s)
    front = Front(desk, tokens, chat, model=asked.name, options=options)
    _tell_devices(engine)

    def ready() -> None:
        host, port = listening.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        _log.info("serving %s at http://%s", asked.name, where)

    told = Told()
    with told.by_signals():
        app = front.app(api_key=asked.api_key)
        went_well = await serve(desk, app, listening, told, drain_s=asked.drain_s, ready=ready)
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
    layout = layout_of(plan, asked.replica, config, page_tokens=asked.page_tokens, kv_tokens=asked.kv_tokens)
    planned = layout.attention_workers
    others = [f"--worker {name} is no attention worker of the plan" for name in asked.workers if name not in planned]
    num = len(layout.stages)
    others += [
        f"--stage {name}={number}: the plan's replica has {num} stages, counted from 0, copies one after another"
        for name, number in asked.stages
        if number >= num
    ]
    if others:
        raise LayoutError(*others)
    return layout


def _engine(asked: Asked, layout: Layout | None, tokens: Tokens, workers: Workers | None) -> Engine:
    seats = asked.seats or (layout.seats if layout else _SEATS)
    chunk_tokens = asked.chunk_tokens or (layout.chunk_tokens if layout else _CHUNK_TOKENS)
    # Steps on their way at the same time are of use where stages are processes, which work at the same time.
    in_flight = min(layout.in_flight, seats) if layout and asked.stages else 1
    options = EngineOptions(
        most_running=seats, chunk_tokens=chunk_tokens, max_tokens=asked.context_tokens, in_flight=in_flight
    )

    made_of = EngineFolder(folder=asked.folder, dtype=asked.dtype, page_tokens=asked.page_tokens, options=options)

    def choose(config: ModelConfig) -> tuple[StageLayout, ...]:
        if layout is not None:
            return layout.stages
        every = range(config.layers)
        shape = made_of.shape(config, every)
        longest = min(asked.context_tokens or config.max_tokens, config.max_tokens)
        devices = pages_of(asked.rooms, shape)
        if not devices:
            free_bytes = free_memory_bytes()
            devices = (one_device(config, shape, seats=seats, max_tokens=longest, free_bytes=free_bytes),)
        return (StageLayout(layers=every, ranks=1, devices=devices),)

    processes = {number: name for name, number in asked.stages}
    return start_engine(made_of, choose, tokens, workers, processes)


def _workers(asked: Asked) -> Workers | None:
    if not asked.workers and not asked.stages:
        return None
    # Seconds grow, and a later engine is obeyed rather than an earlier one that still runs.
    return Workers(asked.store, asked.workers, epoch=int(time.time()), timeout_s=asked.worker_s, start_s=asked.start_s)


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
            "device %s: %d KV pages (%.0f MiB), %d tokens of all heads", device.name, device.num_pages, size, tokens
        )
