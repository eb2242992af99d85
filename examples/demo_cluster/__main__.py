"""A data centre on one machine: ``python -m examples.demo_cluster`` (or ``make demo-cluster``).

A planner and twelve node agents run as separate processes and talk over loopback. The engines behind the agents are
simulated; planner, agents, protocol and solver are real. The story: a placement is proved and activated, load arrives,
a GPU becomes slow, a node dies, the planner itself is killed. The head groups of running requests move each time, and
serving continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from examples.demo_cluster.story import Processes, Story, Teller
from examples.processes import ProcessError
from hetis.planner.client import CallError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print what was seen as JSON on stdout; the story on stderr"
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs, store and agents' state in this folder")
    options = parser.parse_args()
    teller = Teller(sys.stderr if options.json else sys.stdout)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hetis-demo-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Processes(folder) as processes:
            try:
                seen = Story(processes, teller, folder).tell()
            except (ProcessError, CallError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    teller.say(f"Done in {time.monotonic() - started_s:.0f} s; every process has been stopped.")
    if options.json:
        print(json.dumps(seen, indent=2))
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
