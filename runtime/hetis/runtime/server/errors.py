"""What can go wrong at the front.

HetisError
+-- ServeError         it cannot start as it was asked to; all reasons at once
+-- ApiError           a request is answered with an error of OpenAI's form
    +-- BusyError      too many wait already
    +-- StoppedError   the server is ending, or its engine has failed
    +-- StartingError  the server is not ready yet
    +-- AwayError      devices are away without which it cannot be served
"""

from __future__ import annotations

from typing import Any

from hetis.solver.errors import HetisError


class ServeError(HetisError):
    """`hetis-serve` cannot start; ``messages`` are all that is wrong."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class ApiError(HetisError):
    """An answer that is no answer.

    Attributes:
        status: of HTTP.
        kind: ``type`` of the error body; official clients choose their exception by the status.
        param: the field that is wrong, if one is.
        code: for programs.
        retry_s: after which another try may help; None: it will not.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_s = status, kind, param, code, retry_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


class BusyError(ApiError):
    """As many requests are open as may be."""

    def __init__(self, *, open_requests: int, limit: int, retry_s: int) -> None:
        super().__init__(
            f"{open_requests} requests are running or waiting, {limit} may be",
            status=429,
            kind="rate_limit_error",
            code="too_many_requests",
            retry_s=retry_s,
        )


class StoppedError(ApiError):
    """No request is taken any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, kind="server_error", code="stopping", retry_s=5)


class StartingError(ApiError):
    """No request is taken yet."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, kind="server_error", code="starting", retry_s=5)


class AwayError(ApiError):
    """Devices are away that the request cannot do without, and were waited for long enough."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, kind="server_error", code="devices_away", retry_s=5)
