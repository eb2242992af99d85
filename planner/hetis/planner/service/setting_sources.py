"""Sources of settings: flags over environment over file over defaults; errors name the source."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.formats.fields import API_VERSION
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Path, Text, parse_text
from hetis.planner.service.settings import PlannerConfig

PREFIX = "HETIS_"
Leaf = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A setting from outside the file: its dotted name, its text, and its source (``--store``)."""

    name: str
    text: str
    by: str


def load_config(
    path: str | os.PathLike[str] | None,
    *,
    environment: Mapping[str, str],
    flags: Iterable[Given] = (),
    look_further: Callable[[PlannerConfig], Iterable[Problem]] = lambda _config: (),
) -> PlannerConfig:
    """Return the configuration of a file (None: no file), with the ``HETIS_*`` variables over it, and flags over both.

    Args:
        path: of the file.
        environment: of the process.
        flags: of the command line.
        look_further: returns further problems, such as a missing file, of a configuration whose values are all valid.

    Raises:
        DocumentError: with every problem of all sources.
    """
    if path is None:
        data: Any = {"apiVersion": API_VERSION, "kind": "PlannerConfig"}
        layers = _Layers(file="configuration", text=None)
    else:
        data, text = read_data(path)
        layers = _Layers(file=text.file, text=text.text, _root=text._root, problems=list(text.problems))
    for given in (*_from_environment(environment, layers), *flags):
        _put(data, given, layers)
    mistakes, layers.problems[:] = list(layers.problems), []  # unknown names: the values may still be valid
    try:
        config = validated(PlannerConfig, data, layers, to_value=lambda document: document)
    except DocumentError as error:
        raise DocumentError(_in_order([*mistakes, *error.problems])) from None
    contradictions = [layers.problem(place, message) for place, message in config.contradictions()]
    if problems := [*mistakes, *contradictions, *look_further(config)]:
        raise DocumentError(_in_order(problems))
    return config


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems in the order of `validated`: those without a line first."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.column or 0))


def variables() -> dict[str, str]:
    """Return every environment variable that is read, with its setting."""
    return {PREFIX + "__".join(leaf).upper(): ".".join(leaf) for leaf in _leaves(PlannerConfig)}


def mistaken_variables(environment: Mapping[str, str]) -> list[str]:
    """Return ``HETIS_*`` variables that set nothing but resemble one that does, each with its nearest name."""
    known = variables()
    hints = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and name not in _OTHERS:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            hints += [f"{name} is not a setting, did you mean {meant}?" for meant in close]
    return hints


_OTHERS = {"HETIS_DEBUG", "HETIS_CONFIG", "HETIS_SERVER", "HETIS_TOKEN"}  # of this and of other commands of hetis


@dataclass(slots=True)
class _Layers(Text):
    """The text of the file, and the settings that came from elsewhere."""

    given: dict[Leaf, str] = field(default_factory=dict)

    def problem(self, path: Path, message: str) -> Problem:
        for length in range(len(path), 0, -1):
            by = self.given.get(tuple(str(part) for part in path[:length]))
            if by is not None:
                return Problem(file=by, message=message)
        return Text.problem(self, path, message)


def _from_environment(environment: Mapping[str, str], layers: _Layers) -> Iterator[Given]:
    known = variables()
    sections = {name.partition("__")[0] + "__" for name in known if "__" in name}
    for name in sorted(environment):
        if name in known:
            if environment[name]:  # empty is unset, as in compose files
                yield Given(name=known[name], text=environment[name], by=name)
        elif any(name.startswith(section) for section in sections):
            layers.problems.append(Problem(file=name, message=f"is not a setting{did_you_mean(name, known)}"))


def _put(data: Any, given: Given, layers: _Layers) -> None:
    leaves = _leaves(PlannerConfig)
    leaf = tuple(given.name.split("."))
    if leaf not in leaves:
        hint = did_you_mean(given.name, (".".join(known) for known in leaves))
        layers.problems.append(Problem(file=given.by, message=f"{given.name} is not a setting{hint}"))
        return
    holder = data
    for part in leaf[:-1]:
        if not isinstance(holder, dict):
            return  # the file is wrong there, and validation reports it
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
    if isinstance(holder, dict):
        holder[leaf[-1]] = _value(given, leaves[leaf])
        layers.given[leaf] = given.by


def _value(given: Given, annotation: Any) -> Any:
    """Return a variable's text as its field needs it: text stays text, lists are split at commas, the rest is YAML."""
    if get_origin(annotation) is list:
        return [part.strip() for part in given.text.split(",")]
    if annotation is str or get_origin(annotation) is Literal:
        return given.text
    return parse_text(given.text, given.by)[0]


def _leaves(document: type[BaseModel], above: Leaf = ()) -> dict[Leaf, Any]:
    """Return path and bare type of every setting."""
    found: dict[Leaf, Any] = {}
    for name, info in document.model_fields.items():
        if name in ("api_version", "kind"):
            continue
        bare = _bare(info.annotation)
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            found |= _leaves(bare, (*above, name))
        else:
            found[*above, name] = bare
    return found


def _bare(annotation: Any) -> Any:
    """Return ``X`` of ``Annotated[X, ...]`` and of ``X | None``."""
    if hasattr(annotation, "__metadata__"):
        return _bare(annotation.__origin__)
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return _bare(next(argument for argument in get_args(annotation) if argument is not type(None)))
    return annotation
