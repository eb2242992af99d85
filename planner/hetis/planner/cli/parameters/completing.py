"""Shell completion: how the script of `hetis-plan completion` gets its words."""

from __future__ import annotations

import os
from itertools import pairwise

# Imported there from wherever the version of typer has them; none of the names is public.
from typer._completion_classes import BashComplete, add_completion_class, completion_init  # type: ignore[attr-defined]

BREAKS = ("=", ":")  # among bash's COMP_WORDBREAKS


class _Bash(BashComplete):
    """bash's completion with words such as ``type=L4:as=worker`` in one piece.

    bash breaks them at ``=`` and ``:``, passes every piece as a word, and replaces only the last piece.
    """

    _kept = ""  # the part of the last word that bash keeps

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        if len(words) <= int(os.environ["COMP_CWORD"]) or not any(word in BREAKS for word in words):
            return super().get_completion_args()
        joined = words[:1]
        for before, word in pairwise(words):
            if word in BREAKS or (before in BREAKS and word):
                joined[-1] += word
            else:
                joined.append(word)
        *arguments, incomplete = joined[1:]
        end = max(incomplete.rfind(one) for one in BREAKS)
        self._kept = incomplete[: end + 1]
        return arguments, incomplete

    def format_completion(self, item: object) -> str:
        return super().format_completion(item).removeprefix(self._kept)  # type: ignore[arg-type]


def offer_completions() -> None:
    """Answer requests for completions, which a variable of the environment makes."""
    completion_init()
    add_completion_class(_Bash, "bash")
