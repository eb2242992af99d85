"""A stage: some layers of the model, and the devices that hold the KV of these layers. The primary runs this code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hetis.runtime.attention.device import AttentionDevice, IntArray
from hetis.runtime.attention.prefill import PromptKv
from hetis.runtime.engine.decoding import Decoding, places_of
from hetis.runtime.engine.sampling import likeliest
from hetis.runtime.engine.step import Chunk, Step
from hetis.runtime.kv.errors import DeviceError
from hetis.runtime.kv.shape import KvShape, SequenceKey
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.decoder import Decoder, Positions
from hetis.runtime.model.ranks import Ranks

Through = Callable[[int, AttentionDevice], AttentionDevice]


def kv_shape(config: ModelConfig, layers: range, *, page_tokens: int, dtype: str, ranks: int = 1) -> KvShape:
    """What the virtual sequences of a stage with these layers look like.

    There is one for each KV head. Where tensor-parallel ``ranks`` outnumber them there is one for each rank: several
    have the same keys and values, each for queries of its own.
    """
    return KvShape(
        layers=len(layers),
        head_dim=config.head_dim,
        queries_per_group=config.q_heads // max(config.kv_heads, ranks),
        page_tokens=page_tokens,
        dtype=dtype,
        scale=config.head_dim**-0.5,
        windows=config.windows[layers.start : layers.stop],
    )


class Stage:
    """Layers and the devices of their heads. The first devices are the primary's ranks, in this process.

    A step that raises has changed nothing that counts: the same step, or another, may be run next.

    Attributes:
        layers: of the model.
        shape: of its virtual sequences.
        homes: of each head, the rank that computes its queries, and keeps its KV unless that is placed elsewhere.
        devices: that hold KV; an engine may put a new one in the place of one that was lost.
        through: what the calls of a step to a device, by its number, go through, so that they can be timed.
    """

    def __init__(self, decoders: Decoder | Sequence[Decoder], devices: Sequence[AttentionDevice]) -> None:
        """``decoders`` are of the ranks, in their order."""
        self.ranks = Ranks([decoders] if isinstance(decoders, Decoder) else decoders)
        self.devices = list(devices)
        self.layers = self.ranks.decoders[0].layers
        self.shape = devices[0].shape
        self.through: Through | None = None
        self.homes = tuple(rank for rank in range(self.num_ranks) for _ in range(self.ranks.heads))
        self._prompts: dict[tuple[int, int], list[PromptKv]] = {}
        self._places = places_of(self.ranks.heads, self.shape.queries_per_group)

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks of the primary."""
        return len(self.ranks.decoders)

    def run(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, hidden] after the stage's layers; of the last stage the logits [O, vocab], or tokens [O].

        ``hidden`` is what the stage before returned; None on the first. It may be overwritten.

        Raises:
            DeviceError: of the device that failed. No other device holds anything of the step.
        """
        with torch.inference_mode():
            return self._run(step, hidden)

    # --- what devices hold

    def drop(self, device: int, keys: Sequence[SequenceKey]) -> None:
        """Frees sequences on a device; those that are not there are no error. Raises DeviceLostError."""
        self.devices[device].drop(keys)

    def copy(
        self, source: int, target: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> None:
        """Copies KV of positions ``first`` to ``last - 1`` from one device to another. Raises DeviceError."""
        k, v = self.devices[source].export(request, incarnation, heads, first, last)
        self.devices[target].adopt(request, incarnation, heads, first, k, v)

    def export(
        self, device: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionDevice.export` of one of the devices."""
        return self.devices[device].export(request, incarnation, heads, first, last)

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
        """As `AttentionDevice.adopt` of one of the devices."""
        self.devices[device].adopt(request, incarnation, heads, first, k, v)

    def digest(self, device: int, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        """As `AttentionDevice.digest` of one of the devices."""
        return self.devices[device].digest(request, incarnation, heads, last)

    def replace_device(self, index: int, device: AttentionDevice) -> None:
        """A device with nothing in it takes the place of one that was lost."""
        self.devices[index] = device

    def rejoin(self, index: int) -> bool:
        """False: who has the stage finds its devices again."""
        return False

    def close(self) -> None:
        """Nothing is to be done: the devices belong to who made them."""

    def forget_prompt(self, request: int, incarnation: int) -> None:
        """The prompt's KV here is not needed any more: it was prefilled, or it begins anew."""
        self._prompts.pop((request, incarnation), None)

    @property
    def prompts(self) -> tuple[tuple[int, int], ...]:
        """Requests whose prompt is kept, with their incarnations."""
        return tuple(self._prompts)

    # --- inside

    def _run(self, step: Step, given: torch.Tensor | None) -> torch.Tensor:
        ranks = self.ranks
        positions = ranks.positions(torch.from_numpy(step.positions))
        tokens = torch.from_numpy(step.tokens)
        hidden = ranks.embed(tokens, positions) if given is None else ranks.everywhere(given)
        on = [decoder.device for decoder in ranks.decoders]
        decoding = Decoding(step, find=self._device, places=self._places, ranks=on)
        try:
            decoding.begin()
            for layer in range(len(self.layers)):
                hidden = self._layer(layer, step, decoding, hidden, positions)
            decoding.finish()
            for chunk in step.chunks:
                self._ship(chunk)
        except DeviceError:
            decoding.abort()
            raise
        if not ranks.is_last:
            return hidden[0]
        logits = ranks.output(hidden, torch.from_numpy(step.outputs))
        return likeliest(logits) if step.is_greedy else logits

    def _device(self, number: int) -> AttentionDevice:
        return self.devices[number] if self.through is None else self.through(number, self.devices[number])

    def _layer(
        self,
        layer: int,
        step: Step,
        decoding: Decoding,
        hidden: Sequence[torch.Tensor],
        positions: Sequence[Positions],
    ) -> list[torch.Tensor]:
        projected = self.ranks.project(layer, hidden, positions)
        rows = len(step.requests)
        outputs: list[list[torch.Tensor]] = [[] for _ in projected]
        if rows:
            for own, out in zip(outputs, decoding.attend(layer, projected), strict=True):
                own.append(out.view(rows, -1))
        for chunk in step.chunks:
            part = slice(rows, rows + chunk.count)
            for own, prompt, heads in zip(outputs, self._prompt(chunk), projected, strict=True):
                own.append(prompt.attend(layer, chunk.first, heads[part]))
            rows += chunk.count
        return self.ranks.finish(layer, hidden, [own[0] if len(own) == 1 else torch.cat(own) for own in outputs])

    def _prompt(self, chunk: Chunk) -> list[PromptKv]:
        key = chunk.request, chunk.incarnation
        if key not in self._prompts:
            self._prompts[key] = [
                PromptKv(self.shape, self.ranks.heads, chunk.total, decoder.device) for decoder in self.ranks.decoders
            ]
        return self._prompts[key]

    def _ship(self, chunk: Chunk) -> None:
        """The chunk's KV goes to where the heads live, the primary included."""
        part = slice(chunk.first, chunk.first + chunk.count)
        for number in sorted(set(chunk.heads)):
            for rank, prompt in enumerate(self._prompt(chunk)):
                begin = rank * self.ranks.heads
                own = chunk.heads[begin : begin + self.ranks.heads]
                at = [head for head, owner in enumerate(own) if owner == number]
                if at:
                    k, v = (x[:, at, part].transpose(0, 1) for x in (prompt.k, prompt.v))
                    heads = [begin + head for head in at]
                    self.devices[number].adopt(chunk.request, chunk.incarnation, heads, chunk.first, k, v)
