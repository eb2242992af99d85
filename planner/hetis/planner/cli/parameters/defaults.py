"""Defaults of options, read from files: the project's ``hetis.toml``, and with lower precedence the user's.

A table named after a verb (``[place]``, ``[cluster.discover]``) sets options of that verb; settings before all tables
apply to every verb that has the option, except where it has a meaning of its own (`OWN_MEANING`). Precedence: the
command line, the project's table of the verb, the project's settings for all verbs, the user's table of the verb, the
user's settings for all verbs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperOption

from hetis.formats.errors import DocumentError, Problem, did_you_mean, single_problem

NAME = "hetis.toml"


Options = Mapping[str, Mapping[str, TyperOption]]  # by verb and option name

# Options by name, with the verbs in which they mean something else than in `place`, or than in any other verb if
# `place` lacks them. Settings for all verbs do not reach them there; the table of the verb does.
OWN_MEANING: Mapping[str, frozenset[str]] = {
    "chunk-tokens": frozenset({"simulate"}),  # one setting, not choices to plan with
    "cluster": frozenset(  # the name of a cluster, and in `apply` something to change on the planner
        {"apply", "get", "agents", "upstreams", "rollback", "drain", "undrain", "disconnect", "why", "cluster.discover"}
    ),
    "engine": frozenset({"export", "fits"}),
    "from": frozenset({"replan", "cluster.discover"}),
    "gpu": frozenset({"cluster.discover"}),  # what a tool means by a name
    "kv": frozenset({"fits"}),
    "model": frozenset(  # an argument for the engine, a client's name, a check, and in `apply` a request to solve
        {"export", "upstreams", "replan", "apply", "traffic"}
    ),
    "name": frozenset({"export", "apply", "cluster.discover"}),
    "out": frozenset(  # anything but a plan
        {"compare", "report", "share", "export", "upstreams", "convert", "traffic", "cluster.discover"}
    ),
    "plan": frozenset({"dispatch", "apply"}),
    "profile": frozenset({"apply"}),  # as for its cluster
    "rate": frozenset({"simulate", "convert", "rehearse"}),
    "requests": frozenset({"simulate", "dispatch"}),
    "seed": frozenset({"rehearse"}),
    "strict": frozenset({"export", "redispatch"}),
    "to": frozenset({"export", "upstreams"}),
    "trace": frozenset({"rehearse"}),
    "fail": frozenset({"rehearse"}),
    "join": frozenset({"rehearse"}),
    "max-moves": frozenset({"rehearse"}),
    "horizon": frozenset({"rehearse"}),
    "weights": frozenset({"fits"}),  # of one GPU type, as its KV
    "workload": frozenset({"apply"}),  # as for its model
}


def default_files(folder: Path) -> list[Path]:
    """Return the files that exist, the user's first; a project's file is in the folder or in one above it.

    A file in a folder that the user may not read does not exist for them, nor does one in an unknown home.
    """
    user, above = _user_file(), (folder, *folder.parents)
    project = next((each / NAME for each in above if os.path.isfile(each / NAME)), None)
    found = [user] if user is not None and os.path.isfile(user) else []
    return [*found, *([project] if project is not None and project != user else [])]


def _user_file() -> Path | None:
    """Return the path of the user's file, or None if the home folder is unknown."""
    try:
        configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:  # HOME is not set, and the user has no entry in the password database
        return None
    return configuration / "hetis" / NAME


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
        said = tomllib.loads(file.read_text(encoding="utf-8-sig"))  # Windows editors write a BOM
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise single_problem(str(file), f"is not valid TOML: {error}") from None
    except OSError as error:
        raise single_problem(str(file), f"cannot be read: {error}") from None

    def wrong(message: str) -> None:
        problems.append(Problem(file=str(file), message=message))

    def taken(key: str, value: Any, form: TyperOption) -> bool:
        if what := _what_it_takes_instead(value, form):
            wrong(f"--{key} takes {what}, not {_shown(value)}")
        return not what

    every = {name for names in options.values() for name in names}
    tables = {key: value for key, value in said.items() if isinstance(value, dict)}
    for key, value in said.items():
        if key in tables:
            continue
        having = {verb: names[key] for verb, names in options.items() if key in names}
        reached = {verb: form for verb, form in having.items() if verb not in OWN_MEANING.get(key, ())}
        if not having:
            wrong(f"no command has an option --{key}{did_you_mean(key, every)}")
        elif not reached:
            only = ", ".join(f"[{verb}]" for verb in having)
            wrong(f"--{key} means something else in each command: set it in the table of one of them: {only}")
        for verb, form in reached.items():
            if taken(key, value, form):
                yield verb, form.name, _as_given(value, form)
    groups = {verb.partition(".")[0] for verb in options if "." in verb}
    inner = {f"{name}.{verb}": table for name in groups & set(tables) for verb, table in tables[name].items()}
    for verb, table in ({name: table for name, table in tables.items() if name not in groups} | inner).items():
        if not isinstance(table, dict):
            group, _, key = verb.partition(".")
            wrong(f"{group} has no option --{key}: set it in the table of one of its commands, such as [{group}.VERB]")
        elif verb not in options:
            wrong(f"no command {verb!r}{did_you_mean(verb, options)}")
        else:
            for key, value in table.items():
                if (found := options[verb].get(key)) is None:
                    wrong(f"{verb} has no option --{key}{did_you_mean(key, options[verb])}")
                elif taken(key, value, found):
                    yield verb, found.name, _as_given(value, found)


def _what_it_takes_instead(value: Any, option: TyperOption) -> str:
    """Return what an option takes if it takes no value of this type; otherwise empty."""
    if option.is_flag:
        return "" if isinstance(value, bool) else "true or false"
    values = value if option.multiple and isinstance(value, list) else [value]
    if not any(isinstance(one, bool | list | dict) for one in values):
        return ""
    return "text, a number, or a list of them" if option.multiple else "one text or number"


def _shown(value: Any) -> str:
    """Return a value briefly, as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else repr(value)


def _as_given(value: Any, option: TyperOption) -> Any:
    """Return a value as the command line would pass it: text, a list of texts, or a bool for a flag."""
    if option.is_flag:
        return value
    if option.multiple:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    return str(value)
