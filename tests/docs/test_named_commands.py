"""Every command that a message, a docstring, an alert or a sentence of a page names can be typed as it stands there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile

import typer

from tests.docs.pages import PAGES, ROOT, without_fences
from tests.docs.test_commands import group, parse

PACKAGES = ("formats", "profiler", "simulator", "engines", "planner", "runtime", "proto")
VALUE = "NAME-1"  # stands for whatever a message inserts
PROGRAMS = r"hetis-(?:plan|planner|agent|launch|profile)"
# What a message tells a reader to do next stands after a colon or in brackets: "roll back: hetis-plan rollback PLAN".
NEXT = re.compile(rf"(?<=: |.\(){PROGRAMS} (?:[a-z]|--)(?:[^;,:`(){{}}\n]|:(?=\S))*")
NAMED = re.compile(rf"{PROGRAMS} (?:[a-z]|--)[^;,:`()|{{}}\n]*")
PROSE = {"listens", "controls", "sets", "for"}  # verbs and others that follow a program's name in sentences
SPAN = re.compile(rf"`({PROGRAMS} [^`]+)`")


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module with their lines; values that are inserted or appended are `VALUE`."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inside |= {id(node.left) for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            said = ""
            for part in node.values:  # a value directly after a letter is the rest of the message, not of the command
                own = "" if said[-1:].isalnum() else VALUE
                said += str(part.value) if isinstance(part, ast.Constant) else own
            yield node.lineno, said
        elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            yield node.lineno, node.left.value + VALUE
        elif id(node) not in inside and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"\{\w*\}", VALUE, node.value)


def can_be_typed(command: str) -> bool:
    """Return whether the command, without words of its sentence that follow, is one that its program takes."""
    words = shlex.split(command.strip().rstrip(".'"))
    if words[1] in PROSE:
        return True
    least = max((at for at, word in enumerate(words) if word.startswith("-")), default=1)
    for end in range(len(words), least, -1):
        try:
            parse(words[:end])
        except typer.Exit:  # --help
            return True
        except (Exception, SystemExit):  # whatever the parser of that program raises
            continue
        return True
    return False


def exists(command: str) -> bool:
    """Return whether the command's program has the verb and all options that the command names."""
    program, *words = shlex.split(command.strip().rstrip(".'"))
    found = group(program)
    while (verbs := getattr(found, "commands", None)) and words and not words[0].startswith("-"):
        if words[0] not in verbs:
            return words[0].isupper() or words[0] in PROSE or not re.fullmatch(r"[a-z-]+", words[0])
        found = verbs[words.pop(0)]
    options = {option for one in found.params for option in (*one.opts, *one.secondary_opts)} | {"--help", "--"}
    own = takewhile(lambda word: word not in ("--", "|"), words)
    return {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)} <= options


def messages() -> Iterator[tuple[str, str]]:
    """Yield every text of our packages with its place."""
    for package in PACKAGES:
        for path in sorted((ROOT / package / "hetis").rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "hetis-" in text:
                yield from ((f"{path.relative_to(ROOT)}:{line}", said) for line, said in strings(ast.parse(text)))


def sentences() -> Iterator[tuple[str, str]]:
    """Yield every command that stands in a sentence of a page, or in an alert."""
    for path in [*PAGES, ROOT / "deploy/prometheus/alerts.yaml"]:
        for found in SPAN.finditer(without_fences(path.read_text(encoding="utf-8"))):
            yield path.name, found[1]


def test_what_a_message_says_to_do_next_can_be_typed() -> None:
    found = [(where, found[0]) for where, said in messages() for found in NEXT.finditer(said)]
    assert len(found) > 40
    wrong = [f"{where}: {command}" for where, command in found if not can_be_typed(command)]
    assert not wrong, "\n".join(wrong)


def test_commands_in_sentences_have_the_verb_and_options_that_they_name() -> None:
    """They may leave out what the command needs besides."""
    found = [(where, found[0]) for where, said in (*messages(), *sentences()) for found in NAMED.finditer(said)]
    assert len(found) > 200
    wrong = [f"{where}: {command}" for where, command in found if not exists(command)]
    assert not wrong, "\n".join(wrong)


def test_a_command_that_does_not_exist_is_found() -> None:
    module = "f(f'wait: hetis-plan wach {x}', 'see it: hetis-plan get --node', 'read: hetis-plan get ' + x)"
    said = [found[0] for _, text in strings(ast.parse(module)) for found in NEXT.finditer(text)]
    assert {command: can_be_typed(command) for command in said} == {
        f"hetis-plan wach {VALUE}": False,
        "hetis-plan get --node": False,
        f"hetis-plan get {VALUE}": True,
    }
    assert can_be_typed("hetis-plan get nodes lists them")
    assert not exists("hetis-plan drian NODE")
    assert not exists("hetis-plan drain --nodes NODE")
