"""A front on a free loopback port: the real engine, the real server, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from examples.demo_serve.checkpoint import make_checkpoint
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.handover.messages import key_of
from hetis.runtime.launch.engine import EngineFolder, start_engine, warm_up
from hetis.runtime.launch.layout import DevicePages, StageLayout
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.server.app import AppOptions, Front
from hetis.runtime.server.asked import ExecutorAddress, PromptAddresses, RedispatchMode
from hetis.runtime.server.chat import ChatTemplate
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.executing import ExecutorServer
from hetis.runtime.server.moving import Moving
from hetis.runtime.server.options import bound_socket
from hetis.runtime.server.prompts import PromptMetrics, listen_for_prompts, share_prompts
from hetis.runtime.server.running import Told, answering, serve
from hetis.runtime.server.text import Tokens
from hetis.runtime.server.timing import StepPredictor
from hetis.runtime.steering.engine import RealEngine

torch.set_num_threads(1)

MODEL = "tiny"


def demo_model(folder: Path) -> Path:
    return make_checkpoint(folder / MODEL)


def engine_of(folder: Path, *, pages: tuple[int, ...] = (400, 400), **options: Any) -> Engine:
    made_of = EngineFolder(
        folder=folder, dtype=None, page_tokens=16, options=EngineOptions(**({"chunk_tokens": 64} | options))
    )
    devices = tuple(DevicePages(name=f"cpu{i}", pages=count) for i, count in enumerate(pages))

    def choose(config: ModelConfig) -> tuple[StageLayout, ...]:
        return (StageLayout(layers=range(config.layers), ranks=1, devices=devices),)

    return start_engine(made_of, choose, Tokens.from_folder(folder))


class Live:
    """A running server; a context manager. ``desk`` may be looked at; it lives in the server's loop."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        most_open: int = 64,
        app: AppOptions | None = None,
        key: str | None = None,
        drain_s: float = 20.0,
        predictor: StepPredictor | None = None,
        executor: Path | None = None,
        mode: RedispatchMode = RedispatchMode.PLANNER,
        prompts: PromptAddresses | None = None,
    ) -> None:
        """``executor``: a socket where an agent steers the engine. ``prompts``: that go between engines."""
        warm_up(engine)
        hauler = Hauler(engine=engine, bytes_per_step=1 << 14)
        steered = RealEngine(hauler, clock=time.monotonic, takes_moves=mode is RedispatchMode.PLANNER)
        self.moving = Moving(mode=mode, hauler=hauler, steered=steered) if executor is not None else None
        self._executor = executor
        self.engine = engine
        self.listening = bound_socket("127.0.0.1", 0, write_s=5)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self._folder, self._most_open, self._app, self._key, self._drain_s = folder, most_open, app, key, drain_s
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, name="live server")
        self._predictor, self._prompts = predictor, prompts or PromptAddresses()
        self.went_well: bool | None = None

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.tell()
        self.tell()
        self.join()

    def tell(self) -> None:
        """As a signal would."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._told.hear)

    def between_steps(self, act: Callable[[], None]) -> None:
        """Done by the engine's thread."""
        asyncio.run_coroutine_threadsafe(self.desk.call(act), self._loop).result(60)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.listening.close()

    def client(self, **more: Any) -> openai.OpenAI:
        settings: dict[str, Any] = {"api_key": self._key or "none", "max_retries": 0, "timeout": 60.0} | more
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def comes_to(self, value: float, name: str, **labels: str) -> bool:
        """Whether a sample gets that value: metrics follow the engine a moment later."""
        deadline_s = time.monotonic() + 20
        while self.metric(name, **labels) != value:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True

    def _run(self) -> None:
        async def work() -> bool:
            self._loop, self._told = asyncio.get_running_loop(), Told()
            steered = self.moving.steered if self.moving is not None else None
            self.desk = Desk(
                self.engine,
                model=MODEL,
                version="test",
                most_open=self._most_open,
                predictor=self._predictor,
                tend=None if steered is None else self.engine.tend,
                moving=self.moving,
            )
            beside = None
            if steered is not None:
                server = ExecutorServer(ExecutorAddress(socket=self._executor))
                beside = server.serving(self.desk, steered)
            listener, peers = listen_for_prompts(self._prompts.listens), self._prompts.peers
            shared = share_prompts(
                self.engine, self.desk, listener, peers, key=key_of(self._folder, self._key), silent_s=30
            )
            self.desk.metrics.registry.register(PromptMetrics({"model_name": MODEL}, shared))
            front = Front(
                self.desk,
                Tokens.from_folder(self._folder),
                ChatTemplate.from_folder(self._folder),
                model=MODEL,
                options=self._app,
            )
            async with answering(front.app(api_key=self._key), self.listening) as serving:
                went_well = await serve(
                    self.desk, serving, self._told, drain_s=self._drain_s, ready=self._ready.set, beside=beside
                )
            shared.close()
            return went_well

        self.went_well = asyncio.run(work())
