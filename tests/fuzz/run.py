"""Fuzzing with random inputs, for any length of time.

    python -m tests.fuzz.run [TARGET ...] [--minutes N] [--seed N]     # every target, a minute each, unless said
    pip install atheris                                                # then inputs follow the code's own branches
    python -m tests.fuzz.run --keep [TARGET ...]                       # and what reached new ones is kept

Without atheris inputs are made by chance from the corpus, as in the tests. What fails is written to
``tests/fuzz/corpus/TARGET/found-*``, where the tests find it from then on, and its traceback is printed; the exit code
is 1. With ``--keep`` the inputs that atheris grew are reduced to those of which each reaches something that the rest of
the corpus does not, and the shortest of them become ``corpus/TARGET/grown-*``, in place of those that were there: at
most 16 of at most 2 KiB.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
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

MOST_GROWN, MOST_GROWN_BYTES = 16, 2048


def keep(name: str, data: bytes, kind: str = "found") -> Path:
    """Write an input into the corpus."""
    path = CORPUS / name / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
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


def by_coverage(name: str, seconds: float, seed: int, *, keeps: bool = False) -> int:
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
        command = [str(_script(name, folder)), *options]
        done = _run([*command, f"-max_total_time={int(seconds)}", str(grown), str(seeds)])
        findings = [keep(name, path.read_bytes()) for path in found.iterdir()]
        tail = done.stderr.strip().splitlines()
        if done.returncode or findings:
            print(f"{name}: {', '.join(map(str, findings)) or 'ended'}", *tail[-40:], sep="\n", flush=True)
            return 1
        print(f"{name}: {tail[-1] if tail else ''}", flush=True)
        if keeps:
            print(f"{name}: {keep_grown(name, command, seeds=seeds, grown=grown)} of them kept", flush=True)
        return 0


def keep_grown(name: str, command: Sequence[str], *, seeds: Path, grown: Path) -> int:
    """Replace the ``grown-*`` of a target by the shortest inputs that add to the seeds' coverage; return their number.

    Args:
        command: libFuzzer with its options.
        seeds: the inputs that stay in the corpus, to which the others are added.
        grown: the earlier inputs of this kind, and the new ones.
    """
    short = grown.with_name("short")
    short.mkdir()
    for path in grown.iterdir():
        if path.stat().st_size <= MOST_GROWN_BYTES:
            path.rename(short / path.name)
    old = set(seeds.iterdir())
    done = _run([*command, "-merge=1", str(seeds), str(short)])
    if done.returncode:
        raise RuntimeError(f"{name}: the corpus was not reduced: {done.stderr[-2000:]}")
    # Shortest first, since libFuzzer merges in this order and a later input then rarely makes an earlier one useless.
    chosen = sorted(set(seeds.iterdir()) - old, key=lambda path: (path.stat().st_size, path.name))[:MOST_GROWN]
    texts = [path.read_bytes() for path in chosen]
    for path in (CORPUS / name).glob("grown-*"):
        path.unlink()
    for text in texts:
        keep(name, text, "grown")
    return len(texts)


def _script(name: str, folder: Path) -> Path:
    """Return a command that is one file, since libFuzzer restarts itself by its own name to reduce a corpus."""
    script = folder / "fuzz"
    module = shlex.join([sys.executable, "-m", "tests.fuzz.run", "--one", name])
    script.write_text(f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {module} "$0" "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return script


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


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
    parser.add_argument("--keep", action="store_true", help="keep some of the inputs that reached new code (atheris)")
    arguments = parser.parse_args(argv)
    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"{unknown[0]} is none of {', '.join(TARGETS)}")
    if arguments.keep and atheris is None:
        parser.error("--keep: atheris is not installed, and without it nobody knows what an input reaches")
    fuzz = by_chance if atheris is None else partial(by_coverage, keeps=arguments.keep)
    sys.exit(1 if sum([fuzz(name, 60 * arguments.minutes, arguments.seed) for name in names]) else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        main()
