"""The names of a model's dimensions in each architecture's ``config.json``, with one function per family.

Every architecture names its fields a little differently and omits what its library has defaults for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hetis.formats.errors import Problem, shown
from hetis.formats.positions import Text
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import AttentionKind, MlaShape, ModelSpec, MoeShape

MAX_NUMBER = 10**9


@dataclass(slots=True)
class Config:
    """Reads fields and collects their problems, so that all are reported. ``at``: the path of ``data`` in the file."""

    data: dict[str, Any]
    source: Text
    problems: list[Problem] = field(default_factory=list)
    at: tuple[str, ...] = ()

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number, or ``default`` if the config omits it; without a default that is a problem."""
        value = self.data.get(name)
        if value is None:
            if default is None:
                self.problems.append(self.source.problem(self.at, f"{name} is missing"))
            return least if default is None else default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_NUMBER:
            message = f"is {shown(value)}, must be a whole number from {least} to {MAX_NUMBER}"
            self.refuse(name, message)
            return default or least
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"is {shown(value)}, must be true or false")
            return default
        return value

    def refuse(self, name: str, message: str) -> None:
        self.problems.append(self.source.problem((*self.at, name), message))


def _spec(config: Config, **fields: Any) -> ModelSpec | None:
    """Return the model with its attention kind, or None if fields were wrong."""
    if fields["q_heads"] % fields["kv_heads"]:
        heads = f"num_attention_heads ({fields['q_heads']}) must be a multiple of the KV heads ({fields['kv_heads']})"
        config.problems.append(config.source.problem(config.at, heads))
    if config.problems:
        return None
    kind = AttentionKind.MHA if fields["q_heads"] == fields["kv_heads"] else AttentionKind.GQA
    try:
        return ModelSpec(**({"attention": AttentionKind.MLA if fields.get("mla") else kind} | fields))
    except InvalidProblemError as error:
        config.problems.append(Problem(file=config.source.file, message=str(error)))
        return None


def _common(config: Config, name: str, *, tie_embeddings: bool = False, head_dim: int | None = None) -> dict[str, Any]:
    """Return the fields that most families write alike. ``tie_embeddings`` is the family's default."""
    hidden, q_heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    return {
        "name": name,
        "num_layers": config.whole("num_hidden_layers"),
        "hidden": hidden,
        "intermediate": config.whole("intermediate_size"),
        "q_heads": q_heads,
        "kv_heads": config.whole("num_key_value_heads", q_heads),
        "head_dim": config.whole("head_dim", head_dim or max(1, hidden // q_heads)),
        "vocab": config.whole("vocab_size"),
        "max_position": config.whole("max_position_embeddings", 2048),
        "tie_embeddings": config.flag("tie_word_embeddings", tie_embeddings),
    }


def _llama(config: Config, name: str) -> ModelSpec | None:
    return _spec(config, **_common(config, name))


def _mistral(config: Config, name: str) -> ModelSpec | None:
    return _spec(config, **_common(config, name), sliding_window=_window(config))


def _window(config: Config) -> int | None:
    return None if config.data.get("sliding_window") is None else config.whole("sliding_window")


def _qwen2(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen2 and 2.5, which write a sliding window that ``use_sliding_window`` switches off."""
    window = _window(config) if config.flag("use_sliding_window", False) else None
    return _spec(config, **_common(config, name), sliding_window=window)


def _qwen3(config: Config, name: str) -> ModelSpec | None:
    return _spec(config, **_common(config, name, head_dim=128))


def _qwen1(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen 1: MHA, whose ``intermediate_size`` counts gate and up together; each MLP matrix is half as wide."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    return _spec(
        config,
        name=name,
        num_layers=config.whole("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.whole("intermediate_size") // 2,
        q_heads=heads,
        kv_heads=heads,
        head_dim=config.whole("kv_channels", max(1, hidden // heads)),
        vocab=config.whole("vocab_size"),
        max_position=config.whole("seq_length", config.whole("max_position_embeddings", 8192)),
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )


def _qwen_moe(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen2-MoE, whose one wide shared expert counts as several of the routed width, and Qwen3-MoE, which has
    none.
    """
    width = config.whole("moe_intermediate_size")
    shared = config.whole("shared_expert_intermediate_size", 0, least=0)
    if config.whole("decoder_sparse_step", 1) != 1:
        config.refuse("decoder_sparse_step", "only models with experts in every layer (1) are supported")
    if config.data.get("mlp_only_layers"):
        config.refuse("mlp_only_layers", "only models with experts in every layer are supported")
    if shared % width:
        config.refuse("shared_expert_intermediate_size", f"is {shared}, must be a multiple of {width}")
    moe = MoeShape(
        num_experts=config.whole("num_experts"),
        active_experts=config.whole("num_experts_per_tok"),
        expert_intermediate=width,
        shared_experts=shared // width,
    )
    return _spec(config, **_common(config, name, head_dim=None if shared else 128), moe=moe)


def _mixtral(config: Config, name: str) -> ModelSpec | None:
    """Read Mixtral and MiniMax M2: experts of the stated width in every layer."""
    common = _common(config, name)
    moe = MoeShape(
        num_experts=config.whole("num_local_experts", 8),
        active_experts=config.whole("num_experts_per_tok", 2),
        expert_intermediate=common["intermediate"],
    )
    return _spec(config, **common, sliding_window=_window(config), moe=moe)


def _gpt_oss(config: Config, name: str) -> ModelSpec | None:
    """Read gpt-oss, where every second layer has a sliding window."""
    common = _common(config, name, head_dim=64)
    moe = MoeShape(
        num_experts=config.whole("num_local_experts"),
        active_experts=config.whole("num_experts_per_tok"),
        expert_intermediate=common["intermediate"],
    )
    return _spec(config, **common, sliding_window=_window(config), sliding_window_every=2, moe=moe)


def _opt(config: Config, name: str) -> ModelSpec | None:
    """Read OPT: two MLP matrices. Embeddings narrower than the hidden size (OPT-350m) are refused."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if config.whole("word_embed_proj_dim", hidden) != hidden:
        config.refuse("word_embed_proj_dim", f"must equal hidden_size ({hidden})")
    return _spec(
        config,
        name=name,
        num_layers=config.whole("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.whole("ffn_dim"),
        q_heads=heads,
        kv_heads=heads,
        head_dim=max(1, hidden // heads),
        vocab=config.whole("vocab_size"),
        max_position=config.whole("max_position_embeddings", 2048),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        gated_mlp=False,
    )


def _gemma(config: Config, name: str) -> ModelSpec | None:
    return _spec(config, **_common(config, name, tie_embeddings=True, head_dim=256))


def _gemma2(config: Config, name: str) -> ModelSpec | None:
    """Read Gemma 2, where every second layer has a sliding window."""
    common = _common(config, name, tie_embeddings=True, head_dim=256)
    window = config.whole("sliding_window", 4096)
    return _spec(config, **common, sliding_window=window, sliding_window_every=2, float16=False)


def _phi(config: Config, name: str) -> ModelSpec | None:
    return _spec(config, **_common(config, name), gated_mlp=False)


def _routed(config: Config) -> MoeShape:
    """Return the experts of DeepSeek and GLM: routed and shared ones, after some dense layers."""
    return MoeShape(
        num_experts=config.whole("n_routed_experts"),
        active_experts=config.whole("num_experts_per_tok"),
        expert_intermediate=config.whole("moe_intermediate_size"),
        shared_experts=config.whole("n_shared_experts", 0, least=0),
        first_dense_layers=config.whole("first_k_dense_replace", 0, least=0),
    )


def _deepseek(config: Config, name: str) -> ModelSpec | None:
    """Read DeepSeek V2 and V3, Kimi K2 and K2.5: latent attention; dense layers first, then experts in every layer."""
    mla = MlaShape(
        kv_lora_rank=config.whole("kv_lora_rank"),
        qk_rope_head_dim=config.whole("qk_rope_head_dim"),
        qk_nope_head_dim=config.whole("qk_nope_head_dim"),
        v_head_dim=config.whole("v_head_dim"),
        q_lora_rank=None if config.data.get("q_lora_rank") is None else config.whole("q_lora_rank"),
    )
    moe = None
    if config.data.get("n_routed_experts") is not None:
        if config.whole("moe_layer_freq", 1) != 1:
            config.refuse("moe_layer_freq", "only models with experts in every layer after the first (1) are supported")
        moe = _routed(config)
    common = _common(config, name) | {"head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim}
    return _spec(config, **common, mla=mla, moe=moe)


def _glm4_moe(config: Config, name: str) -> ModelSpec | None:
    """Read GLM 4.5 and 4.6: grouped queries; dense layers first, then experts in every layer."""
    return _spec(config, **_common(config, name, head_dim=128), moe=_routed(config))


FAMILIES: dict[str, Callable[[Config, str], ModelSpec | None]] = {
    "LlamaForCausalLM": _llama,
    "LLaMAForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "MiniMaxM2ForCausalLM": _mixtral,
    "QWenLMHeadModel": _qwen1,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen_moe,
    "OPTForCausalLM": _opt,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "PhiForCausalLM": _phi,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "KimiK2ForCausalLM": _deepseek,
    "KimiK25ForConditionalGeneration": _deepseek,
    "Glm4MoeForCausalLM": _glm4_moe,
    "GptOssForCausalLM": _gpt_oss,
}

# Architectures whose language model is described in ``text_config``. Kimi K2.5's vision tower is left out: it has less
# than a thousandth of the weights.
NESTED = {"KimiK25ForConditionalGeneration"}

_LINEAR = "layers of linear attention, which keep a state instead of KV"
_SPARSE = "sparse attention, where an indexer chooses the tokens that are attended to"
_WINDOWS = "windows in most layers and full attention in the others"
_TOWER = "a vision tower beside the text model"
# Architectures that are known, and what keeps the cost model from planning for them.
NOT_MODELLED: dict[str, str] = {
    "Qwen3NextForCausalLM": _LINEAR,
    "Qwen3_5ForConditionalGeneration": _LINEAR,
    "Qwen3_5MoeForConditionalGeneration": _LINEAR,
    "KimiLinearForCausalLM": _LINEAR,
    "KimiK3ForConditionalGeneration": _LINEAR,
    "MiniMaxText01ForCausalLM": _LINEAR,
    "MiniMaxM1ForCausalLM": _LINEAR,
    "NemotronHForCausalLM": "state-space layers (Mamba), which keep a state instead of KV",
    "DeepseekV32ForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": _SPARSE,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "MiniMaxM3ForCausalLM": _SPARSE,
    "MiniMaxM3SparseForConditionalGeneration": _SPARSE,
    "Gemma3ForCausalLM": _WINDOWS,
    "Gemma3ForConditionalGeneration": _WINDOWS,
    "Gemma4ForConditionalGeneration": _WINDOWS,
    "MiMoV2FlashForCausalLM": _WINDOWS,
    "Llama4ForConditionalGeneration": "attention in chunks in most layers and full attention in the others",
    "Qwen3VLForConditionalGeneration": _TOWER,
    "Qwen3VLMoeForConditionalGeneration": _TOWER,
}

# For configs without `architectures`.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "qwen": "QWenLMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "opt": "OPTForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "glm4_moe": "Glm4MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "nemotron_h": "NemotronHForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
