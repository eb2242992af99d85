"""The house keeps its shape: imports point one way, the namespace stays a namespace, the documents name every root."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "solver": set[str](),
    "formats": {"solver"},
    "profiler": {"solver", "formats"},
    "simulator": {"solver", "formats"},
    "planner": {"solver", "formats", "profiler", "simulator", "v1"},
    "runtime": {"solver", "formats", "v1"},
    "proto": set[str](),
}
# Every root's package has its name, but for the contract's: protobuf wants folder and package alike, and a version.
PACKAGE = {root: root for root in MAY_IMPORT} | {"proto": "v1"}
# What the base install lacks; only these roots may use it, and only the planner when a module is merely imported.
EXTRAS = {
    *("highspy", "numba", "ortools", "rich", "typer", "cvxpy", "sqlalchemy", "alembic", "prometheus_client"),
    *("torch", "plotly", "matplotlib", "pyarrow"),
}
# Rooms that the base install has and does not use. The profiler's: its command line, and what measures and draws. The
# formats': what the commands share, which only they import; typer and rich come with the extra of either command.
ROOMS_OF_EXTRAS = {
    *(("profiler", room) for room in ("cli", "measure", "pictures")),
    ("formats", "command_line"),
}


def roots() -> list[str]:
    """Folders that are source roots of the namespace package."""
    return sorted(path.parent.name for path in ROOT.glob("*/hetis") if not path.parent.name.startswith("."))


def modules(root: str) -> list[Path]:
    return sorted((ROOT / root / "hetis").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of every import of a module, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
            if node.module == "hetis":
                yield from (f"hetis.{alias.name}" for alias in node.names)


def imported_at_start(path: Path) -> Iterator[str]:
    """Top-level names of what a module imports when it is imported, type-checking blocks left out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_every_root_is_known_here() -> None:
    assert roots() == sorted(MAY_IMPORT)


@pytest.mark.parametrize("root", sorted(MAY_IMPORT))
def test_imports_point_one_way(root: str) -> None:
    allowed = MAY_IMPORT[root] | {PACKAGE[root]}
    for path in modules(root):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("hetis.")}
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


def test_the_namespace_package_has_no_init() -> None:
    assert not list(ROOT.glob("*/hetis/__init__.py"))


@pytest.mark.parametrize("root", sorted(MAY_IMPORT))
def test_every_inner_package_has_an_init_and_is_typed(root: str) -> None:
    package = ROOT / root / "hetis" / PACKAGE[root]
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("root", ["formats", "profiler"])
def test_the_base_install_is_enough_for_files_and_profiles(root: str) -> None:
    for path in modules(root):
        room = path.relative_to(ROOT / root / "hetis" / root).parts[0]
        if (root, room) not in ROOMS_OF_EXTRAS:
            assert not EXTRAS & set(imported_at_start(path)), path.relative_to(ROOT)


def test_only_commands_import_what_commands_share() -> None:
    for root in sorted(MAY_IMPORT):
        for path in modules(root):
            room = path.relative_to(ROOT / root / "hetis").parts[1]
            if room not in ("cli", "command_line"):
                shared = [name for name in imported(path) if name.startswith("hetis.formats.command_line")]
                assert not shared, path.relative_to(ROOT)


def test_packaging_and_tools_list_every_root() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    build = settings["hatch"]["build"]
    assert sorted(build["dev-mode-dirs"]) == roots()
    assert sorted(build["targets"]["wheel"]["packages"]) == [f"{root}/hetis" for root in roots()]
    assert sorted(settings["mypy"]["mypy_path"].split(":")) == roots()
    assert set(roots()) <= set(settings["ruff"]["src"])


def test_the_architecture_document_names_every_root() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for root in roots():
        assert f"| `{root}/` | `hetis.{PACKAGE[root]}` |" in text


def imports_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Of every module the others that it imports, whatever for and wherever; sources by dotted name.

    ``from package import name`` is an import of the package, whose ``__init__`` runs, and of the module of that name
    where there is one.
    """
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = found[name] & sources.keys() - {name}
    return found


def circle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another, each the next; empty: there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def test_no_imports_go_round_in_a_circle() -> None:
    """Imports for types and inside functions count: a floor has no stairs back, whoever takes them."""
    sources = {
        ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for root in sorted(MAY_IMPORT)
        if root != "proto"
        for path in modules(root)
    }
    circle = circle_in(imports_of(sources))
    assert not circle, " -> ".join(circle)


def test_a_circle_is_found_and_named() -> None:
    planted = {
        "hetis.a": "def late():\n    from hetis.b import thing\n",
        "hetis.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hetis.c import Kind\n",
        "hetis.c": "import hetis.a\nfrom hetis.d import other\n",
        "hetis.d": "",
    }
    assert set(circle_in(imports_of(planted))) == {"hetis.a", "hetis.b", "hetis.c"}
    assert circle_in(imports_of(planted | {"hetis.c": "from hetis import d\n"})) == []


def test_a_package_that_imports_what_imports_it_is_a_circle() -> None:
    planted = {
        "hetis.p": "def main():\n    from hetis.p.app import run\n",
        "hetis.p.app": "from hetis.p.verb import verb\n",
        "hetis.p.verb": "from hetis.p import options\n",
        "hetis.p.options": "",
    }
    assert set(circle_in(imports_of(planted))) == {"hetis.p", "hetis.p.app", "hetis.p.verb"}
