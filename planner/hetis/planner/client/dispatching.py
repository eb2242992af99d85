"""A `DispatchRequests` stream: an engine's messages between two steps, at a much lower cost than single calls.

An engine keeps one per replica. A broken stream raises `CallError` and cannot be used further. Open another one; after
DISPATCH_STATE_LOST, first declare again what is running.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc

from hetis.planner.client.connection import DISPATCH_DEADLINE_S
from hetis.planner.client.errors import CallError, call_error
from hetis.planner.failures import code_of_reason
from hetis.v1 import dispatch_service_pb2 as pb
from hetis.v1 import failure_pb2

_log = logging.getLogger(__name__)
MOST_TOGETHER = 256  # requests of one kind in a message that combines several steps; the planner accepts 1,024


@dataclass(slots=True, eq=False)
class _Step:
    message: pb.DispatchRequestsRequest
    answer: asyncio.Future[pb.DispatchRequestsResponse]


class AsyncDispatchStream:
    """A dispatch stream for asyncio; made by `AsyncClient.dispatch_stream`, and opened with the first step.

    Steps made while another one is under way share the next message, so that many concurrent tasks cost the planner one
    solve. Steps that name the same request are sent one by one.
    """

    def __init__(self, call: Any, replica: str, state_id: str) -> None:
        """``call``: the stream, as opened by gRPC for asyncio."""
        self._call, self._replica, self._state_id = call, replica, state_id
        self._waiting = list[_Step]()
        self._sending: asyncio.Task[None] | None = None
        self._sequence = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def step(
        self,
        *,
        finished: Sequence[str] = (),
        grown: Sequence[pb.Growth] = (),
        new: Sequence[pb.NewRequest] = (),
        timeout: float = DISPATCH_DEADLINE_S,
    ) -> pb.DispatchRequestsResponse:
        """Finish, grow and admit requests, in this order.

        Raises:
            CallError: nothing was done, or the stream broke and it may have been; DEADLINE_EXCEEDED after ``timeout``,
                in which case the stream continues, and a step that was still waiting is not sent.
        """
        message = pb.DispatchRequestsRequest(
            parent=self._replica, state_id=self._state_id, finished=finished, grown=grown, new_requests=new
        )
        step = _Step(message, asyncio.get_running_loop().create_future())
        self._waiting.append(step)
        if self._sending is None:
            self._sending = asyncio.ensure_future(self._send())
        try:
            async with asyncio.timeout(timeout):
                return await step.answer
        except TimeoutError:
            raise _is_late(timeout) from None

    async def close(self) -> None:
        """End the stream; pending steps fail."""
        self._call.cancel()
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    async def _send(self) -> None:
        steps = list[_Step]()
        try:
            while self._waiting:
                steps = self._next_steps()
                if not steps:
                    break
                answer = await self._exchange(_joined([step.message for step in steps]))
                if answer.HasField("failure") and len(steps) > 1:
                    for step in steps:  # one of them caused the failure: send each on its own
                        _settle(step, await self._exchange(step.message))
                    continue
                for step in steps:
                    _settle(step, answer if len(steps) == 1 else _part_of(answer, step.message))
        except (Exception, asyncio.CancelledError) as error:
            # From gRPC: an error status; an orderly end; `close` while waiting for an answer; a write after either.
            failed = call_error(error) if isinstance(error, grpc.RpcError) else _has_ended()
            if not isinstance(error, (grpc.RpcError, CallError, asyncio.CancelledError, asyncio.InvalidStateError)):
                _log.error("a dispatch stream failed, and is ended", exc_info=error)
                self._call.cancel()  # its next answer could be mistaken for that of another step
                failed.__cause__ = error
            for step in (*steps, *self._waiting):
                if not step.answer.done():
                    step.answer.set_exception(failed)
            self._waiting.clear()
        finally:
            self._sending = None

    def _next_steps(self) -> list[_Step]:
        """Take as many waiting steps as may share a message, and drop abandoned ones."""
        steps, names = list[_Step](), set[str]()
        while self._waiting:
            if self._waiting[0].answer.done():
                self._waiting.pop(0)
                continue
            message = self._waiting[0].message
            its_names = {
                *message.finished,
                *(one.id for one in message.new_requests),
                *(one.id for one in message.grown),
            }
            if steps and (len(names) + len(its_names) > MOST_TOGETHER or not names.isdisjoint(its_names)):
                break
            steps.append(self._waiting.pop(0))
            names |= its_names
        return steps

    async def _exchange(self, message: pb.DispatchRequestsRequest) -> pb.DispatchRequestsResponse:
        self._sequence += 1
        message.sequence = self._sequence
        await self._call.write(message)
        answer = await self._call.read()
        if not isinstance(answer, pb.DispatchRequestsResponse):  # the end of the stream
            raise _has_ended()
        return answer


class DispatchStream:
    """A dispatch stream for code without an event loop; steps of several threads are serialised."""

    def __init__(self, open_stream: Any, replica: str, state_id: str) -> None:
        """``open_stream``: takes an iterator of requests and returns one of answers, as gRPC's callables do."""
        self._replica, self._state_id = replica, state_id
        self._lock = threading.Lock()
        self._messages = queue.SimpleQueue[pb.DispatchRequestsRequest | None]()
        self._answers = queue.SimpleQueue[pb.DispatchRequestsResponse | CallError]()
        self._sequence = 0
        self._call = open_stream(self._requests())
        threading.Thread(target=self._read, name="hetis dispatch stream", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(
        self,
        *,
        finished: Sequence[str] = (),
        grown: Sequence[pb.Growth] = (),
        new: Sequence[pb.NewRequest] = (),
        timeout: float = DISPATCH_DEADLINE_S,
    ) -> pb.DispatchRequestsResponse:
        """Finish, grow and admit requests, in this order.

        Raises:
            CallError: nothing was done, or the stream broke and it may have been; DEADLINE_EXCEEDED after ``timeout``,
                in which case the stream continues, and a step that was still waiting for others is not sent.
        """
        message = pb.DispatchRequestsRequest(
            parent=self._replica, state_id=self._state_id, finished=finished, grown=grown, new_requests=new
        )
        end_s = time.monotonic() + timeout
        if not self._lock.acquire(timeout=max(0.0, timeout)):
            raise _is_late(timeout)
        try:
            answer = self._exchange(message, end_s)
        except queue.Empty:
            raise _is_late(timeout) from None
        finally:
            self._lock.release()
        if answer.HasField("failure"):
            raise _error_of(answer.failure)
        return answer

    def close(self) -> None:
        """End the stream; a pending step fails."""
        self._messages.put(None)
        self._call.cancel()

    def _exchange(self, message: pb.DispatchRequestsRequest, end_s: float) -> pb.DispatchRequestsResponse:
        """Send a message and return its answer. Raises CallError, or ``queue.Empty`` at ``end_s``."""
        self._sequence = message.sequence = self._sequence + 1
        self._messages.put(message)
        while True:
            answer = self._answers.get(timeout=max(0.0, end_s - time.monotonic()))
            if isinstance(answer, CallError):
                self._answers.put(answer)  # for the next step too
                raise answer
            if answer.sequence == self._sequence:  # otherwise the answer belongs to a step that timed out
                return answer

    def _requests(self) -> Iterator[pb.DispatchRequestsRequest]:
        while (message := self._messages.get()) is not None:
            yield message

    def _read(self) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
            self._answers.put(_has_ended())
        except grpc.RpcError as error:
            self._answers.put(call_error(error))


def _joined(messages: Sequence[pb.DispatchRequestsRequest]) -> pb.DispatchRequestsRequest:
    if len(messages) == 1:
        return messages[0]
    whole = pb.DispatchRequestsRequest()
    for message in messages:
        whole.MergeFrom(message)
    return whole


def _part_of(answer: pb.DispatchRequestsResponse, message: pb.DispatchRequestsRequest) -> pb.DispatchRequestsResponse:
    """Return the part of a combined answer that concerns one message; the quality is that of the whole answer."""
    new, grown = {one.id for one in message.new_requests}, {one.id for one in message.grown}
    placements = [one for one in answer.placements if one.request in new]
    return pb.DispatchRequestsResponse(
        sequence=answer.sequence,
        stalled=[one for one in answer.stalled if one in grown],
        placements=placements,
        unplaced=[one for one in answer.unplaced if one.request in new],
        stages=answer.stages if placements else (),
    )


def _settle(step: _Step, answer: pb.DispatchRequestsResponse) -> None:
    if step.answer.done():
        return  # the caller no longer waits
    if answer.HasField("failure"):
        step.answer.set_exception(_error_of(answer.failure))
    else:
        step.answer.set_result(answer)


def _error_of(failure: failure_pb2.Failure) -> CallError:
    """Return the error as if the failure had arrived as a gRPC status."""
    name = failure_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    return CallError(
        failure.message,
        code=code_of_reason(failure.reason),
        reason=name,
        metadata=failure.metadata,
        violations=failure.field_violations,
    )


def _has_ended() -> CallError:
    return CallError("the dispatch stream has ended", code=grpc.StatusCode.CANCELLED)


def _is_late(timeout_s: float) -> CallError:
    return CallError(f"no answer within {timeout_s:g} s", code=grpc.StatusCode.DEADLINE_EXCEEDED)
