"""Writes ``docs/reference``: command lines, files, the service and metrics, as the code defines them.

    make reference            writes the pages
    python -m tools.reference --check    says which are out of date, and ends with 1 where one is

Nothing on these pages is written by hand, so that they cannot disagree with the code: a test runs ``--check``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tools.markdown import code, fence, heading, page, prose, slug, table
from tools.reference.metrics import metrics_page

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    check = parser.parse_args(arguments).check
    pages = {f"{name}.md": make() for name, make in PAGES.items()}
    stale = [name for name, text in pages.items() if _read(FOLDER / name) != text]
    gone = [path.name for path in FOLDER.glob("*.md") if path.name not in pages]
    if check:
        for name in [*stale, *gone]:
            print(f"docs/reference/{name} is out of date: run make reference", file=sys.stderr)
        return 1 if stale or gone else 0
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(pages[name], encoding="utf-8")
    for name in gone:
        (FOLDER / name).unlink()
    return 0


# --- command lines


def _typer_page(program: str, module: str) -> str:
    import typer

    command: Any = typer.main.get_command(importlib.import_module(module).app)
    return page([heading(program, _help(command)), *_parameters(command), *_epilog(command), *_verbs(command, program)])


def plan_page() -> str:
    from hetis.planner.cli.parameters.defaults import OWN_MEANING

    rows = ((code(name), ", ".join(map(code, sorted(verbs)))) for name, verbs in OWN_MEANING.items())
    parts = [
        _typer_page("hetis-plan", "hetis.planner.cli.app"),
        "## Options in hetis.toml\n",
        "Some verbs use the name of an option for something else. Only their own tables of"
        " [`hetis.toml`](../cli.md#defaults-from-files) set it for them.\n",
        table(("option", "verbs"), rows),
    ]
    return "\n".join(parts)


def planner_page() -> str:
    return "\n".join(
        [
            _typer_page("hetis-planner", "hetis.planner.service.command"),
            f"## Settings\n\n{_shown('examples/service/planner.yaml')}",
        ]
    )


def worker_page() -> str:
    from hetis.runtime.worker.main import VARIABLES, make_parser

    parser = make_parser()
    rows = [
        (
            code(", ".join(action.option_strings) + (f" {action.metavar}" if action.metavar else "")),
            prose((action.help or "").partition(" [")[0]),
            code(VARIABLES[action.option_strings[0]]) if action.option_strings[0] in VARIABLES else "",
        )
        for action in parser._actions
    ]
    parts = [heading("hetis-worker", prose(parser.description or ""))]
    parts += [table(("option", "meaning", "variable"), rows), fence(parser.epilog or "")]
    return page(parts)


def _verbs(group: Any, program: str) -> Iterator[str]:
    for name, command in sorted(getattr(group, "commands", {}).items()):
        arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([program, name, *arguments])
        yield f"## {program.partition(' ')[2]}{' ' if ' ' in program else ''}{name}\n"
        yield f"`{usage}`\n\n{_help(command)}\n"
        yield from _parameters(command)
        yield from _epilog(command)
        yield from _verbs(command, f"{program} {name}")


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    if name.startswith("["):
        return str(name)
    many = "..." if parameter.nargs == -1 and not name.endswith("...") else ""
    return f"{name}{many}" if parameter.required else f"[{name}{many}]"


def _parameters(command: Any) -> Iterator[str]:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            if parameter.help:
                rows.append((code(parameter.metavar or parameter.name.upper()), prose(parameter.help), ""))
            continue
        names = ", ".join(sorted(parameter.opts, key=len, reverse=True))
        names += f" / {', '.join(parameter.secondary_opts)}" if parameter.secondary_opts else ""
        value = "" if parameter.is_flag else f" {_value_name(parameter)}"
        said = prose(parameter.help or "")
        if parameter.multiple and "repeat" not in said.lower():
            said += " May be repeated."
        if parameter.envvar:
            said += f" Or in `{parameter.envvar}`."
        rows.append((code(names + value), said, _default(parameter)))
    if rows:
        yield table(("option", "meaning", "default"), rows)


def _value_name(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    choices = getattr(kind, "__members__", None)
    if choices:
        return "|".join(member.value for member in choices.values())
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return str(getattr(kind, "__name__", "VALUE")).upper()


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return prose(parameter.show_default)
    if parameter.is_flag:
        return code(parameter.opts[0]) if parameter.default is True and parameter.secondary_opts else ""
    if not parameter.show_default or parameter.default in (None, (), []):
        return ""
    value = parameter.default() if callable(parameter.default) else parameter.default
    return code(str(getattr(value, "value", value)))


def _help(command: Any) -> str:
    paragraphs = textwrap.dedent(command.help or "").strip().split("\n\n")
    return "\n\n".join(prose(paragraph) for paragraph in paragraphs)


def _epilog(command: Any) -> Iterator[str]:
    lines = [line for line in textwrap.dedent(command.epilog or "").replace("\\[", "[").splitlines() if line.strip()]
    if lines:
        yield fence("\n".join(lines))


# --- files


FILE_EXAMPLES = {
    "Cluster": "examples/paper.yaml",
    "ModelSpec": "examples/files/model.yaml",
    "Workload": "examples/files/workload.yaml",
    "Profile": "examples/files/profile.yaml",
    "DispatchState": "examples/dispatch/a100-l4.yaml",
    "DispatchRequests": "examples/dispatch/requests.yaml",
    "Tenants": "examples/three-models.yaml",
}


def formats_page() -> str:
    from hetis.formats.documents import KINDS, json_schema
    from hetis.formats.traces.forms import FORMS, OTHERS

    parts = [
        heading(
            "Files",
            "Every file is YAML or JSON with `apiVersion: hetis/v1` and a `kind`. Sizes, rates and times are text with"
            " a unit (`80GiB`, `100Gbps`, `20us`). `hetis-plan validate FILE` lists every problem of a file at once,"
            " and `hetis-plan schema KIND` prints the JSON Schema that these tables are made of.",
        )
    ]
    for kind in KINDS:
        schema = json_schema(kind)
        parts += [f"## {kind}\n", f"{prose(schema.get('description', ''))}\n", _example(kind), _fields(kind, schema)]
        for name, part in schema.get("$defs", {}).items():
            if "properties" in part:
                parts += [f"### {kind}: {name}\n", f"{prose(part.get('description', ''))}\n", _fields(kind, part)]
        if kind == "Plan":
            parts += ["### Plan: inputs\n", table(("entries", "content"), _entries_of_plans())]
    forms = [*FORMS, *OTHERS]
    parts += [
        "## Traces\n",
        "A trace is CSV or JSONL with a row for each request. Other forms are known by their columns or fields, where"
        " `a.b` is field b of the object in field a; [`hetis-plan convert`](../cli.md#convert) writes the first.\n",
        fence("arrival_s,prompt_tokens,output_tokens\n0.0,374,44\n4.3,396,109"),
        table(
            ("form", "arrival, prompt, output", "known from"),
            ((one.name, ", ".join(map(code, one.fields)), prose(one.source)) for one in forms),
        ),
    ]
    return page(parts)


def _entries_of_plans() -> Iterator[tuple[str, str]]:
    """Yield the entries of `inputs` that each part of a plan's record has, and the part's description."""
    from hetis.planner.use_cases.record import parts

    for part in vars(parts).values():
        if not (isinstance(part, type) and issubclass(part, parts.Part) and part is not parts.Part):
            continue
        names = (one.metadata["name"] or one.name for one in dataclasses.fields(part))  # type: ignore[arg-type]
        yield ", ".join(map(code, names)), prose(part.__doc__ or "")


def _example(kind: str) -> str:
    if kind not in FILE_EXAMPLES:
        return "`place --out` writes such a file; [what is in it](../cli.md#plan-files).\n"
    return _shown(FILE_EXAMPLES[kind])


def _shown(path: str) -> str:
    return f"[`{path}`](../../{path}):\n\n```yaml\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```\n"


def _fields(kind: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = (
            "required" if name in required else "" if field.get("default") is None else code(str(field["default"]))
        )
        rows.append((code(name), _type(kind, field), default))
    return table(("field", "value", "default"), rows)


def _type(kind: str, field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{slug(f'{kind}: {name}')})"
    if "const" in field:
        return code(str(field["const"]))
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    for union in ("anyOf", "oneOf"):
        if union in field:
            several = [_type(kind, one) for one in field[union] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(several))
    if field.get("type") == "array":
        items = field.get("items") or (field["prefixItems"][0] if field.get("prefixItems") else {})
        return f"list of {_type(kind, items)}{_limits(field, 'minItems', 'maxItems')}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(kind, values)}" if isinstance(values, dict) else "mapping"
    examples = f" like {code(str(field['examples'][0]))}" if field.get("examples") else ""
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    return f"{words.get(field.get('type', ''), 'any value')}{examples}{_limits(field, 'minimum', 'maximum')}"


def _limits(field: Mapping[str, Any], least: str, most: str) -> str:
    low, high = field.get(least), field.get(most)
    above = field.get("exclusiveMinimum")
    said = [f"above {above:g}"] if above is not None and least == "minimum" else []
    said += [f"at least {low:g}"] if low is not None else []
    said += [f"at most {high:g}"] if high is not None and high < 1e6 else []
    return f", {', '.join(said)}" if said else ""


# --- the service


def api_page() -> str:
    parts = [
        heading(
            "Services and messages",
            "The contract of the planner, its agents and engines, from the comments of"
            " [`proto/hetis/v1`](../../proto/hetis/v1). How calls behave together is on the page about"
            " [the interface](../api.md).",
        )
    ]
    described = _descriptors()
    for file in described:
        comments = _comments(file)
        for number, service in enumerate(file.service):
            parts.append(f"## {service.name}\n\n{prose(comments.get((6, number), ''))}\n")
            rows = []
            for place, method in enumerate(service.method):
                ask, answer = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
                ask = f"stream of {ask}" if method.client_streaming else ask
                answer = f"stream of {answer}" if method.server_streaming else answer
                says = prose(comments.get((6, number, 2, place), ""))
                rows.append((code(method.name), ask, answer, says))
            parts.append(table(("call", "request", "response", "what it does"), rows))
    for file in described:
        comments = _comments(file)
        for number, message in enumerate(file.message_type):
            parts += _message(message, (4, number), comments, message.name)
        for number, enum in enumerate(file.enum_type):
            parts += _enum(enum, (5, number), comments, enum.name)
    return page(parts)


def _comments(file: Any) -> dict[tuple[int, ...], str]:
    """Return the comment before every element of a file, by its path."""
    return {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}


def _message(message: Any, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str], name: str) -> Iterator[str]:
    if message.options.map_entry:
        return
    yield f"### {name}\n\n{prose(comments.get(path, ''))}\n"
    rows = []
    for number, field in enumerate(message.field):
        rows.append((code(field.name), _field_type(field), prose(comments.get((*path, 2, number), ""))))
    if rows:
        yield table(("field", "type", "meaning"), rows)
    for number, nested in enumerate(message.nested_type):
        yield from _message(nested, (*path, 3, number), comments, f"{name}.{nested.name}")
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, 4, number), comments, f"{name}.{enum.name}")


def _enum(enum: Any, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str], name: str) -> Iterator[str]:
    yield f"### {name}\n\n{prose(comments.get(path, ''))}\n"
    rows = [
        (code(value.name), str(value.number), prose(comments.get((*path, 2, number), "")))
        for number, value in enumerate(enum.value)
    ]
    yield table(("value", "number", "meaning"), rows)


def _field_type(field: Any) -> str:
    name = field.type_name.rpartition(".")[2] or field.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"repeated {name}" if field.label == field.LABEL_REPEATED else name


def _descriptors() -> Iterable[Any]:
    from google.protobuf import descriptor_pb2

    folder = ROOT / "proto"
    sources = sorted(path.relative_to(folder).as_posix() for path in (folder / "hetis" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "set.bin"
        arguments = [f"-I{folder}", "--include_source_info", f"--descriptor_set_out={out}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments, *sources], check=True)
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


# --- pages


PAGES: Mapping[str, Callable[[], str]] = {
    "hetis-plan": plan_page,
    "hetis-planner": planner_page,
    "hetis-agent": partial(_typer_page, "hetis-agent", "hetis.runtime.agent.main"),
    "hetis-worker": worker_page,
    "hetis-launch": partial(_typer_page, "hetis-launch", "hetis.runtime.launch.main"),
    "hetis-profile": partial(_typer_page, "hetis-profile", "hetis.profiler.cli.app"),
    "files": formats_page,
    "services": api_page,
    "metrics": metrics_page,
}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
