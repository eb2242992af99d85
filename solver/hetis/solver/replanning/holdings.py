"""The holdings of every GPU of a plan, and the bytes it has to load to hold something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The part of the model on a GPU: shard ``rank`` of ``tp`` of the layers from ``first_layer`` to ``end_layer``.

    An attention worker holds the KV of those layers and no weights; ``rank`` is then -1. Where ``attention_dp`` copies
    share their experts, it is the rank among all of them, which holds 1/``attention_dp`` of its copy's experts.
    """

    gpu: str  # its type: a device of the same name and another type is another GPU
    first_layer: int
    end_layer: int  # one past the last
    tp: int
    rank: int
    attention_dp: int = 1

    @property
    def is_worker(self) -> bool:
        return self.rank < 0

    def weight_bytes(self, model: ModelSpec) -> float:
        """Return the bytes of the shard, with its share of what the first and the last layers have beside them:
        embedding, vision towers, a layer that drafts, and LM head.
        """
        return self.bytes_to_load(model, None)

    def bytes_to_load(self, model: ModelSpec, before: Holding | None) -> float:
        """Return the bytes read by a GPU that held ``before``: none for layers it keeps, all if its shard differs."""
        if self.is_worker:
            return 0.0
        same_shard = before is not None and before._shard() == self._shard()
        kept = before if same_shard else None
        own, dp = model.on(self.gpu), self.attention_dp
        layers = sum(_layer_bytes(own, i, dp) for i in self._layers() if kept is None or not kept.has(i))
        tables = self._tables(model) - (kept._tables(model) if kept is not None else frozenset())
        ends = len(tables) * model.embedding_params * model.embedding_bytes
        if self.has(0) and (kept is None or not kept.has(0)):
            ends += model.vision_params * model.embedding_bytes
        last = model.num_layers - 1
        if self.has(last) and (kept is None or not kept.has(last)):
            ends += own.draft_params() * own.weight_bytes
        return (layers + ends) / self.tp

    def _shard(self) -> tuple[str, int, int, int]:
        return self.gpu, self.tp, self.rank, self.attention_dp

    def has(self, layer: int) -> bool:
        return self.first_layer <= layer < self.end_layer

    def _layers(self) -> range:
        return range(self.first_layer, self.end_layer)

    def _tables(self, model: ModelSpec) -> frozenset[str]:
        """Return embedding and LM head; one table if they are tied."""
        ends = (("embedding", 0), ("embedding" if model.tie_embeddings else "head", model.num_layers - 1))
        return frozenset(name for name, layer in ends if self.has(layer))


def _layer_bytes(model: ModelSpec, layer: int, attention_dp: int) -> float:
    """Return the bytes of a layer on the ranks of one copy, of ``attention_dp`` that share their experts."""
    if layer < model.prefix_layers:
        return model.dense_layer_params() * model.weight_bytes
    routed = 0.0 if model.moe is None else model.expert_share * model.moe.num_experts * model.expert_params()
    return (model.layer_params() - routed * (1.0 - 1.0 / attention_dp)) * model.weight_bytes


def holdings(plan: Plan) -> dict[str, Holding]:
    """Return the holding of every GPU of the plan, by device name; shared attention workers as in their first stage."""
    found: dict[str, Holding] = {}
    for replica in plan.replicas:
        for device, holding in holdings_of(replica):
            found.setdefault(device, holding)
    return found


def holdings_of(replica: ReplicaPlan) -> Iterator[tuple[str, Holding]]:
    """Yield the same for one replica, in the order of its stages, their attention workers last."""
    dp = replica.attention_dp
    for stage in replica.stages:
        end = stage.first_layer + stage.num_layers
        for i, device in enumerate(stage.devices):
            yield (
                device,
                Holding(
                    gpu=stage.gpu, first_layer=stage.first_layer, end_layer=end, tp=stage.tp,
                    rank=i % (stage.tp * dp), attention_dp=dp,
                ),
            )  # fmt: skip
    for pool in replica.attention_workers:
        stage = replica.stages[pool.stage]
        end = stage.first_layer + stage.num_layers
        for device in pool.devices:
            yield device, Holding(gpu=pool.gpu, first_layer=stage.first_layer, end_layer=end, tp=stage.tp, rank=-1)


def in_flight(replica: ReplicaPlan) -> int:
    """Return the requests whose KV a full replica holds: those that decode, or the prompts of a prefill replica."""
    return max(1, replica.micro_batch) * replica.in_flight
