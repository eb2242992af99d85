"""The replicas that an engine runs: its rules, its settings, and the family of plans that is searched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role
from hetis.solver.plugin_time import NO_PLUGIN, PluginTime

ATTENTION_DP = (2, 4, 8, 16, 32, 64)  # numbers of copies that may share experts
# Every count up to 8, then four per octave: the step from one to the next costs at most a quarter of a batch.
MICRO_BATCHES = (
    *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448,
    512,
)  # fmt: skip


# Attention workers per copy of a stage: every number up to 8, then four per octave.
POOL_SIZES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32)


MOST_STAGES = 64  # maximum stages per replica


def shares_indexers(model: ModelSpec) -> bool:
    """Return whether some layers attend to the tokens that the indexer of an earlier layer chose (GLM-5.2)."""
    return any(mixer.token_indexer is not None and not mixer.owns_indexer for mixer, _ in model.mixers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRules:
    """The rules of an engine, whose replicas are pipelines of few stages in one zone.

    All stages have the same TP size, the model in one precision, GPUs of one vendor (NCCL, RCCL and oneCCL do not
    interoperate), and no copies, with as many micro-batches in flight as stages. KV is handed over between replicas of
    one precision, and of one vendor or several of ``kv_vendors``. Attention workers belong to unified replicas only
    (the plugin replaces the connector that transfers KV), whose KV has 16 bits; they may be of any vendor. Heads go to
    the same worker in all stages, so all stages have equally many workers of one device class and give them equally
    many head groups of every rank. Where prefill and decode are apart, fewer stages may be allowed, see `stages_of`.

    Attributes:
        name: the engine.
        max_stages: maximum stages per replica.
        max_pooled_stages: maximum stages per replica with attention workers.
        max_gpus: maximum GPUs per replica, including attention workers; None: no limit.
        min_layers: minimum layers per stage, including the leading dense layers of the first.
        max_nodes: maximum nodes per replica, including attention workers; None: no limit. Searches only count the
            fewest nodes on which a replica's GPUs fit, so the bound considers each replica on its own; plans respect
            the limit.
        plugin: what attention workers cost the hosts of a replica that has them.
        kv_vendors: vendors between whose GPUs KV may go, if their kernels keep it alike (`PlacementProblem.kv_of`).
    """

    name: str
    max_stages: int = 8
    max_pooled_stages: int = 4
    max_gpus: int | None = None
    min_layers: int = 1
    max_nodes: int | None = None
    plugin: PluginTime = NO_PLUGIN
    kv_vendors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field_name in ("max_stages", "max_pooled_stages", "max_gpus", "min_layers", "max_nodes"):
            value, least = getattr(self, field_name), 0 if field_name == "max_pooled_stages" else 1
            if value is not None and value < least:
                raise InvalidProblemError(f"{field_name} is {value}, must be at least {least}")
        if self.max_stages > MOST_STAGES:
            raise InvalidProblemError(f"max_stages is {self.max_stages}, must be at most {MOST_STAGES}")

    def stages_of(self, role: Role, model: ModelSpec) -> int:
        """Return the most stages that a replica of this role may have.

        KV can only be handed over to decode replicas of one stage: vLLM's NIXL connector rejects others (0.32,
        ``nixl/base_worker.py``), and SGLang accepts them only if prompts come from equally many stages
        (``disaggregation/common/conn.py``). vLLM's connector also accepts no KV from several stages if layers slide or
        keep states, or if one drafts, because it takes the KV of each stage to have equally many parts per layer
        (``register_kv_caches``). SGLang drafts in a pipeline only where it prefills (0.5.23,
        ``arg_groups/validation_hook.py``).
        All have one stage if layers that share indexers must stay together (`keeps_indexers_together`).
        """
        if role is Role.UNIFIED and model.draft is not None and self.name == "sglang":
            return 1
        if self.keeps_indexers_together(model):
            return 1
        keeps = model.sliding_window is not None or model.state_bytes() > 0.0
        is_mixed = (keeps or model.draft is not None) and self.name != "sglang"
        return 1 if role is Role.DECODE or (role is Role.PREFILL and is_mixed) else self.max_stages

    def keeps_indexers_together(self, model: ModelSpec) -> bool:
        """Return whether all layers must be in one stage because they share indexers.

        vLLM's stages do not pass on which tokens an indexer chose (0.32, ``models/deepseek_v32``), so a stage beginning
        with a layer without an indexer would read an unwritten buffer; SGLang's do (its pull request 28532).
        """
        return shares_indexers(model) and self.name != "sglang"

    def describe(self) -> str:
        """Return the rules in a few words."""
        gpus = "" if self.max_gpus is None else f" and {self.max_gpus} GPUs"
        layers = "" if self.min_layers == 1 else f" of at least {self.min_layers} layers each"
        stages = f"{self.max_stages} stages{layers}{gpus}"
        nodes = "" if self.max_nodes is None else f" and on {self.max_nodes} node{'s' * (self.max_nodes > 1)} each"
        beside = "" if self.max_stages == 1 else "; decode replicas have one stage"
        return f"what {self.name} runs: at most {stages} in one zone{nodes}, as many batches in flight{beside}"


MOST_SETTING, MOST_CHUNKS = 10**9, 16  # largest number, and most chunk sizes, in `EngineSettings`


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings with which engines are started regardless of the plan, so plans must respect them.

    Attributes:
        max_num_seqs: requests that a replica runs at once, over all its micro-batches; a prefill replica has at
            least one per micro-batch. None: no limit besides memory.
        chunk_tokens: sizes of prefill chunks; empty: those of the family.
        kv_blocks: KV blocks of `Assumptions.block_tokens` tokens that a stage copy has, if its GPUs have room for as
            many; a block holds these tokens of one request in all head groups and layers. None: no such limit.
        min_context: tokens of the longest request for which every engine has room at least. None: as it comes.
        gpu_memory_utilization: share of a GPU's memory that engines take. None: their default.
    """

    max_num_seqs: int | None = None
    chunk_tokens: tuple[int, ...] = ()
    kv_blocks: int | None = None
    min_context: int | None = None
    gpu_memory_utilization: float | None = None

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        if share is not None and not 0.0 < share <= 1.0:
            raise InvalidProblemError(f"gpu_memory_utilization is {share}, must be above 0 and at most 1")
        named = [("max_num_seqs", self.max_num_seqs), ("kv_blocks", self.kv_blocks), ("min_context", self.min_context)]
        for name, value in (*named, *(("chunk_tokens", size) for size in self.chunk_tokens)):
            if value is not None and not 1 <= value <= MOST_SETTING:
                raise InvalidProblemError(f"{name} is {value}, must be 1 to {MOST_SETTING}")
        if len(self.chunk_tokens) > MOST_CHUNKS:
            raise InvalidProblemError(f"chunk_tokens are {len(self.chunk_tokens)} sizes, must be at most {MOST_CHUNKS}")
        if list(self.chunk_tokens) != sorted(set(self.chunk_tokens)):
            listed = ", ".join(map(str, self.chunk_tokens))
            raise InvalidProblemError(f"chunk_tokens are {listed}, must be ascending, each once")

    def __bool__(self) -> bool:
        """Return whether anything is set."""
        return self != EngineSettings()

    def allows(self, *, micro_batch: int, in_flight: int) -> bool:
        """Return whether no engine runs more requests than it may; copies that share experts are separate engines."""
        return self.max_num_seqs is None or max(micro_batch, 1) * in_flight <= self.max_num_seqs

    def describe(self) -> str:
        """Return the settings in a few words."""
        parts = []
        if self.max_num_seqs is not None:
            parts.append(f"at most {self.max_num_seqs} request{'s' * (self.max_num_seqs > 1)} at once")
        if self.chunk_tokens:
            parts.append(f"chunks of {' or '.join(map(str, self.chunk_tokens))} tokens")
        if self.kv_blocks is not None:
            parts.append(f"at most {self.kv_blocks} KV block{'s' * (self.kv_blocks > 1)}")
        if self.min_context is not None:
            parts.append(f"room for a request of {self.min_context} tokens")
        if self.gpu_memory_utilization is not None:
            parts.append(f"{self.gpu_memory_utilization:.0%} of the GPUs' memory")
        return ", ".join(parts)


NOTHING_SET = EngineSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The family of plans that is searched; the bound of an answer holds for exactly these plans.

    Attributes:
        name: the strategy of this family.
        mixed_types: stages of one replica may use different GPU types.
        uneven_layers: stages may hold different numbers of layers; otherwise they differ by at most one.
        max_pool: attention workers of one class per stage, one of `POOL_SIZES`; 0: none.
        tp_sizes, micro_batches, in_flight, chunk_tokens: the values tried for each.
        attention_dp: for models with experts, the numbers of copies that share them: replicas of one stage, whose
            copies are all on one node (with a number of GPUs that is in ``tp_sizes``) and iterate together.
        roles: the roles of replicas; prefill and decode only both or neither.
        one_type_per_role: all prefill replicas have one GPU type, and all decode replicas have one.
        engine: the rules of an engine, which determine ``in_flight``; None: those of published heuristics, whose
            pipelines have 1 micro-batch in flight (which walks through the stages) or at least as many as stages.
        engine_settings: settings that every replica respects, see `at`.

    Under a limit on TTFT stages keep to further rules (`docs/cost-model.md`, "Latency").
    """

    name: str = "hetis"
    mixed_types: bool = True
    uneven_layers: bool = True
    max_pool: int = 32
    tp_sizes: tuple[int, ...] = (1, 2, 4, 8)
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    in_flight: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    chunk_tokens: tuple[int, ...] = (256, 512, 2048)
    attention_dp: tuple[int, ...] = (2, 4, 8)
    roles: tuple[Role, ...] = (Role.UNIFIED, Role.PREFILL, Role.DECODE)
    one_type_per_role: bool = False
    engine: EngineRules | None = None
    engine_settings: EngineSettings = NOTHING_SET

    def __post_init__(self) -> None:
        if self.engine is not None:
            depths = tuple(range(1, self.engine.max_stages + 1))
            if self.in_flight != depths:
                raise InvalidProblemError(
                    f"{self.engine.name} runs 1 to {self.engine.max_stages} micro-batches in flight, one for each stage"
                )
        if other := set(self.attention_dp).difference(ATTENTION_DP):
            raise InvalidProblemError(f"attention_dp has {min(other)}, must be of {', '.join(map(str, ATTENTION_DP))}")
        if not self.roles or (Role.PREFILL in self.roles) != (Role.DECODE in self.roles):
            listed = ", ".join(self.roles) or "none"
            raise InvalidProblemError(f"roles are {listed}, must be unified, or prefill and decode, or all three")

    def at(self, settings: EngineSettings) -> Family:
        """Return the plans of this family whose replicas respect these settings.

        For each number M of micro-batches, the largest size that ``max_num_seqs`` allows is added to those tried: it
        may not be among `MICRO_BATCHES`, and without it the family would lose up to a quarter of what the engine runs.
        """
        sizes, most = self.micro_batches, settings.max_num_seqs
        if most is not None:
            fullest = {most // m for m in self.in_flight if m <= most}
            sizes = tuple(sorted({size for size in sizes if size <= most} | fullest))
        return replace(
            self, micro_batches=sizes, chunk_tokens=settings.chunk_tokens or self.chunk_tokens, engine_settings=settings
        )

    @property
    def plugin(self) -> PluginTime:
        """Return what attention workers cost hosts; nothing where no engine's rules apply."""
        return NO_PLUGIN if self.engine is None else self.engine.plugin

    @property
    def splits_roles(self) -> bool:
        """Return whether prompts may be prefilled on replicas other than those that decode."""
        return Role.PREFILL in self.roles

    def attention_dp_of(self, model: ModelSpec) -> tuple[int, ...]:
        """Return the numbers of copies that may share the experts of a model."""
        return () if model.experts is None else tuple(d for d in self.attention_dp if d <= max(self.tp_sizes))

    def pool_sizes(self) -> tuple[int, ...]:
        """Return the numbers of attention workers that a stage may have."""
        return tuple(p for p in POOL_SIZES if p <= self.max_pool)

    def describe(self, model: ModelSpec | None = None) -> str:
        """Return the family in one sentence, including how it treats the experts of a model."""
        each = " of all stages" if self.engine is not None else ""
        shared = "/".join(map(str, () if model is None else self.attention_dp_of(model)))
        in_flight = f"{', '.join(map(str, self.in_flight))} of them in flight, 1 or no fewer than stages"
        parts = (
            "stages of any GPU types" if self.mixed_types else "one device class and TP size per replica",
            "any number of layers per stage" if self.uneven_layers else "equal layers per stage",
            f"TP {'/'.join(map(str, self.tp_sizes))}{each} inside a node",
            "no stage copies",
            f"or one stage of {shared} copies in a node that share its experts" if shared else "",
            self._describe_workers(),
            f"micro-batches of {self.micro_batches[0]} to {self.micro_batches[-1]} requests",
            in_flight if self.engine is None else self.engine.describe(),
            f"prefill chunks of {' or '.join(map(str, self.chunk_tokens))} tokens",
            "under a TTFT limit, stages that take their share of a round trip with a chunk",
            self._describe_roles(),
            f"engines started with {self.engine_settings.describe()}" if self.engine_settings else "",
        )
        return "; ".join(filter(None, parts))

    def _describe_workers(self) -> str:
        if not self.max_pool:
            return "no attention workers"
        if self.engine is not None:
            return (
                f"up to {self.max_pool} attention workers of one class per stage, as many for each of up to "
                f"{self.engine.max_pooled_stages} stages of a replica that prefills and decodes"
            )
        return f"up to {self.max_pool} attention workers per stage"

    def _describe_roles(self) -> str:
        if not self.splits_roles:
            return "every replica prefills and decodes"
        text = "replicas that prefill, decode or do both" if Role.UNIFIED in self.roles else "prefill and decode apart"
        return text + (", each on one GPU type" if self.one_type_per_role else "")
