"""Stands for vLLM where only its life is of interest: ``python fake_vllm.py serve MODEL --port N`` says it is well.

Nothing but the standard library is imported. With ``--headless`` it waits, with a child of its own as vLLM's ranks are.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Front(BaseHTTPRequestHandler):
    """Every path is well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def main() -> None:
    words = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child = subprocess.Popen(["sleep", "600"])
    print(f"fake: has child {child.pid}", file=sys.stderr, flush=True)
    if "--headless" in words:
        signal.pause()
    HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Front).serve_forever()


if __name__ == "__main__":
    main()
