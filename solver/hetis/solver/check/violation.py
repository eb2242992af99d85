"""Violations, the output of the checker: one for every broken rule and place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """The rules of a sound plan, one per kind of violation, each stated as a sentence."""

    KNOWN_DEVICE = "every device exists in the cluster"
    DEVICE_ONCE = "every device is used at most once"
    DEVICE_COUNT = "a stage has tp * copies devices, a pool equally many for every copy"
    GPU_TYPE = "a device is of the GPU type its stage or pool names"
    TP_NODE = "a TP group lies inside one node"
    TP_SIZE = "a TP size is one of the family's and divides heads and head groups"
    COPIES = "a stage has between one copy and the family's most"
    EXPERTS = "copies that share experts are those of one stage on one node, in a number of the family's"
    STAGE_ZONE = "a stage lies inside one zone"
    LAYERS = "the stages cover every layer once and in order"
    STAGE_LAYERS = "every stage holds at least one layer, the first one beside the prefix layers"
    CUT = "no stage starts where the model forbids a cut"
    EQUAL_LAYERS = "without uneven layers, stages differ by one layer at most"
    ONE_TYPE = "without mixed types, a replica uses one GPU type"
    POOL_STAGE = "a pool serves a stage that has no other, of its own replica, which decodes"
    POOL_SIZE = "a stage has between one card and the family's most in its pool"
    POOL_ZONE = "a pool lies in the zone of its stage"
    SHARED_POOL = "cards of a shared pool serve stages of one replica, in a strategy that shares them"
    HEAD_GROUPS = "a stage and its pool share the head groups of a rank"
    ROLE = "the role of a replica is one of the family's"
    ROLE_ZONE = "a prefill or decode replica lies inside one zone"
    ROLE_TYPE = "in a family of one GPU type per pool, so are the replicas of a role"
    KV_ZONES = "a prefill replica sends KV inside its zone, or to every zone"
    SETTING = "micro-batch, micro-batches in flight and chunk are the family's, and 0 where the role has none"
    IN_FLIGHT = "one micro-batch is in flight, or at least one for every stage copy"
    ENGINE = "a replica is what the family's engine runs"
    MAX_NUM_SEQS = "a replica runs no more requests at once than its engine was started for"
    KV_BLOCKS = "the KV of a stage copy's requests fits into the blocks that its engine was started with"
    RANK_MEMORY = "weights, KV and activations fit on every primary rank"
    WORKER_MEMORY = "KV fits on every attention worker"
    RATE = "a replica claims the rate that the cost model gives"
    TPOT = "a replica claims the TPOT of its rate"
    TTFT = "a replica claims the TTFT of its rate"
    TPOT_LIMIT = "TPOT is within the objective's limit"
    TTFT_LIMIT = "TTFT is within the objective's limit"
    KV_TOKENS = "a replica claims the KV room that its devices have"
    ROUTE = "a route leads from a prefill replica to a decode replica that it may send to, once"
    ROUTE_RATE = "no replica sends or receives more requests than its rate"
    LINK_CAPACITY = "the traffic between two zones fits their link"
    CLASSES = "classes have their bounds and shares of the workload, and a replica serves one of them, or all"
    FINITE = "numbers are finite and not negative, rates of routes positive"
    FAMILY = "the family is the one of the strategy"
    OBJECTIVE = "the plan answers the objective of the problem"
    VALUE = "the value is what the replicas and routes give"
    DEMAND = "goodput meets the demand"
    BOUND = "the bound is on the far side of the value"
    GAP = "the gap is |bound - value| / |value|"
    STATUS = "the status is what the gap and the replicas say"
    CONSTRAINT = "the plan keeps every constraint: what is pinned and what is forbidden"
    LOSS = "what is stated to be left without the worst node or zone is what the replicas elsewhere serve"
    PRICES = "the class table has a row for every device class and counts the devices of the plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken rule, its place, and a message with the number found and its limit."""

    rule: Rule
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.rule.name.lower()})"


Broken = tuple[Rule, str]  # a rule and a message; the caller knows the place


def at(where: str, *found: Iterable[Broken]) -> list[Violation]:
    """Return the violations found at a place."""
    return [Violation(rule=rule, where=where, message=message) for some in found for rule, message in some]
