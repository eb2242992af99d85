"""Clients that keep asking through the router, with OpenAI's library and without retries of their own."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

import openai

CLIENTS = 3
TOKENS = 12
PAUSE_S = 0.1  # between an answer and the next question


class Load:
    """Threads that ask questions in a loop while the context is open."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._served = Counter[str]()
        self._failures: list[str] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def served(self) -> Counter[str]:
        """Return the number of answers by the address of the replica that gave them."""
        with self._lock:
            return Counter(self._served)

    @property
    def failures(self) -> list[str]:
        """Return a line for each request that got no answer."""
        with self._lock:
            return list(self._failures)

    def _ask(self, number: int) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            asked = 0
            while not self._is_over.wait(PAUSE_S):
                asked += 1
                try:
                    answer = client.chat.completions.with_raw_response.create(
                        model="demo",
                        messages=[{"role": "user", "content": f"Question {asked} of client {number}"}],
                        max_tokens=TOKENS,
                    )
                    # If nginx tried several replicas, the last one answered.
                    replica = answer.headers.get("x-served-by", "").rpartition(", ")[2]
                    assert answer.parse().choices
                except openai.OpenAIError as error:
                    with self._lock:
                        self._failures.append(f"{type(error).__name__}: {error}")
                else:
                    with self._lock:
                        self._served[replica] += 1
