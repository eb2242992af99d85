"""Chat templates: messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hetis.runtime.model.errors import ModelError
from hetis.runtime.server.text import read_tokenizer_config
from hetis.solver.errors import HetisError

MOST_CHARACTERS = 16 * 2**20  # of a rendered chat: a template may repeat what it is given


class ChatError(HetisError):
    """The model's template refuses these messages, or there is none."""


class ChatTemplate:
    """The template of a model folder, rendered in a sandbox as transformers does it."""

    def __init__(self, source: str, special: Mapping[str, str], *, where: str = "chat template") -> None:
        """``special``: texts of special tokens by name, such as ``bos_token``.

        Raises:
            ModelError: the template is none.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise ChatError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{where}: no template: {error}") from None
        self._special = dict(special)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """``chat_template.jinja``, or the template in ``tokenizer_config.json``; None: the model has none.

        Raises:
            ModelError: it cannot be read.
        """
        fields = read_tokenizer_config(folder)
        special = {name: _text(value) for name, value in fields.items() if name.endswith("_token") and _text(value)}
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special, where=str(path))
        found = fields.get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((item.get("template") for item in found if item.get("name") == "default"), None)
        if not isinstance(found, str):
            return None
        return cls(found, special, where=f"{folder / 'tokenizer_config.json'}: chat_template")

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = True, **more: Any) -> str:
        """The chat as one text; ``prompt``: with the beginning of the answer. ``more`` is for the template.

        Raises:
            ChatError: the template does not take these messages.
        """
        import jinja2

        values = self._special | more | {"messages": list(messages), "add_generation_prompt": prompt}
        parts, length = [], 0
        try:
            for part in self._template.generate(**values):
                length += len(part)
                if length > MOST_CHARACTERS:
                    raise ChatError(f"the chat is longer than {MOST_CHARACTERS} characters")
                parts.append(part)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ChatError(f"the model's chat template does not take this chat: {error}") from None
        return "".join(parts)


def _text(value: object) -> str:
    """A special token, which configs write as a text or as an object with its ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
