"""What a model is, read from the ``config.json`` of a Hugging Face folder; what cannot be run is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetis.runtime.model.errors import ModelError

DTYPES = ("float32", "float64", "bfloat16", "float16")
_ROPE_THETA = 1e4
_LONGEST_SAID = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary positions: base, and llama3's stretching of the long waves where ``factor`` is above 1.

    Attributes:
        theta: the base.
        factor: long waves are slowed by it.
        low_freq_factor, high_freq_factor: where between long and short waves the slowing fades.
        original_tokens: context that the model was first trained for.
    """

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model.

    Attributes:
        family: ``llama`` (also Mistral), ``qwen2``, ``qwen3`` or ``opt``.
        layers, hidden, intermediate, vocab: sizes.
        q_heads, kv_heads, head_dim: of attention; ``r = q_heads / kv_heads``.
        max_tokens: longest context.
        eps: of the norms.
        rope: None: positions are learned (OPT).
        qkv_bias, o_bias, mlp_bias: which linears have a bias.
        qk_norm: queries and keys are normalised per head (Qwen3).
        tied: the output matrix is the embedding.
        windows: of each layer, positions that attention reaches back, itself counted; 0: all.
        eos: ids that end a text.
        bos: id that begins one, where there is one.
        dtype: of the checkpoint.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_tokens: int
    eps: float
    rope: RopeConfig | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int, ...]
    eos: tuple[int, ...]
    bos: int | None
    dtype: str

    @property
    def queries_per_group(self) -> int:
        """r"""
        return self.q_heads // self.kv_heads


def read_config(folder: Path) -> ModelConfig:
    """The model in ``folder``.

    Raises:
        ModelError: there is no such file, or the model cannot be run; all reasons in one message.
    """
    path = folder / "config.json"
    fields = _read_json(path)
    found = fields.get("model_type")
    family = _FAMILIES.get(str(found))
    if family is None:
        raise ModelError(f"{path}: model_type is {found!r}, must be one of {', '.join(_FAMILIES)}")
    reader = _Fields(path, fields)
    config = family(reader)
    reader.refuse_if_wrong()
    generation = folder / "generation_config.json"
    if generation.is_file():
        others = _Fields(generation, _read_json(generation))
        eos = others.ids("eos_token_id")
        others.refuse_if_wrong()
        config = replace(config, eos=eos or config.eos)
    return config


class _Fields:
    """The fields of a config file; problems are gathered, so that all are told at once."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path, self.fields = path, fields
        self.problems: list[str] = []

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.fields.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{name} is {_said(value)}, must be a whole number >= 1")
            return 1
        return value

    def real(self, name: str, default: float | None = None) -> float:
        return self.positive(name, self.fields.get(name), default)

    def positive(self, name: str, value: Any, default: float | None = None) -> float:
        """``value``, which the file has under ``name``; ``default`` in place of null."""
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"{name} is {_said(value)}, must be a number > 0")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{name} is {value!r}, must be true or false")
            return default
        return value

    def must_be(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.fields.get(name, default)
        if value not in allowed:
            self.problems.append(f"{name} is {value!r}, must be {' or '.join(map(repr, allowed))}")
        return value

    def dtype(self) -> str:
        value = self.fields.get("dtype") or self.fields.get("torch_dtype") or "float32"
        if value not in DTYPES:
            self.problems.append(f"dtype is {value!r}, must be one of {', '.join(DTYPES)}")
        return str(value)

    def heads(self) -> tuple[int, int]:
        q_heads = self.whole("num_attention_heads")
        kv_heads = self.whole("num_key_value_heads", q_heads)
        if q_heads % kv_heads:
            self.problems.append(f"num_attention_heads is {q_heads}, must be a multiple of {kv_heads} KV heads")
        return q_heads, kv_heads

    def rope(self) -> RopeConfig:
        """Of transformers 5 (``rope_parameters``) and before (``rope_theta`` and ``rope_scaling``). null: not given."""
        where = "rope_scaling" if self.fields.get("rope_parameters") is None else "rope_parameters"
        given = self.fields.get(where) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            self.problems.append(f"{where} is {given!r}, must be one set of numbers, for all layers")
            return RopeConfig(theta=_ROPE_THETA)

        def real(name: str, default: float | None = None) -> float:
            own = given.get(name)
            if own is not None or default is None:
                return self.positive(f"{where}.{name}", own)
            return self.positive(name, self.fields.get(name), default)

        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ("default", "llama3"):
            self.problems.append(f"{where}.rope_type is {kind!r}, must be 'default' or 'llama3'")
        partial = real("partial_rotary_factor", 1.0)
        if partial != 1.0:
            self.problems.append(f"partial_rotary_factor is {partial:g}, must be 1")
        theta = real("rope_theta", _ROPE_THETA)
        if kind != "llama3":
            return RopeConfig(theta=theta)
        original = real("original_max_position_embeddings")
        if original % 1:
            self.problems.append(f"{where}.original_max_position_embeddings is {original:g}, must be a whole number")
        return RopeConfig(
            theta=theta,
            factor=real("factor"),
            low_freq_factor=real("low_freq_factor"),
            high_freq_factor=real("high_freq_factor"),
            original_tokens=int(original),
        )

    def windows(self, layers: int, *, enabled: bool) -> tuple[int, ...]:
        """Of each layer. Configs of transformers 5 say it by layer, older ones for all, or above some layer."""
        window = self.fields.get("sliding_window")
        if not enabled or window is None:
            return (0,) * layers
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            self.problems.append(f"sliding_window is {window!r}, must be a whole number >= 1 or null")
            return (0,) * layers
        kinds = self.fields.get("layer_types")
        if kinds is None:
            full = self.fields.get("max_window_layers") if "use_sliding_window" in self.fields else None
            full = 0 if full is None else full
            if isinstance(full, bool) or not isinstance(full, int) or full < 0:
                self.problems.append(f"max_window_layers is {full!r}, must be a whole number >= 0")
                full = 0
            return tuple(window if i >= full else 0 for i in range(layers))
        known = {"full_attention": 0, "sliding_attention": window}
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in list(known) for kind in kinds):
            self.problems.append(
                f"layer_types is {_said(kinds)}, must be a list of {layers}, each {' or '.join(known)}"
            )
            return (0,) * layers
        return tuple(known[kind] for kind in kinds)

    def ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids, of which a config has one, several or none."""
        value = self.fields.get(name, default)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
            self.problems.append(f"{name} is {_said(value)}, must be a token id >= 0, or several, or null")
            return ()
        return tuple(found)

    def bos(self) -> int | None:
        """The first of the ids that begin a text, if there is one."""
        return next(iter(self.ids("bos_token_id")), None)

    def refuse_if_wrong(self) -> None:
        if self.problems:
            raise ModelError(f"{self.path}: " + "; ".join(self.problems))


def _llama(
    fields: _Fields, *, family: str = "llama", qkv_bias: bool | None = None, qk_norm: bool = False
) -> ModelConfig:
    q_heads, kv_heads = fields.heads()
    hidden, layers = fields.whole("hidden_size"), fields.whole("num_hidden_layers")
    fields.must_be("hidden_act", ("silu", "swish"), "silu")
    fields.must_be("quantization_config", (None,), None)
    bias = fields.flag("attention_bias", False)
    if fields.fields.get("head_dim") is None and hidden % q_heads:
        fields.problems.append(f"hidden_size is {hidden}, must be a multiple of {q_heads} heads")
    head_dim = fields.whole("head_dim", max(hidden // q_heads, 1))
    if head_dim % 2:
        fields.problems.append(f"head_dim is {head_dim}, must be even: positions turn pairs")
    is_qwen = family.startswith("qwen")
    has_windows = fields.flag("use_sliding_window", False) if is_qwen else "sliding_window" in fields.fields
    return ModelConfig(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=fields.whole("intermediate_size"),
        vocab=fields.whole("vocab_size"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_tokens=fields.whole("max_position_embeddings", 2048),
        eps=fields.real("rms_norm_eps", 1e-6),
        rope=fields.rope(),
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        o_bias=bias if qkv_bias is None else False,
        mlp_bias=fields.flag("mlp_bias", False),
        qk_norm=qk_norm,
        tied=fields.flag("tie_word_embeddings", False),
        windows=fields.windows(layers, enabled=has_windows),
        eos=fields.ids("eos_token_id"),
        bos=fields.bos(),
        dtype=fields.dtype(),
    )


def _qwen2(fields: _Fields) -> ModelConfig:
    return _llama(fields, family="qwen2", qkv_bias=True)


def _qwen3(fields: _Fields) -> ModelConfig:
    return _llama(fields, family="qwen3", qk_norm=True)


def _opt(fields: _Fields) -> ModelConfig:
    hidden, layers, q_heads = (
        fields.whole(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    fields.must_be("activation_function", ("relu",), "relu")
    fields.must_be("do_layer_norm_before", (True,), True)
    fields.must_be("_remove_final_layer_norm", (False,), False)
    fields.must_be("layer_norm_elementwise_affine", (True,), True)
    fields.must_be("word_embed_proj_dim", (hidden,), hidden)
    fields.must_be("quantization_config", (None,), None)
    if hidden % q_heads:
        fields.problems.append(f"hidden_size is {hidden}, must be a multiple of {q_heads} heads")
    bias = fields.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        layers=layers,
        hidden=hidden,
        intermediate=fields.whole("ffn_dim"),
        vocab=fields.whole("vocab_size"),
        q_heads=q_heads,
        kv_heads=q_heads,
        head_dim=hidden // q_heads,
        max_tokens=fields.whole("max_position_embeddings", 2048),
        eps=1e-5,
        rope=None,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        tied=fields.flag("tie_word_embeddings", True),
        windows=(0,) * layers,
        eos=fields.ids("eos_token_id", 2),
        bos=fields.bos(),
        dtype=fields.dtype(),
    )


_FAMILIES = {"llama": _llama, "mistral": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "opt": _opt}


def _said(value: Any) -> str:
    """What the file has, or that it has it not; what is long, in part."""
    said = "missing" if value is None else repr(value)
    return said if len(said) <= _LONGEST_SAID else said[:_LONGEST_SAID] + "..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be an object")
    return value
