"""The HTTP front end of an engine: its health, its models and its metrics."""

from __future__ import annotations

import http
import http.client
import json
import urllib.error
import urllib.request

from hetis.runtime.agent.pressure import EngineNews, ScrapeState, scrape
from hetis.runtime.agent.pressure.judging import DEFAULT_LIMITS
from hetis.runtime.agent.pressure.watching import after

ASK_S = 5.0  # for an answer
_MOST_BYTES = 1 << 20
_KEY_NEEDED = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: an engine is on this node


class Front:
    """Questions to the front at an address. All of them block, for ``ASK_S`` or little more."""

    def __init__(self, endpoint: str, *, api_key: str = "") -> None:
        self._url = f"http://{endpoint}"
        self._api_key = api_key

    def is_well(self) -> bool:
        """Return whether it answers and reports a working engine."""
        return self._get("/health")[0] == http.HTTPStatus.OK

    def serves_a_model(self) -> bool:
        """Return whether it lists a model, or requires an unknown API key for the list."""
        status, body = self._get("/v1/models")
        try:
            return status in _KEY_NEEDED or bool(status == http.HTTPStatus.OK and json.loads(body)["data"])
        except (ValueError, KeyError, TypeError):
            return False

    def news(self, before: EngineNews, now_s: float) -> EngineNews:
        """Return what its metrics say now, given the earlier news."""
        return after(before, scrape(f"{self._url}/metrics", timeout_s=ASK_S), now_s, DEFAULT_LIMITS)

    def _get(self, path: str) -> tuple[int, bytes]:
        """Return status and body; the status is 0 if nobody answers."""
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            with _OPENER.open(urllib.request.Request(self._url + path, headers=headers), timeout=ASK_S) as answer:
                return answer.status, answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, b""
        except (OSError, ValueError, http.client.HTTPException):  # urllib's other errors are OSErrors
            return 0, b""


def nothing_known() -> EngineNews:
    """Return the news of an engine that was never asked."""
    return EngineNews(state=ScrapeState.UNREACHABLE, readings={}, earlier={}, pressure={}, taken_s=0.0)


def num_at_work(news: EngineNews) -> int | None:
    """Return how many requests run or wait, or None if the last scrape failed or the engine does not say."""
    if news.state is not ScrapeState.READ:
        return None
    counts = [count for one in news.readings.values() for count in (one.num_running, one.num_waiting)]
    return None if not counts or None in counts else sum(count or 0 for count in counts)
