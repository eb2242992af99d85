"""Makes vLLM's processes wait for one another without using a processor, in tests.

Each would poll for its next message for a second, at the cost of the processes that should write it: here ranks
outnumber processors. Run by vLLM's own Python.
"""

from __future__ import annotations

from typing import Any

SOON_MS = 10  # limit after which a message is found even if its notification is lost


def wait_in_peace() -> None:
    """Make the processes that are started from here wait for notifications of messages from the beginning."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if self.local_notify_socket in dict(self.poller.poll(timeout=SOON_MS)):
            self.local_notify_socket.recv(copy=False)

    SpinCondition.wait = wait
