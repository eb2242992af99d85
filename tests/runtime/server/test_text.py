"""Tokens by themselves, and chats as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.engine.text import TextStream
from hetis.runtime.model.errors import ModelError
from hetis.runtime.server.chat import ChatError, ChatTemplate
from hetis.runtime.server.text import Tokens

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  déjà vu  "}],
    [
        {"role": "system", "content": "<b>&amp;"},
        {"role": "user", "content": "x\ny"},
        {"role": "assistant", "content": ""},
    ],
]
# What templates in the wild use: loops with breaks, JSON, namespaces, trimmed blocks, dates, exceptions.
TEMPLATE = """{%- set seen = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- set seen.n = seen.n + 1 %}
{{ bos_token if loop.first }}[{{ m.role }}]{{ m | tojson }}{{ m['content'] | trim }}
    {%- if seen.n == 3 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"""


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tokens:
    return Tokens.from_folder(folder)


@settings(deadline=None, max_examples=50)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_bytes_of_tokens_together_are_the_text(tokens: Tokens, text: str) -> None:
    assert b"".join(tokens.bytes_of(token) for token in tokens.encode(text, special=False)) == text.encode()


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(3, 511), max_size=60))
def test_a_stream_tells_the_whole_text_whatever_the_tokens(tokens: Tokens, ids: list[int]) -> None:
    stream = TextStream(tokens, prompt=tokens.encode("before "))
    assert "".join(map(stream.push, ids)) + stream.end() == tokens.decode(ids)


def test_a_stream_of_nothing_but_halves_does_not_wait_for_ever(tokens: Tokens) -> None:
    half = next(token for token in range(512) if tokens.bytes_of(token) == b"\xc3")
    stream = TextStream(tokens)
    told = [stream.push(half) for _ in range(200)]
    assert any(told)
    assert "".join(told) + stream.end() == "\N{REPLACEMENT CHARACTER}" * 200


def test_a_token_that_is_no_character_is_told_by_its_bytes(tokens: Tokens) -> None:
    half = next(token for token in range(512) if tokens.bytes_of(token) == b"\xc3")
    assert tokens.text_of(half) == "bytes:\\xc3"
    assert tokens.text_of(0) == "<|begin|>"


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", ["own", TEMPLATE])
def test_a_chat_is_rendered_as_transformers_does(folder: Path, chat: list[dict[str, Any]], template: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate.from_folder(folder)
    if template != "own":
        theirs.chat_template = template
        ours = ChatTemplate(template, {"bos_token": theirs.bos_token})
    assert ours is not None
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, mood="calm")
        assert ours.render(chat, prompt=prompt, mood="calm") == wanted


def test_a_template_cannot_leave_its_sandbox_nor_fill_the_memory() -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0] + 1 }}"):
        with pytest.raises(ChatError, match="does not take this chat"):
            ChatTemplate(source, {}).render([{"role": "user"}])
    with pytest.raises(ChatError, match="the chat is longer than"):
        ChatTemplate("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", {}).render([])
    with pytest.raises(ModelError, match="no template"):
        ChatTemplate("{% for %}", {})


def test_a_folder_may_keep_its_template_in_several_places(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}1"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    named = ChatTemplate.from_folder(tmp_path)
    assert named is not None
    assert named.render([]) == "<s>1"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}2", encoding="utf-8")
    own = ChatTemplate.from_folder(tmp_path)
    assert own is not None
    assert own.render([]) == "<s>2"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer: there is neither tokenizer\.json nor"):
        Tokens.from_folder(tmp_path)
