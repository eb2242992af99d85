"""Workers outlive what they serve: cut off, they come back; an engine in the place of another takes them over."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.demo_serve.checkpoint import make_checkpoint
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.launch.engine import EngineFolder, start_engine
from hetis.runtime.launch.layout import DevicePages, StageLayout
from hetis.runtime.launch.workers import Workers
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.server.text import Tokens
from hetis.runtime.transport.connecting import open_store
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.remote import RemoteDevice

PROMPT, PARAMS = [5, 6, 7, 8], SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture(scope="module", autouse=True)
def _worker(store: str) -> Iterator[None]:
    """One worker for all tests, told by its environment. It comes before the store is there."""
    told = {"HETIS_WORKER_NAME": "w", "HETIS_STORE": store, "HETIS_WORKER_KV_MEMORY": "1MiB"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hetis.runtime.worker"], env=os.environ | told | {"OMP_NUM_THREADS": "1"}
    )
    yield
    process.kill()
    process.wait(30)


def start(folder: Path, workers: Workers) -> Engine:
    made_of = EngineFolder(folder=folder, dtype=None, page_tokens=16, options=EngineOptions(chunk_tokens=64))
    here = (DevicePages(name="here", pages=100),)

    def choose(config: ModelConfig) -> tuple[StageLayout, ...]:
        return (StageLayout(layers=range(config.layers), ranks=1, devices=here),)

    return start_engine(made_of, choose, Tokens.from_folder(folder), workers)


def wait_for(holds: Callable[[], bool], *, limit_s: float = 120) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "it never held"
        time.sleep(0.1)


def answer_over_the_worker(engine: Engine, *, cut: bool = False) -> tuple[int, ...]:
    """The tokens of a request all of whose heads were on the worker; ``cut``: until the connection broke."""
    number = engine.add(PROMPT, PARAMS)
    tokens = [news.token for news in engine.step() if news.token is not None]
    away = [head for head, device in enumerate(engine.running[number].heads[0]) if device == 0]
    if away:
        assert engine.move(number, away, 1)
    if cut:
        cut_off(engine)
    while engine.has_work:
        tokens += [news.token for news in engine.step() if news.token is not None]
    return tuple(tokens)


def test_a_worker_goes_from_engine_to_engine_and_comes_back_when_cut_off(folder: Path, store: str) -> None:
    (alone,) = generate(start(folder, Workers(store, [], epoch=1, timeout_s=30, start_s=60)), [PROMPT], PARAMS)
    wanted = tuple(alone.tokens)
    serve_until_the_end(folder, store, wanted)
    gc.collect()  # as its process would take the store with it
    # The engine is gone without a goodbye, and its store with it; another opens the store anew.
    workers = Workers(store, ["w"], epoch=11, timeout_s=30, start_s=120)
    engine = start(folder, workers)
    assert answer_over_the_worker(engine) == wanted
    workers.close(engine)
    del engine, workers
    gc.collect()
    # The clock of the next one is behind: it is the later engine all the same.
    behind = Workers(store, ["w"], epoch=3, timeout_s=30, start_s=120)
    engine = start(folder, behind)
    assert answer_over_the_worker(engine) == wanted
    assert behind.epoch == 12
    behind.close(engine)


def serve_until_the_end(folder: Path, store: str, wanted: tuple[int, ...]) -> None:
    """The worker's connection breaks, and it comes back; then the engine is gone."""
    workers = Workers(store, ["w"], epoch=10, timeout_s=30, start_s=120)
    engine = start(folder, workers)
    assert answer_over_the_worker(engine) == wanted
    assert answer_over_the_worker(engine, cut=True) == wanted
    assert not is_up(engine)

    def is_back() -> bool:
        workers.bring_back(engine)
        return is_up(engine)

    wait_for(is_back)
    assert answer_over_the_worker(engine) == wanted
    cut_off(engine)


def cut_off(engine: Engine) -> None:
    device = engine.stage.devices[1]
    assert isinstance(device, RemoteDevice)
    device._channel.close()


def is_up(engine: Engine) -> bool:
    return engine.placement.state.devices[1].status.value != "lost"


def test_the_store_listens_where_it_was_told_and_nowhere_else() -> None:
    opened = open_store("127.0.0.1:0", is_master=True)
    socket.create_connection(("127.0.0.1", opened.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # all of 127.0.0.0/8 is this host's
        socket.create_connection(("127.0.0.2", opened.port), timeout=5)
    with pytest.raises(ChannelError, match=rf"store 127.0.0.1:{opened.port}: cannot listen there: address already in"):
        open_store(f"127.0.0.1:{opened.port}", is_master=True)
    everywhere = open_store("0.0.0.0:0", is_master=True)
    socket.create_connection(("127.0.0.2", everywhere.port), timeout=5).close()
