"""Tables of the documents whose sources have changed since they were measured.

    python -m benchmarks.staleness            lists them; status 1 if one of them does not say so
    python -m benchmarks.staleness --mark     makes each stale table say so, and no other

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` and begins with a line about its sources:

    <!-- sources 0f3a...: measured at 1a2b3c4 -->

The digest is that of the code in `SOURCES`, without comments and docstrings. ``--markdown`` of a benchmark writes it,
and a test compares it. A change of code must mark the tables that it makes stale; a new measurement removes the mark.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "**Its sources have changed since this was measured.**"
NOT_RECORDED = "not recorded"

_SOLVER = "solver/hetis/solver"
_COSTS = (f"{_SOLVER}/cost.py", f"{_SOLVER}/workload.py", f"{_SOLVER}/model.py", "profiler/hetis/profiler/roofline.py")
_SEARCH = (*_COSTS, f"{_SOLVER}/placement", f"!{_SOLVER}/placement/explanation", f"!{_SOLVER}/placement/infeasible")
_SIMULATOR = (*_COSTS, "simulator/hetis/simulator")
_DISPATCH = (f"{_SOLVER}/dispatch",)
_REDISPATCH = (*_DISPATCH, f"{_SOLVER}/redispatch")
_PLUGIN = tuple(f"runtime/hetis/runtime/{room}" for room in ("attention", "transport", "vllm", "worker"))

# The sources of each table: files and whole folders, without those marked "!".
SOURCES: dict[str, tuple[str, ...]] = {
    "placement": ("benchmarks/placement.py", "benchmarks/measuring/specification.py", *_SEARCH),
    "placement_any": ("benchmarks/placement.py", *_SEARCH),
    "attention_workers": ("benchmarks/attention_workers.py", *_SEARCH),
    "strategies": ("benchmarks/strategies.py", *_SEARCH),
    "hexgen3": ("benchmarks/hexgen3.py", *_SEARCH),
    "token_ranges": ("benchmarks/token_ranges.py", "benchmarks/measuring/token_ranges.py", *_COSTS),
    "engines": ("benchmarks/engines.py", "engines/hetis/engines/precision.py", *_SEARCH),
    "published": ("benchmarks/published.py", *_SEARCH, f"{_SOLVER}/published"),
    "pipeline": ("benchmarks/pipeline.py", *_COSTS),
    "pipeline roles": ("benchmarks/pipeline.py", *_SIMULATOR),
    "dispatch": ("benchmarks/dispatch.py", *_DISPATCH),
    "dispatch ties": ("benchmarks/dispatch.py", "benchmarks/measuring/ties.py", *_DISPATCH),
    "redispatch": ("benchmarks/redispatch.py", *_REDISPATCH),
    "simulation": ("benchmarks/simulation.py", *_SIMULATOR),
    "staging": ("benchmarks/staging.py", *_SEARCH, *_SIMULATOR),
    "simulation speed": ("benchmarks/simulation.py", *_SIMULATOR),
    "goodput": (
        "benchmarks/goodput.py",
        *(f"planner/hetis/planner/use_cases/{name}.py" for name in ("verify", "service_level")),
        *(*_SEARCH, *_SIMULATOR),
    ),
    "whole_engine": ("benchmarks/whole_engine.py", *_SIMULATOR, "tools/whole_engine.py"),
    "silicon": (
        *("benchmarks/silicon.py", "benchmarks/measuring/serving_points.py", "benchmarks/measuring/closed_loop.py"),
        "benchmarks/measuring/published_settings.py",
        *(f"profiler/hetis/profiler/{name}.py" for name in ("engines", "engine_tables", "experts", "latent")),
        *("simulator/hetis/simulator/timing.py", *_COSTS),
    ),
    "left_out": (
        *("benchmarks/left_out.py", "benchmarks/measuring/shipped_points.py"),
        *("tools/left_out.py", "tools/efficiency.py", "profiler/hetis/profiler/fit"),
        *("profiler/hetis/profiler/ranges.py", "planner/hetis/planner/use_cases/robustness/profile_errors.py", *_COSTS),
    ),
    "expert_parallel": ("benchmarks/expert_parallel.py", "solver/hetis/solver/cost.py"),
    "paper": ("benchmarks/paper.py", *_SEARCH, f"{_SOLVER}/published", *_SIMULATOR),
    "ablations": ("benchmarks/ablations.py", *_SEARCH, *_SIMULATOR, *_REDISPATCH),
    "emulation": ("benchmarks/emulation.py", *_PLUGIN, *_REDISPATCH),
    "vllm": ("benchmarks/vllm.py", "benchmarks/measuring/vllm_engine.py", *_PLUGIN),
    "service admissions": (
        *("benchmarks/service.py", "planner/hetis/planner/service", "planner/hetis/planner/fleet/dispatching"),
        *_DISPATCH,
    ),
    "service": ("benchmarks/service.py", "planner/hetis/planner/service", "planner/hetis/planner/fleet"),
    "sharing": ("benchmarks/sharing.py", *_SEARCH, f"{_SOLVER}/tenants", f"{_SOLVER}/shares"),
    "layers": ("benchmarks/layers.py", f"{_SOLVER}/layers"),
    "robustness": ("benchmarks/robustness.py", *_SEARCH, "planner/hetis/planner/use_cases/robustness"),
}

_SECTION = re.compile(r"<!-- (?!end |sources )(?P<name>[\w ]+?) -->\n(?P<text>.*?)<!-- end (?P=name) -->", re.DOTALL)
_STAMP = re.compile(r"<!-- sources (?P<digest>[0-9a-f]+|not recorded)[^\n]*-->\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table in a document."""

    document: Path
    name: str
    digest: str  # of the sources that were measured
    is_marked: bool

    @property
    def is_stale(self) -> bool:
        return self.digest != digest(self.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.staleness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mark", action="store_true", help="write the marks")
    if parser.parse_args().mark:
        for document in documents():
            mark(document)
    found = [table for document in documents() for table in tables(document)]
    for table in found:
        if table.is_stale:
            says = "and says so" if table.is_marked else "and does not say so"
            print(f"{table.document.relative_to(ROOT)}: {table.name} is stale {says}")
    sys.exit(any(table.is_stale != table.is_marked for table in found))


def documents() -> Iterator[Path]:
    """Yield the documents that hold tables."""
    return (path for path in sorted((ROOT / "docs").glob("*.md")) if _SECTION.search(path.read_text(encoding="utf-8")))


def tables(document: Path) -> Iterator[Table]:
    """Yield every table of a document."""
    for section in _SECTION.finditer(document.read_text(encoding="utf-8")):
        stamp = _STAMP.match(section["text"])
        recorded = stamp["digest"] if stamp else NOT_RECORDED
        yield Table(document=document, name=section["name"], digest=recorded, is_marked=MARK in section["text"])


def mark(document: Path) -> None:
    """Mark the document's stale tables, and no others."""
    stale = {table.name for table in tables(document) if table.is_stale}

    def marked(section: re.Match[str]) -> str:
        stamp = _STAMP.match(section["text"])
        head = stamp[0] if stamp else f"<!-- sources {NOT_RECORDED} -->\n"
        rest = section["text"][len(stamp[0]) if stamp else 0 :].replace(f"{MARK}\n\n", "")
        says = f"{MARK}\n\n" if section["name"] in stale else ""
        return f"<!-- {section['name']} -->\n{head}{says}{rest}<!-- end {section['name']} -->"

    text = document.read_text(encoding="utf-8")
    new = _SECTION.sub(marked, text)
    if new != text:
        document.write_text(new, encoding="utf-8")


def stamp(name: str) -> str:
    """Return the first line of a table that is measured today."""
    return f"<!-- sources {digest(name)}: measured at {_commit()} -->"


def digest(name: str) -> str:
    """Return the digest of the present code that a table measures."""
    return digest_of(sorted(_files(SOURCES[name])), lambda path: (ROOT / path).read_text(encoding="utf-8"))


def digest_of(paths: Iterable[str], text_of: Callable[[str], str]) -> str:
    """Return the digest of the files at these paths with these texts."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path}\n{code_of(text_of(path))}\n".encode())
    return whole.hexdigest()[:16]


def is_source(path: str, sources: Iterable[str]) -> bool:
    """Return whether a file belongs to the sources."""
    inside = [source.lstrip("!") for source in sources if path == source.lstrip("!") or path.startswith(f"{source}/")]
    outside = [s for s in sources if s.startswith("!") and path.startswith(f"{s[1:]}/")]
    return path.endswith(".py") and bool(inside) and not outside


def _files(sources: tuple[str, ...]) -> Iterator[str]:
    roots = {source.lstrip("!").split("/")[0] for source in sources}
    for root in roots:
        for file in (ROOT / root).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            if is_source(path, sources):
                yield path


@cache
def code_of(text: str) -> str:
    """Return a module without comments, docstrings and blank lines, the same under every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "an unknown commit"


if __name__ == "__main__":
    main()
