"""Requests come, end, make room and move in any order, devices go and come back: pages are conserved, heads have one
owner, and the text is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetis.runtime.attention.device import DeviceStep, Ready
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.request import FinishReason, SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.kv.shape import KvShape, SequenceKey
from hetis.runtime.model.decoder import Decoder
from tests.runtime.checkpoints import Model, random_model, random_prompts

TOKENS = 20
PROMPTS = random_prompts(11, 6, shortest=1, longest=40)
DEVICES = 3
PAGES = (34, 25, 16)  # the longest request fits on all of them, and barely: without one it has to wait


@cache
def model() -> Model:
    return random_model("qwen2", seed=4)


@cache
def decoder() -> Decoder:
    return Decoder.from_folder(model().folder)


class FragileDevice(LocalDevice):
    """A device that can be lost, after any number of further calls."""

    def __init__(self, name: str, shape: KvShape, num_pages: int) -> None:
        super().__init__(name, shape, num_pages)
        self.calls_left: int | None = None

    def _call(self) -> None:
        if self.calls_left == 0:
            raise DeviceLostError(self.name, "it was taken away")
        if self.calls_left is not None:
            self.calls_left -= 1

    def begin(self, step: DeviceStep) -> None:
        self._call()
        super().begin(step)

    def attend(self, layer: int, qkv: torch.Tensor) -> Ready:
        self._call()
        return super().attend(layer, qkv)

    def finish(self, number: int) -> None:
        self._call()
        super().finish(number)

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        self._call()
        super().drop(keys)

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._call()
        return super().export(request, incarnation, heads, first, last)

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._call()
        super().adopt(request, incarnation, heads, first, k, v)


class EngineStates(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        shape = kv_shape(decoder().config, decoder().layers, page_tokens=4, dtype="float32")
        self.devices = [FragileDevice(f"d{i}", shape, pages) for i, pages in enumerate(PAGES)]
        options = EngineOptions(most_running=4, chunk_tokens=16, growth_tokens=4, patience_s=float("inf"))
        self.engine = Engine(decoder().config, Stage(decoder(), self.devices), options=options)
        self.prompts: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), tokens=st.sampled_from([1, 5, TOKENS, TOKENS]))
    @precondition(lambda self: len(self.answers) - len(self.ended) < 6)
    def add(self, prompt: int, tokens: int) -> None:
        number = self.engine.add(PROMPTS[prompt], SamplingParams(max_tokens=tokens))
        self.prompts[number], self.answers[number] = prompt, []

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            for news in self.engine.step():
                if news.token is not None:
                    self.answers[news.request].append(news.token)
                if news.finish_reason is not None:
                    self.ended[news.request] = news.finish_reason

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.engine.running)
    def cancel(self, which: int) -> None:
        self.engine.cancel(list(self.engine.running)[which % len(self.engine.running)])

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.engine.running)
    def preempt(self, which: int) -> None:
        self.engine.preempt(list(self.engine.running)[which % len(self.engine.running)])

    @rule(which=st.integers(0, 9), head=st.integers(0, 3), many=st.integers(1, 4), further=st.integers(1, DEVICES - 1))
    @precondition(lambda self: self.engine.running)
    def move(self, which: int, head: int, many: int, further: int) -> None:
        """Some of the heads that are where ``head`` is go to another device."""
        self.step(1)
        if not self.engine.running:
            return
        request = self.engine.running[list(self.engine.running)[which % len(self.engine.running)]]
        owner = request.heads[0][head]
        heads = [other for other, device in enumerate(request.heads[0]) if device == owner][:many]
        to = (owner + further) % DEVICES
        if self.engine.placement.state.devices[to].status == "ok":
            self.engine.move(request.number, heads, to)

    @rule(device=st.integers(1, DEVICES - 1), calls=st.integers(0, 30))
    def take_away(self, device: int, calls: int) -> None:
        if self.engine.placement.state.devices[device].status == "ok":
            self.devices[device].calls_left = calls

    @rule(device=st.integers(1, DEVICES - 1))
    def bring_back(self, device: int) -> None:
        if self.engine.placement.state.devices[device].status == "lost":
            fresh = FragileDevice(f"d{device}", self.devices[device].shape, PAGES[device])
            self.devices[device] = fresh
            self.engine.restore_device(device, fresh)

    @invariant()
    def everything_has_one_owner(self) -> None:
        placement = self.engine.placement
        placement.check_invariants()
        assert set(placement.requests) == set(self.engine.running)
        held = [set(device.pool.sequences) for device in self.devices]
        for request in self.engine.running.values():
            assert request.heads[0] == placement.heads(request.number)
            for head, owner in enumerate(request.heads[0]):
                key = SequenceKey(request.number, request.incarnation, head)
                if request.computed and self.devices[owner].calls_left != 0:
                    assert self.devices[owner].pool.tokens(key) >= request.computed
                    assert [key in keys for keys in held] == [device == owner for device in range(DEVICES)]

    @invariant()
    def pages_are_conserved(self) -> None:
        alive = {(r.number, r.incarnation) for r in self.engine.running.values()}
        for device in self.devices:
            if device.calls_left is None:
                device.pool.check_invariants()
                assert {(key.request, key.incarnation) for key in device.pool.sequences} <= alive
        assert set(self.engine.stage.prompts) <= alive

    @invariant()
    def prompts_outside_the_pages_are_few(self) -> None:
        """They are counted while they are kept, in the middle of a step too: docs/runtime.md, "Room"."""
        book, running = self.engine.stages[0].prompts, self.engine.running
        kept = [running[number].prefill_tokens for number, _ in self.engine.stage.prompts]
        assert sum(kept) <= book.tokens <= book.most_tokens == self.engine.longest() + 16

    @invariant()
    def the_text_is_right(self) -> None:
        for number, answer in self.answers.items():
            assert answer == model().generate(PROMPTS[self.prompts[number]], TOKENS)[: len(answer)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(600):
            if not self.engine.has_work:
                break
            self.step(1)
            for device in range(1, DEVICES):
                self.bring_back(device)
            self.everything_has_one_owner()
        self.the_text_is_right()
        assert self.ended.keys() == self.answers.keys()
        assert FinishReason.UNAVAILABLE not in self.ended.values()
        for device in self.devices:
            if device.calls_left is None:
                assert device.pool.free_pages == device.num_pages


EngineStates.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestEngineStates = EngineStates.TestCase
