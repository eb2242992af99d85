"""A parsed page: its text, and whether its HTML is well-formed."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "line", "path", "circle"}  # elements without end tags, in SVG with a slash


class ReadPage(HTMLParser):
    """Checks that every element is closed by its own end tag, every id is unique, and nothing is fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.columns: list[int] = []  # number of cells in every row of a table
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        if given.get("id"):
            self.names.append(str(given["id"]))
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "tr":
            self.columns.append(0)
        if tag in ("td", "th"):
            self.columns[-1] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open[-1:] == [tag], f"</{tag}> inside {self._open[-3:]}"
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)
