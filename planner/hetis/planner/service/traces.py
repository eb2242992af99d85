"""OpenTelemetry traces: one server span per call, a child of the caller's span. Needs the extra ``otel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Span(Protocol):
    """The span of one call."""

    @property
    def trace_id(self) -> str:
        """The trace id for logs, empty if the call is not traced."""
        ...

    def end(self, code: str, *, is_error: bool) -> None: ...


class Traces(Protocol):
    """Factory of spans."""

    def begin(self, method: str, metadata: Mapping[str, str]) -> Span:
        """Start the span of a call, which is the current one of this task until it ends."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class _NoSpan:
    trace_id = ""

    def end(self, code: str, *, is_error: bool) -> None:
        pass


class NoTraces:
    """Traces nothing."""

    def begin(self, method: str, metadata: Mapping[str, str]) -> Span:
        return _NO_SPAN

    def close(self) -> None:
        pass


_NO_SPAN = _NoSpan()


class MissingExtraError(Exception):
    """Traces are configured, but OpenTelemetry is not installed."""


class OtelTraces:
    """Spans of OpenTelemetry, as children of the caller's ``traceparent``."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("hetis.planner")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Mapping[str, str]) -> Span:
        from opentelemetry import trace

        service, _, name = method.removeprefix("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{name}",
            context=self._propagator.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        return _OtelSpan(span)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelSpan:
    def __init__(self, span: Any) -> None:
        from opentelemetry import context, trace

        self._span = span
        self._detach = context.detach
        self._token = context.attach(trace.set_span_in_context(span))
        self.trace_id = format(span.get_span_context().trace_id, "032x")

    def end(self, code: str, *, is_error: bool) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("rpc.grpc.status_code", code)
        if is_error:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()
        self._detach(self._token)


def open_traces(endpoint: str | None, version: str) -> Traces:
    """Return traces that are sent to an OTLP endpoint, or to nowhere if None.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoTraces()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"traces need {error.name}: pip install 'hetis[planner,otel]'") from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": "hetis-planner", "service.version": version}), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTraces(provider)
