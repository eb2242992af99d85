"""The memory for KV and states of a replica, and the GPUs that hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hetis.solver.model import ModelSpec
from hetis.solver.plan import ReplicaPlan, StagePlan

PAGE_TOKENS = 16  # the plugin's default
PROMPT_TOKENS = 64  # prompts of this length fill the chunks of a prefill replica, as plans assume; shorter ones do not
DTYPE_BYTES: Mapping[str, int] = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


class Card(NamedTuple):
    """A GPU that holds KV for the ranks of a stage; ``kv_bytes`` is the memory for each of them."""

    device: str
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class KvRoom:
    """The memory for KV and states.

    It has ``pages`` for every head group, each of ``page_bytes`` per layer, and ``state_bytes`` per layer for the
    states of all requests, which ranks hold in parts or, unless ``divides_states``, whole. The last of the
    ``num_layers`` layers is followed by ``draft_layers`` more. At least ``fitting_pages`` are in every stage, whichever
    of its layers have an indexer, and beside ``taken_bytes``.
    """

    pages: int
    fitting_pages: int
    page_bytes: int
    state_bytes: float
    divides_states: bool
    num_layers: int
    draft_layers: int
    taken_bytes: int = 0  # memory of a rank that plans do not count (`_beside_shared_experts`)

    @classmethod
    def of(cls, kv_tokens: int, replica: ReplicaPlan, model: ModelSpec, dtype: str) -> KvRoom:
        numbers = model.kv_bytes_per_token_group() / model.kv_bytes
        each = 1 if is_fp8(model, dtype) else DTYPE_BYTES[dtype]
        # Decoding requests, and one prompt for each micro-batch.
        decoding = max(replica.micro_batch * replica.in_flight, replica.max_num_seqs)
        requests = (decoding + replica.in_flight) // replica.attention_dp
        pages = -(-kv_tokens // PAGE_TOKENS)
        # A mean of layers may be no whole number of bytes; up, but not by a rounding error.
        page_bytes = math.ceil(PAGE_TOKENS * numbers * (1 - 1e-12)) * each
        taken_bytes, left = _beside_shared_experts(replica, model), pages
        if taken_bytes:
            layers = model.num_layers + model.draft_layers  # copies that share experts have one stage (`_unshared`)
            left -= -(-taken_bytes // (max(replica.stages[0].kv_head_groups_kept, 1) * layers * page_bytes))
        return cls(
            pages=pages,
            fitting_pages=_fitting_pages(max(left, 0), replica, model),
            page_bytes=page_bytes,
            state_bytes=requests * model.kept_states * model.state_bytes()
            + replica.in_flight // replica.attention_dp * replica.chunk_tokens * model.chunk_state_bytes(),
            divides_states=model.divides_states,
            num_layers=model.num_layers,
            draft_layers=model.draft_layers,
            taken_bytes=taken_bytes,
        )

    @property
    def context_tokens(self) -> int:
        """The longest request in tokens. Engines keep one page for themselves."""
        return max(self.fitting_pages - 1, 1) * PAGE_TOKENS

    def of_ranks(self, stage: StagePlan) -> int:
        is_last = stage.first_layer + stage.num_layers == self.num_layers
        layers = stage.num_layers + (self.draft_layers if is_last else 0)
        kv_bytes = stage.kv_head_groups_kept * self.pages * layers * self.page_bytes
        ranks = stage.tp if self.divides_states else 1
        return max(0, kv_bytes + round(layers * self.state_bytes / ranks) - self.taken_bytes)

    def cards(self, replica: ReplicaPlan, number: int) -> Iterator[Card]:
        """Yield the GPUs that hold KV for a stage; the heads that a rank does not keep are divided evenly among them.

        On a GPU shared by several stages, each stage gets what its own heads need: the planned capacity fits all of
        them.
        """
        for pool in replica.attention_workers:
            if pool.stage == number:
                pages = -(-pool.kv_head_groups * self.pages // len(pool.devices))
                kv_bytes = pages * replica.stages[number].num_layers * self.page_bytes
                yield from (Card(device, kv_bytes) for device in pool.devices)


def _fitting_pages(pages: int, replica: ReplicaPlan, model: ModelSpec) -> int:
    """Return how many of the pages fit in each stage if it has as many layers with an indexer as it can.

    Plans count the mean of all layers. vLLM's drafting layer always has an indexer (models/deepseek_v32/attention.py).
    """
    indexer, layers = model.indexer, model.indexer_layers
    if indexer is None or layers == model.num_layers:
        return pages
    mean, share = model.kv_bytes_per_token_group(), layers / model.num_layers
    most = 0.0
    for number, stage in enumerate(replica.stages, 1):
        drafting = model.draft_layers if number == len(replica.stages) else 0
        own = (min(stage.num_layers, layers) + drafting) / (stage.num_layers + drafting)
        most = max(most, mean + (own - share) * indexer.key_bytes)
    return int(pages * (mean / most))


_MOE_TOKENS = 16_384  # most tokens per call of vLLM's fused experts


def _beside_shared_experts(replica: ReplicaPlan, model: ModelSpec) -> int:
    """Return the bytes of a rank that plans do not count for copies that share experts; less KV then fits.

    With several ranks per copy, vLLM keeps all shared experts on each rank (``use_sequence_parallel_moe``), and its
    fused experts need a workspace for the tokens of all copies times the number of experts that each token activates.
    """
    experts = model.experts
    if not replica.expert_parallel or experts is None:
        return 0
    layers, (stage, *_) = (model.num_layers - model.prefix_layers) * model.expert_share, replica.stages
    whole = layers * experts.shared_params(model.hidden) * model.weight_bytes
    tokens = replica.attention_dp * (replica.micro_batch * model.step_tokens + replica.chunk_tokens)
    wide = experts.active * (experts.size(model.hidden) + experts.width) * model.activation_bytes
    return round(whole * (1 - 1 / stage.tp) + min(tokens, _MOE_TOKENS) * wide)


def is_fp8(model: ModelSpec, dtype: str) -> bool:
    """Return whether KV has one byte per number: as planned, unless an explicit dtype overrides it."""
    return dtype == "auto" and model.kv_bytes == 1
