"""Four ways to move heads wrongly; each has to show in the text, or the equality tests prove nothing.

VERIFY finds every one of them before anything is moved; the texts are looked at without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.generate import engine_from_folder, local_devices
from hetis.runtime.engine.request import SamplingParams
from tests.runtime.checkpoints import random_model, random_prompts

Pieces = tuple[torch.Tensor, torch.Tensor]  # K and V, each [heads, layers, positions, d]


def last_block_dropped(x: torch.Tensor) -> torch.Tensor:
    x[:, :, (x.shape[2] - 1) // 16 * 16 :] = 0
    return x


def length_off_by_one(x: torch.Tensor) -> torch.Tensor:
    x[:, :, -1] = 0
    return x


def layer_missing(x: torch.Tensor) -> torch.Tensor:
    x[:, 1] = 0
    return x


def heads_swapped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


def nothing(x: torch.Tensor) -> torch.Tensor:
    return x


def answers_with(
    mutant: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch, *, is_verified: bool = False
) -> tuple[int, int]:
    """How many of six answers differ from transformers' where two heads of each move once, after ten tokens; and how
    many of the moves are made.
    """
    model = random_model()
    prompts = random_prompts(9, 6, shortest=20)
    engine: Engine = engine_from_folder(model.folder, local_devices([200, 200]))
    export = LocalDevice.export

    def mutated(
        self: LocalDevice, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> Pieces:
        k, v = export(self, request, incarnation, heads, first, last)
        return mutant(k), mutant(v)

    monkeypatch.setattr(LocalDevice, "export", mutated)
    if not is_verified:
        monkeypatch.setattr(Engine, "verify", lambda self, move: True)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=30)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    steps = moved = 0
    while engine.has_work:
        for news in engine.step():
            assert news.token is not None
            answers[news.request].append(news.token)
        steps += 1
        if steps == 10:
            for request in engine.running.values():
                owner = max(set(request.heads[0]), key=request.heads[0].count)
                heads = [head for head, device in enumerate(request.heads[0]) if device == owner][:2]
                assert len(heads) == 2
                moved += engine.move(request.number, heads, 1 - owner)
    wanted = [model.generate(prompt, 30) for prompt in prompts]
    return sum(answers[number] != right for number, right in zip(numbers, wanted, strict=True)), moved


@pytest.mark.parametrize("mutant", [last_block_dropped, length_off_by_one, layer_missing, heads_swapped])
def test_a_mutant_changes_the_text_of_everyone_it_moves(
    mutant: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers_with(mutant, monkeypatch) == (6, 6)


def test_without_a_mutant_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers_with(nothing, monkeypatch, is_verified=True) == (0, 6)


@pytest.mark.parametrize("mutant", [last_block_dropped, length_off_by_one, layer_missing, heads_swapped])
def test_a_mutant_is_found_before_it_moves_anything(
    mutant: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers_with(mutant, monkeypatch, is_verified=True) == (0, 0)
