"""Tables of the documents whose sources have changed since they were measured.

    python -m benchmarks.staleness            lists them; status 1 if one of them does not say so
    python -m benchmarks.staleness --mark     makes each stale table say so, and no other

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` and begins with a line about its sources:

    <!-- sources 0f3a...: measured at 1a2b3c4 -->

The digest is that of the definitions in `SOURCES`: the code of all top-level statements, in whatever file and order,
without comments, docstrings and blank lines, files of data as they are, and the data of the GPUs, models and lengths
that the benchmark names (`benchmarks.measuring.named_data`). A definition that moves from one source to another leaves
it as it is. ``--markdown`` of a benchmark writes it, and a test compares it. A change of code or data must mark the
tables that it makes stale; a new measurement removes the mark.

Imports, ``__all__`` and blocks of ``if TYPE_CHECKING`` do not count, except that a definition which uses a renaming
import (``from x import y as z``) has it in its code. Hence the digest cannot see that a name is imported from another
module, if both define it and differ; nor what the order of statements or the import of a module does.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.measuring.named_data import data_named_in

ROOT = Path(__file__).parents[1]
MARK = "**Its sources have changed since this was measured.**"
NOT_RECORDED = "not recorded"

_SOLVER = "solver/hetis/solver"
_COSTS = (
    *(f"{_SOLVER}/{name}.py" for name in ("cost", "workload", "model", "profile")),
    "profiler/hetis/profiler/roofline.py",
)
_SEARCH_AND_BINDING = (
    *_COSTS,
    f"{_SOLVER}/placement",
    f"!{_SOLVER}/placement/explanation",
    f"!{_SOLVER}/placement/infeasible",
)
# Binding names the GPUs of a plan that is already chosen: no rate or latency depends on it, only a search's seconds.
_SEARCH = (*_SEARCH_AND_BINDING, f"!{_SOLVER}/placement/binding.py")
_PROFILER = "profiler/hetis/profiler"
_ENGINE_PROFILES = (
    *(f"{_PROFILER}/{name}.py" for name in ("engines", "engine_tables", "experts", "latent", "linear")),
    *(f"{_PROFILER}/{name}.json" for name in ("efficiency", "experts", "latent", "linear")),
)
_SIMULATOR = (*_COSTS, "simulator/hetis/simulator")
_DISPATCH = (f"{_SOLVER}/dispatch",)
_REDISPATCH = (*_DISPATCH, f"{_SOLVER}/redispatch")
_PLUGIN = tuple(f"runtime/hetis/runtime/{room}" for room in ("attention", "transport", "vllm", "worker"))

# The sources of each table: its benchmark, and then files and whole folders, without those marked "!".
SOURCES: dict[str, tuple[str, ...]] = {
    "placement": ("benchmarks/placement.py", "benchmarks/measuring/specification.py", *_SEARCH_AND_BINDING),
    "placement_any": ("benchmarks/placement.py", *_SEARCH_AND_BINDING),
    "attention_workers": ("benchmarks/attention_workers.py", *_SEARCH),
    "strategies": ("benchmarks/strategies.py", *_SEARCH),
    "hexgen3": ("benchmarks/hexgen3.py", *_SEARCH),
    "attention": ("benchmarks/attention.py", "runtime/hetis/runtime/attention"),
    "attention gpu": ("benchmarks/attention.py", "runtime/hetis/runtime/attention"),
    "token_ranges": ("benchmarks/token_ranges.py", "benchmarks/measuring/token_ranges.py", *_COSTS),
    "engines": (
        *("benchmarks/engines.py", "engines/hetis/engines/precision.py", f"{_PROFILER}/defaults.py"),
        *(*_ENGINE_PROFILES, *_SEARCH),
    ),
    "published": ("benchmarks/published.py", *_SEARCH, f"{_SOLVER}/published"),
    "pipeline": ("benchmarks/pipeline.py", *_COSTS),
    "pipeline roles": ("benchmarks/pipeline.py", *_SIMULATOR),
    "dispatch": ("benchmarks/dispatch.py", *_DISPATCH),
    "dispatch ties": ("benchmarks/dispatch.py", "benchmarks/measuring/ties.py", *_DISPATCH),
    "redispatch": ("benchmarks/redispatch.py", *_REDISPATCH),
    "simulation": ("benchmarks/simulation.py", *_SIMULATOR),
    "staging": ("benchmarks/staging.py", *_SEARCH, *_SIMULATOR),
    "simulation speed": ("benchmarks/simulation.py", *_SIMULATOR, *_REDISPATCH),
    "goodput": (
        "benchmarks/goodput.py",
        *(
            f"planner/hetis/planner/use_cases/{name}.py"
            for name in (
                *("verify", "verification", "lower_rates", "tightening", "equal_stages", "representative"),
                "service_level",
            )
        ),
        *(*_SEARCH, *_SIMULATOR, *_REDISPATCH),
    ),
    "queueing": (
        *("benchmarks/queueing.py", "planner/hetis/planner/use_cases/verification/queueing.py"),
        *(*_SEARCH, *_SIMULATOR),
    ),
    "whole_engine": ("benchmarks/whole_engine.py", *_SIMULATOR, "tools/whole_engine.py"),
    "silicon": (
        *("benchmarks/silicon.py", "benchmarks/measuring/serving_points.py", "benchmarks/measuring/closed_loop.py"),
        *("benchmarks/measuring/published_points.py", "benchmarks/measuring/published_settings.py"),
        *_ENGINE_PROFILES,
        *("simulator/hetis/simulator/timing.py", *_COSTS),
    ),
    "mlperf": (
        *("benchmarks/mlperf.py", "benchmarks/measuring/mlperf_rows.py", "benchmarks/measuring/published_points.py"),
        *("planner/hetis/planner/use_cases/robustness/profile_errors.py", "profiler/hetis/profiler/ranges.py"),
        *_ENGINE_PROFILES,
        *_SEARCH,
    ),
    "static batches": (
        *("benchmarks/static_batches.py", "benchmarks/measuring/published_points.py"),
        *_ENGINE_PROFILES,
        *("simulator/hetis/simulator/timing.py", *_COSTS),
    ),
    "left_out": (
        *("benchmarks/left_out.py", "benchmarks/measuring/shipped_points.py"),
        *("tools/left_out.py", "tools/efficiency.py", "profiler/hetis/profiler/fit"),
        *("profiler/hetis/profiler/ranges.py", "planner/hetis/planner/use_cases/robustness/profile_errors.py", *_COSTS),
    ),
    "expert_parallel": ("benchmarks/expert_parallel.py", "solver/hetis/solver/cost.py"),
    "paper": ("benchmarks/paper.py", *_SEARCH, f"{_SOLVER}/published", *_SIMULATOR, *_REDISPATCH),
    "paper_assumptions": ("benchmarks/paper_assumptions.py", *_SEARCH, f"{_SOLVER}/published"),
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
    "helix": ("benchmarks/helix.py", f"{_SOLVER}/layers"),
    "robustness": ("benchmarks/robustness.py", *_SEARCH, "planner/hetis/planner/use_cases/robustness"),
}

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SECTION = re.compile(r"<!-- (?!end |sources )(?P<name>[\w ]+?) -->\n(?P<text>.*?)<!-- end (?P=name) -->", re.DOTALL)
_STAMP = re.compile(r"<!-- sources (?P<digest>[0-9a-f]+|not recorded)[^\n]*-->\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table in a document."""

    document: Path
    name: str
    digest: str  # digest of the sources at the measurement
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
    """Return the first line of a table measured today."""
    return f"<!-- sources {digest(name)}: measured at {_commit()} -->"


def digest(name: str) -> str:
    """Return the digest of the present code that a table measures, and of its data."""
    texts = ((ROOT / path).read_text(encoding="utf-8") for path in _files(SOURCES[name]))
    return digest_of(texts, data_named_in(SOURCES[name][0], ROOT))


def digest_of(texts: Iterable[str], data: Iterable[str] = ()) -> str:
    """Return the digest of the definitions in modules with these texts, and of pieces of data."""
    definitions = sorted(itertools.chain(data, *map(definitions_of, texts)))
    return hashlib.sha256("\n\n".join(definitions).encode()).hexdigest()[:16]


def is_source(path: str, sources: Iterable[str]) -> bool:
    """Return whether a file belongs to the sources."""
    inside = [source.lstrip("!") for source in sources if path == source.lstrip("!") or path.startswith(f"{source}/")]
    outside = [s for s in sources if s.startswith("!") and (path == s[1:] or path.startswith(f"{s[1:]}/"))]
    return (path.endswith(".py") or path in inside) and bool(inside) and not outside


def _files(sources: tuple[str, ...]) -> Iterator[str]:
    roots = {source.lstrip("!").split("/")[0] for source in sources}
    for root in roots:
        yield from (path for path in _modules_in(root) if is_source(path, sources))
    yield from (source for source in sources if source.endswith(".json"))


@cache
def _modules_in(root: str) -> tuple[str, ...]:
    """Return the paths of all modules below a folder of the repository."""
    return tuple(file.relative_to(ROOT).as_posix() for file in (ROOT / root).rglob("*.py"))


@cache
def definitions_of(text: str) -> tuple[str, ...]:
    """Return the code of each top-level statement of a module, the same under every version of Python.

    A file of JSON is one statement.

    The lines are those of the text, because `ast.unparse` differs by version. In front of them are the renaming imports
    that the statement uses. A decorator belongs to its definition.
    """
    module = ast.parse(text)
    rows = _rows_of_code(text, module)
    statements = [node for node in module.body if not _is_for_checkers(node)]
    of_module = {name for node in statements if not isinstance(node, _SCOPES) for name in _renamings(node)}
    found = []
    for node in statements:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        code = [row for row in rows[first - 1 : node.end_lineno] if row]
        if code:
            used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            renamed = sorted(f"{alias} = {what}" for alias, what in of_module | _renamings(node) if alias in used)
            found.append("\n".join([*renamed, *code]))
    return tuple(found)


def _rows_of_code(text: str, module: ast.Module) -> list[str]:
    """Return all rows of a module, with nothing in place of comments, docstrings and imports."""
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    rows = [line.encode() for line in lines]  # the columns of `ast` count bytes
    for node in ast.walk(module):
        match node:
            case ast.Expr(value=ast.Constant(value=str())) | ast.Import() | ast.ImportFrom():
                _strike(rows, node)
    return [row.replace(b"\0", b"").decode().rstrip() for row in rows]


def _strike(rows: list[bytes], node: ast.stmt) -> None:
    """Overwrite a statement with zeros, which keeps the columns of those after it."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    for row in range(node.lineno - 1, node.end_lineno):
        start = node.col_offset if row == node.lineno - 1 else 0
        end = node.end_col_offset if row == node.end_lineno - 1 else len(rows[row])
        rows[row] = rows[row][:start] + bytes(end - start) + rows[row][end:]


def _is_for_checkers(node: ast.stmt) -> bool:
    """Return whether a statement matters only to readers of the module: type checkers, or users of its public names."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") and not node.orelse
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _renamings(statement: ast.stmt) -> set[tuple[str, str]]:
    """Return the aliases of the imports in a statement that differ from the imported name, each with the latter."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            package = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            for imported in node.names:
                *_, module, name = ["", *f"{package}{imported.name}".split(".")]
                if imported.asname not in (None, name):
                    found.add((imported.asname, f"{module}.{name}"))
    return found


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "an unknown commit"


if __name__ == "__main__":
    main()
