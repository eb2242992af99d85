"""The tensor-parallel ranks of one stage, driven together by one process.

    hidden = embed(tokens, positions)
    for layer:  projected = project(layer, hidden, positions);  hidden = finish(layer, hidden, attention of each rank)
    logits = output(hidden)

What every rank holds alike (hidden states, positions) is a list with one tensor per rank, the same one for ranks on
one device. Partial results are summed on the first rank's device, in the order of the ranks: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetis.runtime.model.decoder import Decoder, Positions


class Ranks:
    """The dense part of a stage.

    Attributes:
        decoders: of each rank, in their order.
        is_last: logits come out of it.
        heads: virtual sequences of each rank. Where ranks outnumber KV heads, several hold the same KV for queries of
            their own.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = tuple(decoders)
        first = self.decoders[0]
        assert [d.shard.rank for d in self.decoders] == list(range(first.shard.size)), "ranks are missing"
        self.is_last = first.weights.output is not None
        self.heads = first.kv_heads

    @property
    def device(self) -> str:
        """Of the first rank: where partial results are summed."""
        return self.decoders[0].device

    def everywhere(self, x: torch.Tensor) -> list[torch.Tensor]:
        """On the device of each rank."""
        return [x.to(decoder.device) for decoder in self.decoders]

    def positions(self, positions: torch.Tensor) -> list[Positions]:
        """Looked up once per step for all layers; ``positions`` is int64 [T]."""
        found: dict[str, Positions] = {}
        for decoder in self.decoders:
            if decoder.device not in found:
                found[decoder.device] = decoder.positions(positions.to(decoder.device))
        return [found[decoder.device] for decoder in self.decoders]

    def embed(self, tokens: torch.Tensor, positions: Sequence[Positions]) -> list[torch.Tensor]:
        """Hidden states [T, hidden] of token ids [T]; of the first stage. Each rank has part of the vocabulary."""
        with_rows = [(d, p) for d, p in zip(self.decoders, positions, strict=True) if d.weights.embedding is not None]
        return self.everywhere(self._sum([d.embed(tokens.to(d.device), p) for d, p in with_rows]))

    def project(self, layer: int, hidden: Sequence[torch.Tensor], positions: Sequence[Positions]) -> list[torch.Tensor]:
        """Of each rank the heads of its queries, keys and values in the layer, as `Decoder.project`."""
        ranks = zip(self.decoders, hidden, positions, strict=True)
        return [decoder.project(layer, own, at) for decoder, own, at in ranks]

    def finish(
        self, layer: int, hidden: Sequence[torch.Tensor], attention: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Hidden states after the layer, from those before it and attention's outputs [T, q_heads * d] of each rank.

        ``hidden`` may be overwritten.
        """
        if len(self.decoders) == 1:
            return [self.decoders[0].finish(layer, hidden[0], attention[0])]
        parts = [decoder.attended(layer, own) for decoder, own in zip(self.decoders, attention, strict=True)]
        hidden = self.everywhere(hidden[0] + self._sum(parts))
        parts = [decoder.mlp(layer, own) for decoder, own in zip(self.decoders, hidden, strict=True)]
        return self.everywhere(hidden[0] + self._sum(parts))

    def output(self, hidden: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Logits [O, vocab] of some ``rows`` [O] of hidden states [T, hidden]; of the last stage."""
        parts = [
            decoder.output(own[rows.to(decoder.device)]).to(self.device)
            for decoder, own in zip(self.decoders, hidden, strict=True)
            if decoder.weights.output is not None
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _sum(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        total = parts[0].to(self.device)
        for part in parts[1:]:
            total = total + part.to(self.device)
        return total
