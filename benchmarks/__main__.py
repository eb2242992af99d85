"""Run benchmarks one after another, each in a process of its own.

python -m benchmarks --quick              all, in their quick form (`make bench`)
python -m benchmarks --markdown           makes the tables of docs/data, which takes hours (`make tables`)
python -m benchmarks --markdown paper     those named
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_MEASURED = ("__init__", "__main__")
OF_ACCURACY = ("memory", "mlperf", "silicon", "vllm_runs")


def main() -> None:
    own = (path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_MEASURED)
    modules = {name: f"benchmarks.{name}" for name in own} | {
        name: f"benchmarks.accuracy.{name}" for name in OF_ACCURACY
    }
    names = sorted(modules)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *names], metavar="NAME", help=", ".join(names))
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_const", const="--quick", dest="form", help="few and small cases")
    how.add_argument("--markdown", action="store_const", const="--markdown", dest="form", help="make the tables")
    options = parser.parse_args()
    failed = [name for name in options.names or names if not _runs(modules[name], options.form)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _runs(module: str, form: str) -> bool:
    print(f"== {module}", flush=True)
    return subprocess.run([sys.executable, "-m", module, form], cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    main()
