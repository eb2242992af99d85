"""Converts YAML and JSON text to plain data that remembers the position of every value.

The text is read as PyYAML events, never as objects, and composed here without recursion, so tags that make objects,
endless nesting and alias bombs have no effect. Plain scalars follow the core schema of YAML 1.2, of which JSON is a
subset: ``1e-9`` is a number, ``no`` and ``12:30`` are strings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from hetis.formats.errors import MAX_SHOWN, DocumentError, Problem, single_problem

MAX_DEPTH = 64  # levels of nesting, with aliases expanded
MAX_NODES = 1_000_000  # values in a document, with aliases expanded
_MOST_EXPLAINED = 65_536  # characters that the pure Python parser reads to explain an error: it takes 50 times as long
_EVENTS_PER_LOOK = 1024

Path = Sequence[str | int]

_INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+"')
_WORDS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")} | {"!"}


def path_text(path: Path) -> str:
    """Return ``nodes[1].gpus[0].type`` for ``("nodes", 1, "gpus", 0, "type")``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class NotYamlError(DocumentError):
    """The text violates the syntax of YAML."""


def _go_on() -> None:
    """Never end the reading early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits on the cost of reading a document."""

    max_values: int = MAX_NODES  # values in it; nothing beyond is built
    max_yaml_values: int = MAX_NODES  # the same for YAML, which takes ten times as long to read; aliases expanded
    # Called periodically while it is read; may raise an exception, which ends the reading
    look_up: Callable[[], None] = _go_on


UNHURRIED = Bounds()
"""For files of the user who runs the command."""


@dataclass(slots=True)
class _Node:
    """A value and its position. ``items`` are the nodes inside; a mapping also keeps its keys' nodes."""

    line: int
    column: int
    scalar: Any = None
    items: list[_Node] | None = None
    keys: list[_Node] | None = None
    size: int = 1
    height: int = 1
    places: dict[str, int] | None = None  # places of the keys; made when a path is looked up

    def place_of(self, part: str | int) -> int | None:
        """Return the index of the item for a key or a position, or None if there is none."""
        if self.items is None:
            return None
        if self.keys is None:
            return part if isinstance(part, int) and 0 <= part < len(self.items) else None
        if self.places is None:
            self.places = {key.scalar: place for place, key in reversed(list(enumerate(self.keys)))}
        return self.places.get(part) if isinstance(part, str) else None

    def plain(self) -> Any:
        if self.items is None:
            return self.scalar
        if self.keys is None:
            return [item.plain() for item in self.items]
        return {key.scalar: item.plain() for key, item in zip(self.keys, self.items, strict=True)}


@dataclass(slots=True)
class Text:
    """The text of a document. It finds the line of a path when a problem needs it."""

    file: str
    text: str | None  # None: the data did not come from text
    _root: _Node | None = None
    problems: list[Problem] = field(default_factory=list)
    bounds: Bounds = UNHURRIED

    def locate(self, path: Path) -> tuple[int | None, int | None]:
        """Return line and column of the value at ``path``, or of the closest existing one around it."""
        if self._root is None and self.text is not None:
            if _may_exceed(self.text, self.bounds.max_yaml_values):
                self.text = None
                return None, None
            try:  # JSON read by the fast way below
                self._root = _Composer(self).compose()
            except DocumentError:
                self.text = None  # JSON that YAML cannot read; do not try again
        node = self._root
        if node is None:
            return None, None
        line, column = node.line, node.column
        for part in path:
            place = node.place_of(part)
            if place is None or node.items is None:
                break
            where = node.items[place] if node.keys is None else node.keys[place]
            line, column = where.line, where.column
            node = node.items[place]
        return line, column

    def problem(self, path: Path, message: str) -> Problem:
        """Return a problem with the value at ``path``."""
        line, column = self.locate(path)
        return Problem(file=self.file, path=path_text(path), message=message, line=line, column=column)


def parse_text(text: str, file: str, bounds: Bounds = UNHURRIED) -> tuple[Any, Text]:
    """Return the plain data (dict, list, str, int, float, bool, None) of YAML or JSON, and the text with its positions.

    Duplicate keys do not stop the reading; they are left in ``Text.problems``. Numbers may be infinite or NaN in YAML.
    Raises DocumentError if it is not YAML, holds several documents, is nested too deep, or is too large once its
    aliases are expanded.
    """
    source = Text(file=file, text=text, bounds=bounds)
    not_json: json.JSONDecodeError | None = None
    if text.lstrip()[:1] in ("{", "["):
        if _may_exceed(text, bounds.max_values):
            raise single_problem(file, f"is larger than {bounds.max_values} values")
        try:  # strict JSON is read many times faster this way; anything unusual takes the other way, for its messages
            return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite), source
        except json.JSONDecodeError as error:
            not_json = error
        except (ValueError, RecursionError):
            pass
    try:
        root = _Composer(source).compose()
    except NotYamlError as error:
        if not_json is None or not file.endswith(".json"):
            raise
        message = f"is not valid JSON: {not_json.msg[:1].lower()}{not_json.msg[1:]}"
        raise single_problem(file, message, line=not_json.lineno, column=not_json.colno) from error
    source._root = root
    return root.plain(), source


def _may_exceed(text: str, max_values: int) -> bool:
    """Return whether a text in braces may hold more values, counted in no more time than a scan of the text.

    A value follows a comma or an opening bracket. Those inside quotes are only excluded if it matters.
    """
    if text.count(",") + text.count("[") + text.count("{") <= max_values:
        return False
    bare = _QUOTED.sub("", text)
    return bare.count(",") + bare.count("[") + bare.count("{") > max_values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("duplicate key")
    return mapping


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


class _Composer:
    """Composes nodes from events with its own stack."""

    def __init__(self, source: Text) -> None:
        self._source, self._text, self._bounds = source, source.text or "", source.bounds
        self._anchors: dict[str, _Node] = {}
        self._problems: list[Problem] = []
        self._num_values = 0

    def compose(self) -> _Node:
        stack: list[tuple[_Node, str | None]] = []
        root: _Node | None = None
        scalar, mapping_start, sequence_start = yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent
        for number, event in enumerate(_events(self._text, self._source.file)):
            if not number % _EVENTS_PER_LOOK:
                self._bounds.look_up()
            kind, mark = type(event), event.start_mark
            line, column = mark.line + 1, mark.column + 1
            if kind is scalar:
                node = _Node(line, column, self._scalar(event, line, column))
                if event.anchor is not None:
                    self._anchors[event.anchor] = node
            elif kind is mapping_start or kind is sequence_start:
                self._check_tag(event.tag, line, column)
                stack.append((_Node(line, column, None, [], [] if kind is mapping_start else None), event.anchor))
                if len(stack) > MAX_DEPTH:
                    raise self._error(line, column, f"is nested more than {MAX_DEPTH} levels deep")
                continue
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                node, anchor = stack.pop()
                self._finish(node)
                if anchor is not None:
                    self._anchors[anchor] = node
            elif kind is yaml.AliasEvent:
                if event.anchor not in self._anchors:
                    raise self._error(line, column, f"alias *{event.anchor} has no finished anchor before it")
                node = self._anchors[event.anchor]
            elif kind is yaml.DocumentStartEvent and root is not None:
                raise self._error(line, column, "holds several YAML documents, expected one")
            else:
                continue
            if stack:
                self._put(stack[-1][0], node)
            else:
                root = node
        if root is None:
            raise single_problem(self._source.file, "is empty")
        self._source.problems = self._problems
        return root

    def _put(self, parent: _Node, node: _Node) -> None:
        assert parent.items is not None
        if parent.keys is not None and len(parent.keys) == len(parent.items):
            if not isinstance(node.scalar, str):
                what = "a mapping or list" if node.items is not None else str(node.scalar)
                raise self._error(node.line, node.column, f"key {what} is not a string (quote it)")
            parent.keys.append(node)
            return
        parent.items.append(node)
        parent.size += node.size
        if node.height >= parent.height:
            parent.height = node.height + 1
        self._num_values += 1
        # Check in addition to the size, which a collection only passes on at its end: open collections count too.
        most = self._bounds.max_yaml_values
        if parent.size > most or self._num_values > most or parent.height > MAX_DEPTH:
            limit = f"{MAX_DEPTH} levels of nesting" if parent.height > MAX_DEPTH else f"{most} values"
            raise self._error(node.line, node.column, f"is larger than {limit} once its aliases are expanded")

    def _finish(self, node: _Node) -> None:
        first_line: dict[str, int] = {}
        for key in node.keys or ():
            if key.scalar in first_line and len(self._problems) <= MAX_SHOWN:
                message = f"duplicate key {key.scalar!r}, first at line {first_line[key.scalar]}"
                self._problems.append(self._problem(key.line, key.column, message))
            first_line.setdefault(key.scalar, key.line)

    def _scalar(self, event: yaml.ScalarEvent, line: int, column: int) -> Any:
        self._check_tag(event.tag, line, column)
        text: str = event.value
        if not event.implicit[0] or (event.tag or "").endswith(":str"):
            return text
        if text in _WORDS:
            return _WORDS[text]
        if text[0] not in "+-.0123456789":
            return text
        if _NOT_FINITE.fullmatch(text):  # refused with its path by the field that it is for
            return float(text.replace(".", ""))
        if _INT.fullmatch(text) and len(text) <= 300:
            return int(text)
        return float(text) if FLOAT.fullmatch(text) else text

    def _check_tag(self, tag: str | None, line: int, column: int) -> None:
        if tag is not None and tag not in _TAGS:
            raise self._error(line, column, f"YAML tag {tag.replace('tag:yaml.org,2002:', '!!')} is not supported")

    def _problem(self, line: int, column: int, message: str) -> Problem:
        return Problem(file=self._source.file, line=line, column=column, message=message)

    def _error(self, line: int, column: int, message: str) -> DocumentError:
        return DocumentError([self._problem(line, column, message)])


def _events(text: str, file: str) -> Iterator[Any]:
    """Yield the events of the fast parser. If it fails, the pure Python one explains why, always in the same words."""
    try:
        if hasattr(yaml, "CSafeLoader"):
            try:
                yield from yaml.parse(text, Loader=yaml.CSafeLoader)
                return
            except yaml.YAMLError:
                if len(text) > _MOST_EXPLAINED:
                    raise
                for _ in yaml.parse(text, Loader=yaml.SafeLoader):
                    pass
                raise
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        marks = (error.problem_mark, error.context_mark)
        words = [part for part in (error.context, error.problem) if part]
        line, column = next(((m.line + 1, m.column + 1) for m in marks if m is not None), (None, None))
        message = f"is not valid YAML: {', '.join(words)}"
        raise NotYamlError([Problem(file=file, message=message, line=line, column=column)]) from None
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(error.character[:1] or "?")
        raise _not_text(file, text, error.position, character) from None
    except UnicodeEncodeError as error:  # of the fast parser: bytes of an environment that were no text
        raise _not_text(file, text, error.start, ord(text[error.start])) from None


def _not_text(file: str, text: str, place: int, character: int) -> DocumentError:
    line = text.count("\n", 0, place) + 1
    return single_problem(file, f"is not text: character U+{character:04X} is not allowed", line=line)
