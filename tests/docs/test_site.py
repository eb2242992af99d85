"""The site builds without warnings and without a network, draws formulas, and loads nothing from elsewhere."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.planner.browser import CHROMIUM, browse, console
from tools import reference, tables

needs_mkdocs = pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "latex2mathml"))),
    reason="NOT BUILT: the documentation's site needs pip install 'hetis[docs]', which make test installs",
)


def test_the_reference_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_the_pictures_of_the_report_are_of_the_plan_as_it_was_last_measured() -> None:
    """If this fails, take them again (docs/report.md names the plan) and change the sentence below the first of them.

    A row of the table of rungs has the same fleet, model and traffic.
    """
    said = re.search(r"fleet-160\.yaml.*serves ([\d.]+)\s+requests/s", (ROOT / "docs/report.md").read_text(), re.DOTALL)
    with tables.path_of("rungs").open(encoding="utf-8") as file:
        (row,) = [row for row in csv.DictReader(file) if row["name"].startswith("32 A100-80 + 32 L40S")]
    assert said is not None
    assert said[1] == row["keeps"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the whole site with warnings as errors. Proxies lead nowhere, so that nothing can be fetched."""
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet, which would hide warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    variables = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@needs_mkdocs
def test_nothing_of_the_site_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(http[^\"]*)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|preload)\"[^>]*href=\"(http[^\"]*)\"", text)
        assert not loaded, f"{page.name} loads {loaded}"


@needs_mkdocs
def test_formulas_are_drawn_and_not_spelled(site: Path) -> None:
    for name, least in (("cost-model", 100), ("dispatch", 15)):
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("<math") >= least
        assert "$`" not in text
        assert "\\frac" not in text


@needs_mkdocs
def test_every_table_has_a_page_and_a_file(site: Path) -> None:
    for path in tables.DATA.glob("*.csv"):
        assert (site / "data" / path.name).read_bytes() == path.read_bytes()
        text = (site / "data" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert text.count("<tr>") == len(tables.read(path.stem)) + 1


@needs_mkdocs
def test_a_formula_that_is_not_understood_is_an_error() -> None:
    from tools.site import mathml

    assert "<msub>" in mathml("x_{ij} \\le 1", display="inline")
    with pytest.raises(ValueError, match="is not understood"):
        mathml("\\nonsense{x}", display="inline")


@needs_mkdocs
@pytest.mark.skipif(CHROMIUM is None, reason="NOT SHOWN: Chromium is not installed")
@pytest.mark.parametrize("page", ["index.html", "reference/files.html"])
def test_the_search_works_on_pages_from_a_disk(site: Path, page: str, tmp_path: Path) -> None:
    """Browsers refuse web workers there; test_nothing_of_the_site_comes_from_elsewhere covers what replaces them."""
    address = f"{(site / page).as_uri()}?q=makespan"
    said = browse(address, tmp_path, "--virtual-time-budget=20000", "--dump-dom")
    assert re.search(r"[1-9]\d* matching documents", said)
    assert not console(said)
