"""Traces that are one JSON value: an array of requests or conversations, or the output of ``vllm bench serve``.

An array is read item by item, so that ShareGPT's 600 MB take no more memory than its longest conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from hetis.formats.errors import DocumentError, shown, single_problem
from hetis.formats.trace_forms import CONVERSATIONS, VLLM_BENCH, Row, fields_of, form_of, unknown_form, values_of

MAX_ITEM = 16 * 2**20  # characters per item
_CHUNK = 2**20

CountTokens = Callable[[str], int]
"""Returns the number of tokens of a text."""

_ANSWERS = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}


def array_rows(label: str, file: IO[str], count: CountTokens | None) -> Iterator[Row]:
    """Yield the rows of a file that holds one JSON value.

    Args:
        label: the file, for messages.
        file: its text.
        count: counts the tokens of a text in conversations, which have no counts. None: conversations are refused.

    Raises:
        DocumentError: the file is not JSON, or not in a known form.
    """
    begin = file.read(_CHUNK)
    if begin.lstrip()[:1] == "{":
        yield from _bench_rows(label, begin, file)
        return
    form = None
    for index, item in _items(label, begin, file):
        if not isinstance(item, dict):
            raise single_problem(label, f"[{index}] is {shown(item)}, expected an object")
        turns = _turns(item)
        if turns is not None:
            if count is None:
                raise single_problem(
                    label, "has texts and no numbers of tokens: hetis-plan convert counts them, see its --help"
                )
            yield from _conversation_rows(index, turns, count)
            continue
        fields = fields_of(item)
        form = form or form_of(fields)
        if form is None:
            raise unknown_form(label, f"[{index}]", "field", "fields", list(fields))
        yield from values_of(f"[{index}]", form, fields)


def _items(label: str, begin: str, file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yield the items of an array with their numbers, each as soon as it is complete."""
    decode = json.JSONDecoder().raw_decode
    buffer, place, index = begin, len(begin) - len(begin.lstrip()), 0
    if buffer[place : place + 1] != "[":
        raise single_problem(label, f"begins with {buffer[place : place + 20]!r}, expected a JSON array")
    place += 1
    more = True
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            item, end = decode(buffer, place)
            # A number at the end of what was read may continue.
            whole = end < len(buffer) or not more
        except ValueError as error:
            whole, item, end = False, None, place
            if not more:
                raise single_problem(label, f"[{index}] is not JSON: {error}") from None
        except RecursionError:
            raise single_problem(label, f"[{index}] is nested too deep") from None
        if whole:
            yield index, item
            index, place = index + 1, end
            continue
        if len(buffer) - place > MAX_ITEM:
            raise single_problem(label, f"[{index}] is not JSON, or has more than {MAX_ITEM} characters")
        chunk = file.read(_CHUNK)
        more = bool(chunk)
        buffer, place = buffer[place:] + chunk, 0


def _turns(item: dict[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation, in the form of ShareGPT or of chat requests, or None if there are none."""
    for key in ("conversations", "conversation", "messages", "items"):
        if isinstance(item.get(key), list):
            return list(item[key])
    return None


def _conversation_rows(index: int, turns: list[Any], count: CountTokens) -> Iterator[Row]:
    """Yield a request for every answer. Its prompt is everything that was said before."""
    before = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue
        who = str(turn.get("from", turn.get("role", ""))).lower()
        text = turn.get("value", turn.get("content", turn.get("text")))
        tokens = count(text) if isinstance(text, str) and text else 0
        if who in _ANSWERS and before and tokens:
            yield f"[{index}].turn[{number}]", CONVERSATIONS, ["0", str(before), str(tokens)]
        before += tokens


def _bench_rows(label: str, begin: str, file: IO[str]) -> Iterator[Row]:
    """Yield the requests of ``vllm bench serve --save-result --save-detailed``, which has a list for each property."""
    from hetis.formats.files import MAX_BYTES

    text = begin + file.read(MAX_BYTES)
    if len(text) > MAX_BYTES:
        raise single_problem(label, f"is larger than {MAX_BYTES // 2**20} MiB")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise single_problem(label, f"is not JSON: {error}") from None
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    missing = [name for name in VLLM_BENCH.fields if name not in lists]
    if missing:
        raise _not_a_trace(label, missing, list(data))
    columns = [lists[name] for name in VLLM_BENCH.fields]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{len(lists[name])} {name}" for name in VLLM_BENCH.fields)
        raise single_problem(label, f"has lists of different lengths: {lengths}")
    errors = lists.get("errors", [])
    for index, row in enumerate(zip(*columns, strict=True)):
        if not (index < len(errors) and errors[index]):
            yield f"[{index}]", VLLM_BENCH, [str(value) for value in row]


def _not_a_trace(label: str, missing: list[str], keys: list[str]) -> DocumentError:
    return single_problem(
        label,
        f"has no {', '.join(missing)}, but {', '.join(key[:40] for key in keys[:12])}: expected an array of requests,"
        " or what vllm bench serve --save-detailed saves",
    )


def characters_counter(characters_per_token: float) -> CountTokens:
    """Return a function that estimates the tokens of a text from its length, at least one."""
    return partial(_by_length, characters_per_token)


def _by_length(characters_per_token: float, text: str) -> int:
    return max(1, round(len(text) / characters_per_token))
