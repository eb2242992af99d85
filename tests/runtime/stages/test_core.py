"""A stage behind frames does what a stage does, and refuses what is not its engine's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.step import Chunk, Step
from hetis.runtime.kv.errors import DeviceError, DeviceLostError, StaleEpochError
from hetis.runtime.launch.workers import Workers
from hetis.runtime.model.config import read_config
from hetis.runtime.server.measuring import measure_engine
from hetis.runtime.stages.messages import pack_run, read_run
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.errors import FrameError
from hetis.runtime.transport.frames import Frame, Kind
from tests.runtime.checkpoints import Model, random_model, random_prompts
from tests.runtime.engine.pipelines import Part, run_moving, stages_of
from tests.runtime.stages.inproc import InprocStage, setup_of


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("qwen2", kv_heads=2, vocab_size=100)


def engine_with(model: Model, stage: InprocStage, setup: StageSetup, **options: int) -> Engine:
    """The first layer here, the others behind frames."""
    first = stages_of(model.folder, [Part(until=1), Part(until=3)])[0]
    own = EngineOptions(**({"chunk_tokens": 40} | options))
    return Engine(read_config(model.folder), [first, stage.meet(setup)], options=own)


def test_a_stage_behind_frames_is_token_identical(model: Model) -> None:
    stage = InprocStage("s1", model.folder)
    engine = engine_with(model, stage, setup_of(range(1, 3), ranks=2, pages=(12, 12, 12)), growth_tokens=0)
    prompts = random_prompts(21, 6, shortest=10, longest=40)
    assert run_moving(engine, prompts, 30, seed=4) == [model.generate(prompt, 30) for prompt in prompts]
    assert engine.num_preempted > 0
    assert engine.num_moved_heads > 0
    stage.catch_up()
    assert stage.core.stage is not None
    assert stage.core.stage.prompts == ()
    for device in stage.core.stage.devices:
        assert isinstance(device, LocalDevice)
        assert device.pool.free_pages == device.num_pages


def test_the_only_stage_may_be_elsewhere(model: Model) -> None:
    stage = InprocStage("s0", model.folder).meet(setup_of(range(3)))
    engine = Engine(read_config(model.folder), stage)
    assert measure_engine(engine).predictor is None
    prompt = random_prompts(8, 1)[0]
    (answer,) = generate(engine, [prompt], SamplingParams(max_tokens=10))
    assert answer.tokens == model.generate(prompt, 10)


def test_moves_are_verified_there(model: Model) -> None:
    stage = InprocStage("s1", model.folder)
    engine = engine_with(model, stage, setup_of(range(1, 3), pages=(40, 40)))
    number = engine.add(random_prompts(5, 1)[0])
    engine.step()
    head = 0
    owner = engine.running[number].heads[1][head]
    move = engine.stages[1].placement.prepare(number, [head], 1 - owner)
    assert move is not None
    computed = engine.running[number].computed
    assert engine.copy(move, 0, computed)
    assert engine.verify(move)
    assert stage.core.stage is not None
    target = stage.core.stage.devices[1 - owner]
    assert isinstance(target, LocalDevice)
    target.pool.k += 1
    assert not engine.verify(move)


def test_a_stage_that_is_gone_takes_the_replica_with_it(model: Model) -> None:
    stage = InprocStage("s1", model.folder)
    engine = engine_with(model, stage, setup_of(range(1, 3)))
    engine.add([1, 2, 3])
    engine.step()
    assert stage.pipe is not None
    stage.pipe.close()
    engine.step()
    with pytest.raises(DeviceLostError, match="s0: the primary is lost, and the replica with it"):
        engine.step()


def test_an_attention_worker_that_a_stage_lost_costs_no_token_and_comes_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = InprocStage("s1", model.folder)
    engine = engine_with(model, stage, replace(setup_of(range(1, 3), pages=(400, 400)), workers=("s1",)))
    assert [device.num_pages for device in engine.stages[1].stage.devices] == [400, 100]
    workers = Workers("127.0.0.1:0", [], epoch=1, timeout_s=5, start_s=5)
    prompt = random_prompts(6, 1)[0]
    number = engine.add(prompt, SamplingParams(max_tokens=24))
    tokens = []
    while engine.has_work:
        tokens += [news.token for news in engine.step()]
        if len(tokens) == 4 and not stage_is_broken(stage):
            assert engine.move(number, [0], 1, stage=1) or engine.running[number].heads[1][0] == 1
            break_device(stage, monkeypatch)
        if len(tokens) == 10:
            bring_back(workers, engine)
            assert states(engine) == ["ok", "lost"], "its process has not found it yet"
            stage.back_pages["s1"] = 100
            bring_back(workers, engine)
            assert states(engine) == ["ok", "ok"]
            assert engine.move(number, [0], 1, stage=1) or engine.running[number].heads[1][0] == 1
    assert tokens == model.generate(prompt, 24)
    assert stage.core.stage is not None
    found = stage.core.stage.devices[1]
    assert isinstance(found, LocalDevice)
    stage.catch_up()
    assert found.pool.free_pages == 100
    assert not stage_is_broken(stage)


def bring_back(workers: Workers, engine: Engine) -> None:
    """It asks, and at the next time has an answer."""
    workers.bring_back(engine)
    workers.bring_back(engine)


def states(engine: Engine) -> list[str]:
    return [device.status.value for device in engine.stages[1].placement.state.devices]


def test_workers_are_let_go_with_the_engine_and_what_is_no_device_does_not_come_back(model: Model) -> None:
    stage = InprocStage("s1", model.folder)
    remote = stage.meet(setup_of(range(1, 3), pages=(40, 40)))
    assert not remote.rejoin(1)
    ended = stage.num_ended
    stage.meet(setup_of(range(1, 3), pages=(40, 40)), epoch=2)
    assert stage.num_ended == ended + 1
    with pytest.raises(DeviceLostError):
        stage.meet(setup_of(range(1, 3)), epoch=3).rejoin(1)


def stage_is_broken(stage: InprocStage) -> bool:
    assert stage.core.stage is not None
    return "begin" in vars(stage.core.stage.devices[1])


def break_device(stage: InprocStage, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise DeviceLostError("s1", "it was taken away")

    assert stage.core.stage is not None
    for name in ("begin", "drop", "adopt"):
        monkeypatch.setattr(stage.core.stage.devices[1], name, lost)


def test_another_key_and_an_older_engine_are_refused(model: Model) -> None:
    stage, setup = InprocStage("s1", model.folder), setup_of(range(1, 3))
    with pytest.raises(DeviceError, match="s1: the key is another process's, or an old one"):
        stage.meet(setup, key=bytes(16))
    old = stage.meet(setup, epoch=5)
    with pytest.raises(StaleEpochError, match="epoch 4 has ended, 5 is current"):
        stage.meet(setup, epoch=4)
    new = stage.meet(setup, epoch=6)
    assert new.homes == (0, 0)
    answer = stage.core.handle(Frame(kind=Kind.DIGEST, epoch=5, session=old._session.number))
    assert answer is not None
    assert answer.kind is Kind.ERROR
    assert stage.core.handle(Frame(kind=Kind.FORGET, epoch=5, session=old._session.number)) is None


def test_a_stage_that_cannot_be_is_told_why(model: Model) -> None:
    stage = InprocStage("s1", model.folder)
    with pytest.raises(DeviceError, match="ModelError: tensor parallelism of 3 does not divide"):
        stage.meet(setup_of(range(1, 3), ranks=3, pages=(4, 4, 4)))
    with pytest.raises(DeviceError, match="LayoutError: KV of"):
        stage.meet(setup_of(range(1, 3), pages=(2**40,)))


def test_a_step_is_the_same_on_the_other_side() -> None:
    step = Step(
        epoch=3,
        number=7,
        tokens=np.arange(5, dtype=np.int64),
        positions=np.array([9, 4, 0, 1, 2], np.int64),
        requests=np.array([11, 12], np.int64),
        incarnations=np.array([0, 2], np.int64),
        heads=np.array([[0, 1, 1], [2, 0, 0]], np.int64),
        chunks=(Chunk(request=13, incarnation=1, first=0, count=3, total=8, heads=(0, 0, 2)),),
        outputs=np.array([0, 1], np.int64),
        is_greedy=True,
    )
    hidden = torch.randn(5, 4)
    body = torch.cat([part.view(-1).view(torch.uint8) for part in pack_run(step, hidden)])
    frame = Frame(kind=Kind.RUN, epoch=3, session=1, step=7, dtype="float32", parts=(body,))
    found, states = read_run(frame, "float32")
    assert states is not None
    assert torch.equal(states, hidden)
    for name in ("epoch", "number", "chunks", "is_greedy"):
        assert getattr(found, name) == getattr(step, name)
    for name in ("tokens", "positions", "requests", "incarnations", "heads", "outputs"):
        assert np.array_equal(getattr(found, name), getattr(step, name))
    for size in range(0, len(body), 8):
        with pytest.raises(FrameError):
            read_run(frame._replace(parts=(body[:size],)), "float32")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"first": "x"}'])
def test_what_is_no_setup_is_refused(text: str) -> None:
    with pytest.raises(FrameError, match="a stage was set up by what is no setup"):
        StageSetup.from_json(text)


def test_a_setup_is_the_same_on_the_other_side() -> None:
    setup = replace(setup_of(range(1, 3), ranks=2, pages=(4, 5, 6)), workers=("s2",), max_tokens=100)
    assert StageSetup.from_json(setup.to_json()) == setup
