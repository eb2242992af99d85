"""Handling of calls around their servicers: identity, deadline, errors, telemetry."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from hetis.commands.endpoints import STREAM_OPEN
from hetis.planner.callers import ANYBODY, Identity, present_caller, set_present_caller
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service import statuses
from hetis.planner.service.audit_refusals import NOT_KEPT
from hetis.planner.service.identity.credentials import Authenticator
from hetis.planner.service.limits import CallLimits, WriteRates
from hetis.planner.service.methods import CONNECT, WRITES, has_role, is_open, require_role
from hetis.planner.service.observability.telemetry import CallRecord, Telemetry
from hetis.planner.store import AuditedChange

_log = logging.getLogger("hetis.planner.calls")
_CHANGE_WAITS_S = 5.0  # how long a change waits for a term that begins; its caller gives up after 10 s
_MESSAGE_S, _OPEN_MESSAGE_S = 30.0, 5.0  # how long a call may be without its message; the latter without credentials
DEADLINE_SLACK_S = 0.05
"""A call cancelled this close to its deadline was ended by it, since the caller's clock may be slightly ahead."""
Handler = Any  # grpc.RpcMethodHandler and ServicerContext, whose types in gRPC both amount to Any here
Context = Any
Decode = Callable[[bytes], Message]


class Calls(grpc.aio.ServerInterceptor):
    """The only interceptor, so that a call costs one wrapper: identity, role, deadline, errors, telemetry, drain."""

    def __init__(self, authenticator: Authenticator, telemetry: Telemetry, *, writes: WriteRates | None = None) -> None:
        self._authenticator = authenticator
        self._writes = writes or WriteRates()
        self._telemetry = telemetry
        self._wrapped: dict[str, Handler] = {}
        self._limits = CallLimits()
        # The method of each stream, its context, and its caller when it began.
        self._streams: dict[asyncio.Task[None], tuple[str, Context, Identity]] = {}
        self._num_unary = 0
        self._unary_done = asyncio.Event()
        self._unary_done.set()
        self._ended = dict[asyncio.Task[None], ServiceError]()
        self.is_draining = False
        self._require_leader: Callable[[str], None] = lambda _method: None
        self._on_refusal: Callable[[AuditedChange], None] = lambda _change: None
        self._until_begun: Callable[[bool], Awaitable[None]] | None = None

    def answer_for(
        self,
        *,
        require_leader: Callable[[str], None],
        on_refusal: Callable[[AuditedChange], None],
        until_begun: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """Set the planner for which calls are answered from now on.

        Args:
            require_leader: raises NOT_LEADER if the planner may not answer a method now.
            on_refusal: called with every change that was refused.
            until_begun: waits for the end of a beginning that is under way or near, for a limited time; agents, and
                changes before them (true), that come meanwhile wait for it.
        """
        self._require_leader, self._on_refusal, self._until_begun = require_leader, on_refusal, until_begun

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        method: str = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # gRPC then answers UNIMPLEMENTED
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def refuse_new(self) -> None:
        """Make every call from now on fail with DRAINING, except health and reflection."""
        self.is_draining = True

    async def end_streams(self, error: ServiceError | None = None) -> None:
        """End the remaining streams with ``error``, or with DRAINING if it is None."""
        running = [stream for stream in self._streams if not stream.done()]
        for stream in running:
            if error is not None:
                self._ended[stream] = error
            stream.cancel()
        if running:
            await asyncio.wait(running)

    def end_revoked_streams(self) -> None:
        """End the streams whose credentials now grant less than when the stream began.

        The credentials may have been revoked, have expired, or have a lesser role or scope now. Callers that are still
        allowed reconnect, and are checked again.
        """
        for stream, (method, context, began_as) in list(self._streams.items()):
            try:
                self._require_as_before(method, context, began_as)
            except ServiceError as error:
                if not stream.done():
                    self._ended[stream] = error
                    stream.cancel()

    def _require_as_before(self, method: str, context: Context, began_as: Identity) -> None:
        """Raise CREDENTIALS, ROLE or DRAINING if the credentials grant less than when the call began."""
        identity = self._identify(context)
        require_role(identity, method)
        if not identity.covers(began_as):
            message = f"the credentials {identity.name} now allow less than when this call began: repeat it"
            raise ServiceError(Reason.ERROR_REASON_DRAINING, message)

    async def wait_for_unary(self, timeout_s: float) -> bool:
        """Wait until no unary call is under way; return False on a timeout."""
        try:
            await asyncio.wait_for(self._unary_done.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _identify(self, context: Context) -> Identity:
        metadata = context.invocation_metadata() or ()
        return self._authenticator.identify(metadata, context.auth_context(), context.peer())

    def _wrap(self, method: str, handler: Handler) -> Handler:
        """Return a handler of a method of any kind.

        To gRPC it has streams in both directions, of which nothing is read before it is requested: a caller is
        identified, and its calls are counted, before it has sent a message.
        """
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_stream
        if behaviour is None:
            raise NotImplementedError(f"{method}: client-streaming methods are not part of the contract")
        decode: Decode = handler.request_deserializer

        async def first(context: Context, read: Callable[[], Awaitable[Any]]) -> Any:
            request = await read()
            if not is_open(method):  # a late message, or an agent that waited for a term: identified a while ago
                self._require_as_before(method, context, present_caller())
            return request

        async def unary(context: Context, read: Callable[[], Awaitable[Any]]) -> None:
            request = await first(context, read)
            self._num_unary += 1
            self._unary_done.clear()
            context.add_done_callback(self._unary_ended)
            async with self._limits.turn(method):
                await context.write(await behaviour(request, context))

        async def stream(context: Context, read: Callable[[], Awaitable[Any]]) -> None:
            is_watch = not handler.request_streaming
            await self._streamed(method, behaviour(await first(context, read), context), context, is_watch=is_watch)

        answer = stream if handler.response_streaming else unary

        async def handle(requests: Any, context: Context) -> None:
            record = self._telemetry.begin(method, context.peer(), is_stream=handler.response_streaming)

            async def read() -> Any:
                return requests if handler.request_streaming else await _first_message(context, decode, record)

            await self._watched(context, record, read, answer)

        raw = partial(decoded, decode) if handler.request_streaming else None
        encode: Callable[[Any], bytes] = handler.response_serializer

        def encoded(answer: Any) -> bytes:
            return answer if isinstance(answer, bytes) else encode(answer)  # bytes: encoded once for several streams

        return grpc.stream_stream_rpc_method_handler(handle, request_deserializer=raw, response_serializer=encoded)

    def _unary_ended(self, _context: Context) -> None:
        """Count a call as ended once its answer was sent: a shutdown would cut off an answer on its way."""
        self._num_unary -= 1
        if self._num_unary == 0:
            self._unary_done.set()

    async def _streamed(self, method: str, responses: Any, context: Context, *, is_watch: bool) -> None:
        """Write a servicer's responses, or let it write them, in a task that a drain can end.

        ``is_watch``: a single request is answered, maybe late, so the caller is informed that the stream is open.
        """

        async def write() -> None:
            if is_watch and not is_open(method):
                await context.send_initial_metadata((STREAM_OPEN,))
            if not hasattr(responses, "__aiter__"):
                await responses
                return
            try:
                async for response in responses:
                    await context.write(response)
            finally:
                if hasattr(responses, "aclose"):
                    await responses.aclose()

        if is_open(method):  # a probe's watch of the health is not ended by a drain
            return await write()
        stream = asyncio.create_task(write())
        self._streams[stream] = method, context, present_caller()
        try:
            await stream
        except asyncio.CancelledError:
            if not (self.is_draining or stream in self._ended) or context.cancelled():
                raise
        finally:
            self._streams.pop(stream, None)
            ended = self._ended.pop(stream, None)
        if ended is not None:
            raise ended.with_traceback(None)  # which would grow with every stream of a lost term
        self._require_leader(method)  # otherwise the end of a term would look like the end of the watched resource
        if self.is_draining:
            # The stream may have ended for another reason at this very moment; the caller will see that when it
            # retries.
            raise statuses.draining()
        return None

    async def _watched(
        self,
        context: Context,
        record: CallRecord,
        read: Callable[[], Awaitable[Any]],
        answer: Callable[[Context, Callable[[], Awaitable[Any]]], Awaitable[None]],
    ) -> None:
        """Let ``answer`` answer a call, with what ``read`` returns, and turn errors into statuses."""
        method, code = record.method, grpc.StatusCode.UNKNOWN
        try:
            caller = ANYBODY if is_open(method) else self._identify(context)
            with self._limits.opened(method, caller, peer=context.peer(), is_stream=record.is_stream):
                if not is_open(method):
                    await self._admit(context, caller, record, read)
                set_present_caller(caller)
                await answer(context, read)
            code = _code_set(context) or grpc.StatusCode.OK
        except grpc.aio.AbortError:  # from gRPC's own servicers, such as health
            code = _code_set(context) or code
            raise
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= DEADLINE_SLACK_S
            code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.InternalError:  # an answer cannot be written any more: the caller is gone
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except Exception as error:
            if isinstance(error, NotImplementedError) and _code_set(context) is grpc.StatusCode.UNIMPLEMENTED:
                code = grpc.StatusCode.UNIMPLEMENTED  # from generated code, for methods that a servicer lacks
                await context.abort(code, f"{method} is not implemented")
            meant = _service_error(error, record)
            if method in WRITES and record.caller and record.reason not in NOT_KEPT:
                self._on_refusal(record.refused_change())
            code = meant.code
            await statuses.abort(context, statuses.to_status(meant))
        finally:
            record.end(code, self._telemetry.metrics)

    async def _admit(
        self, context: Context, identity: Identity, record: CallRecord, read: Callable[[], Awaitable[Any]]
    ) -> None:
        """Check what the caller may do. Only a refused role has its request read.

        Raises:
            ServiceError: QUOTA_EXCEEDED, ROLE, DRAINING, NOT_LEADER, DEADLINE_REQUIRED or DEADLINE_TOO_LONG, checked
                in this order. Of changes NOT_LEADER is checked before ROLE: only a leader can write a refusal into the
                audit log.
        """
        method = record.method
        record.comes_from(identity)
        self._writes.take(method, identity)
        if method in WRITES:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHANGE_WAITS_S):
                    await self._begun(is_change=True)
            self._require_leader(method)
        if not has_role(identity, method):
            with suppress(ServiceError):  # no message: the role is what the caller has to mend first
                if method != CONNECT:
                    await read()
            require_role(identity, method, record.resource)
        if method == CONNECT:
            await self._begun(is_change=False)
        if self.is_draining:  # maybe only since the call began to wait
            raise statuses.draining()
        self._require_leader(method)
        if not record.is_stream:
            require_deadline(method, context.time_remaining())

    async def _begun(self, *, is_change: bool) -> None:
        """Wait for the end of a term's beginning that is under way or near."""
        if self._until_begun is not None and not self.is_draining:
            await self._until_begun(is_change)


async def _first_message(context: Context, decode: Decode, record: CallRecord) -> Message:
    """Return the only message of a call. Raises INVALID_FIELD if none comes in time, or another kind of message."""
    limit_s = _OPEN_MESSAGE_S if is_open(record.method) else _MESSAGE_S
    try:
        async with asyncio.timeout(limit_s):
            raw = await context.read()
    except TimeoutError:
        message = f"no message was received within {limit_s:g} s"
        raise ServiceError(Reason.ERROR_REASON_INVALID_FIELD, message) from None
    if not isinstance(raw, bytes):
        raise ServiceError(Reason.ERROR_REASON_INVALID_FIELD, "the call has no message")
    request = decoded(decode, raw)
    record.requests(request)
    return request


def decoded(decode: Decode, raw: bytes) -> Message:
    """Return the decoded message. Raises INVALID_FIELD if the bytes are not such a message."""
    try:
        return decode(raw)
    except DecodeError as error:
        raise ServiceError(Reason.ERROR_REASON_INVALID_FIELD, f"the request cannot be parsed: {error}") from None


def _service_error(error: Exception, record: CallRecord) -> ServiceError:
    """Return the error for the caller, and record it; a bug is logged, and becomes an incident."""
    meant = statuses.as_service_error(error)
    if meant is None:
        incident_id = secrets.token_hex(6)
        _log.error(
            "incident",
            exc_info=error,
            extra={"incident": incident_id, "method": record.method, "caller": record.caller},
        )
        meant = statuses.incident(incident_id)
    record.failed(meant)
    return meant


def _code_set(context: Context) -> grpc.StatusCode | None:
    """Return the status code that a servicer set on its context, or None."""
    code = context.code()
    if code is None or isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), None)


LONGEST_S = 60.0
_CLOCKS_S = 0.5  # a deadline is rounded up on its way, and is measured by two clocks


def require_deadline(method: str, remaining_s: float | None) -> None:
    """Check a unary call's deadline. Raises DEADLINE_REQUIRED or DEADLINE_TOO_LONG."""
    if remaining_s is None:
        message = f"{method} has no deadline: set one of at most {LONGEST_S:g} s"
        raise ServiceError(Reason.ERROR_REASON_DEADLINE_REQUIRED, message, metadata={"max_s": f"{LONGEST_S:g}"})
    if remaining_s > LONGEST_S + _CLOCKS_S:
        message = f"{method} has a deadline {remaining_s:.0f} s away: at most {LONGEST_S:g} s is allowed"
        raise ServiceError(Reason.ERROR_REASON_DEADLINE_TOO_LONG, message, metadata={"max_s": f"{LONGEST_S:g}"})
