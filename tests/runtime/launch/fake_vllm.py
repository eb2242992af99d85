"""A stand-in for vLLM's process: ``python fake_vllm.py serve MODEL --port N`` reports that it is healthy.

Nothing but the standard library is imported. With ``--headless`` it waits, with a child of its own as vLLM's ranks are.
The JSON file named by ``FAKE_VLLM`` controls it, and is read at every request: with ``{"fails": TEXT}`` it exits with
code 1 at its start, with ``{"loading": true}`` it is not healthy yet, with ``{"silent": true}`` it answers nothing, and
with ``{"running": N}`` it reports N running requests. Beside the file it keeps two lists. ``.log`` has its lifecycle:
``started``, and ``told`` (to terminate) with the number of running requests then. ``.asked`` has what its metrics
reported each time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

CONTROL = os.environ.get("FAKE_VLLM", "")


class Front(BaseHTTPRequestHandler):
    """Every path answers OK unless the control file changes that; every chat has the same answer."""

    def do_GET(self) -> None:
        control = _control()
        if control.get("silent"):
            return
        self.send_response(503 if control.get("loading") else 200)
        self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(b'{"data": [{"id": "fake"}]}')
        elif self.path == "/metrics":
            counts = {"num_requests_running": control.get("running", 0), "num_requests_waiting": 0}
            _note(str(counts["num_requests_running"]), ".asked")
            counts["kv_cache_usage_perc"] = 0.25
            lines = [f'vllm:{name}{{model_name="fake",engine="0"}} {count}\n' for name, count in counts.items()]
            info = 'vllm:cache_config_info{num_gpu_blocks="400",model_name="fake",engine="0"} 1.0\n'
            self.wfile.write("".join([*lines, info]).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        message = {"role": "assistant", "content": "Well."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main() -> None:
    words = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_note(f"told {_control().get('running', 0)}")))
    if fails := _control().get("fails"):
        sys.exit(str(fails))
    child = subprocess.Popen(["sleep", "600"])
    print(f"fake: has child {child.pid}", file=sys.stderr, flush=True)
    _note("started")
    if "--headless" in words:
        signal.pause()
    HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Front).serve_forever()


def _control() -> dict[str, Any]:
    return dict(json.loads(Path(CONTROL).read_text(encoding="utf-8"))) if CONTROL else {}


def _note(what: str, where: str = ".log") -> int:
    if CONTROL:
        with Path(CONTROL).with_suffix(where).open("a", encoding="utf-8") as log:
            log.write(f"{what}\n")
    return 0


if __name__ == "__main__":
    main()
