"""Files and folders of the repository that pages name or link to exist, and so do the headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, without_fences

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ROOTS = (
    "solver",
    "formats",
    "proto",
    "profiler",
    "simulator",
    "engines",
    "planner",
    "runtime",
    "tools",
    "tests",
    "benchmarks",
)
_LINKED = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"\s]+)\"")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_NAMED = re.compile(r"`([\w.-]+(?:/[\w.*-]*)*)`")


def missing(text: str) -> list[str]:
    """Return the paths in a text that begin with a folder of ours, and the names of tests, that do not exist.

    ``planner/cli/place.py`` is short for ``planner/hetis/planner/cli/place.py``.
    """
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    found = []
    for name in dict.fromkeys(_NAMED.findall(text)):
        first, slash, rest = name.rstrip("/").partition("/")
        if slash and first in folders:
            is_there = any(ROOT.glob(f"{first}/{rest or '*'}")) or any(ROOT.glob(f"{first}/hetis/{first}/{rest}"))
        elif re.fullmatch(r"test_\w+\.py", name):
            is_there = any((ROOT / "tests").rglob(name))
        else:
            continue
        if not is_there:
            found.append(name)
    return found


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = (heading.strip().lower() for heading in _HEADING.findall(without_fences(text)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Return the links to files that are not there, or to headings that their page does not have."""
    found = []
    for link in map("".join, _LINKED.findall(without_fences(page.read_text(encoding="utf-8")))):
        path, _, anchor = link.partition("#")
        to = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_lead_to_files(page: Path) -> None:
    assert not missing(page.read_text(encoding="utf-8"))


def test_a_path_that_leads_nowhere_is_found() -> None:
    text = "`tests/faults/`, `tests/faults/test_no_such.py`, `test_lease.py`, `test_nothing.py`, `and/or`, `docs/*.md`"
    assert missing(text) == ["tests/faults/test_no_such.py", "test_nothing.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`, three\n\n```bash\n# four\n```\n")
    page = tmp_path / "page.md"
    page.write_text('[a](other.md#one-two-three) [b](other.md#four) [c](none.md) [d](https://e.f) <img src="h.png">')
    assert dead_links(page) == ["other.md#four", "none.md", "h.png"]


def test_the_map_of_the_architecture_names_what_there_is() -> None:
    """Names refer to files by the ends of their paths, or to definitions somewhere in the tree."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Where to change what")[2]
    files = {path.as_posix(): path for root in ROOTS for path in (ROOT / root).rglob("*") if path.is_file()}
    code = "\n".join(
        path.read_text(encoding="utf-8") for name, path in files.items() if name.endswith((".py", ".proto"))
    )
    for name in dict.fromkeys(re.findall(r"`([^`]+)`", text)):
        if re.fullmatch(r"[\w/]+\.(py|proto|j2|css)", name):
            first, _, rest = name.partition("/")
            ends = {name, f"{first}/hetis/{first}/{rest}"}
            assert any(path.endswith(f"/{end}") for path in files for end in ends), name
        elif re.fullmatch(r"_?[A-Z][\w.]*|_?[a-z]+_[a-z_]+|\w+\.[a-z_]+", name):
            for part in name.split("."):
                assert re.search(
                    rf"^\s*(?:def|class|message|async def) {part}\b|^\s*{part}\b ?[:=]", code, re.MULTILINE
                ), name
