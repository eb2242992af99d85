"""The engine: it takes requests, runs steps, and owns the map from heads to devices.

A token counts only when its whole step is through. A step that fails is done again, or, where a device was lost, the
requests that had heads there are prefilled again: prompt and output so far.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.engine.news import TokenOutput
from hetis.runtime.engine.part import PipelineStage
from hetis.runtime.engine.pipeline import Flight, Pipeline, paths_of
from hetis.runtime.engine.placement import Placement
from hetis.runtime.engine.planning import plan_steps
from hetis.runtime.engine.request import (
    DevicesAwayError,
    FinishReason,
    Logprob,
    Request,
    RequestError,
    SamplingParams,
)
from hetis.runtime.engine.sampling import Sampler, sample
from hetis.runtime.engine.seats import Seats
from hetis.runtime.engine.stage import Stage
from hetis.runtime.engine.step import Step
from hetis.runtime.engine.text import TextStream, Tokenizer
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.model.config import ModelConfig
from hetis.solver.dispatch.problem import Stage as StageCosts
from hetis.solver.dispatch.snapshot import DeviceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What bounds a step.

    Attributes:
        most_running: requests that run at a time.
        chunk_tokens: prompt tokens that a step prefills at most.
        growth_tokens: output tokens that room is kept for when a request is admitted; more of it preempts less.
        max_tokens: longest context; None: the model's.
        in_flight: cohorts of requests that take their steps apart from each other; at least one for each copy of a
            stage, whatever is said here.
        patience_s: for so long after a device was lost it is expected back: requests that cannot do without it wait.
    """

    most_running: int = 64
    chunk_tokens: int = 1024
    growth_tokens: int = 64
    max_tokens: int | None = None
    in_flight: int = 1
    patience_s: float = 0.0


class Engine(Seats):
    """One replica, driven by this process; not to be shared between threads."""

    def __init__(
        self,
        config: ModelConfig,
        stages: PipelineStage | Sequence[PipelineStage],
        *,
        costs: StageCosts | Sequence[StageCosts] | None = None,
        options: EngineOptions | None = None,
        tokenizer: Tokenizer | None = None,
        epoch: int = 1,
        overlaps: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stages`` have all layers of the model; those with the same layers are copies of one stage.

        ``costs`` are of attention on each stage's devices, in their order; None: all of one speed. Without a
        ``tokenizer`` requests cannot have stop texts, and news have no text. With ``overlaps`` every stage works in a
        thread of its own, on the step of another cohort than the others: of use where stages are processes.

        Raises:
            PipelineError: layers are missing, or in two stages that are no copies.
        """
        self.config, self.epoch = config, epoch
        self.options = options or EngineOptions()
        self.tokenizer = tokenizer
        self.max_tokens = min(self.options.max_tokens or config.max_tokens, config.max_tokens)
        given = list(stages) if isinstance(stages, Sequence) else [stages]
        own = [costs] * len(given) if costs is None or isinstance(costs, StageCosts) else costs
        pairs = enumerate(zip(given, own, strict=True))
        parts = [StageHeads(i, stage, cost, overlaps=overlaps) for i, (stage, cost) in pairs]
        super().__init__(
            parts,
            paths_of(parts, config.layers, least=self.options.in_flight),
            most_running=self.options.most_running,
            growth_tokens=self.options.growth_tokens,
            patience_s=self.options.patience_s,
            clock=clock,
        )
        for part in self.stages:
            part.prompts.most_tokens = self.longest() + self.options.chunk_tokens
        self.num_steps = 0
        self.last_steps: Sequence[Step] = ()
        self._samplers: dict[int, Sampler] = {}
        self._texts: dict[int, TextStream] = {}
        self._pipeline, self._overlaps = Pipeline(), overlaps
        self._cancelled: set[int] = set()
        self._turn = 0
        self._next_number = 0
        self._news: list[TokenOutput] = []
        self.between_steps: list[Callable[[], None]] = []
        self.on_prefilled: Callable[[Request, int], None] | None = None

    @property
    def stage(self) -> Stage:
        """The first stage, in this process; of an engine without a pipeline, the only one."""
        stage = self.stages[0].stage
        assert isinstance(stage, Stage), "the first stage is a process of its own"
        return stage

    @property
    def placement(self) -> Placement:
        """Where heads live on the first stage."""
        return self.stages[0].placement

    @property
    def last_step(self) -> Step | None:
        """The last step as the first stage saw it; None: there was none."""
        return self.last_steps[0] if self.last_steps else None

    # --- requests

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a request; returns its number.

        Raises:
            RequestError: it is empty, has ids that are no tokens, or could not be served even alone by all devices.
            DevicesAwayError: its prompt does not fit without devices that are gone.
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
        if not self.could_hold(len(prompt) + most - 1):
            raise RequestError(f"{len(prompt)} prompt and {most} output tokens need more KV pages than there are")
        self.absences.look()
        if not self.could_hold(len(prompt), without=self.absences.gone):
            raise DevicesAwayError(self.absences.why())
        request = Request(number=self._next_number, prompt=tuple(prompt), params=params, max_tokens=most)
        self._next_number += 1
        self._samplers[request.number] = Sampler(params)
        if self.tokenizer is not None:
            self._texts[request.number] = TextStream(self.tokenizer, params.stop, prompt=request.prompt)
        self.waiting.append(request)
        return request.number

    def longest(self) -> int:
        """Prompt and output tokens that a request may have where it is alone: by the context and the KV of all devices,
        whether these are there now or not."""
        held = range(1, self.max_tokens)
        return bisect_left(held, True, key=lambda tokens: not self.could_hold(tokens)) + 1

    def cancel(self, number: int) -> None:
        """Ends a request; one that has ended already, or never was, is no error."""
        request = self.running.get(number) or next((r for r in self.waiting if r.number == number), None)
        if request is None:
            return
        if number in self.running and self._pipeline.is_flying(request):
            self._cancelled.add(number)  # when its step has landed
        else:
            self._end(request, FinishReason.CANCELLED)

    def expected_tokens(self, number: int) -> int:
        """Output tokens that a running request is still expected to make.

        Its rest, where nothing else can end it; else no more than what room is kept for when one comes.
        """
        request = self.running[number]
        rest, params = request.max_tokens - len(request.output), request.params
        has_other_ends = not params.ignore_eos or params.stop or params.stop_token_ids
        return min(rest, self.options.growth_tokens) if has_other_ends else rest

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._news)

    @property
    def only_waits(self) -> bool:
        """All there is to do is to wait for devices that are away: steps bring nothing until one of them is back."""
        return self.has_work and not (self.running or self._news) and all(r.number in self.aside for r in self.waiting)

    # --- steps

    def step(self) -> list[TokenOutput]:
        """Sends the step of every cohort on its way that is not, and waits for one; returns what has landed.

        Where stages do not overlap this is one step of one cohort. Nothing where there is nothing to do.
        """
        self.lose_failed()
        self.tend()
        for request in self.admit():
            self._end(request, FinishReason.UNAVAILABLE, error=self.absences.why())
        for cohort in self._idle_cohorts():
            self.make_room(self._cohort(cohort))
            requests = [request for request in self._cohort(cohort) if not request.awaits_kv]
            if requests and cohort not in self._pipeline.cohorts:
                self._launch(cohort, requests)
        if len(self._pipeline):
            self._land()
        elif self.running and self.elsewhere is not None and not self._news:
            self.elsewhere.wait()
        while self._pipeline.has_landed():
            self._land()
        news, self._news = self._news, []
        return news

    def tend(self) -> None:
        """What is due between two steps. Every step does it: to be called where none is made, for changes of the head
        map would stay half made when their requests have ended."""
        for work in self.between_steps:
            work()

    def settle(self, request: Request | None = None) -> bool:
        was_flying = bool(len(self._pipeline) if request is None else self._pipeline.is_flying(request))
        while was_flying and len(self._pipeline):
            self._land()
        if request is None:
            for part in self.stages:
                part.settle()
        return was_flying

    def close(self) -> None:
        """Ends the threads and connections of the stages; requests that are left are forgotten."""
        for part in self.stages:
            part.close()

    def _cohort(self, number: int) -> list[Request]:
        return [request for request in self.running.values() if request.cohort == number]

    def _idle_cohorts(self) -> list[int]:
        """Cohorts with requests and no step on its way, in turn: all of them, or one where stages do not overlap."""
        some = {request.cohort for request in self.running.values() if not request.awaits_kv} - set(
            self._pipeline.cohorts
        )
        turns = [(self._turn + i) % len(self.paths) for i in range(len(self.paths))]
        idle = [cohort for cohort in turns if cohort in some][: None if self._overlaps else 1]
        if idle:
            self._turn = (idle[-1] + 1) % len(self.paths)
        return idle

    def _launch(self, cohort: int, requests: list[Request]) -> None:
        path = self.paths[cohort]
        steps, wanted = plan_steps(
            requests,
            epoch=self.epoch,
            number=self.num_steps,
            chunk_tokens=self.options.chunk_tokens,
            stages={part.number: len(part.stage.homes) for part in path},
            may_prefill=self.may_prefill,
        )
        if not len(steps[0].tokens):
            return  # prompts that wait for those of other cohorts
        self.last_steps = steps
        self.num_steps += 1
        self._pipeline.launch(Flight(cohort=cohort, path=path, steps=steps, wanted=wanted))

    def _land(self) -> None:
        """Takes what one step brought. Nothing of a step that failed counts: it is done again."""
        flight = self._pipeline.land()
        if flight.failed is not None:
            part, error = flight.failed
            if not isinstance(error, DeviceLostError):
                raise error
            device = part.device(error)
            if part.placement.state.devices[device].status is not DeviceStatus.LOST:
                part.lost.add(device)
        else:
            self._count(flight)
        for number in [request.number for request in self._cohort(flight.cohort) if request.number in self._cancelled]:
            self._end(self.running[number], FinishReason.CANCELLED)

    def _count(self, flight: Flight) -> None:
        """The positions of a step that is through all stages are held, and its tokens are output."""
        assert flight.output is not None, "it did not fail"
        step = flight.steps[0]
        for chunk in step.chunks:
            request = self.running[chunk.request]
            request.computed = chunk.first + chunk.count
            if self.on_prefilled is not None:
                self.on_prefilled(request, chunk.first)
            if chunk.is_last:
                for part in flight.path:
                    part.forget_prompt(chunk.request, chunk.incarnation)
        for number in step.requests.tolist():
            self.running[number].computed += 1
        tokens, logprobs = self._sample(flight.output, flight.wanted, is_greedy=step.is_greedy)
        for request, token, logprob in zip(flight.wanted, tokens, logprobs, strict=True):
            self._take(request, token, logprob)

    def _sample(
        self, output: torch.Tensor, wanted: Sequence[Request], *, is_greedy: bool
    ) -> tuple[list[int], list[Logprob | None]]:
        if is_greedy:
            return output.tolist(), [None] * len(wanted)
        return sample(output, [self._samplers[r.number] for r in wanted], [r.params for r in wanted])

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
            self.release(request)
            del self.running[request.number]
        elif request in self.waiting:
            self.waiting.remove(request)
        del self._samplers[request.number]
        self._cancelled.discard(request.number)
        stream = self._texts.pop(request.number, None)
        if stream is not None:
            text += stream.end()
        request.finish_reason, request.error = reason, error
        self._news.append(
            TokenOutput(
                request=request.number, token=token, text=text, logprob=logprob, finish_reason=reason, error=error
            )
        )
