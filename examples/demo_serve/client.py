"""What the demo asks the server, with the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]


class Client:
    """Calls of the server at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def heads(self) -> Json:
        """Devices, and where the heads of running requests are."""
        found: Json = json.loads(self._open("/hetis/heads").read())
        return found

    def move(self, request: str, heads: list[int], to: str) -> bool:
        """False: the request has ended meanwhile, or heads and devices are not as they were."""
        try:
            self._open("/hetis/moves", {"request": request, "heads": heads, "to": to})
        except urllib.error.HTTPError as error:
            if error.code not in (404, 409):
                raise
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with labels."""
        lines = self._open("/metrics").read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def stream_chat(self, body: Json) -> Iterator[Json]:
        """Chunks of an answer as they come."""
        with self._open("/v1/chat/completions", body | {"stream": True}) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text == "[DONE]":
                    return
                if text:
                    yield json.loads(text)

    def _open(self, path: str, body: Json | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self._url + path, data), timeout=60)
