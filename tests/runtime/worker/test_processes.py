"""Attention workers in processes of their own: the same tokens, and none lost when a process is killed or hangs."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import sleep

import pytest
import torch

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.errors import DeviceLostError, StaleEpochError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.transport.connecting import ChannelKind, Endpoint, look_up
from hetis.runtime.worker.joining import join
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.pipelines import run_moving
from tests.runtime.moving.test_hauler import run_changing
from tests.runtime.worker.processes import WorkerProcesses, worker_processes

TOKENS = 16


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcesses]:
    with worker_processes(5, tmp_path_factory.mktemp("workers")) as found:
        yield found


def engine_of(
    workers: WorkerProcesses,
    count: int,
    kind: ChannelKind = ChannelKind.AUTO,
    *,
    dtype: str = "float32",
    timeout_s: float = 30.0,
) -> Engine:
    def devices(shape: KvShape) -> list[AttentionDevice]:
        remote = workers.join(workers.names[:count], shape, kind=kind, timeout_s=timeout_s)
        return [LocalDevice("primary", shape, 100), *remote]

    folder = random_model(kv_heads=4, dtype=dtype).folder
    return engine_from_folder(folder, devices, options=EngineOptions(chunk_tokens=48))


def close(engine: Engine) -> None:
    """Every worker holds nothing any more, and is left to the next engine."""
    for device in engine.stage.devices[1:]:
        assert isinstance(device, RemoteDevice)
        if not device.is_lost:
            assert device.ping() == (device.num_pages, 0)
        device.close()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
def test_heads_in_processes_that_move_give_what_transformers_gives(
    workers: WorkerProcesses, count: int, kind: ChannelKind
) -> None:
    model, prompts = random_model(kv_heads=4), random_prompts(count, 4)
    engine = engine_of(workers, count, kind)
    assert run_moving(engine, prompts, TOKENS, seed=count) == [model.generate(prompt, TOKENS) for prompt in prompts]
    close(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_on_a_real_gpu_of_another_process_give_what_transformers_gives(tmp_path: Path) -> None:
    model, prompts = random_model(kv_heads=4), random_prompts(3, 4)
    with worker_processes(1, tmp_path, device="cuda:0") as workers:
        engine = engine_of(workers, 1)
        assert run_moving(engine, prompts, TOKENS, seed=3) == [model.generate(prompt, TOKENS) for prompt in prompts]
        close(engine)


def test_half_precision_in_processes_gives_what_one_device_gives(workers: WorkerProcesses) -> None:
    prompts = random_prompts(9, 4)
    engine = engine_of(workers, 3, dtype="bfloat16")
    moved = run_moving(engine, prompts, TOKENS, seed=9)
    close(engine)
    alone = generate(engine_of(workers, 0, dtype="bfloat16"), prompts, SamplingParams(max_tokens=TOKENS))
    assert moved == [answer.tokens for answer in alone]


@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_hung_process_costs_no_token(
    workers: WorkerProcesses, kind: ChannelKind, how: signal.Signals
) -> None:
    model, prompts = random_model(kv_heads=4), random_prompts(20, 4)
    engine = engine_of(workers, 3, kind, timeout_s=1.0 if how == signal.SIGSTOP else 30.0)
    victim = engine.stage.devices[2].name
    numbers = [engine.add(prompt, SamplingParams(max_tokens=TOKENS)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    steps = 0
    try:
        while engine.has_work:
            steps += 1
            if steps == 5:
                for request in list(engine.running.values())[:2]:
                    assert engine.move(request.number, [h for h, d in enumerate(request.heads[0]) if d == 0][:2], 2)
                workers.processes[victim].send_signal(how)
            for news in engine.step():
                if news.token is not None:
                    answers[news.request].append(news.token)
        assert [answers[n] for n in numbers] == [model.generate(prompt, TOKENS) for prompt in prompts]
        close(engine)
    finally:
        if how == signal.SIGSTOP:
            workers.processes[victim].send_signal(signal.SIGCONT)  # a zombie: the next engine finds it empty
        else:
            workers.restart(victim)
    engine = engine_of(workers, 3, kind)
    assert [device.ping()[1] for device in engine.stage.devices[1:] if isinstance(device, RemoteDevice)] == [0, 0, 0]
    close(engine)


def test_an_older_engine_is_refused_and_a_newer_one_takes_over(workers: WorkerProcesses) -> None:
    engine = engine_of(workers, 1)
    device = engine.stage.devices[1]
    assert isinstance(device, RemoteDevice)
    endpoint = look_up(workers.store, "w0")
    with pytest.raises(StaleEpochError):
        join("w0", endpoint, device.shape, epoch=workers.epoch - 1)
    assert device.ping() == (device.num_pages, 0)
    newer = workers.join(["w0"], device.shape)[0]
    with pytest.raises(DeviceLostError):
        device.ping()
    newer.close()


def test_connections_that_say_nothing_hold_up_nobody(workers: WorkerProcesses) -> None:
    shape = engine_of(workers, 0).stage.shape
    endpoint = look_up(workers.store, "w0")
    with ExitStack() as probes:
        for _ in range(5):  # each of them once held a worker up for 10 s
            probes.enter_context(socket.create_connection((endpoint.host, endpoint.port), timeout=30))
        device = workers.join(["w0"], shape, timeout_s=30)[0]
        assert device.ping() == (device.num_pages, 0)
        for _ in range(5):
            probes.enter_context(socket.create_connection((endpoint.host, endpoint.port), timeout=30))
        sleep(0.3)  # until the worker, which hears nothing, has looked at them
        assert device.ping() == (device.num_pages, 0)
        device.close()


def test_a_worker_refuses_the_key_of_another_run(workers: WorkerProcesses) -> None:
    endpoint = look_up(workers.store, "w0")
    wrong = Endpoint(host=endpoint.host, port=endpoint.port, key=bytes(16))
    shape = engine_of(workers, 0).stage.shape
    with pytest.raises(DeviceLostError, match="the key is another worker's"):
        join("w0", wrong, shape, epoch=workers.epoch + 1)


def test_changes_in_the_background_move_heads_between_processes(workers: WorkerProcesses) -> None:
    model, prompts = random_model(kv_heads=4), random_prompts(60, 4)
    engine = engine_of(workers, 3)
    hauler = Hauler(engine=engine, bytes_per_step=10_000)
    assert run_changing(engine, hauler, prompts, TOKENS, seed=6) == [model.generate(p, TOKENS) for p in prompts]
    assert hauler.counts.flipped > 5
    close(engine)
