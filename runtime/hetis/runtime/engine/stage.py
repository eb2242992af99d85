"""A stage: some layers of the model, and the devices that hold the KV of these layers. The primary runs this code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, IntArray, Pending
from hetis.runtime.attention.prefill import PromptKv
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
        self._kinds = _kinds(self.ranks.heads, self.shape.queries_per_group)

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
        shares = self._shares(step)
        try:
            for share in shares:
                share.device.begin(share.step)
            for layer in range(len(self.layers)):
                hidden = self._layer(layer, step, shares, hidden, positions)
            for share in shares:
                share.device.finish(step.number)
            for chunk in step.chunks:
                self._ship(chunk)
        except DeviceError:
            self._abort(step, shares)
            raise
        if not ranks.is_last:
            return hidden[0]
        logits = ranks.output(hidden, torch.from_numpy(step.outputs))
        return likeliest(logits) if step.is_greedy else logits

    def _shares(self, step: Step) -> list[_Share]:
        """Which device has which decoding virtual sequences; the primary last, so that others compute meanwhile."""
        shares, width = [], self._kinds.size  # heads of queries, keys and values of a token
        for number in map(int, reversed(np.unique(step.heads))):
            device = self.devices[number] if self.through is None else self.through(number, self.devices[number])
            pieces, rows, heads, begin = [], [], [], 0
            for rank in range(self.num_ranks):
                here = step.heads[:, rank * self.ranks.heads : (rank + 1) * self.ranks.heads] == number
                row, head = np.nonzero(here)
                if not len(row):
                    continue
                rows.append(row)
                heads.append(head + rank * self.ranks.heads)
                on = self.ranks.decoders[rank].device
                takes = torch.from_numpy((row[:, None] * width + self._kinds[head]).ravel()).to(on)
                puts = None if here.all() else torch.from_numpy(np.flatnonzero(here)).to(on)
                part = slice(begin, begin + len(row))
                pieces.append(_Piece(rank, takes, puts, part))
                begin = part.stop
            of = np.concatenate(rows)
            own = DeviceStep(
                epoch=step.epoch,
                number=step.number,
                requests=step.requests[of],
                incarnations=step.incarnations[of],
                heads=np.concatenate(heads),
                positions=step.positions[of],
            )
            shares.append(_Share(device, own, tuple(pieces)))
        return shares

    def _layer(
        self,
        layer: int,
        step: Step,
        shares: list[_Share],
        hidden: Sequence[torch.Tensor],
        positions: Sequence[Positions],
    ) -> list[torch.Tensor]:
        projected = self.ranks.project(layer, hidden, positions)
        rows = len(step.requests)
        outputs: list[list[torch.Tensor]] = [[] for _ in projected]
        if rows:
            for own, out in zip(outputs, self._decode(layer, shares, projected, rows), strict=True):
                own.append(out)
        for chunk in step.chunks:
            part = slice(rows, rows + chunk.count)
            for own, prompt, heads in zip(outputs, self._prompt(chunk), projected, strict=True):
                own.append(prompt.attend(layer, chunk.first, heads[part]))
            rows += chunk.count
        return self.ranks.finish(layer, hidden, [own[0] if len(own) == 1 else torch.cat(own) for own in outputs])

    def _decode(
        self, layer: int, shares: list[_Share], projected: Sequence[torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """Outputs [B, q_heads * d] of each rank: every virtual sequence computed where it lives, together again."""
        shape = self.shape
        heads = [own.flatten(0, 1) for own in projected]
        pending = [(share, share.device.attend(layer, share.of(heads))) for share in shares]
        size = rows * self.ranks.heads, shape.queries_per_group, shape.head_dim
        outputs = [own.new_empty(size) for own in heads]
        for share, part in pending:
            share.put(part, outputs)
        return [out.view(rows, -1) for out in outputs]

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

    def _abort(self, step: Step, shares: list[_Share]) -> None:
        for share in shares:
            # The one that failed, or another that did meanwhile: the engine hears of that at the next step.
            with contextlib.suppress(DeviceError):
                share.device.abort(step.number)


class _Piece(NamedTuple):
    """What a device computes for one rank.

    Attributes:
        rank: whose queries they are.
        takes: of all heads that the rank projects, those of the device: queries, key and value of each in turn.
        puts: where the outputs go among those of the rank's virtual sequences; None: they are all of them.
        part: where they are among the device's own.
    """

    rank: int
    takes: torch.Tensor
    puts: torch.Tensor | None
    part: slice


class _Share(NamedTuple):
    """What one device computes of a step, rank by rank."""

    device: AttentionDevice
    step: DeviceStep
    pieces: tuple[_Piece, ...]

    def of(self, heads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Queries, key and value of each of the device's virtual sequences, [N, r + 2, d], from the ranks' heads."""
        found = [heads[piece.rank].index_select(0, piece.takes) for piece in self.pieces]
        own = found[0] if len(found) == 1 else torch.cat([part.to(found[0].device) for part in found])
        return own.view(len(self.step), -1, own.shape[1])

    def put(self, pending: Pending, outputs: list[torch.Tensor]) -> None:
        """Waits for the device's outputs, and puts them in their places among each rank's [B * H, r, d]."""
        computed = pending.wait()
        for piece in self.pieces:
            out = outputs[piece.rank]
            own = computed[piece.part].to(out.device)
            if piece.puts is None:
                outputs[piece.rank] = own
            else:
                out.index_copy_(0, piece.puts, own)


def _kinds(heads: int, r: int) -> IntArray:
    """Where the r queries, key and value of each head are among the heads that a token has, [heads, r + 2]."""
    head = np.arange(heads)[:, None]
    queries = head * r + np.arange(r)
    return np.concatenate([queries, heads * r + head, heads * (r + 1) + head], axis=1)
