"""A model as a list of layers, and the means over its layers with which plans count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model.attention import Grouped
from hetis.solver.model.layers import Layer, LayerKinds, window_of, without_window
from hetis.solver.model.mixer import Indexer, Kernel, Mixer
from hetis.solver.model.mlp import Dense, Experts, Mlp
from hetis.solver.model.variants import DraftShape, GpuPrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Parameter counts omit norms and biases (well under 1% of the weights of any model in the catalogue). The figures of
    a layer are the mean over all repeated layers, so a stage may only start where each kind has had about its share of
    the layers. ``forbidden_cuts`` are further layer numbers i before which no pipeline stage may start. GPU types in
    ``precisions`` compute layers in a precision of their own (`on`).

    Attributes:
        weights: name of the layers' precision, such as fp8 or awq-int4; empty if not specified.
        weight_bytes: bytes per parameter of the layers; 1 for fp8, about 0.53 for 4-bit with scales.
        kv_bytes: bytes per element of the KV cache.
        activation_bytes: bytes per element sent between devices.
        embedding_bytes: bytes per parameter of embedding and LM head, which are seldom quantised.
        windows_free_kv: engines free the KV that windows have passed although other layers keep theirs, as vLLM's
            hybrid KV cache manager does. Where all layers slide, they always do.
        residual_streams: copies of the residual that layers mix (hyper-connections, DeepSeek-V4); 1: a plain residual.
        norms_span_heads: queries and keys are normalised over all heads, whose squares the TP ranks sum: a third
            all-reduce of a layer (MiniMax-M2).
        vision_params: parameters of vision towers, which the first stage holds in 16 bits.
        float16: engines compute it in float16; False: they refuse, as its values exceed the range (Gemma 2).
        draft: how engines are configured to draft tokens; None: they do not draft.
    """

    name: str
    layers: tuple[Layer, ...]
    hidden: int
    vocab: int
    weights: str = ""
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    activation_bytes: float = 2.0
    embedding_bytes: float = 2.0
    tie_embeddings: bool = False
    max_position: int = 4096
    windows_free_kv: bool = True
    residual_streams: int = 1
    norms_span_heads: bool = False
    vision_params: int = 0
    float16: bool = True
    draft: DraftShape | None = None
    forbidden_cuts: frozenset[int] = frozenset()
    precisions: tuple[GpuPrecision, ...] = ()
    _kinds: LayerKinds = field(init=False, repr=False, compare=False)
    _kv_bytes_per_token_group: float = field(init=False, repr=False, compare=False)
    _state_bytes: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("hidden", "vocab", "max_position", "residual_streams"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"{self.name}: {name} is {getattr(self, name)}, must be >= 1")
        if not self.layers:
            raise InvalidProblemError(f"{self.name}: num_layers is 0, must be >= 1")
        if self.draft is not None and not (self.draft.tokens >= 1 and 0.0 <= self.draft.acceptance <= 1.0):
            raise InvalidProblemError(f"{self.name}: {self.draft} needs a token at least and an acceptance of 0 to 1")
        object.__setattr__(self, "_kinds", LayerKinds.of(self.layers))
        if self._kinds.main is None:
            raise InvalidProblemError(f"{self.name}: has no layer with attention, must have one at least")
        # Once, because a simulation needs them for every prompt.
        token_bytes = self._mean(lambda mixer: mixer.kv_bytes(self.kv_bytes)) / self.head_groups
        object.__setattr__(self, "_kv_bytes_per_token_group", token_bytes)
        object.__setattr__(self, "_state_bytes", self._mean(lambda mixer: mixer.state_bytes(self.kv_bytes)))

    def __hash__(self) -> int:
        return hash((self.name, self.hidden, len(self.layers), self.weights, self.kv_bytes))  # all layers' takes longer

    def on(self, gpu: str) -> ModelSpec:
        """Return the model as GPUs of one type hold it, in a single precision."""
        if not self.precisions:
            return self
        own = next((one for one in self.precisions if one.gpu == gpu), self)
        return replace(self, weights=own.weights, weight_bytes=own.weight_bytes, kv_bytes=own.kv_bytes, precisions=())

    # The shape, as heads are divided among ranks and kernels see it.
    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mixers(self) -> tuple[tuple[Mixer, int], ...]:
        """The kinds of attention, each with the number of layers that have it."""
        return self._kinds.mixers

    @property
    def mlps(self) -> tuple[tuple[Mlp, int], ...]:
        """The kinds of MLP of repeated layers, each with the number of layers that have it."""
        return self._kinds.mlps

    @property
    def attention(self) -> Mixer:
        """The kind of attention that most layers with KV have."""
        assert self._kinds.main is not None, "checked when the model was made"
        return self._kinds.main

    @property
    def q_heads(self) -> int:
        return self.attention.q_heads

    @property
    def kv_heads(self) -> int:
        """The KV heads that most layers have, as engines number them; one for each query head with latent attention."""
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.key_dim

    @property
    def head_groups(self) -> int:
        """The KV head groups of a layer, G, the smallest things placed: the most that a layer has; 1 with MLA."""
        return self._kinds.groups

    @property
    def queries_per_group(self) -> int:
        """Return r, the query heads that share one head group."""
        return self.q_heads // self.head_groups

    def divides(self, ranks: int) -> bool:
        """Return whether so many tensor-parallel ranks can share the heads of all layers."""
        return all(mixer.divides(ranks) for mixer, _ in self.mixers)

    @property
    def kernels(self) -> frozenset[Kernel]:
        """The kernels that engines run for its layers; sparse ones beside those of what they choose from."""
        sparse = {Kernel.SPARSE} if self.indexer is not None else set[Kernel]()
        return frozenset({mixer.kernel for mixer, _ in self.mixers} | sparse)

    @property
    def kernel(self) -> Kernel:
        """The kernels that engines run for most layers with KV."""
        return Kernel.SPARSE if self.indexer is not None else self.attention.kernel

    @property
    def indexer(self) -> Indexer | None:
        """The indexer that chooses among all tokens, in layers with sparse attention."""
        return next((mixer.token_indexer for mixer, _ in self.mixers if mixer.token_indexer is not None), None)

    @property
    def indexer_layers(self) -> int:
        """The number of layers with an indexer of their own."""
        return sum(count for mixer, count in self.mixers if mixer.token_indexer is not None and mixer.owns_indexer)

    @property
    def kv_share(self) -> float:
        """Return the share of layers that keep KV; the others keep a state for each request, or nothing."""
        return sum(count for _, count in self._kinds.attention) / self.num_layers

    @property
    def sliding_window(self) -> int | None:
        """The window of layers that slide; None: none do."""
        return next((window for mixer, _ in self.mixers if (window := window_of(mixer)) is not None), None)

    @property
    def sliding_share(self) -> float:
        """Return the share of the layers with KV that have a sliding window."""
        sliding = sum(count for mixer, count in self._kinds.attention if window_of(mixer) is not None)
        return sliding / sum(count for _, count in self._kinds.attention)

    @property
    def _frees_windows(self) -> bool:
        return self.windows_free_kv or self.sliding_share == 1.0

    @property
    def frees_some_kv(self) -> bool:
        """Return whether engines free KV in some of the layers only."""
        return self.windows_free_kv and 0.0 < self.sliding_share < 1.0

    @property
    def plain_layer(self) -> tuple[Grouped, Dense] | None:
        """The parts of a layer if all have usual grouped attention, windows apart, and a dense MLP; otherwise None."""
        return self._kinds.plain

    @property
    def all_heads_share(self) -> str:
        """What all heads of some layers share; empty: nothing."""
        return next((what for mixer, _ in self.mixers if (what := mixer.all_heads_share)), "")

    @property
    def has_like_heads(self) -> bool:
        """Return whether all layers with KV have heads of one shape."""
        return len({without_window(mixer) for mixer, _ in self._kinds.attention}) == 1

    @property
    def heads_can_move(self) -> bool:
        """Return whether attention workers may compute head groups: those of all layers, with the KV of all tokens.

        States, indexers and compressors serve all heads together, KV that windows free is not kept alike in all layers,
        and the plugin does not verify drafts.
        """
        return self.has_like_heads and not self.all_heads_share and self.draft is None and not self.frees_some_kv

    # Parameters.
    def _mean(self, of: Callable[[Mixer], float]) -> float:
        """Return the mean over all layers of a figure of their attention."""
        total = 0.0
        for mixer, count in self._kinds.mixers:
            total += count * of(mixer)
        return total / len(self.layers)

    def _repeated(self, of: Callable[[Mlp], float]) -> float:
        """Return the mean over repeated layers of a figure of their MLPs, which may be an array."""
        layers = self.num_layers - self.prefix_layers
        return sum(count / layers * of(mlp) for mlp, count in self.mlps)

    def attention_params(self) -> float:
        """Return the mean parameters of a layer's attention projections, and of what mixes its residual streams."""
        return self._mean(lambda mixer: mixer.params(self.hidden)) + self.mixing_params()

    @property
    def residual_width(self) -> int:
        """Return the numbers of a token's residual, in all of its streams; stages send each other these."""
        return self.residual_streams * self.hidden

    def mixing_params(self) -> int:
        """Return a layer's parameters for mixing residual streams; 0 for a plain residual.

        Before attention and before the MLP, a token's streams determine how they are joined, divided and mixed: n, n
        and n^2 numbers (``DeepseekV4HyperConnection``).
        """
        n = self.residual_streams
        return 0 if n == 1 else 2 * (2 + n) * n * self.residual_width

    def dense_layer_params(self) -> float:
        """Return the mean parameters of a leading layer without experts; of any layer if there is none."""
        mlps = sum(count * mlp.params(self.hidden) for mlp, count in self._kinds.prefix_mlps)
        return self.attention_params() + mlps / self.prefix_layers if self.prefix_layers else self.layer_params()

    def layer_params(self) -> float:
        """Return the mean parameters of a repeated layer."""
        return self.attention_params() + self._repeated(lambda mlp: mlp.params(self.hidden))

    def active_layer_params(self) -> float:
        """Return the mean parameters of a repeated layer that one token touches."""
        return self.attention_params() + self._repeated(lambda mlp: mlp.active_params(self.hidden))

    def touched_layer_params(self, tokens: float) -> float:
        """Return the mean parameters of a repeated layer that ``tokens`` of a batch read, without untouched experts."""
        return self.attention_params() + self._repeated(lambda mlp: mlp.touched_params(self.hidden, tokens))

    @property
    def experts(self) -> Experts | None:
        """The experts of the layers that have some; None for a model without."""
        return next((mlp for mlp, _ in self.mlps if isinstance(mlp, Experts)), None)

    @property
    def expert_share(self) -> float:
        """Return the share of repeated layers that have experts; 0 for a model without."""
        return self._repeated(lambda mlp: float(isinstance(mlp, Experts)))

    def expert_params(self) -> int:
        """Return the parameters of one routed expert; 0 for a model without experts."""
        return 0 if self.experts is None else self.experts.expert_params(self.hidden)

    def touched_experts(self, tokens: float) -> float:
        """Return the expected routed experts of a layer with experts that ``tokens`` touch under even routing."""
        return 0.0 if self.experts is None else self.experts.touched(tokens)

    def expert_activation_bytes(self, tokens: float, slices: int = 1) -> float:
        """Return the bytes of activations that the routed experts of a layer move for ``tokens`` tokens on one rank."""
        elements = 0.0 if self.experts is None else self.experts.activation_elements(self.hidden, tokens, slices)
        return elements * self.activation_bytes

    @property
    def inner(self) -> int:
        """The numbers of a token between the products of a repeated layer's MLP, the most of any."""
        return self._kinds.inner

    @property
    def prefix_layers(self) -> int:
        """Return the leading layers that differ from the repeated ones; they stay together on the first stage."""
        return self._kinds.prefix_layers

    @property
    def draft_layers(self) -> int:
        """Return the layers after the last one that draft tokens; they are like the repeated ones."""
        return 0 if self.draft is None else 1

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one decoding request in an iteration: its next one and the drafts."""
        return 1 if self.draft is None else 1 + self.draft.tokens

    @property
    def emitted_tokens(self) -> float:
        """Return the mean tokens that an iteration adds to a decoding request."""
        return 1.0 if self.draft is None else self.draft.emitted()

    def draft_params(self) -> float:
        """Return the parameters of the drafting layer, with the projection of the state and token it starts from."""
        return self.draft_layers * (self.layer_params() + 2 * self.hidden * self.hidden)

    @property
    def embedding_params(self) -> int:
        """Return the parameters of the embedding table; the LM head has as many (the same ones if tied)."""
        return self.vocab * self.hidden

    def params(self) -> int:
        """Return the number of all parameters, vision towers included."""
        return self._with_ends(self.layer_params()) + self.vision_params

    def active_params(self) -> int:
        """Return the parameters that one token of text uses; like published counts, includes embedding and LM head."""
        return self._with_ends(self.active_layer_params())

    def _with_ends(self, repeated: float) -> int:
        """Return the parameters of all layers, repeated ones having this many, with embedding and LM head."""
        prefix, ends = self.prefix_layers, self.embedding_params * (1 if self.tie_embeddings else 2)
        return round((self.num_layers - prefix) * repeated + prefix * self.dense_layer_params()) + ends

    # What requests keep.
    def kv_bytes_per_token_group(self) -> float:
        """Return the mean KV bytes of one token in one layer and one head group, with the key of an indexer."""
        return self._kv_bytes_per_token_group

    def kv_bytes_per_token(self) -> float:
        """Return the KV bytes of one token over all layers and head groups."""
        return self.num_layers * self.head_groups * self.kv_bytes_per_token_group()

    def _mean_by_kv(self, of: Callable[[Mixer], float]) -> float:
        """Return the mean over all layers of a figure of their attention, weighted by the KV of each."""
        kept = self._mean(lambda mixer: mixer.kv_bytes(self.kv_bytes) * of(mixer))
        return kept / self._mean(lambda mixer: mixer.kv_bytes(self.kv_bytes))

    def cached_tokens(self, context_tokens: float) -> float:
        """Return the tokens whose KV is kept, as the mean of the layers by the KV of each."""
        if self.sliding_window is None or not self._frees_windows:
            return context_tokens
        return self._mean_by_kv(lambda mixer: mixer.kept_tokens(context_tokens))

    def cached_growth(self, context_tokens: float) -> float:
        """Return the tokens by which `cached_tokens` grows with each further token of the context."""
        if self.sliding_window is None or not self._frees_windows:
            return 1.0
        return self._mean_by_kv(lambda mixer: float((size := window_of(mixer)) is None or context_tokens < size))

    def state_bytes(self) -> float:
        """Return the mean bytes that one request keeps in one layer, for all heads, independently of its context."""
        return self._state_bytes

    @property
    def recurrent_layers(self) -> int:
        """The number of layers that keep states of linear attention or a state space."""
        return sum(count for mixer, count in self.mixers if mixer.kernel is Kernel.RECURRENT)

    @property
    def recurrent_state_bytes(self) -> float:
        """Return the bytes of a request's state in a layer of linear attention; 0 for a model without."""
        return max((m.state_bytes(self.kv_bytes) for m, _ in self.mixers if m.kernel is Kernel.RECURRENT), default=0.0)

    def chunk_state_bytes(self) -> float:
        """Return the mean bytes that a layer keeps of each token of a chunk while it is computed, beside its KV."""
        return self._mean(lambda mixer: mixer.chunk_state_bytes(self.kv_bytes))

    @property
    def divides_states(self) -> bool:
        """Return whether ranks divide what is kept for a request by heads; otherwise each holds all of it."""
        return all(mixer.divides_states for mixer, _ in self.mixers)

    @property
    def kept_states(self) -> int:
        """The states kept for a request: one for each token of an iteration, as drafts may be rejected, or else one."""
        return self.step_tokens if self.divides_states else 1  # what compressed attention keeps belongs to tokens

    def state_ranks(self, tp: int) -> int:
        """Return among how many of ``tp`` ranks a state is divided."""
        return tp if self.divides_states else 1

    def state_traffic_bytes(self, queries: float) -> float:
        """Return the mean bytes of states that one request's ``queries`` tokens read and write in a layer."""
        return self._mean(lambda mixer: mixer.state_traffic_bytes(queries, self.kv_bytes))

    def state_flops(self) -> float:
        """Return the mean FLOPs of updating and reading the state of a layer for one token."""
        return self._mean(lambda mixer: mixer.token_flops())

    def prompt_kv_bytes(self, prompt_tokens: float) -> float:
        """Return the bytes that a prompt leaves for its decoding: KV and states of all layers and heads."""
        return prompt_tokens * self.kv_bytes_per_token() + self.num_layers * self.state_bytes()

    def exchange_bytes_per_head(self) -> float:
        """Return bytes per token, layer and query head between a primary and an attention worker.

        q goes out and the head output comes back, while k and v go out once per head group: ``(2 + 2/r) head_dim s``
        (Hetis, SC'25). With MLA the query and output are in the latent space.
        """
        return self.attention.exchange_elements_per_head() * self.activation_bytes

    # What attention computes and reads.
    def attention_flops(self, pairs: float, heads: float) -> float:
        """Return mean FLOPs of prefill attention over (query, key) ``pairs`` for ``heads`` query heads of a layer."""
        return self._mean(lambda mixer: mixer.prefill_flops()) / self.q_heads * pairs * heads

    def decode_attention_flops(self, context_tokens: float, heads: float) -> float:
        """Return FLOPs of one token's decode attention over ``context_tokens`` for ``heads`` query heads of a layer."""
        return self._mean(lambda mixer: mixer.decode_flops()) / self.q_heads * context_tokens * heads

    def attended_tokens(self, context_tokens: float) -> float:
        """Return the tokens a query attends to, as the mean of the layers by the FLOPs for each.

        With compressed attention, these are the window's tokens and the entries of each layer. An indexer reads the
        keys of the whole context to choose tokens; it counts by the bytes that it reads.
        """
        if self.indexer is not None:
            return self.read_tokens(context_tokens)
        found = self._mean(lambda mixer: mixer.decode_flops() * mixer.attended(context_tokens, self.kv_bytes))
        return found / self._mean(lambda mixer: mixer.decode_flops())

    def read_tokens(self, context_tokens: float) -> float:
        """Return the tokens of KV with as many bytes as a query reads."""
        read = self._mean(lambda mixer: mixer.read_bytes(context_tokens, self.kv_bytes))
        return read / self._mean(lambda mixer: mixer.kv_bytes(self.kv_bytes))

    def window_read_tokens(self) -> float:
        """Return the part of `read_tokens` that is read even from a short context: a window of compressed attention."""
        read = self._mean(lambda mixer: mixer.window_read_bytes(self.kv_bytes))
        return read / self._mean(lambda mixer: mixer.kv_bytes(self.kv_bytes))

    @property
    def attention_limit(self) -> int | None:
        """The context beyond which some layers attend to no more tokens; None: all attend to all."""
        return min((limit for mixer, _ in self.mixers if (limit := mixer.limit) is not None), default=None)

    def scan_flops(self, context_tokens: float) -> float:
        """Return the mean FLOPs of a layer for scoring the keys of compressed entries for one token, on every rank."""
        return self._mean(lambda mixer: mixer.scan_flops(context_tokens))

    def allowed_cut(self, layer: int) -> bool:
        """Return whether a pipeline stage may start at ``layer``."""
        if not 0 < layer < self.num_layers:
            return True
        is_even = self._kinds.even_cuts is None or layer in self._kinds.even_cuts
        return is_even and layer >= self.prefix_layers and layer not in self.forbidden_cuts
