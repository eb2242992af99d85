"""A small XML reader for the output of ``nvidia-smi``, safe for untrusted text.

It uses Python's own expat. Dangerous XML is refused before it can do harm: an entity declaration ends the reading, so
nothing expands; expat loads nothing external unless told to; and the depth and number of elements are bounded. The
document type that ``nvidia-smi`` names is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from hetis.formats.errors import DocumentError, single_problem

MAX_DEPTH = 64
MAX_ELEMENTS = 1_000_000


@dataclass(slots=True)
class Element:
    """An element with its own text, stripped of surrounding blanks."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, path: str) -> Element | None:
        """Return the first element at a path such as ``mig_mode/current_mig``, or None."""
        here: Element | None = self
        for tag in path.split("/"):
            here = next((child for child in here.children if child.tag == tag), None) if here is not None else None
        return here

    def text_of(self, path: str) -> str:
        """Return the text of the element at a path, or an empty string if there is none."""
        found = self.find(path)
        return found.text if found is not None else ""

    def all(self, tag: str) -> Iterator[Element]:
        """Return the children with a tag."""
        return (child for child in self.children if child.tag == tag)


def parse_xml(text: str, file: str) -> Element:
    """Return the root element of a document.

    Raises:
        DocumentError: it is not XML, declares entities, is nested too deep, or is too large.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    top = Element("", 0)
    stack, num_elements = [top], 0

    def refuse(message: str) -> DocumentError:
        return single_problem(file, message, line=parser.CurrentLineNumber)

    def start(tag: str, attributes: object) -> None:
        nonlocal num_elements
        num_elements += 1
        if len(stack) > MAX_DEPTH or num_elements > MAX_ELEMENTS:
            limit = f"{MAX_DEPTH} levels" if len(stack) > MAX_DEPTH else f"{MAX_ELEMENTS} elements"
            raise refuse(f"has more than {limit}")
        element = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(tag: str) -> None:
        element = stack.pop()
        element.text = element.text.strip()

    def characters(some: str) -> None:
        if not stack[-1].children:  # blanks between elements belong to no text
            stack[-1].text += some

    def entity(name: str, *rest: object) -> None:
        raise refuse(f"declares the entity {name[:40]!r}, which no nvidia-smi does")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = characters, entity
    try:
        parser.Parse(text.lstrip(), True)
    except expat.ExpatError as error:
        raise single_problem(file, f"is not XML: {expat.ErrorString(error.code)}", line=error.lineno) from None
    return top.children[0]
