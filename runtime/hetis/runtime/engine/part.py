"""What the engine asks of a stage: in this process (`Stage`), or in one of its own (`RemoteStage`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hetis.runtime.attention.device import AttentionDevice, IntArray
from hetis.runtime.engine.step import Step
from hetis.runtime.kv.shape import KvShape, SequenceKey


class KvDevice(Protocol):
    """A device as the engine's book knows it: name, shape of its virtual sequences, pages in all."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> KvShape: ...
    @property
    def num_pages(self) -> int: ...


class PipelineStage(Protocol):
    """Some layers of the model, and the devices of their heads. The first devices are the ranks of its primary.

    What it is asked it does one thing after the other. Every method may raise `DeviceLostError` of one of its devices;
    where the primary is lost, so is the stage.
    """

    @property
    def layers(self) -> range:
        """Of the model."""

    @property
    def shape(self) -> KvShape:
        """Of its virtual sequences."""

    @property
    def homes(self) -> tuple[int, ...]:
        """Of each head, the rank that computes its queries."""

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks of the primary."""

    @property
    def devices(self) -> Sequence[KvDevice]:
        """That hold KV."""

    def run(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, hidden] after the stage's layers; of the last stage the logits [O, vocab].

        Of a greedy step the last stage returns the likeliest tokens in their place, int64 [O].

        ``hidden`` is what the stage before returned; None on the first. It may be overwritten.
        """

    def forget_prompt(self, request: int, incarnation: int) -> None:
        """The prompt's KV on the primary is not needed any more: it was prefilled, or it begins anew."""

    def drop(self, device: int, keys: Sequence[SequenceKey]) -> None:
        """Frees sequences on a device; those that are not there are no error."""

    def copy(
        self, source: int, target: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> None:
        """Copies KV of positions ``first`` to ``last - 1`` from one device to another."""

    def export(
        self, device: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionDevice.export` of one of the devices."""

    def adopt(
        self,
        device: int,
        request: int,
        incarnation: int,
        heads: Sequence[int],
        first: int,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """As `AttentionDevice.adopt` of one of the devices. What fails may show in the next step only."""

    def digest(self, device: int, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        """As `AttentionDevice.digest` of one of the devices."""

    def replace_device(self, index: int, device: AttentionDevice) -> None:
        """A device with nothing in it takes the place of one that was lost."""

    def rejoin(self, index: int) -> bool:
        """Whether the stage has by itself found a device again that was lost, with nothing in it; asked again and
        again. False of one in this process: it is given its devices."""

    def close(self) -> None:
        """The engine has ended."""
