"""The share of small mistakes in the solver's arithmetic that its tests notice.

    python -m tools.mutants [--sample N] [--seed S] [--only TEXT] [--jobs N]

A mutant is the solver with one mistake: ``<`` for ``<=``, ``+`` for ``-``, a constant off by one, ``min`` for ``max``,
a deleted statement, a negated condition. None is made in what does no arithmetic: arguments of decorators
(``frozen=True``), annotations, blocks of ``if TYPE_CHECKING``, imports, ``raise`` and ``assert`` statements, and
formatted texts. Nothing else is excepted, whether a test could notice it or not.

A sample is drawn from all mutants of dispatch, re-dispatch, the checker and the cost model, file by file in proportion.
Each mutant meets the narrow tests of its part, with kernels as plain Python. It is killed if a test fails or takes far
too long. Survivors are printed as a changed line: either a test is missing, or the change makes no difference (a bound
that is checked twice, a tie, a tolerance).

A mutant takes 5 to 60 CPU seconds; those of dispatch and re-dispatch take longest. The same seed draws the same mutants
of the same code.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOLVER = "solver/hetis/solver"
# Part: the files that are changed, and the tests that must notice, the quickest to notice first.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cost": (
        (f"{SOLVER}/cost.py", f"{SOLVER}/mixes.py"),
        (
            "tests/solver/test_cost.py",
            "tests/solver/check/test_roles.py::test_search_and_checker_know_the_same_slack",
            "tests/solver/test_agreement.py",
        ),
    ),
    "check": (
        (f"{SOLVER}/check",),
        (
            "tests/solver/check",
            "tests/solver/test_agreement.py",
        ),
    ),
    "dispatch": (
        (f"{SOLVER}/dispatch",),
        ("tests/solver/dispatch_state", "tests/solver/dispatch"),
    ),
    "redispatch": (
        (f"{SOLVER}/redispatch",),
        (
            *(
                f"tests/solver/redispatch/test_{name}.py"
                for name in ("limits", "ordering", "redispatch", "triggers_and_baselines", "watch", "quality", "totals")
            ),
        ),
    ),
}
NOT_CHANGED = ("small_stage", "compile_dispatch", "compile_redispatch")  # functions that only compile
WITH_KERNELS = ("dispatch", "redispatch")
INSTANCES = 4  # instances kept of each parametrised test
# With kernels as plain Python the first two take minutes; the third tests their signatures, which those lack.
LEFT_OUT = (
    "test_rounding_stays_within_half_a_percent_of_the_best_plan_on_average",
    "test_quality_over_small_stages_of_every_kind_is_as_the_search_found_it",
    "test_costs_of_any_type_become_what_kernels_are_compiled_for",
)
LONGEST_S = 240.0  # CPU seconds of a mutant's tests; a mutant that takes longer counts as killed
PRELOADED = ("numpy", "scipy.optimize", "scipy.sparse", "pytest", "numba", "highspy")

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "ceil": "floor", "floor": "ceil",
         "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A file with one mistake."""

    part: str
    path: str
    line: int
    was: str
    now: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    mutant: Mutant
    killed: bool
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=150, metavar="N", help="mutants tried, 150 unless given")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample")
    parser.add_argument("--only", default="", metavar="TEXT", help="only parts and files whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants tried at the same time")
    arguments = parser.parse_args()
    for name in PRELOADED:
        __import__(name)
    everything = [
        one for part in PARTS for one in mutants_of(part) if arguments.only in part or arguments.only in one.path
    ]
    drawn = random.Random(arguments.seed).sample(everything, min(arguments.sample, len(everything)))
    for part in dict.fromkeys(one.part for one in drawn):
        if not _passes(part, None):
            sys.exit(f"the tests of {part} fail as they are")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        verdicts = []
        for verdict in pool.map(tried, drawn):
            verdicts.append(verdict)
            one, says = verdict.mutant, "killed" if verdict.killed else "LIVES"
            print(f"{says:6} {verdict.seconds:5.1f} s  {one.path}:{one.line}: {one.was} -> {one.now}", flush=True)
    for part in dict.fromkeys([*(v.mutant.part for v in verdicts), ""]):
        those = [v for v in verdicts if part in ("", v.mutant.part)]
        killed = sum(v.killed for v in those)
        print(
            f"{part or 'all':12} {killed} of {len(those)} killed: {killed / len(those):.0%} ({len(everything)} exist)"
        )


def mutants_of(part: str) -> Iterator[Mutant]:
    """Yield every mutant of a part, in the order of its files."""
    for source in PARTS[part][0]:
        files = [ROOT / source] if source.endswith(".py") else sorted((ROOT / source).glob("*.py"))
        for file in files:
            yield from _mutants_of_file(part, file)


def _mutants_of_file(part: str, file: Path) -> Iterator[Mutant]:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstrings_and_types = _not_run(tree)
    for node in ast.walk(tree):
        if id(node) in docstrings_and_types:
            continue
        for changed in _changes(node):
            was = ast.get_source_segment(text, node)
            assert was is not None
            now = ast.unparse(changed) if isinstance(changed, ast.stmt) else f"({ast.unparse(changed)})"
            yield Mutant(
                part=part,
                path=file.relative_to(ROOT).as_posix(),
                line=node.lineno,  # type: ignore[attr-defined]
                was=" ".join(was.split()),
                now=" ".join(now.split()),
                source=_replaced(text, node, now),
            )


def _not_run(tree: ast.AST) -> set[int]:
    """Return the nodes without arithmetic: decorators, annotations, types, raised errors and formatted texts."""
    found: set[int] = set()
    for node in ast.walk(tree):
        skipped: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef):
            skipped = [*([node.returns] if node.returns else []), *node.decorator_list]
            skipped += [one.annotation for one in ast.walk(node.args) if isinstance(one, ast.arg) and one.annotation]
            skipped += node.body if node.name in NOT_CHANGED else []
        elif isinstance(node, ast.ClassDef):
            skipped = [*node.decorator_list]
        elif isinstance(node, ast.AnnAssign):
            skipped = [node.annotation]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped = [*node.body]
        elif isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            skipped = [node]
        for one in skipped:
            found |= {id(below) for below in ast.walk(one)}
    return found


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the variants of the node, each with one mistake."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield _with(node, ops=[OPERATORS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield _with(node, func=ast.Name(NAMES[name]))
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in NAMES:
            yield _with(node, func=ast.Attribute(value, NAMES[name]))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript()]):
            yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _replaced(text: str, node: ast.AST, now: str) -> str:
    lines = [line.encode() for line in text.splitlines(keepends=True)]  # columns count bytes
    begin, end = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    before = lines[begin][: node.col_offset]  # type: ignore[attr-defined]
    after = lines[end][node.end_col_offset :]  # type: ignore[attr-defined]
    return b"".join([*lines[:begin], before, now.encode(), after, *lines[end + 1 :]]).decode()


def tried(mutant: Mutant) -> Verdict:
    """Return the verdict of the tests of a mutant's part."""
    began = time.monotonic()
    killed = not _passes(mutant.part, mutant)
    return Verdict(mutant=mutant, killed=killed, seconds=time.monotonic() - began)


def _passes(part: str, mutant: Mutant | None) -> bool:
    """Return whether all tests of a part pass in a separate process, with a mutant's file replacing the true one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "solver"
        shutil.copytree(ROOT / "solver", folder, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (Path(name) / mutant.path).write_text(mutant.source, encoding="utf-8")
        child = os.fork()
        if child == 0:
            os._exit(_run_tests(folder, part))
        _, status = os.waitpid(child, 0)
        return status == 0


def _run_tests(folder: Path, part: str) -> int:
    import resource

    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (int(LONGEST_S), int(LONGEST_S) + 5))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(folder))
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not soak and not gpu"]
    return int(pytest.main([*options, *PARTS[part][1]], plugins=[_FewInstances()] if part in WITH_KERNELS else []))


class _FewInstances:
    """A pytest plugin that keeps a few instances of each parametrised test, since plain Python kernels are slow."""

    @staticmethod
    def pytest_collection_modifyitems(items: list[Any]) -> None:
        met = Counter[tuple[Path, str]]()
        kept = []
        for item in items:
            test = item.path, getattr(item, "originalname", item.name)
            met[test] += 1
            if met[test] <= INSTANCES and test[1] not in LEFT_OUT:
                kept.append(item)
        items[:] = kept


if __name__ == "__main__":
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    sys.dont_write_bytecode = True
    main()
