"""Prompts computed by one engine and decoded by another: the text of one engine, whatever fails between the two."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.handover import service
from hetis.runtime.handover.kv import whole_shape
from hetis.runtime.handover.messages import key_of
from hetis.runtime.model.config import read_config
from hetis.runtime.transport.channel import PipeChannel
from hetis.runtime.transport.frames import Frame, Kind, header_of
from hetis.runtime.transport.messages import ErrorCode, error_answer
from hetis.runtime.transport.tcp import TcpPipe, listen
from tests.runtime.checkpoints import Model, random_model, random_prompts
from tests.runtime.engine.pipelines import Part, assert_empty, pipeline_of, run_moving, stages_of
from tests.runtime.handover.apart import answering, decoding, prefilling, wait_until
from tests.runtime.stages.inproc import InprocStage, setup_of

WHOLE = (Part(until=3),)
PREFILLS = {"whole": WHOLE, "split": (Part(until=2, ranks=2), Part(until=3, ranks=4))}
DECODES = {
    "workers": (Part(until=3, workers=2),),
    "split": (Part(until=1, workers=1), Part(until=3, ranks=2, workers=1)),
    "many ranks": (Part(until=3, ranks=4, workers=1),),
    "copies": (Part(until=1, copies=2, workers=1), Part(until=3)),
}


@pytest.fixture(scope="module")
def model() -> Model:
    """Two KV heads, so that four ranks hold each of them twice."""
    return random_model("qwen2", kv_heads=2, vocab_size=100)


def wanted(model: Model, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    return [model.generate(prompt, tokens) for prompt in prompts]


@pytest.mark.parametrize(("prefill", "decode"), [("whole", "workers"), ("split", "split"), ("whole", "many ranks")])
def test_prompts_of_another_engine_give_the_same_tokens(model: Model, prefill: str, decode: str) -> None:
    prompts = [[7], *random_prompts(3, 3), *random_prompts(4, 1, shortest=100, longest=100)]
    engine = pipeline_of(model.folder, *DECODES[decode])
    computed_here: list[int] = []
    engine.on_prefilled = lambda request, first: computed_here.append(request.number)
    with prefilling(pipeline_of(model.folder, *PREFILLS[prefill], chunk_tokens=17)) as other:
        with decoding(engine, other.port, bytes_per_step=1) as apart:
            wait_until(lambda: apart.num_up == 1)
            assert run_moving(engine, prompts, 8, seed=5) == wanted(model, prompts, 8)
        assert apart.counts.received == 4
        assert computed_here == [0]  # a single token leaves nothing to be computed elsewhere
        assert other.service.num_prompts == 4
    assert_empty(engine)
    assert_empty(other.engine)


def test_stages_in_processes_send_and_take_kv(model: Model) -> None:
    def staged(name: str) -> Engine:
        first = stages_of(model.folder, [Part(until=1), Part(until=3)])[0]
        other = InprocStage(name, model.folder).meet(setup_of(range(1, 3), ranks=2, pages=(60, 60, 60)))
        return Engine(read_config(model.folder), [first, other], options=EngineOptions(chunk_tokens=17))

    prompts, engine = random_prompts(12, 3), staged("decodes")
    with prefilling(staged("prefills")) as other, decoding(engine, other.port) as apart:
        wait_until(lambda: apart.num_up == 1)
        assert run_moving(engine, prompts, 8, seed=2) == wanted(model, prompts, 8)
        assert apart.counts.received == 3


def test_samples_and_log_probabilities_are_those_of_one_engine(model: Model) -> None:
    prompts, params = random_prompts(6, 2), SamplingParams(max_tokens=6, temperature=0.9, seed=3, logprobs=2)
    alone = generate(pipeline_of(model.folder, *WHOLE), prompts, params)
    engine = pipeline_of(model.folder, *WHOLE)
    with prefilling(pipeline_of(model.folder, *WHOLE)) as other, decoding(engine, other.port) as apart:
        wait_until(lambda: apart.num_up == 1)
        together = generate(engine, prompts, params)
        assert apart.counts.received == 2
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    chosen = [[one.chosen for one in answer.logprobs] for answer in (*alone, *together)]
    assert chosen[2:] == [pytest.approx(own, abs=1e-4) for own in chosen[:2]]


def test_an_engine_short_of_kv_has_what_it_gave_up_computed_again(model: Model) -> None:
    """Twelve pages hold three prompts and not their answers: requests make room for each other."""
    prompts = random_prompts(7, 3, shortest=18, longest=24)
    engine = pipeline_of(model.folder, Part(until=3, workers=1, pages=6), growth_tokens=1)
    with prefilling(pipeline_of(model.folder, Part(until=3, pages=8), chunk_tokens=17)) as other:
        with decoding(engine, other.port) as apart:
            wait_until(lambda: apart.num_up == 1)
            answers = generate(engine, prompts, SamplingParams(max_tokens=24, ignore_eos=True))
        assert [answer.tokens for answer in answers] == wanted(model, prompts, 24)
        assert engine.num_preempted
        # one that makes room before its KV is there has it asked for twice, and received once
        assert 3 <= apart.counts.received <= 3 + engine.num_preempted
    assert_empty(engine)
    assert_empty(other.engine)


def test_a_lost_engine_costs_the_prompts_it_had_and_no_token(model: Model) -> None:
    """Of two that compute prompts one hangs and one goes; with none left they are computed where they are decoded."""
    prompts = random_prompts(8, 4, shortest=60, longest=70)
    engine = pipeline_of(model.folder, *DECODES["copies"])
    numbers: list[int] = []
    answers: dict[int, list[int]] = {}

    def step() -> None:
        for news in engine.step():
            if news.token is not None:
                answers.setdefault(news.request, []).append(news.token)

    with (
        prefilling(pipeline_of(model.folder, *WHOLE, chunk_tokens=8)) as hangs,
        prefilling(pipeline_of(model.folder, *WHOLE, chunk_tokens=8)) as goes,
        decoding(engine, hangs.port, goes.port, silent_s=3) as apart,
    ):
        wait_until(lambda: apart.num_up == 2)
        hangs.hang.set()
        numbers += [engine.add(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts]
        while not answers:
            step()
        goes.service.close()
        while engine.has_work:
            step()
        assert apart.counts.failed >= 2  # those of the one that hangs; of the other perhaps none was left
        wait_until(lambda: apart.num_up == 0)  # nor is it met again, though its port is open
        assert answer_of(engine, prompts[0]) == model.generate(prompts[0], 4)
        assert apart.counts.computed_here >= 1
        hangs.hang.clear()
    assert [answers[number] for number in numbers] == wanted(model, prompts, 8)
    assert_empty(engine)


def test_an_engine_comes_back_and_requests_that_leave_are_forgotten_at_both_ends(model: Model) -> None:
    (prompt,) = random_prompts(9, 1, shortest=70)
    engine = pipeline_of(model.folder, *WHOLE)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with (
        prefilling(pipeline_of(model.folder, *WHOLE, chunk_tokens=8)) as other,
        decoding(engine, other.port) as apart,
    ):
        wait_until(lambda: apart.num_up == 1)
        other.halt.set()
        number = engine.add(prompt, params)
        while number not in engine.running:
            engine.step()
        wait_until(lambda: bool(other.engine.waiting) or bool(other.engine.running))
        engine.cancel(number)
        engine.step()
        wait_until(lambda: not other.engine.waiting and not other.engine.running)
        other.halt.clear()
        assert generate(engine, [prompt], params)[0].tokens == model.generate(prompt, 4)
        assert apart.counts.received == 1
    assert_empty(engine)
    assert_empty(other.engine)


def test_another_model_key_or_dtype_is_refused_and_prompts_are_computed_here(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    (prompt,) = random_prompts(10, 1)
    engine = pipeline_of(model.folder, *WHOLE)
    with prefilling(pipeline_of(model.folder, *WHOLE)) as other, decoding(engine, other.port, key=bytes(16)) as apart:
        wait_until(lambda: "another model, or another key" in caplog.text)
        assert generate(engine, [prompt], SamplingParams(max_tokens=4))[0].tokens == model.generate(prompt, 4)
        assert (apart.counts.received, apart.counts.computed_here) == (0, 1)


def test_keys_tell_models_and_front_keys_apart(model: Model) -> None:
    same_sizes = random_model("qwen2", kv_heads=2, vocab_size=100, seed=1)
    keys = [key_of(model.folder, None), key_of(model.folder, "k" * 16), key_of(same_sizes.folder, None)]
    assert len(set(keys)) == 3
    assert key_of(Path(str(model.folder)), None) == keys[0]


def test_what_is_no_greeting_ends_its_connection_alone(model: Model) -> None:
    engine = pipeline_of(model.folder, *WHOLE)
    with prefilling(pipeline_of(model.folder, *WHOLE)) as other:
        for sent in (
            b"GET / HTTP/1.1\r\n\r\n".ljust(64),
            header_of(Frame(kind=Kind.PREFILL, epoch=1, session=1, counts=(1, 0, 0))),
            struct.pack("<I", 0) * 16,
        ):
            with socket.create_connection(("127.0.0.1", other.port), timeout=30) as stranger:
                stranger.sendall(sent)
                assert stranger.recv(1) == b""
        (prompt,) = random_prompts(11, 1)
        with decoding(engine, other.port) as apart:
            wait_until(lambda: apart.num_up == 1)
            answer = answer_of(engine, prompt)
            assert apart.counts.received == 1
    assert answer == model.generate(prompt, 4)


def test_who_is_silent_makes_way_for_those_that_greet_and_long_greetings_are_not_taken(model: Model) -> None:
    engine = pipeline_of(model.folder, *WHOLE)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(prefilling(pipeline_of(model.folder, *WHOLE)))
        where = ("127.0.0.1", other.port)
        long = stack.enter_context(socket.create_connection(where, timeout=30))
        long.sendall(header_of(Frame(kind=Kind.HELLO, epoch=1, session=1, parts=(torch.zeros(1 << 20),))))
        assert long.recv(1) == b""  # though nothing of its body was sent
        silent = [stack.enter_context(socket.create_connection(where, timeout=30)) for _ in range(20)]
        assert silent[0].recv(1) == b""
        apart = stack.enter_context(decoding(engine, other.port))
        wait_until(lambda: apart.num_up == 1)


@pytest.mark.parametrize("fault", ["refuses", "leaves a gap", "sends too much"])
def test_what_one_engine_refuses_or_sends_wrong_another_computes(model: Model, fault: str) -> None:
    """The faulty one is asked first, and not again: the other is, before anything is computed here."""
    (prompt,) = random_prompts(13, 1, shortest=30)
    engine = pipeline_of(model.folder, *WHOLE)
    with (
        answering(lambda frame: wrong_answer(frame, engine, fault)) as port,
        prefilling(pipeline_of(model.folder, *WHOLE)) as other,
        decoding(engine, port, other.port) as apart,
    ):
        wait_until(lambda: apart.num_up == 2)
        assert answer_of(engine, prompt) == model.generate(prompt, 4)
        counts = apart.counts
        assert (counts.failed, counts.received, counts.computed_here) == (1, 1, 0)
    assert_empty(engine)


def wrong_answer(asked: Frame, engine: Engine, fault: str) -> Frame:
    if fault == "refuses":
        return error_answer(asked, ErrorCode.FAILED, "1024 prompts wait already")
    config = engine.config
    first, positions = (1, asked.counts[0] - 1) if fault == "leaves a gap" else (0, asked.counts[0] + 2)
    kv = torch.zeros(config.kv_heads, config.layers, positions, config.head_dim)
    return Frame(
        kind=Kind.KV,
        epoch=asked.epoch,
        session=asked.session,
        serial=asked.serial,
        step=first,
        counts=(config.kv_heads, positions, 0),
        dtype=whole_shape(engine).dtype,
        parts=(kv, kv),
    )


def test_kv_that_could_not_be_written_ends_the_next_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = random_prompts(14, 1, shortest=30)
    engine = pipeline_of(model.folder, *WHOLE)

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.stages[0].stage, "adopt", fails)
    with prefilling(pipeline_of(model.folder, *WHOLE)) as other, decoding(engine, other.port) as apart:
        wait_until(lambda: apart.num_up == 1)
        with pytest.raises(RuntimeError, match="out of memory"):
            answer_of(engine, prompt)


def test_jobs_are_begun_as_far_as_their_kv_may_wait_unsent(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_UNSENT_BYTES", 4096)  # less than a prompt has, more than an answer to a ping
    prompts = random_prompts(15, 3, shortest=30)
    engine = pipeline_of(model.folder, *WHOLE)
    with prefilling(pipeline_of(model.folder, *WHOLE)) as other, decoding(engine, other.port) as apart:
        wait_until(lambda: apart.num_up == 1)
        other.halt.set()
        numbers = [engine.add(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]
        while len(engine.running) < len(numbers):
            engine.step()
        wait_until(lambda: sum(len(caller.queue) for caller in other.service._callers) == 2)
        assert len(other.engine.waiting) + len(other.engine.running) == 1
        other.halt.clear()
        while engine.has_work:
            engine.step()
        assert apart.counts.received == 3


def test_two_ends_that_both_write_do_not_wait_for_each_other() -> None:
    """More is written both ways than buffers take; one of the two reads meanwhile."""
    body = torch.arange(16 << 20, dtype=torch.uint8)
    frames = [Frame(kind=Kind.KV, epoch=1, session=1, serial=serial, parts=(body,)) for serial in range(2)]
    with listen("127.0.0.1") as listener:
        here = TcpPipe.connect("127.0.0.1", listener.getsockname()[1], timeout_s=30, reads_ahead=True)
        there = TcpPipe(listener.accept()[0], "there")
    ends = [PipeChannel(pipe, stall_s=60) for pipe in (here, there)]
    came: list[list[Frame | None]] = [[], []]

    def both_ways(end: int) -> None:
        for frame in frames:
            ends[end].send([frame])
            came[end].append(ends[end].receive(60))

    thread = threading.Thread(target=both_ways, args=(1,))
    thread.start()
    both_ways(0)
    thread.join(60)
    for end in ends:
        end.close()
    heard = [[frame.serial for frame in own if frame is not None and frame.body.equal(body)] for own in came]
    assert heard == [[0, 1], [0, 1]]


def answer_of(engine: Engine, prompt: list[int]) -> list[int]:
    return generate(engine, [prompt], SamplingParams(max_tokens=4))[0].tokens
