"""Stages as processes: several steps on their way at once, and the text is that of the whole model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.model.config import read_config
from hetis.runtime.stages.remote import RemoteStage
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.connecting import connect, look_up, open_store
from tests.command_line import environment
from tests.runtime.checkpoints import Model, random_model, random_prompts
from tests.runtime.engine.pipelines import Part, run_moving, stages_of
from tests.runtime.stages.inproc import setup_of


class StageProcesses:
    """Two stage processes and an attention worker, and the store where they say where they are."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.store: Any = open_store("127.0.0.1:0", is_master=True)
        self.epoch = 0
        self._folder, self._logs = folder, logs
        self.of = {name: self._start(name, "stages", "--model", str(folder)) for name in ("p1", "p2")}
        self.start_worker()

    def start_worker(self) -> None:
        self.of["w"] = self._start("w", "worker", "--kv-memory", "4MiB")

    def meet(self, *setups: tuple[str, StageSetup]) -> list[RemoteStage]:
        """Processes, by name, as what they are told to be. Each engine gets an epoch above the last."""
        self.epoch += 1
        return [self._meet(name, setup) for name, setup in setups]

    def _meet(self, name: str, setup: StageSetup) -> RemoteStage:
        where = look_up(self.store, name, timeout_s=120)
        config = read_config(self._folder)
        return RemoteStage(name, setup, config, connect(where, stall_s=60), epoch=self.epoch, key=where.key)

    def _start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"hetis.runtime.{module}", "--name", name]
        command += ["--store", f"127.0.0.1:{self.store.port}", "--timeout", "60", *arguments]
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment(OMP_NUM_THREADS="1"))


@contextmanager
def stage_processes(folder: Path, logs: Path) -> Iterator[StageProcesses]:
    processes = StageProcesses(folder, logs)
    try:
        yield processes
    finally:
        for process in processes.of.values():
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("qwen3", vocab_size=100)


@pytest.fixture(scope="module")
def processes(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageProcesses]:
    with stage_processes(model.folder, tmp_path_factory.mktemp("logs")) as found:
        yield found


def engine_of(model: Model, processes: StageProcesses, *, in_flight: int) -> Engine:
    """Layer 0 here, 1 in one process with two ranks, 2 in another with an attention worker."""
    first = stages_of(model.folder, [Part(until=1), Part(until=3)])[0]
    last = replace(setup_of(range(2, 3), pages=(60, 0), name="w"), workers=("w",))
    last = replace(last, stage=replace(last.stage, devices=(last.stage.devices[0], named(last, 1, "w"))))
    others = processes.meet(("p1", setup_of(range(1, 2), ranks=2, pages=(120, 120))), ("p2", last))
    options = EngineOptions(chunk_tokens=40, in_flight=in_flight, growth_tokens=0)
    return Engine(read_config(model.folder), [first, *others], options=options, epoch=processes.epoch, overlaps=True)


def named(setup: StageSetup, device: int, name: str) -> Any:
    return replace(setup.stage.devices[device], name=name)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_stages_in_processes_are_token_identical(model: Model, processes: StageProcesses, in_flight: int) -> None:
    engine = engine_of(model, processes, in_flight=in_flight)
    prompts = random_prompts(31, 8, shortest=10, longest=40)
    assert run_moving(engine, prompts, 20, seed=3, often=0.1) == [model.generate(prompt, 20) for prompt in prompts]
    for part in engine.stages:
        part.placement.check_invariants()
        assert len(part.placement) == 0
    engine.close()


def test_a_worker_that_dies_costs_no_token_and_is_taken_back_and_a_stage_that_dies_costs_the_replica(
    model: Model, processes: StageProcesses
) -> None:
    engine = engine_of(model, processes, in_flight=2)
    prompts = random_prompts(32, 4)
    assert answers_over_the_worker(engine, prompts, then=processes.of["w"].kill) == wanted(model, prompts)
    assert [device.status.value for device in engine.stages[2].placement.state.devices] == ["ok", "lost"]
    assert not engine.stages[2].rejoin(1).result()
    processes.of["w"].wait(30)
    processes.start_worker()
    deadline_s = time.monotonic() + 240
    while not engine.stages[2].rejoin(1).result():
        assert time.monotonic() < deadline_s, "it never came back"
        time.sleep(0.2)
    engine.take_back(1, stage=2)
    assert answers_over_the_worker(engine, prompts) == wanted(model, prompts)
    assert [device.status.value for device in engine.stages[2].placement.state.devices] == ["ok", "ok"]
    engine.add(prompts[0])
    processes.of["p1"].kill()
    with pytest.raises(DeviceLostError, match="s0: the primary is lost, and the replica with it"):
        run_out(engine)
    engine.close()


def wanted(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    return [model.generate(prompt, 20) for prompt in prompts]


def answers_over_the_worker(
    engine: Engine, prompts: list[list[int]], *, then: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Answers of requests that all have a head on the last stage's worker, when something happens."""
    numbers = [engine.add(prompt, SamplingParams(max_tokens=20)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    steps = 0
    while engine.has_work:
        for news in engine.step():
            assert news.token is not None
            answers[news.request].append(news.token)
        steps += 1
        if steps == 8:
            for request in list(engine.running.values()):
                assert 1 in request.heads[2] or engine.move(request.number, [0], 1, stage=2)
            then()
    return list(answers.values())


def run_out(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
