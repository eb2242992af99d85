"""A page as one file of HTML: template, style and script together, nothing fetched from anywhere."""

from __future__ import annotations

from importlib.resources import files

from hetis.planner.report.page.blocks import Page

PACKAGE = "hetis.planner.report.page"


def render_page(page: Page) -> str:
    """The whole file.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_text("page.html.j2"))
    return template.render(page=page, css=_text("page.css"), script=_text("page.js"))


def _text(name: str) -> str:
    return files(PACKAGE).joinpath(name).read_text(encoding="utf-8")
