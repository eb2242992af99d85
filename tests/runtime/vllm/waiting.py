"""How vLLM's processes wait for one another in tests: without a processor.

Each would look for its next message again and again for a second, at the cost of those who should write it: here ranks
outnumber processors. Run by vLLM's own Python.
"""

from __future__ import annotations

from typing import Any

SOON_MS = 10  # a message whose notice is lost is found then


def wait_in_peace() -> None:
    """Let the processes that are started from here wait for a message's notice from the beginning."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if self.local_notify_socket in dict(self.poller.poll(timeout=SOON_MS)):
            self.local_notify_socket.recv(copy=False)

    SpinCondition.wait = wait
