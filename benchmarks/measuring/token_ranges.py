"""Attention workers that hold ranges of tokens, of all head groups, in place of all tokens of some head groups.

No plan has such workers: this is what they would cost, to be compared with `cost.PoolCost`. KernelFlume (arXiv
2606.29207) splits the KV of a request in this way. Letters are those of `docs/cost-model.md`, "Token ranges": f is the
share of a request's tokens on p cards, equally many on each. Every card attends with all query heads, and returns for
each of them a partial output and the logarithm of its sum of exponentials, by which the stage weighs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost
from hetis.solver.profile import Fit, Op

LOG_SUM_BYTES = 4.0  # per token and query head; in float32, because it is exponentiated


@dataclass(frozen=True, slots=True)
class TokenRangeCost:
    """Times of one layer of decode attention on a stage (TP ranks of ``primary``) and its workers over ``link``."""

    primary: DeviceCost
    worker: DeviceCost
    link: Link

    def attention_s(self, micro_batch: int, share: float, cards: int) -> float:
        """Return seconds of attention on the stage and its cards at once, and then of weighing their outputs."""
        away_s = self.worker_s(micro_batch, share, cards) + self.exchange_s(micro_batch, cards)
        return max(self.own_s(micro_batch, share), away_s) + self.merge_s(micro_batch, cards)

    def own_s(self, micro_batch: int, share: float) -> float:
        """Return seconds of a rank's heads over the tokens that stay; 0 if none do."""
        device, groups = self.primary, self.primary.shape.groups
        heads = groups * device.shape.queries_per_group
        return _attention_s(device, micro_batch, heads=heads, groups=groups, share=1.0 - share)

    def worker_s(self, micro_batch: int, share: float, cards: int) -> float:
        """Return seconds of all heads over the tokens of one card."""
        m = self.worker.model
        return _attention_s(self.worker, micro_batch, heads=m.q_heads, groups=m.head_groups, share=share / cards)

    def exchange_s(self, micro_batch: int, cards: int) -> float:
        """Return seconds of all queries to every card and all partial outputs back, per iteration and layer.

        Keys and values of new tokens go to one card, of those that the stage does not keep.
        """
        m = self.primary.model
        new_bytes = m.head_groups * m.kv_bytes_per_token_group()
        per_card = micro_batch * (m.q_heads * (_query_and_output_bytes(self.primary) + LOG_SUM_BYTES))
        sent = max(
            self.primary.transfer_s(cards * per_card + micro_batch * new_bytes, self.link),
            self.worker.transfer_s(per_card + micro_batch * new_bytes, self.link),
        )
        return float(sent) + 2.0 * self.link.latency_s

    def merge_s(self, micro_batch: int, cards: int) -> float:
        """Return seconds in which a rank reads the partial outputs of its heads, its own included, and weighs them."""
        device, m = self.primary, self.primary.model
        output = _output_width(device) * m.activation_bytes + LOG_SUM_BYTES
        partial = (cards + 1) * micro_batch * m.q_heads / device.shape.tp * output
        return _fit(device).seconds(num_bytes=partial)

    def card_bytes_per_token(self, share: float, cards: int) -> float:
        """Return the KV bytes in one layer of a card, for every token in the context of any request."""
        m = self.worker.model
        return share / cards * m.head_groups * m.kv_bytes_per_token_group()


def _attention_s(device: DeviceCost, micro_batch: int, *, heads: float, groups: float, share: float) -> float:
    m = device.model
    tokens = share * m.attended_tokens(device.moments.resident_context)
    if tokens <= 0.0:
        return 0.0
    return _fit(device).seconds(
        flops=micro_batch * m.decode_attention_flops(tokens, heads),
        num_bytes=micro_batch * groups * tokens * m.kv_bytes_per_token_group(),
        heads=micro_batch * heads,
    )


def _fit(device: DeviceCost) -> Fit:
    found = device.profile.fit(Op.DECODE_ATTENTION, device.model, device.shape.tp)
    assert found is not None, "profiles have one"
    return found


def _output_width(device: DeviceCost) -> int:
    """Return the elements of one head's output, which with MLA is in the latent space."""
    m = device.model
    return m.head_dim if m.mla is None else m.mla.kv_lora_rank


def _query_and_output_bytes(device: DeviceCost) -> float:
    """Return bytes per token and query head of a query and an output."""
    m = device.model
    query = m.head_dim if m.mla is None else m.mla.kv_lora_rank + m.mla.qk_rope_head_dim
    return (query + _output_width(device)) * m.activation_bytes
