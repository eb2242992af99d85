"""Defaults of options, read from files: the project's ``hetis.toml``, and with lower precedence the user's.

A table named after a verb (``[place]``, ``[cluster.discover]``) sets options of that verb; settings before all tables
apply to every verb that has the option. Precedence: the command line, the project's table of the verb, the project's
settings for all verbs, the user's table of the verb, the user's settings for all verbs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hetis.formats.errors import DocumentError, Problem, did_you_mean, single_problem

NAME = "hetis.toml"


class OptionForm(NamedTuple):
    """An option of a verb: the name of its parameter, and what it takes."""

    parameter: str
    is_flag: bool
    is_repeatable: bool


Options = Mapping[str, Mapping[str, OptionForm]]  # by verb and option name


def default_files(folder: Path) -> list[Path]:
    """Return the files that exist, the user's first; a project's file is in the folder or in one above it."""
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    user = configuration / "hetis" / NAME
    project = next((above / NAME for above in (folder, *folder.parents) if (above / NAME).is_file()), None)
    found = [user] if user.is_file() else []
    return [*found, *([project] if project is not None and project != user else [])]


def default_map(options: Options, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the defaults of every verb by parameter name, from the files that apply to a folder.

    Raises:
        DocumentError: a file is not TOML, names a verb or an option that does not exist, or has a value of a type that
            an option does not take.
    """
    found: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for file in default_files(folder):
        for verb, name, value in _settings(file, options, problems):
            inner = found
            for part in verb.split("."):  # groups of verbs are nested, as click expects
                inner = inner.setdefault(part, {})
            inner[name] = value
    if problems:
        raise DocumentError(dict.fromkeys(problems))  # settings for all verbs are wrong for each of them
    return found


def _settings(file: Path, options: Options, problems: list[Problem]) -> Iterator[tuple[str, str, Any]]:
    """Yield verb, parameter and value of every setting in a file, those for all verbs before those for one."""
    import tomllib  # takes a tenth of the start-up time, so import it only if there is a file

    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise single_problem(str(file), f"cannot be read: {error}") from None
    every = {name for names in options.values() for name in names}
    tables = {key: value for key, value in said.items() if isinstance(value, dict)}
    for key, value in said.items():
        if key in tables:
            continue
        if key not in every:
            problems.append(
                Problem(file=str(file), message=f"no command has an option --{key}{did_you_mean(key, every)}")
            )
        for verb, names in options.items():
            if key in names and _is_taken(key, value, names[key], file, problems):
                yield verb, names[key].parameter, _as_given(value, names[key])
    groups = {verb.partition(".")[0] for verb in options if "." in verb}
    inner = {f"{name}.{verb}": table for name in groups & set(tables) for verb, table in tables[name].items()}
    for verb, table in ({name: table for name, table in tables.items() if name not in groups} | inner).items():
        if not isinstance(table, dict):
            group, _, key = verb.partition(".")
            message = (
                f"{group} has no option --{key}: set it in the table of one of its commands, such as [{group}.VERB]"
            )
            problems.append(Problem(file=str(file), message=message))
            continue
        if verb not in options:
            problems.append(Problem(file=str(file), message=f"no command {verb!r}{did_you_mean(verb, options)}"))
            continue
        for key, value in table.items():
            if key not in options[verb]:
                hint = did_you_mean(key, options[verb])
                problems.append(Problem(file=str(file), message=f"{verb} has no option --{key}{hint}"))
            elif _is_taken(key, value, options[verb][key], file, problems):
                yield verb, options[verb][key].parameter, _as_given(value, options[verb][key])


def _is_taken(key: str, value: Any, option: OptionForm, file: Path, problems: list[Problem]) -> bool:
    """Return whether an option takes a value of this type; otherwise add a problem."""
    values = value if option.is_repeatable and isinstance(value, list) else [value]
    if option.is_flag:
        wrong, takes = not isinstance(value, bool), "true or false"
    else:
        wrong = any(isinstance(one, bool | list | dict) for one in values)
        takes = "text, a number, or a list of them" if option.is_repeatable else "one text or number"
    if wrong:
        problems.append(Problem(file=str(file), message=f"--{key} takes {takes}, not {_shown(value)}"))
    return not wrong


def _shown(value: Any) -> str:
    """Return a value briefly, as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else repr(value)


def _as_given(value: Any, option: OptionForm) -> Any:
    """Return a value as the command line would pass it: text, a list of texts, or a bool for a flag."""
    if option.is_flag:
        return value
    if option.is_repeatable:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    return str(value)
