"""Compressed attention in a ``config.json``: DeepSeek-V4's kinds of layers, and their shape.

Layers are told apart as vLLM 0.32 (models/deepseek_v4/attention.py) and transformers 5.23
(``DeepseekV4Config.__post_init__``) do.
"""

from __future__ import annotations

from hetis.formats.errors import shown
from hetis.formats.layers import Shape
from hetis.formats.models.config_json import Config
from hetis.formats.models.linear_attention import spread

_SPARSE, _HEAVY = 4, 128  # tokens per entry of layers with an indexer, and of those that attend to all entries
_KINDS = {"sliding_attention": 0, "compressed_sparse_attention": _SPARSE, "heavily_compressed_attention": _HEAVY}


def compressed_attention(config: Config, num_layers: int) -> Shape:
    """Return the shape of DeepSeek-V4's attention. An indexer's keys have 8 bits and a scale of 32, as for V3.2."""
    ratios = _ratios(config, num_layers)
    for ratio, kind in ((_SPARSE, "compressed sparse attention"), (_HEAVY, "heavily compressed attention")):
        spread(config, "compress_ratios", (each == ratio for each in ratios), kind)
    size, index = config.whole("head_dim"), config.whole("index_head_dim")
    if config.whole("num_key_value_heads", 1) != 1:
        config.refuse("num_key_value_heads", "must be 1: all heads share one vector per token as key and value")
    rope = config.whole("qk_rope_head_dim", max(1, size // 8))
    if rope > size:
        config.refuse("qk_rope_head_dim", f"is {rope}, must be at most head_dim ({size})")
    heads, groups = config.whole("num_attention_heads"), config.whole("o_groups")
    if heads % groups:
        config.refuse("o_groups", f"is {groups}, must divide num_attention_heads ({heads})")
    return {
        "window": config.whole("sliding_window"),
        "sparse_layers": ratios.count(_SPARSE),
        "sparse_ratio": _SPARSE,
        "heavy_layers": ratios.count(_HEAVY),
        "heavy_ratio": _HEAVY,
        "top_entries": config.whole("index_topk"),
        "index_heads": config.whole("index_n_heads"),
        "index_head_dim": index,
        "index_key_bytes": index + 4.0,
        "rope_head_dim": rope,
        "q_lora_rank": config.whole("q_lora_rank"),
        "o_groups": groups,
        "o_lora_rank": config.whole("o_lora_rank"),
    }


def _ratios(config: Config, num_layers: int) -> list[int]:
    """Return the tokens per entry of every layer, 0 for layers with a window alone.

    Transformers writes ``layer_types``; DeepSeek ``compress_ratios``, where drafting layers follow. Both must agree.
    """
    of_kinds, stated = _ratios_of_kinds(config, num_layers), _stated_ratios(config, num_layers)
    if of_kinds is None and stated is None:
        config.refuse_all("compress_ratios is missing, and layer_types, too")
    if of_kinds and stated and (differing := [i for i in range(num_layers) if of_kinds[i] != stated[i]]):
        config.refuse_contradiction("compress_ratios", differing[0])
    return (stated or []) if of_kinds is None else of_kinds


def _ratios_of_kinds(config: Config, num_layers: int) -> list[int] | None:
    """Return the ratios by ``layer_types``, or None if the config omits them; empty if they were refused."""
    if config.data.get("layer_types") is None:
        return None
    kinds = config.kinds_of_layers(num_layers, tuple(_KINDS))
    rates = {kind: ratio for kind, ratio in _KINDS.items() if ratio}
    if (stated := config.data.get("compress_rates") or rates) != rates:
        wanted = ", ".join(f"{kind} {ratio}" for kind, ratio in rates.items())
        config.refuse("compress_rates", f"is {shown(stated)}, must have {wanted}")
    return _some(config, "layer_types", [_KINDS[kind] for kind in kinds or ()])


def _stated_ratios(config: Config, num_layers: int) -> list[int] | None:
    """Return ``compress_ratios``, or None if the config omits them; empty if they were refused."""
    if (stated := config.data.get("compress_ratios")) is None:
        return None
    if not config.has_num_layers:
        return []
    drafting = config.whole("num_nextn_predict_layers", 0, least=0)
    if not isinstance(stated, list) or len(stated) not in (num_layers, num_layers + drafting):
        found = f"has {len(stated)} items" if isinstance(stated, list) else f"is {shown(stated)}"
        further = f" ({num_layers + drafting} with the drafting layers)" if drafting else ""
        config.refuse("compress_ratios", f"{found}, must be a list of {num_layers}{further}, one for each layer")
        return []
    ratios = stated[:num_layers]
    known = (0, 1, _SPARSE, _HEAVY)
    if unknown := [ratio for ratio in ratios if type(ratio) is not int or ratio not in known]:
        config.refuse("compress_ratios", f"has {shown(unknown[0])}, must have 0, 4 or 128 for each layer")
        return []
    return _some(config, "compress_ratios", [ratio if ratio > 1 else 0 for ratio in ratios])


def _some(config: Config, field: str, ratios: list[int]) -> list[int]:
    if ratios and not any(ratios):
        config.refuse(field, "has no layer that compresses: only models with both windows and entries are modelled")
    return ratios
