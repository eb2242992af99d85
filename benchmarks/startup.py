"""CPU seconds until ``hetis-plan --help`` has answered, next to a bare Python start in the same run.

    python -m benchmarks.startup [--quick] [--json]

Target: `hetis-plan --help` under 0.3 s of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python": ["-c", "pass"],
    "hetis-plan --help": ["-m", "hetis.planner.cli", "--help"],
    "hetis-plan place --help": ["-m", "hetis.planner.cli", "place", "--help"],
    "hetis-plan catalog gpus": ["-m", "hetis.planner.cli", "catalog", "gpus"],
}


def main() -> None:
    """Print one row per command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 starts of each command instead of 20")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    arguments = parser.parse_args()
    for name, command in COMMANDS.items():
        samples = [cpu_seconds([sys.executable, *command]) for _ in range(5 if arguments.quick else 20)]
        row = {"command": name, "cpu_s": statistics.median(samples), "worst_cpu_s": max(samples), "runs": len(samples)}
        if arguments.json:
            print(json.dumps(row))
        else:
            print(f"{name:<26} {row['cpu_s']:.3f} s CPU (median of {len(samples)}, worst {max(samples):.3f})")


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=os.environ | {"COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
