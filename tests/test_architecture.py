"""The architecture holds: imports point one way, one root defines `hetis`, and documents name every root."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Packages, and the other packages that each may import.
MAY_IMPORT = {
    "solver": set[str](),
    "formats": {"solver"},
    "commands": {"solver", "formats"},
    "profiler": {"solver", "formats", "commands"},
    "simulator": {"solver", "formats"},
    "engines": {"solver", "formats", "commands"},
    "planner": {"solver", "formats", "commands", "profiler", "simulator", "engines", "v1"},
    "runtime": {"solver", "formats", "commands", "engines", "v1"},
    "v1": set[str](),
}
# A package is in the root of its name, except the contract, whose folder protobuf wants to be like its package, with a
# version, and what commands share, which is beside the file formats that it prints.
ROOT_OF = {package: package for package in MAY_IMPORT} | {"v1": "proto", "commands": "formats"}
# Packages that the base install lacks. Only these roots may use them, and at import time only the planner.
EXTRAS = {
    *(
        "highspy",
        "networkx",
        "numba",
        "rich",
        "typer",
        "cvxpy",
        "sqlalchemy",
        "alembic",
        "prometheus_client",
    ),
    *("torch", "pyarrow"),
}
# Folders that the base install has and does not use: the profiler's command line, and its measuring modules.
ROOMS_OF_EXTRAS = {("profiler", room) for room in ("cli", "measure")}

# The planner's folders from top to bottom, and those beside them that all may use.
PLANNER_FLOORS = (
    *("cli", "library", "service", "resources", "fleet", "jobs", "convert", "report"),
    *("export", "loop", "use_cases", "client", "store"),
)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PLANNER_BESIDE = {"callers", "failures", "threads", "watching"}


def roots() -> list[str]:
    """Folders that are source roots of the namespace package."""
    return sorted(path.parent.name for path in ROOT.glob("*/hetis") if not path.parent.name.startswith("."))


def modules(package: str) -> list[Path]:
    return sorted((ROOT / ROOT_OF[package] / "hetis" / package).rglob("*.py"))


@cache  # every test needs those of every module, which takes seconds to parse
def import_statements(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Every import of a module's text, also those inside functions."""
    found, blocks = list[ast.Import | ast.ImportFrom](), list[ast.AST]([ast.parse(source)])
    while blocks:
        for node in ast.iter_child_nodes(blocks.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.append(node)
            elif not isinstance(node, ast.expr):  # imports are statements, and none is inside an expression
                blocks.append(node)
    return tuple(found)


def imported(path: Path) -> Iterator[str]:
    """Dotted names of every import of a module, also those inside functions."""
    for node in import_statements(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
            if node.module == "hetis":
                yield from (f"hetis.{alias.name}" for alias in node.names)


def imported_at_start(path: Path) -> Iterator[str]:
    """Return the top-level names that a module imports at import time, without type-checking blocks."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_every_root_is_known_here() -> None:
    assert roots() == sorted(set(ROOT_OF.values()))
    for root in roots():
        packages = {path.name for path in (ROOT / root / "hetis").iterdir() if path.is_dir()} - {"__pycache__"}
        assert packages == {package for package, its in ROOT_OF.items() if its == root}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in modules(package):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("hetis.")}
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


def test_one_root_says_what_hetis_itself_is_and_imports_nothing_for_it() -> None:
    """The planner's root has it, with names created on use; every other root only adds a package to the namespace."""
    assert list(ROOT.glob("*/hetis/__init__.py")) == [ROOT / "planner" / "hetis" / "__init__.py"]
    (path,) = ROOT.glob("*/hetis/__init__.py")
    assert set(imported_at_start(path)) == {"__future__", "importlib", "pkgutil", "typing"}
    for root in roots():
        files = {one.name for one in (ROOT / root / "hetis").iterdir() if one.is_file()}
        assert files == ({"__init__.py", "py.typed"} if root == "planner" else set()), root


def test_no_package_asks_hetis_itself() -> None:
    """Packages import names from where they are defined, because `hetis` would load the planner."""
    for package in sorted(MAY_IMPORT):
        for path in modules(package):
            assert "hetis" not in imported(path), path.relative_to(ROOT)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_every_inner_package_has_an_init_and_is_typed(package: str) -> None:
    folder = ROOT / ROOT_OF[package] / "hetis" / package
    assert (folder / "__init__.py").is_file()
    assert (folder / "py.typed").is_file()


@pytest.mark.parametrize("root", ["formats", "profiler"])
def test_the_base_install_is_enough_for_files_and_profiles(root: str) -> None:
    for path in modules(root):
        room = path.relative_to(ROOT / root / "hetis" / root).parts[0]
        if (root, room) not in ROOMS_OF_EXTRAS:
            assert not EXTRAS & set(imported_at_start(path)), path.relative_to(ROOT)


# Modules with the options of a command outside packages named `cli`.
COMMANDS = {
    "planner/hetis/planner/service/command.py",
    "planner/hetis/planner/service/main.py",
    *(f"runtime/hetis/runtime/{room}/__main__.py" for room in ("agent", "launch", "worker")),
    *(f"runtime/hetis/runtime/{room}/main.py" for room in ("agent", "launch")),
}


# Of what commands share, what others may import: none of it loads typer or rich.
FOR_OTHERS = {f"hetis.commands{module}" for module in ("", ".endpoints", ".exit_codes", ".groups", ".process", ".x509")}


def test_only_commands_import_what_commands_share() -> None:
    for module in FOR_OTHERS - {"hetis.commands"}:
        path = ROOT / ROOT_OF["commands"] / f"{module.replace('.', '/')}.py"
        assert not {"typer", "rich"} & set(imported_at_start(path)), module
    for package in sorted(MAY_IMPORT):
        for path in modules(package):
            room = path.relative_to(ROOT / ROOT_OF[package] / "hetis" / package).parts[0]
            if package != "commands" and room != "cli" and path.relative_to(ROOT).as_posix() not in COMMANDS:
                shared = {name for name in imported(path) if name.startswith("hetis.commands")}
                assert shared <= FOR_OTHERS, path.relative_to(ROOT)


def test_packaging_and_tools_list_every_root() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    build = settings["hatch"]["build"]
    assert sorted(build["dev-mode-dirs"]) == roots()
    assert sorted(build["targets"]["wheel"]["packages"]) == [f"{root}/hetis" for root in roots()]
    assert sorted(settings["mypy"]["mypy_path"].split(":")) == roots()
    assert set(roots()) <= set(settings["ruff"]["src"])


def test_the_architecture_document_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package, root in ROOT_OF.items():
        assert f"| `{root}/` | `hetis.{package}` |" in text


def imports_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return for every module the others that it imports, for any purpose and anywhere; ``sources`` are by dotted name.

    ``from package import name`` is an import of the package, whose ``__init__`` runs, and of the module of that name if
    it exists.
    """
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in import_statements(source):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif node.module:
                found[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = found[name] & sources.keys() - {name}
    return found


def circle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import one another in a circle, each the next; empty if there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def rooms_of(imports: Mapping[str, set[str]], package: str) -> dict[str, set[str]]:
    """The imports between the folders and modules that stand directly in a package, by their names in it."""
    inside = f"{package}."
    rooms: dict[str, set[str]] = {}
    for name, others in imports.items():
        if name.startswith(inside):
            room = name.removeprefix(inside).split(".")[0]
            found = {other.removeprefix(inside).split(".")[0] for other in others if other.startswith(inside)}
            rooms.setdefault(room, set()).update(found - {room})
    return rooms


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return imports_of(
        {
            ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
                "utf-8"
            )
            for package, root in sorted(ROOT_OF.items())
            if root != "proto"
            for path in modules(package)
        }
    )


def test_no_imports_go_round_in_a_circle(imports: dict[str, set[str]]) -> None:
    """Imports for types and inside functions count: a lower floor never imports a higher one, in any way."""
    circle = circle_in(imports)
    assert not circle, " -> ".join(circle)


def test_no_folders_go_round_in_a_circle(imports: dict[str, set[str]]) -> None:
    """Folders have no circles at any depth, which files without a circle may still form."""
    packages = {name[:end] for name in imports for end, letter in enumerate(name) if letter == "."}
    for package in sorted(packages):
        circle = circle_in(rooms_of(imports, package))
        assert not circle, f"{package}: " + " -> ".join(circle)


def test_the_planners_floors_import_downwards(imports: dict[str, set[str]]) -> None:
    """The picture in docs/architecture.md: a floor imports floors below it, and all may import those beside them."""
    found = rooms_of(imports, "hetis.planner")
    assert found.keys() - {"__init__"} == {*PLANNER_FLOORS, *PLANNER_BESIDE}
    for room, others in found.items():
        if room in PLANNER_FLOORS:
            below = PLANNER_FLOORS[PLANNER_FLOORS.index(room) + 1 :]
            assert others <= {*below, *PLANNER_BESIDE}, f"{room} imports {others - {*below, *PLANNER_BESIDE}}"
        else:
            assert others <= PLANNER_BESIDE, f"{room} imports {others - PLANNER_BESIDE}"
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = [text.index(f"\n{room}/ ") for room in PLANNER_FLOORS]
    assert places == sorted(places), "the document draws the floors in another order"


def steps_of_the_walks() -> list[tuple[str, str]]:
    """Return path and name of everything to which the walks of the architecture document refer."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Two walks")[2].partition("\n## ")[0]
    steps, path = [], ""
    for row in re.findall(r"^\| [a-z]+ \| (.*?) \|", section, re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", row):
            if quoted.endswith(".py"):
                path = quoted
            else:
                steps.append((path, quoted))
    return steps


def test_the_walks_name_what_there_is() -> None:
    steps = steps_of_the_walks()
    assert len(steps) > 30
    for path, name in steps:
        root, _, inside = path.partition("/")
        found = ast.parse((ROOT / root / "hetis" / root / inside).read_text(encoding="utf-8")).body
        for part in name.split("."):
            scopes = [one for one in found if isinstance(one, SCOPES) and one.name == part]
            assert scopes, f"docs/architecture.md: {path} has no {name}"
            found = scopes[0].body


def test_folders_that_import_each_other_are_a_circle() -> None:
    planted = {"hetis.a.one": "import hetis.b.two\n", "hetis.b.two": "", "hetis.b.one": "import hetis.a.two\n"}
    found = imports_of(planted | {"hetis.a.two": ""})
    assert circle_in(found) == []
    assert set(circle_in(rooms_of(found, "hetis"))) == {"a", "b"}


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


def test_a_search_for_a_placement_loads_no_compiler() -> None:
    """Only the dispatcher, and with it simulations of attention workers, have kernels."""
    found = "import sys, hetis.solver.planning, hetis.solver.published.hexgen; print('numba' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
