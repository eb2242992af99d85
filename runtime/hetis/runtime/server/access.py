"""Who may call: those with the key, where there is one."""

from __future__ import annotations

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hetis.runtime.server.errors import ApiError

_PATHS = ("/v1/", "/hetis/")  # health and metrics are for probes, which have no key


class KeyNeeded:
    """Lets only those with the key in. The time that a comparison takes tells nothing of the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_PATHS):
            headers = dict(scope["headers"])
            kind, _, said = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(said.strip(), self._key):
                error = ApiError(
                    "this server needs its API key", status=401, kind="authentication_error", code="invalid_api_key"
                )
                await JSONResponse(error.body(), status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)
