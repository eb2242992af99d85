"""Fuzzing with random inputs, for any length of time.

    python -m tests.fuzz.run [TARGET ...] [--minutes N] [--seed N]     # every target, a minute each, unless said
    pip install atheris                                                # then inputs follow the code's own branches

Without atheris inputs are made by chance from the corpus, as in the tests. What fails is written to
``tests/fuzz/corpus/TARGET/found-*``, where the tests find it from then on, and its traceback is printed; the exit code
is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None and "--one" in sys.argv:
    with atheris.instrument_imports(include=["hetis"]):
        from tests.fuzz.mutating import failure_of, mutations
        from tests.fuzz.targets import CORPUS, MOST_BYTES, MOST_S, ROOT, TARGETS
else:
    from tests.fuzz.mutating import failure_of, mutations
    from tests.fuzz.targets import CORPUS, MOST_BYTES, MOST_S, ROOT, TARGETS


def keep(name: str, data: bytes) -> Path:
    """Write an input that failed into the corpus."""
    path = CORPUS / name / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_chance(name: str, seconds: float, seed: int) -> int:
    """Return how many inputs failed, stopping at the first for a target."""
    end_s, num = time.monotonic() + seconds, 0
    for data in mutations(TARGETS[name], name, random.Random(seed)):
        if time.monotonic() > end_s:
            break
        num += 1
        if (error := failure_of(TARGETS[name], data)) is not None:
            print(f"{name}: {keep(name, data)}", *traceback.format_exception(error), sep="\n")
            return 1
    print(f"{name}: {num:,} inputs by chance, none failed", flush=True)
    return 0


def by_coverage(name: str, seconds: float, seed: int) -> int:
    """Do the same with atheris in separate processes, since it ends the process that it runs in."""
    with tempfile.TemporaryDirectory(prefix="hetis-fuzz-") as text:
        folder = Path(text)
        seeds, grown, found = (folder / part for part in ("seeds", "grown", "found"))
        for made in (seeds, grown, found):
            made.mkdir()
        for number, path in enumerate(TARGETS[name].inputs(name)):
            into = grown if path.name.startswith("grown-") else seeds
            (into / f"{number}").write_bytes(path.read_bytes()[:MOST_BYTES])
        options = [f"-max_len={MOST_BYTES}", f"-seed={seed}", f"-timeout={MOST_S:.0f}", f"-artifact_prefix={found}/"]
        fuzz = [sys.executable, "-m", "tests.fuzz.run", "--one", name, "fuzz"]
        command = [*fuzz, *options, f"-max_total_time={int(seconds)}", str(grown), str(seeds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        findings = [keep(name, path.read_bytes()) for path in found.iterdir()]
        tail = done.stderr.strip().splitlines()
        if done.returncode or findings:
            print(f"{name}: {', '.join(map(str, findings)) or 'ended'}", *tail[-40:], sep="\n", flush=True)
            return 1
        print(f"{name}: {tail[-1] if tail else ''}", flush=True)
        return 0


def one(name: str, arguments: Sequence[str]) -> None:
    """Fuzz one target until libFuzzer's options say stop; the first argument is its program name."""
    target = TARGETS[name]

    def read(data: bytes) -> None:
        target.read(data)

    atheris.Setup(list(arguments), read)
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"{unknown[0]} is none of {', '.join(TARGETS)}")
    fuzz = by_chance if atheris is None else by_coverage
    sys.exit(1 if sum([fuzz(name, 60 * arguments.minutes, arguments.seed) for name in names]) else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        main()
