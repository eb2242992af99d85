"""The formats that checkpoints of Quark and compressed-tensors state, as a whole and for groups of modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hetis.formats.errors import shown
from hetis.formats.fields import listed, mapping

# Types of weights of AMD's Quark that vLLM 0.32 supports (quark/quark.py) and the cost model knows; fp4 goes by its
# scales.
QUARK = {"fp8_e4m3": "fp8", "int8": "int8", "int4": "int4", "uint4": "int4"}
_QUARK_LAYERS = ("layer_quant_config", "layer_type_quant_config")


# Weights of a group of compressed-tensors: their number of bits, and whether they are floats. Floats of 4 bits go by
# the number of weights that share a scale, as in vLLM 0.32 (`_is_nvfp4_format` and `_is_mxfp4`).
_COMPRESSED = {(8, True): "fp8", (4, False): "int4", (8, False): "int8"}
_COMPRESSED_FP4 = {None: "nvfp4", 16: "nvfp4", 32: "mxfp4"}
CLASS = "Linear"  # class of all matrices of a layer, as targets of compressed-tensors name it
MOST_PATTERNS = 1000  # patterns of modules left in 16 bits, each tried on every module; with more, all modules do
_MOST_WILDCARDS = 4  # limit per regular expression; more could take very long to match
_NESTED = re.compile(r"[*+}]\)?[*+{]")


def quark_precision(data: Mapping[str, Any]) -> str | None:
    """Return the precision that Quark states for all modules but the excluded ones; None: unknown, or several.

    Layers of ``layer_quant_config`` are mostly there for their KV, with the weights of all others.
    """
    found = {_quark_format(layer.get("weight")) for layer in quark_layers(data)}
    own = (data.get(name) or {} for name in _QUARK_LAYERS)
    return found.pop() if len(found) == 1 and all(isinstance(each, dict) for each in own) else None


def quark_input(data: Mapping[str, Any]) -> str | None:
    """Return the precision that Quark states for the activations of all modules; None: 16 bits, unknown, or several."""
    found = {_quark_format(layer.get("input_tensors")) for layer in quark_layers(data)}
    return found.pop() if len(found) == 1 else None


def quark_layers(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what Quark states for all modules, and for some."""
    own = (mapping(data.get(name)) for name in _QUARK_LAYERS)
    return [
        mapping(layer) for layer in (data.get("global_quant_config"), *(one for each in own for one in each.values()))
    ]


def _quark_format(weight: Any) -> str | None:
    has_scales_of_scales = isinstance(weight, list)
    stated = mapping(weight[0] if has_scales_of_scales and weight else weight)
    kind, size = stated.get("dtype"), stated.get("group_size")
    if kind == "fp4":
        return ("nvfp4" if has_scales_of_scales else "mxfp4") if size == (16 if has_scales_of_scales else 32) else None
    return None if has_scales_of_scales else QUARK.get(str(kind))


class QuantisedGroup(NamedTuple):
    """A group of modules of compressed-tensors: its name, its modules, and their precision."""

    name: str
    targets: tuple[str, ...]
    precision: str


def compressed_groups(data: Mapping[str, Any]) -> list[QuantisedGroup]:
    """Return the groups of a checkpoint of compressed-tensors, in its order.

    Raises:
        ValueError: the weights of a group have no known form, or a target cannot be read; it names the group.
    """
    stated = mapping(data.get("config_groups")) or {"config_groups": None}
    groups, num_patterns = list[QuantisedGroup](), 0
    for name, group in stated.items():
        weights = mapping(mapping(group).get("weights"))
        bits, of_group = weights.get("num_bits"), f" in {name}" if len(stated) > 1 else ""
        if bits not in (4, 8):
            raise ValueError(f"with {shown(bits)} bits{of_group}")
        is_float, size = weights.get("type") == "float", weights.get("group_size")
        if (bits, is_float) == (4, True) and size not in tuple(_COMPRESSED_FP4):
            raise ValueError(f"with floats of 4 bits in groups of {shown(size)}{of_group}")
        targets = tuple(map(str, listed(mapping(group).get("targets", [CLASS]))))
        patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
        for pattern in patterns:
            if expression(pattern) is None:
                raise ValueError(f"with the target {shown(f're:{pattern}')}{of_group}")
        num_patterns += len(patterns)
        if num_patterns > MOST_PATTERNS:
            raise ValueError(f"with more than {MOST_PATTERNS} regular expressions as targets")
        precision = _COMPRESSED.get((bits, is_float)) or _COMPRESSED_FP4[size]
        groups.append(QuantisedGroup(name, targets, precision))
    return groups


def expression(pattern: str) -> re.Pattern[str] | None:
    """Return a regular expression, or None if it is invalid, or could take very long to match."""
    if sum(map(pattern.count, "*+{")) > _MOST_WILDCARDS or _NESTED.search(pattern):
        return None
    try:
        return re.compile(pattern)
    except re.error:
        return None


# Weights of torchao's configs, by their names without ``Config`` and underscores: bits, and whether they are floats.
_TORCHAO = {
    **dict.fromkeys(
        ("int4weightonly", "int8dynamicactivationint4weight", "float8dynamicactivationint4weight"), (4, False)
    ),
    **dict.fromkeys(("int8weightonly", "int8dynamicactivationint8weight"), (8, False)),
    **dict.fromkeys(("float8weightonly", "float8dynamicactivationfloat8weight"), (8, True)),
}


def in_groups_of_torchao(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what torchao states as groups of compressed-tensors; modules of a config of no known kind name it.

    ``quant_type`` is the name of a config, with ``quant_type_kwargs``, or a config; ``ModuleFqnToConfig`` has one for
    each of some modules or expressions (``re:``), none for those in 16 bits, and one for all others.
    """
    stated = data.get("quant_type")
    whole = mapping(stated).get("default", stated)
    whole = {"_type": whole, "_data": data.get("quant_type_kwargs")} if isinstance(whole, str) else mapping(whole)
    named = next(
        (mapping(of) for key, of in mapping(whole.get("_data")).items() if key.endswith("fqn_to_config")), None
    )
    configs = {"_default": whole} if named is None else named
    groups, ignored = dict[str, Any](), [*listed(data.get("modules_to_not_convert"))]
    for name, config in configs.items():
        if config is None:
            ignored.append(name)
            continue
        kind = str(mapping(config).get("_type")).replace("_", "").lower().removesuffix("config")
        of, options = _TORCHAO.get(kind), mapping(mapping(config).get("_data"))
        if of is None and "intx" in kind and (bits := re.search(r"int([48])\b", str(options.get("weight_dtype")))):
            of = int(bits[1]), False
        if of is None and not name.endswith("embed_tokens"):
            return {"quant_method": f"torchao with {mapping(config).get('_type')}"}
        if of is not None:
            size = options.get("group_size") if isinstance(options.get("group_size"), int) else None
            weights = {"num_bits": of[0], "type": "float" if of[1] else "int", "group_size": size, "symmetric": True}
            groups[name] = {"weights": weights, "targets": [CLASS if name == "_default" else name]}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignored}
