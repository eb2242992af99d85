"""Every family of Hugging Face models, and its reader.

Every architecture names its fields a little differently and omits what its library has defaults for: a reader maps
these names. Families that name the kind of every layer share one reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hetis.formats.errors import shown
from hetis.formats.fields import listed
from hetis.formats.models.common import (
    Family,
    common_fields,
    family_of,
    same_experts,
    spec_of,
    towers_of_any_kind,
    vision_params,
    window_in_all,
)
from hetis.formats.models.config_json import Config
from hetis.formats.models.deepseek import deepseek_v4, kimi_linear, with_indexer
from hetis.formats.models.linear_attention import lightning_attention
from hetis.formats.models.qwen import qwen1, qwen2_vl, qwen3_next
from hetis.formats.models.unlike import by_layers, deci, twice_in_a_layer
from hetis.solver.model import ModelSpec


def _minimax(config: Config, name: str) -> ModelSpec | None:
    """Read MiniMax-Text-01 and M1: lightning attention in seven of eight layers, and Mixtral's experts in all.

    vLLM serves them up to version 0.23 (``_PREVIOUSLY_SUPPORTED_MODELS`` of its registry).
    """
    if config.data.get("shared_intermediate_size"):
        what = f"is {shown(config.data['shared_intermediate_size'])}, only models without a shared expert are supported"
        config.refuse("shared_intermediate_size", what)
    config.linear = lightning_attention(config, config.num_layers())
    fields = common_fields(config, name)
    fields |= same_experts(config, fields, 8, 2) | window_in_all(config, fields)
    return spec_of(config, **fields, linear=config.linear.shape)


def _opt(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse embeddings narrower than the hidden size (OPT-350m)."""
    hidden = fields["hidden"]
    if config.whole("word_embed_proj_dim", hidden) != hidden:
        config.refuse("word_embed_proj_dim", f"must equal hidden_size ({hidden})")
    return {}


def _llama4(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read Llama 4: chunked attention in three of four layers, and experts in all layers or every second one.

    A query attends to the tokens of its own chunk, which are at most a window, and are counted as one. vLLM (0.32)
    keeps the KV of all tokens, because chunks switch its hybrid KV cache manager off.
    """
    every, num_layers = config.whole("interleave_moe_layer_step", 1), fields["num_layers"]
    experts = same_experts(config, fields, 16, 1, shared_experts=1, every=every)
    if config.data.get("moe_layers") not in (None, list(range(every - 1, num_layers, every))):
        config.refuse("moe_layers", f"only models with experts in every layer number {every} are supported")
    # 0: no rope, and full attention. An empty list is like none.
    without_rope = config.for_layers("no_rope_layers", num_layers) if config.data.get("no_rope_layers") else None
    full = num_layers // config.whole("no_rope_layer_interval", 4) if not without_rope else without_rope.count(0)
    window = config.optional("attention_chunk_size")
    return experts | {
        "intermediate": config.whole("intermediate_size_mlp", 16_384),
        "sliding_window": window,
        "sliding_layers": None if window is None else num_layers - full,
        "vision_params": vision_params(config, projection=fields["hidden"]),
    }


def _of_inner_model(config: Config, name: str) -> ModelSpec | None:
    """Read a model whose language model has an architecture of its own (InternVL), with its tower."""
    inner = next(iter(listed(config.data.get("architectures"))), None) or MODEL_TYPES.get(
        str(config.data.get("model_type"))
    )
    read = FAMILIES.get(str(inner))
    if read is None or read is _of_inner_model:
        config.refuse("architectures", f"is {shown(inner)}, which is not supported; {supported()}")
        return None
    model = read(config, name)
    if model is None:
        return None
    return replace(model, vision_params=towers_of_any_kind(config, model.hidden))


def _with_towers(read: Family, params: int, config: Config, name: str) -> ModelSpec | None:
    """Read a model whose config names towers, or adapters, without describing them; they have so many parameters."""
    note = f"its towers and adapters, which its config does not describe, count as {params / 1e9:.2f}B parameters"
    config.notes, before = [], config.notes
    model = read(config, name)
    config.notes = [*before, f"{name}: {note}"]  # in place of what was noted on towers
    return None if model is None else replace(model, vision_params=params)


# Fields that configs of classic decoders may omit: the width of the MLP as a multiple of the hidden size.
_CLASSIC: dict[str, Any] = {"gated_mlp": False, "usual": {"expansion_ratio": 4}}


# Values of Gemma from its second generation on exceed the range of float16. Configs omit what equals the library's
# defaults (Gemma3TextConfig): every second, later every sixth layer does not slide.
_LATER_GEMMA = partial(by_layers, tied=True, fixed={"float16": False})
_GEMMA_2 = {"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2}
_GEMMA_3 = {"head_dim": 256, "sliding_window": 1024, "sliding_window_pattern": 6, "num_attention_heads": 8}
_GEMMA_3 |= {"num_key_value_heads": 4, "vocab_size": 262_208, "max_position_embeddings": 131_072}


# Qwen's windows are off unless ``use_sliding_window`` switches them on, in the layers from a stated one on. vLLM (0.32)
# runs models with the window in all layers or in none.
_QWEN = {"use_sliding_window": False, "max_window_layers": 28}


_SPARSE = partial(by_layers, shape=with_indexer)


# Kimi K2.5's vision tower is left out: it has less than a thousandth of the weights.
# Architecture, its ``model_type`` if configs without ``architectures`` are known, and its reader.
_TABLE: tuple[tuple[str, str, Family], ...] = (
    ("LlamaForCausalLM", "llama", by_layers),
    ("LLaMAForCausalLM", "", by_layers),
    ("MistralForCausalLM", "mistral", by_layers),
    ("MixtralForCausalLM", "mixtral", partial(by_layers, usual={"num_local_experts": 8, "num_experts_per_tok": 2})),
    # MiniMaxText01RMSNormTP in vLLM 0.32
    ("MiniMaxM2ForCausalLM", "minimax_m2", partial(by_layers, fixed={"norms_span_heads": True})),
    ("QWenLMHeadModel", "qwen", family_of(qwen1)),
    ("Qwen2ForCausalLM", "qwen2", partial(by_layers, usual=_QWEN)),
    ("Qwen2MoeForCausalLM", "qwen2_moe", partial(by_layers, usual=_QWEN)),
    ("Qwen3ForCausalLM", "qwen3", partial(by_layers, usual=_QWEN | {"head_dim": 128})),
    ("Qwen3MoeForCausalLM", "qwen3_moe", partial(by_layers, usual=_QWEN)),
    ("OPTForCausalLM", "opt", family_of(_opt, fixed={"gated_mlp": False}, tie_embeddings=True, width="ffn_dim")),
    ("GemmaForCausalLM", "gemma", partial(by_layers, tied=True, usual={"head_dim": 256})),
    ("Gemma2ForCausalLM", "gemma2", partial(_LATER_GEMMA, usual=_GEMMA_2)),
    ("Gemma3ForCausalLM", "gemma3_text", partial(_LATER_GEMMA, usual=_GEMMA_3)),
    ("Gemma3ForConditionalGeneration", "gemma3", partial(_LATER_GEMMA, usual=_GEMMA_3)),
    ("PhiForCausalLM", "phi", partial(by_layers, **_CLASSIC)),
    ("Phi3ForCausalLM", "phi3", by_layers),
    ("PhiMoEForCausalLM", "phimoe", partial(by_layers, usual={"num_local_experts": 16, "num_experts_per_tok": 2})),
    ("KimiLinearForCausalLM", "kimi_linear", kimi_linear),
    ("GptOssForCausalLM", "gpt_oss", partial(by_layers, usual={"head_dim": 64, "sliding_window_pattern": 2})),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", partial(qwen2_vl, gated=False)),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", partial(qwen2_vl, gated=True)),
    ("Qwen2_5OmniModel", "qwen2_5_omni", partial(by_layers, usual=_QWEN)),
    ("Qwen2_5OmniForConditionalGeneration", "", partial(by_layers, usual=_QWEN)),
    ("DeepseekV32ForCausalLM", "deepseek_v32", _SPARSE),
    ("GlmMoeDsaForCausalLM", "glm_moe_dsa", _SPARSE),
    ("DeepseekV4ForCausalLM", "deepseek_v4", deepseek_v4),
    ("Llama4ForConditionalGeneration", "llama4", family_of(_llama4, fixed={"windows_free_kv": False}, head_dim=128)),
    ("Llama4ForCausalLM", "llama4_text", family_of(_llama4, fixed={"windows_free_kv": False}, head_dim=128)),
    ("LongcatFlashForCausalLM", "longcat_flash", partial(by_layers, shape=twice_in_a_layer)),
    ("Starcoder2ForCausalLM", "starcoder2", partial(by_layers, gated_mlp=False, tied=True)),
    ("DeciLMForCausalLM", "nemotron-nas", deci),
    ("DbrxForCausalLM", "dbrx", partial(by_layers, inner=("attn_config", "ffn_config"))),
    ("KimiK25ForConditionalGeneration", "kimi_k25", partial(by_layers, fixed={"vision_params": 0})),
    ("AXK2ForCausalLM", "axk2", _SPARSE),
    # By model cards: 3.3B and 3.4B with DeepEncoder (SAM, and CLIP or a small Qwen2); 4.15B with CLIP; 5.6B with
    # adapters for all matrices.
    ("DeepseekOCRForCausalLM", "", partial(_with_towers, by_layers, 400_000_000)),
    ("DeepseekOCR2ForCausalLM", "", partial(_with_towers, by_layers, 460_000_000)),
    ("Phi3VForCausalLM", "phi3_v", partial(_with_towers, by_layers, 325_000_000)),
    ("Phi4MMForCausalLM", "phi4mm", partial(_with_towers, by_layers, 1_740_000_000)),
)


# Families with one reader: ``architecture=model_type``, or an architecture alone.
_ALIKE: tuple[tuple[Family, str], ...] = (
    (
        by_layers,
        "MiniMaxM3ForCausalLM=minimax_m3 MiniMaxM3SparseForCausalLM "
        "MiniMaxM3SparseForConditionalGeneration=minimax_m3_vl KimiK3ForConditionalGeneration=kimi_k3 "
        "MiMoV2FlashForCausalLM=mimo_v2_flash MiMoV2ForCausalLM=mimo_v2 MiMoV2OmniForConditionalGeneration "
        "MiMoForCausalLM=mimo Step3p5ForCausalLM=step3p5 Step3p7FlashForCausalLM=step3p7 "
        "Step3p7ForConditionalGeneration Glm4vForConditionalGeneration=glm4v Glm46VForConditionalGeneration=glm46v "
        "Glm4ForCausalLM=glm4 GlmForCausalLM=glm GraniteForCausalLM=granite GraniteMoeForCausalLM=granitemoe "
        "GraniteMoeSharedForCausalLM=granitemoeshared GraniteMoeHybridForCausalLM=granitemoehybrid "
        "BambaForCausalLM=bamba Olmo2ForCausalLM=olmo2 Olmo3ForCausalLM=olmo3 OlmoeForCausalLM=olmoe "
        "FalconH1ForCausalLM=falcon_h1 HunYuanDenseV1ForCausalLM=hunyuan_v1_dense "
        "HunYuanMoEV1ForCausalLM=hunyuan_v1_moe BailingMoeForCausalLM=bailing_moe "
        "BailingMoeV2ForCausalLM=bailing_moe_v2 BailingMoeLinearForCausalLM "
        "BailingMoeLinearV2ForCausalLM=bailing_moe_linear BailingMoeV2_5ForCausalLM=bailing_hybrid "
        "JambaForCausalLM=jamba SeedOssForCausalLM=seed_oss ExaoneForCausalLM=exaone Exaone4ForCausalLM=exaone4 "
        "ExaoneMoEForCausalLM=exaone_moe Dots1ForCausalLM=dots1 StableLmForCausalLM=stablelm "
        "InternLM3ForCausalLM=internlm3 ExaoneMoeForCausalLM FlexOlmoForCausalLM=flex_olmo "
        "Ministral3ForCausalLM=ministral3 HYV3ForCausalLM=hy_v3 SolarOpenForCausalLM=solar_open CwmForCausalLM=cwm "
        "InklingForCausalLM=inkling_text InklingForConditionalGeneration=inkling_mm_model "
        "Inkling2ForCausalLM=inkling2_text Inkling2ForConditionalGeneration=inkling2 "
        "BitNetForCausalLM=bitnet LagunaForCausalLM=laguna OlmoHybridForCausalLM=olmo_hybrid "
        "BailingMoeV3ForCausalLM BailingHybridForCausalLM InternLMForCausalLM=internlm "
        "InternLM2ForCausalLM=internlm2 OrionForCausalLM=orion "
        "BaichuanForCausalLM=baichuan BaiChuanForCausalLM SolarForCausalLM=solar DeepseekForCausalLM=deepseek "
        "TeleChat2ForCausalLM=telechat MellumForCausalLM=mellum SarvamMoEForCausalLM=sarvam_moe "
        "SarvamMLAForCausalLM=sarvam_mla_moe PanguUltraMoEForCausalLM=pangu_ultra_moe ChatGLMModel=chatglm "
        "ChatGLMForConditionalGeneration GLM4VForCausalLM MiniCPMV=minicpmv MiniCPMO=minicpmo "
        "DeepseekV2ForCausalLM=deepseek_v2 DeepseekV3ForCausalLM=deepseek_v3 KimiK2ForCausalLM=kimi_k2 "
        "AXK1ForCausalLM=axk1 Glm4MoeLiteForCausalLM=glm4_moe_lite Mistral3ForConditionalGeneration=mistral3 "
        "MistralLarge3ForCausalLM",
    ),
    (
        partial(by_layers, tied=True, inner=("attn_config",), **_CLASSIC),
        "BloomForCausalLM=bloom GPT2LMHeadModel=gpt2 GPTBigCodeForCausalLM=gpt_bigcode FalconForCausalLM=falcon "
        "MPTForCausalLM=mpt MptForCausalLM BioGptForCausalLM=biogpt XGLMForCausalLM=xglm CTRLLMHeadModel=ctrl "
        "OpenAIGPTLMHeadModel=openai-gpt GPTNeoXJapaneseForCausalLM=gpt_neox_japanese",
    ),
    (partial(by_layers, **_CLASSIC), "GPTJForCausalLM=gptj GPTNeoXForCausalLM=gpt_neox CodeGenForCausalLM=codegen"),
    (
        partial(by_layers, gated_attention=True),
        "MuseGlimmerForConditionalGeneration=muse_glimmer AfmoeForCausalLM=afmoe",
    ),
    (
        _of_inner_model,
        "InternVLChatModel=internvl_chat InternVLForConditionalGeneration=internvl "
        "InternS1ForConditionalGeneration=interns1 MiniCPMV4_6ForConditionalGeneration=minicpmv4_6 "
        "MiniCPMV4_7ForConditionalGeneration=minicpmv4_7 PaliGemmaForConditionalGeneration=paligemma "
        "NemotronH_Nano_VL_V2 NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 "
        "NemotronH_Omni_Reasoning_V3=nemotron_h_omni LlavaForConditionalGeneration=llava "
        "LlavaNextForConditionalGeneration=llava_next LlavaOnevisionForConditionalGeneration=llava_onevision "
        "KimiVLForConditionalGeneration=kimi_vl PixtralForConditionalGeneration Lfm2VlForConditionalGeneration=lfm2_vl "
        "Qwen2AudioForConditionalGeneration=qwen2_audio BailingMoeV3VLForConditionalGeneration",
    ),
    (
        partial(by_layers, gated_mlp=False),
        "NemotronHForCausalLM=nemotron_h NemotronHPuzzleForCausalLM ArceeForCausalLM=arcee "
        "NemotronForCausalLM=nemotron ApertusForCausalLM=apertus",
    ),
    (
        partial(by_layers, tied=True),
        "Ernie4_5ForCausalLM=ernie4_5 Ernie4_5_MoeForCausalLM=ernie4_5_moe CohereForCausalLM=cohere "
        "Cohere2ForCausalLM=cohere2 Cohere2VisionForConditionalGeneration=cohere2_vision SmolLM3ForCausalLM=smollm3 "
        "Lfm2ForCausalLM=lfm2 Lfm2MoeForCausalLM=lfm2_moe "
        "MiniCPMForCausalLM=minicpm MiniCPM3ForCausalLM=minicpm3 Plamo3ForCausalLM=plamo3 "
        "HunYuanVLForConditionalGeneration=hunyuan_vl VaultGemmaForCausalLM=vaultgemma",
    ),
    (
        _LATER_GEMMA,
        "Gemma4ForConditionalGeneration=gemma4 Gemma4ForCausalLM=gemma4_text "
        "Gemma4UnifiedForConditionalGeneration=gemma4_unified Gemma4UnifiedForCausalLM=gemma4_unified_text",
    ),
    (
        qwen3_next,
        "Qwen3NextForCausalLM=qwen3_next Qwen3_5ForConditionalGeneration=qwen3_5 "
        "Qwen3_5MoeForConditionalGeneration=qwen3_5_moe Qwen3_5ForCausalLM=qwen3_5_text "
        "Qwen3_5MoeForCausalLM=qwen3_5_moe_text InternS2PreviewForConditionalGeneration",
    ),
    (_minimax, "MiniMaxText01ForCausalLM=minimax_text_01 MiniMaxM1ForCausalLM=minimax_m1 MiniMaxForCausalLM=minimax"),
    (
        partial(by_layers, usual={"head_dim": 128}),
        "Qwen3VLForConditionalGeneration=qwen3_vl Qwen3VLMoeForConditionalGeneration=qwen3_vl_moe "
        "Qwen3OmniMoeForConditionalGeneration=qwen3_omni_moe Glm4MoeForCausalLM=glm4_moe "
        "Qwen3OmniMoeThinkerForConditionalGeneration=qwen3_omni_moe_thinker Glm4vMoeForConditionalGeneration=glm4v_moe",
    ),
)


def _rows() -> Iterator[tuple[str, str, Family]]:
    yield from _TABLE
    for read, named in _ALIKE:
        for one in named.split():
            architecture, _, kind = one.partition("=")
            yield architecture, kind, read


def supported() -> str:
    """Return the first of the families, for messages."""
    names = list(FAMILIES)
    return f"supported: {', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


_SHOWN = 12


FAMILIES = {architecture: read for architecture, _, read in _rows()}


MODEL_TYPES = {kind: architecture for architecture, kind, _ in _rows() if kind}


# Architectures whose language model is described in ``text_config``.
NESTED = {
    name
    for name, read in FAMILIES.items()
    if name.endswith("ForConditionalGeneration") or read is _of_inner_model or name.startswith("DeepseekOCR")
}


INNER = ("text_config", "llm_config", "thinker_config", "language_config")


# What language models inside others omit where it equals their library's default (transformers), by their type.
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
LIBRARY_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "llama": _LLAMA | {"vocab_size": 32_000, "max_position_embeddings": 2048},
    "mistral": _LLAMA
    | {"intermediate_size": 14_336, "num_key_value_heads": 8, "vocab_size": 32_000, "sliding_window": 4096}
    | {"max_position_embeddings": 131_072},
    "qwen2": _LLAMA
    | {"intermediate_size": 22_016, "num_key_value_heads": 32, "vocab_size": 151_936}
    | {"max_position_embeddings": 32_768},
}


# Architectures that are known, and what keeps the cost model from planning for them.
NOT_MODELLED: dict[str, str] = {
    "DeepseekV41ForCausalLM": "layers that share the compressed entries of others, and tables of n-grams (Engram)",
    "UnlimitedOCRForCausalLM": "windows that move with a reference (R-SWA)",
    "DiffusionGemmaForBlockDiffusion": "blocks of tokens that are denoised together",
    "Dots3NoteForCausalLM": "latent attention in windows, beside latent attention with an indexer",
    "Ernie4_5_VLMoeForConditionalGeneration": "experts for text and others for images",
    "Glm5NextForConditionalGeneration": "an indexer of pooled keys",
    "HYV4ForCausalLM": "streams of the residual with one indexer for several layers",
    "Qwen4ExpForCausalLM": "streams of low rank, and tables of n-grams",
    "Gemma3nForConditionalGeneration": "predicted copies of the residual (AltUp) and low-rank branches (LAuReL)",
    "Gemma3nForCausalLM": "predicted copies of the residual (AltUp) and low-rank branches (LAuReL)",
    "Step3TextForCausalLM": "queries of low rank beside grouped KV",
    "Step3VLForConditionalGeneration": "queries of low rank beside grouped KV",
    "Plamo2ForCausalLM": "state spaces with norms and projections of their own",
    "ZayaForCausalLM": "attention in a compressed space behind convolutions",
    "Phi4MultimodalForCausalLM": "towers for images and sound, with an adapter for each",
    "JetMoeForCausalLM": "experts of attention",
    "MllamaForConditionalGeneration": "layers that attend to images alone",
    "MambaForCausalLM": "no layer with KV",
    "Mamba2ForCausalLM": "no layer with KV",
    "FalconMambaForCausalLM": "no layer with KV",
    "Phi3SmallForCausalLM": "block-sparse attention, where every head attends to blocks of its own",
    "Phi4FlashForCausalLM": "layers that have a state space (Mamba), and layers that share the KV of another",
}
