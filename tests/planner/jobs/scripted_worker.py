"""A stand-in for the solver process: the posed problem selects its behaviour, so that tests need no solver.

Run as a script. It ends with its input, as the real one does. It imports little before it is ready: tests start many.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from typing import Any

from hetis.planner.jobs.frames import JobFrame, read_frame, to_bytes

cancelled = threading.Event()


def send(kind: str, payload: bytes = b"", **fields: object) -> None:
    sys.stdout.buffer.write(to_bytes(JobFrame(kind=kind, fields=fields, payload=payload)))
    sys.stdout.buffer.flush()


# The seed of a posed problem selects what the worker does.
OF_SEED = {1: "wait", 2: "die after saying something", 3: "hang", 4: "say nothing found"}


def interrupted(document: bytes) -> bytes:
    """Return a result in the service's form."""
    from hetis.formats.files import content_digest
    from hetis.v1 import plan_pb2

    result = plan_pb2.PlanResult(status=plan_pb2.SOLVE_STATUS_INTERRUPTED, value=1.0)
    result.document.digest = content_digest(document)
    return result.SerializeToString()


def act(script: dict[str, Any]) -> None:
    match script["do"] if "do" in script else OF_SEED[script["settings"]["seed"]]:
        case "find":
            send("searching")
            send("progress", phase="pricing", elapsed_s=0.5, incumbent=1.0)
            send("found", str(script.get("document", os.getpid())).encode(), result="")
        case "wait":  # for the end of the input, or until it is cancelled
            send("searching")
            send("progress", phase="waiting", elapsed_s=0.0)
            cancelled.wait()
            send("found", b"incumbent", result=base64.b64encode(interrupted(b"incumbent")).decode())
        case "verify":  # until it is cancelled
            send("searching", spent_s=0.0)
            send("verifying", spent_s=0.0)
            cancelled.wait()
            send("found", b"not verified", result="")
        case "compile":  # longer than the search may take
            send("searching", spent_s=0.0)
            send("compiling")
            time.sleep(script["compile_s"])
            send("searching", spent_s=0.0)
            send("found", str(cancelled.is_set()).encode(), result="")
        case "hang":
            send("searching")
            time.sleep(3600)
        case "exit":
            print("MemoryError: no room for tables", file=sys.stderr, flush=True)
            os._exit(3)
        case "die after saying something":
            send("searching")
            print("Traceback ...\nMemoryError: no room for tables", file=sys.stderr, flush=True)
            os._exit(3)
        case "say infeasible":
            send("infeasible", reasons=["too big"])
        case "say nothing found":
            send("nothing_found", message="no plan found within 1.0 s; allow more time")


if "never-ready" in sys.argv:
    print("ImportError: no solver here", file=sys.stderr, flush=True)
    sys.exit(1)
send("ready")
while (frame := read_frame(sys.stdin.buffer)) is not None:
    if frame.kind == "cancel":
        cancelled.set()
    else:
        cancelled.clear()
        threading.Thread(target=act, args=(json.loads(frame.payload),), daemon=True).start()
os._exit(0)
