"""The data of the GPUs, models and lengths that a benchmark names, of which its times and rates are made.

They are named in its modules, or in a fleet of ``examples/`` that it names; in tables of measurements any may be, so
for the benchmarks of those the whole catalogue counts. What counts of a GPU is its entry in the catalogue, the
efficiencies and kernels of its architecture and, if the benchmark uses shipped profiles, its own. So a table goes stale
with the data of its own fleets, and not with the first measurements of another architecture.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hetis.formats.catalogue import UnknownNameError, resolve_gpu, resolve_model
from hetis.profiler.engine_tables import NEAREST

_CATALOGUE = "formats/hetis/formats/catalogue/data"
_PROFILER = "profiler/hetis/profiler"
_WITH_SHIPPED, _WITH_KERNELS = {"shipped_profile", "default_profile"}, {"for_engine", "default_profile"}
_NAME = re.compile(r"[\w./-]{2,60}")
_FROM_TABLES = "benchmarks/measuring/published_points.py"  # reads tables of measurements
_NAMES_NOTHING = ("benchmarks/staleness.py",)  # its names are those of tables


def data_named_in(module: str, root: Path) -> Iterator[str]:
    """Yield the pieces of data that count for a benchmark, such as ``benchmarks/paper.py``, each as a line of JSON."""
    modules = list(_modules(module, root))
    named = {name for each in modules for name in each.constants}
    if any(_FROM_TABLES in each.imported for each in modules):
        yield from (_line(file, _data(root / _CATALOGUE / file)) for file in ("gpus.json", "models.json"))
    used = {name for each in modules for name in each.variables}
    for fleet in sorted(root / "examples" / f"{name}.yaml" for name in named):
        if fleet.is_file():
            line = _line(fleet.name, yaml.safe_load(_text(fleet)))
            named.update(_NAME.findall(line))
            yield line
    for name in sorted(named):
        if (lengths := root / _CATALOGUE / "workloads" / f"{name}.json").is_file():
            yield _line(f"lengths {name}", _data(lengths))
    for name, row in _meant(root, "model", named, resolve_model).items():
        yield _line(f"model {name}", row)
    gpus = _meant(root, "gpu", named, resolve_gpu)
    for name, row in gpus.items():
        yield _line(f"GPU {name}", row)
        shipped = root / _PROFILER / "profiles" / f"{name}.json"
        if used & _WITH_SHIPPED and shipped.is_file():
            yield _line(f"profile of {name}", _data(shipped))
    if gpus:
        architectures = {row["architecture"] for row in gpus.values()}
        yield from _efficiencies(root, architectures, with_kernels=bool(used & _WITH_KERNELS))


@dataclass(frozen=True, slots=True)
class _Module:
    """What a module may name (its short strings), the variables that it uses, and the modules that it may import."""

    constants: frozenset[str]
    variables: frozenset[str]
    imported: frozenset[str]


def _modules(first: str, root: Path) -> Iterator[_Module]:
    """Yield a module and all those of `benchmarks` that it imports."""
    waiting, seen = [first], {first, *_NAMES_NOTHING}
    while waiting:
        module = _module(root / waiting.pop())
        yield module
        found = {path for path in module.imported - seen if (root / path).is_file()}
        seen |= found
        waiting += sorted(found)


@cache
def _module(path: Path) -> _Module:
    constants, variables, imported = set[str](), set[str](), set[str]()
    for node in ast.walk(ast.parse(_text(path))):
        match node:
            case ast.Constant(value=str(text)) if _NAME.fullmatch(text):
                constants.add(text)
            case ast.Name(id=name):
                variables.add(name)
            case ast.ImportFrom(module=str(package), names=names) if package.startswith("benchmarks"):
                folder = package.replace(".", "/")
                imported |= {f"{folder}.py", *(f"{folder}/{each.name}.py" for each in names)}
    return _Module(frozenset(constants), frozenset(variables), frozenset(imported))


def _meant(
    root: Path, kind: str, named: Collection[str], resolve: Callable[[str, Collection[str]], str]
) -> dict[str, dict[str, Any]]:
    """Return the catalogue's entries of one kind, models or GPUs, that these names mean."""
    entries = _data(root / _CATALOGUE / f"{kind}s.json")[f"{kind}s"]
    rows = {entry[kind]["name"]: entry[kind] for entry in entries}
    meant = {_resolved(name, tuple(rows), resolve) for name in named}
    return {name: rows[name] for name in sorted(meant - {""})}


@cache
def _resolved(name: str, known: tuple[str, ...], resolve: Callable[[str, Collection[str]], str]) -> str:
    """Return the name in the catalogue, or an empty text if it means none."""
    try:
        return resolve(name, known)
    except UnknownNameError:
        return ""


def _efficiencies(root: Path, architectures: Collection[str], *, with_kernels: bool) -> Iterator[str]:
    """Yield what models GPUs of these architectures: efficiencies, their relatives', and the kernels of engines."""
    efficiencies = dict(_data(root / _PROFILER / "efficiency.json"))
    every = efficiencies.pop("architectures")
    yield _line("efficiency", efficiencies)
    relatives = {every[name]["relative"] for name in architectures if "relative" in every[name]}
    for name in sorted(relatives.union(architectures)):
        yield _line(f"efficiency of {name}", every[name])
    for file in ("experts", "latent", "linear") if with_kernels else ():
        for row in _data(root / _PROFILER / f"{file}.json")["kernels"]:
            if row["architecture"] in {*architectures, *relatives, NEAREST}:
                yield _line(file, row)


@cache
def _data(path: Path) -> Any:
    return json.loads(_text(path))


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _line(name: str, value: object) -> str:
    return f"{name}: {json.dumps(value, sort_keys=True)}"
