"""The engine: it takes requests, runs steps, and owns the map from heads to devices.

A token counts only when its whole step is through. A step that fails is done again, or, where a device was lost, the
requests that had heads there are prefilled again: prompt and output so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.engine.news import TokenOutput
from hetis.runtime.engine.placement import HeadMove, Placement, even_costs
from hetis.runtime.engine.planning import plan_step
from hetis.runtime.engine.request import FinishReason, Logprob, Request, RequestError, SamplingParams
from hetis.runtime.engine.sampling import Sampler, sample
from hetis.runtime.engine.stage import Stage
from hetis.runtime.engine.step import Step
from hetis.runtime.engine.text import TextStream, Tokenizer
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.kv.shape import SequenceKey
from hetis.runtime.model.config import ModelConfig
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.dispatch.problem import Stage as StageCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What bounds a step.

    Attributes:
        most_running: requests that run at a time.
        chunk_tokens: prompt tokens that a step prefills at most.
        growth_tokens: output tokens that room is kept for when a request is admitted; more of it preempts less.
        max_tokens: longest context; None: the model's.
    """

    most_running: int = 64
    chunk_tokens: int = 1024
    growth_tokens: int = 64
    max_tokens: int | None = None


class Engine:
    """One replica in this process; not to be shared between threads."""

    def __init__(
        self,
        config: ModelConfig,
        stage: Stage,
        *,
        costs: StageCosts | None = None,
        options: EngineOptions | None = None,
        tokenizer: Tokenizer | None = None,
        epoch: int = 1,
    ) -> None:
        """``costs`` are of attention on the stage's devices, in their order; None: all of one speed.

        Without a ``tokenizer`` requests cannot have stop texts, and news have no text.
        """
        self.config, self.stage, self.epoch = config, stage, epoch
        self.options = options or EngineOptions()
        self.tokenizer = tokenizer
        self.max_tokens = min(self.options.max_tokens or config.max_tokens, config.max_tokens)
        devices = stage.devices
        shape = devices[0].shape
        heads = HeadShape(
            head_groups=config.kv_heads,
            queries_per_group=config.queries_per_group,
            kv_bytes_per_token=2 * shape.head_dim * shape.torch_dtype.itemsize,
            exchange_bytes_per_head=shape.head_dim * shape.torch_dtype.itemsize * (2 + 2 / shape.queries_per_group),
            block_tokens=shape.page_tokens,
        )
        costs = costs or even_costs(heads, [device.name for device in devices])
        self.placement = Placement(costs, [device.num_pages for device in devices])
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.num_steps = 0
        self.num_preempted = 0
        self.num_moved_heads = 0
        self.last_step: Step | None = None
        self._samplers: dict[int, Sampler] = {}
        self._texts: dict[int, TextStream] = {}
        self._lost: set[int] = set()
        self._next_number = 0
        self._news: list[TokenOutput] = []
        self.between_steps: list[Callable[[], None]] = []

    # --- requests

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a request; returns its number.

        Raises:
            RequestError: it is empty, has ids that are no tokens, or could not be served even alone.
        """
        params = params or SamplingParams()
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer, which this engine has not")
        bad = next((token for token in prompt if not 0 <= token < self.config.vocab), None)
        if not len(prompt) or bad is not None:
            what = f"has token {bad}, must be >= 0 and < {self.config.vocab}" if len(prompt) else "is empty"
            raise RequestError(f"the prompt {what}")
        if len(prompt) >= self.max_tokens:
            raise RequestError(f"the prompt has {len(prompt)} tokens, the context {self.max_tokens} with the output")
        most = min(params.max_tokens, self.max_tokens - len(prompt))
        # The last token is never attended to, so that its KV needs no room.
        if not self.placement.could_hold(len(prompt) + most - 1):
            raise RequestError(f"{len(prompt)} prompt and {most} output tokens need more KV pages than there are")
        request = Request(number=self._next_number, prompt=tuple(prompt), params=params, max_tokens=most)
        self._next_number += 1
        self._samplers[request.number] = Sampler(params)
        if self.tokenizer is not None:
            self._texts[request.number] = TextStream(self.tokenizer, params.stop, prompt=request.prompt)
        self.waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Ends a request; one that has ended already, or never was, is no error."""
        request = self.running.get(number) or next((r for r in self.waiting if r.number == number), None)
        if request is not None:
            self._end(request, FinishReason.CANCELLED)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._news)

    # --- steps

    def step(self) -> list[TokenOutput]:
        """Runs one step; returns what it brought. Nothing where there is nothing to do."""
        self._lose_devices()
        for work in self.between_steps:
            work()
        self._admit()
        self._make_room()
        requests = list(self.running.values())
        if requests:
            self._run(requests)
        news, self._news = self._news, []
        return news

    def _run(self, requests: list[Request]) -> None:
        step, wanted = plan_step(
            requests,
            epoch=self.epoch,
            number=self.num_steps,
            chunk_tokens=self.options.chunk_tokens,
            kv_heads=self.config.kv_heads,
        )
        self.last_step = step
        self.num_steps += 1
        try:
            logits = self.stage.run(step)
        except DeviceLostError as error:
            self.lose_device(self._device(error))
            return
        for chunk in step.chunks:
            request = self.running[chunk.request]
            request.computed = chunk.first + chunk.count
            if chunk.is_last:
                self.stage.forget_prompt(chunk.request, chunk.incarnation)
        for number in step.requests.tolist():
            self.running[number].computed += 1
        samplers = [self._samplers[request.number] for request in wanted]
        tokens, logprobs = sample(logits, samplers, [request.params for request in wanted])
        for request, token, logprob in zip(wanted, tokens, logprobs, strict=True):
            self._take(request, token, logprob)

    def _take(self, request: Request, token: int, logprob: Logprob | None) -> None:
        request.output.append(token)
        if logprob is not None:
            request.logprobs.append(logprob)
        params = request.params
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self.config.eos)
        reason, text, stream = None, "", self._texts.get(request.number)
        if token in ends:
            reason = FinishReason.STOP
        elif stream is not None:
            text = stream.push(token)
            if stream.is_stopped:
                reason = FinishReason.STOP
        if reason is None and len(request.output) >= request.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            self._news.append(TokenOutput(request=request.number, token=token, text=text, logprob=logprob))
        else:
            self._end(request, reason, token=token, text=text, logprob=logprob)

    # --- who runs

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.options.most_running:
            request = self.waiting[0]
            remaining = request.max_tokens - len(request.output)
            heads = self.placement.admit(
                request.number,
                tokens=request.num_tokens,
                growth=min(remaining, self.options.growth_tokens),
            )
            if heads is None:
                if not self.running:  # nobody will make room for it: devices were lost since it came
                    self._end(request, FinishReason.ERROR, error="the devices that are left have too few KV pages")
                    continue
                return
            self.waiting.popleft()
            request.heads, request.prefill_tokens = heads, request.num_tokens
            self.running[request.number] = request

    def _make_room(self) -> None:
        """A page for the next position of everyone who decodes: heads leave a full device, then the youngest waits."""
        decoding = [r for r in self.running.values() if not r.is_prefilling]
        stuck = list(self.placement.grow(r.number for r in decoding if self.placement.tokens(r.number) <= r.computed))
        while stuck:
            number = stuck.pop(0)
            while number in self.running and self.placement.grow([number]):
                if not (self._give_way(number) or self._move_away(number)):
                    self.preempt(self._youngest_on(self.placement.full_devices(number)).number)

    def _give_way(self, number: int) -> bool:
        """Takes back moves that hold pages which a request needs to grow: nothing is lost with them."""
        full = self.placement.full_devices(number)
        moves = [m for m in self.placement.moves if m.request == number or m.target in full]
        for move in moves:
            self.abort_move(move)
        return bool(moves)

    def _youngest_on(self, devices: tuple[int, ...]) -> Request:
        return next(r for r in reversed(self.running.values()) if set(devices) & set(r.heads))

    def _move_away(self, number: int) -> bool:
        """Moves one head of a request from a full device to one with room for it and its growth."""
        request = self.running[number]
        free = self.placement.state.free_blocks()
        pages = self.stage.shape.pages(request.computed + 1)
        held = [request.heads.count(device) for device in range(len(free))]
        takes = {i for i, d in enumerate(self.placement.state.devices) if d.status == "ok"}
        for source in self.placement.full_devices(number):
            targets = [i for i in takes - {source} if free[i] >= pages + held[i]]
            if targets:
                target = max(targets, key=lambda i: int(free[i]))
                head = next(h for h, owner in enumerate(request.heads) if owner == source)
                return self.move(number, [head], target)
        return False

    def preempt(self, number: int) -> None:
        """A running request gives up its KV, and is prefilled again before anyone who came later."""
        request = self.running.pop(number)
        self._release(request)
        request.lose_kv()
        request.num_preempted += 1
        self.num_preempted += 1
        self.waiting.appendleft(request)

    # --- heads

    def move(self, number: int, heads: Sequence[int], target: int) -> bool:
        """Moves heads of a running request, now, between two steps; False: the target has too few pages.

        Raises:
            InvalidProblemError: the heads are on several devices, or the target takes none.
        """
        request = self.running[number]
        move = self.placement.prepare(number, heads, target)
        if move is None:
            return False
        if not self.copy(move, 0, request.computed):
            return False
        self.flip([move])
        return True

    def copy(self, move: HeadMove, first: int, last: int) -> bool:
        """Copies positions ``first`` to ``last - 1`` of a prepared move; False: a device was lost meanwhile."""
        if first >= last:
            return True
        source, target = self.stage.devices[move.source], self.stage.devices[move.target]
        incarnation = self.running[move.request].incarnation
        try:
            k, v = source.export(move.request, incarnation, move.heads, first, last)
            target.adopt(move.request, incarnation, move.heads, first, k, v)
        except DeviceLostError as error:
            self.lose_device(self._device(error))  # which aborts the move, wherever it was
            return False
        return True

    def verify(self, move: HeadMove) -> bool:
        """Whether both ends hold the same KV, all positions and layers, bit for bit; False also for a device lost."""
        request = self.running[move.request]
        if not request.computed:
            return True  # its prompt has not begun: neither end holds anything
        try:
            theirs, ours = (
                self.stage.devices[device].digest(move.request, request.incarnation, move.heads, request.computed)
                for device in (move.source, move.target)
            )
        except DeviceLostError as error:
            self.lose_device(self._device(error))
            return False
        return bool((theirs == ours).all())

    def flip(self, moves: Sequence[HeadMove]) -> None:
        """The targets, which have all the KV, own the heads from the next step on; the sources free theirs.

        Between two steps only. This is where moves are committed, and the only place.
        """
        self.placement.commit(*moves)
        for move in moves:
            request = self.running[move.request]
            request.heads = self.placement.heads(move.request)
            self.num_moved_heads += len(move.heads)
            self._drop(request, move.heads, move.source)

    def abort_move(self, move: HeadMove) -> None:
        """The heads stay where they are, and what was copied is dropped. A move that has ended is no error."""
        if self.placement.is_under_way(move):
            self.placement.abort(move)
            self._drop(self.running[move.request], move.heads, move.target)

    def lose_device(self, device: int) -> None:
        """A device is gone: the requests that had heads there are prefilled again, in their order.

        Raises:
            DeviceLostError: it is the primary, without which there is no replica.
        """
        if device == 0:
            raise DeviceLostError(self.stage.devices[0].name, "the primary is lost, and the replica with it")
        self._lost.discard(device)
        for move in [move for move in self.placement.moves if move.target != device]:
            if device in self.running[move.request].heads:
                self.abort_move(move)
        hit = [self.running.pop(number) for number in self.placement.lose(device)]
        for request in sorted(hit, key=lambda r: r.number, reverse=True):
            self._drop_all(request, but=device)
            request.lose_kv()
            self.waiting.appendleft(request)

    def restore_device(self, index: int, device: AttentionDevice) -> None:
        """A device with nothing in it takes the place of one that was lost, with as many pages."""
        self.stage.devices[index] = device
        self.placement.restore(index)

    def _lose_devices(self) -> None:
        """Those that failed where nothing could be done about it."""
        for device in sorted(self._lost):
            self.lose_device(device)

    def _device(self, error: DeviceLostError) -> int:
        return next(i for i, device in enumerate(self.stage.devices) if device.name == error.device)

    # --- ends

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        token: int | None = None,
        text: str = "",
        logprob: Logprob | None = None,
        error: str = "",
    ) -> None:
        if request.number in self.running:
            self._release(request)
            del self.running[request.number]
        else:
            self.waiting.remove(request)
        del self._samplers[request.number]
        stream = self._texts.pop(request.number, None)
        if stream is not None:
            text += stream.end()
        request.finish_reason, request.error = reason, error
        self._news.append(
            TokenOutput(
                request=request.number, token=token, text=text, logprob=logprob, finish_reason=reason, error=error
            )
        )

    def _release(self, request: Request) -> None:
        for move in self.placement.moves:
            if move.request == request.number:
                self._drop(request, move.heads, move.target)
        self.placement.release(request.number)
        self._drop_all(request)

    def _drop_all(self, request: Request, *, but: int | None = None) -> None:
        self.stage.forget_prompt(request.number, request.incarnation)
        for device in sorted(set(request.heads) - {but}):
            self._drop(request, [head for head, owner in enumerate(request.heads) if owner == device], device)

    def _drop(self, request: Request, heads: Sequence[int], device: int) -> None:
        try:
            self.stage.devices[device].drop([SequenceKey(request.number, request.incarnation, head) for head in heads])
        except DeviceLostError:
            self._lost.add(device)
