"""Which modules of a quantised Hugging Face checkpoint keep 16 bits, or have a format of their own.

Checkpoints name modules as PyTorch does, ``model.layers.3.self_attn.q_proj``, below a prefix that differs by
architecture: one by one, by a parent, by a part of the name (AWQ), by a glob (ModelOpt), or by a regular expression
(compressed-tensors after ``re:``, GPTQ after ``-:``). Groups of compressed-tensors name their modules' class, too.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from hetis.formats.fields import listed, mapping
from hetis.formats.models import dtypes
from hetis.formats.models.checkpoint_names import Module, modules, routed_experts, whole_experts
from hetis.formats.models.config_json import LinearLayers
from hetis.formats.models.quantised_formats import (
    CLASS,
    MOST_PATTERNS,
    QUARK,
    QuantisedGroup,
    compressed_groups,
    expression,
    quark_layers,
)
from hetis.solver.model import ModelSpec

# Keys under which formats list the modules that they leave in 16 bits.
_UNQUANTISED_KEYS = (
    "ignore",
    "exclude",
    "exclude_modules",
    "modules_to_not_convert",
    "ignored_layers",
    "llm_int8_skip_modules",  # of bitsandbytes, for weights of 4 bits, too
)
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
MODELOPT = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8", "MXFP8": "fp8"}
MODELOPT |= {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4"}  # quantisation algorithms that vLLM 0.32 supports
_LEAST_GROUP = 16  # weights that share a scale; engines have kernels for 32 and more
_NO_GROUPS = 2**20  # a scale for so many takes no memory; no matrix has such rows
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # names of modules with one of these are expressions in AutoRound


T = TypeVar("T")
Stated = Callable[[str], T | None]  # the format of a module, or its bytes per parameter, by name; None: not stated


def modelopt_precision(data: Mapping[str, Any]) -> str | None:
    """Return the precision that ModelOpt states, that of most modules where it is mixed; None if it is not known."""
    algorithm = str(data.get("quant_algo", "")).upper()
    if algorithm != "MIXED_PRECISION":
        return MODELOPT.get(algorithm)
    found = Counter(_algorithm(entry) for name, entry in _mixed(data).items() if "_attn." not in name)
    return MODELOPT.get(found.most_common(1)[0][0]) if found else None


def compressed_precision(data: Mapping[str, Any], model: ModelSpec, linear: LinearLayers) -> str | None:
    """Return the precision that most parameters outside of attention have in a checkpoint of compressed-tensors.

    As with ModelOpt's mixed form, that of the MLP counts, which has most of a layer; that of attention if nothing else
    is quantised; None if no matrix of the layers is.
    """
    groups = compressed_groups(data)
    ignored, (named, of_class) = _ignored(data, ""), _group_precisions(groups)
    params = {is_attention: defaultdict[str, float](float) for is_attention in (False, True)}
    for module in (*modules(model, linear), *routed_experts(model)):
        for layer in module.layers:
            precision = _first((ignored, named), layer, module)
            precision = of_class if precision is None else precision
            if precision:
                params["_attn." in module.names[0]][precision] += module.params
    return next((max(found, key=found.__getitem__) for found in params.values() if found), None)


def override_of_bits(
    data: Mapping[str, Any], bits: int, model: ModelSpec, linear: LinearLayers
) -> tuple[str, str] | None:  # fmt: skip
    """Return the first entry by which GPTQModel or AutoRound gives modules of the layers other bits than ``bits``, but
    not 16, if any does: the key that it is in, and its name.

    Patterns of ``dynamic`` are such overrides unless they begin with ``-:`` (vLLM 0.32, `get_dynamic_override`).
    """
    found = [(layer, one) for one in (*modules(model, linear), *routed_experts(model)) for layer in one.layers]
    if _is_by_auto_round(data):
        name = _override_of_auto_round(data, bits, found)
        return None if name is None else ("extra_config", name)
    positive = {name: mapping(of) for name, of in mapping(data.get("dynamic")).items() if not name.startswith("-:")}
    others = [name for name, stated in positive.items() if stated.get("bits", bits) != bits]
    if len(others) > MOST_PATTERNS:
        return "dynamic", others[0]
    for name in others:
        pattern = expression(name.removeprefix("+:"))
        if pattern is None or any(_first((pattern.match,), layer, module) for layer, module in found):
            return "dynamic", name
    return None


def _override_of_auto_round(data: Mapping[str, Any], bits: int, modules: Sequence[tuple[int, Module]]) -> str | None:
    """Return an entry that gives one of the modules other bits, but not 16, or an expression for any other bits that
    cannot be read.
    """
    others = {name for name, of in mapping(data.get("extra_config")).items() if mapping(of).get("bits", bits) != bits}
    patterns = [name for name in others if _is_expression(name)]
    unreadable = sorted(name for name in patterns if expression(name) is None)
    if unreadable or len(patterns) > MOST_PATTERNS:
        return (unreadable or sorted(patterns))[0]
    entry_of = _entry_of_auto_round(data)
    found = (_first((entry_of,), layer, module) for layer, module in modules)
    return next((name for name in found if name in others and not _has_16_bits(data["extra_config"][name])), None)


def layer_weight_bytes(data: Mapping[str, Any], model: ModelSpec, dtype: str, linear: LinearLayers) -> float:
    """Return the mean bytes per parameter of a layer of a checkpoint.

    Args:
        data: the checkpoint's ``quantization_config``.
        model: its shape.
        dtype: the formats of activations and weights, as in `hetis.formats.models.dtypes`.
        linear: its layers of linear attention.
    """
    sizes = _bytes_of_formats(data)
    weights = dtypes.split_dtype(dtype)[1]
    usual, base = sizes[weights], dtypes.base_bytes(dtype)
    stated, otherwise = _in_order(data, usual, base, sizes)
    beside_experts = sizes["fp8"] if "expert_dtype" in data else otherwise  # of DeepSeek-V4
    exceptions, routed, are_all_plain = list[tuple[float, float]](), list[tuple[float, float]](), True
    of_experts = usual if _mixed(data) and not _lists_experts(data) else otherwise
    experts = routed_experts(model) if _has_groups(data) else whole_experts(model)
    every = (*modules(model, linear), *experts)
    stated = (*stated, *_by_kind(data, stated, every))
    for module in every:
        share = 1 / (module.repeated or model.num_layers)
        if module.size is not None:
            exceptions.append((module.params * module.num_layers * share, module.size))
            continue
        found = [size for layer in module.layers if (size := _first(stated, layer, module)) is not None]
        default = of_experts if module.is_routed else beside_experts
        found = found[: module.num_layers] + [default] * (module.num_layers - len(found))
        of_module = [(module.params * share, size) for size in found if size != usual]
        exceptions += of_module
        routed += of_module if module.is_routed else []
        are_all_plain &= set(found) == {usual if module.is_routed else base}
    if are_all_plain and model.experts is not None:
        return dtypes.experts_weight_bytes(dtype, model, sizes)
    has_own_formats = "expert_dtype" in data or _has_groups(data)  # of all that is not routed
    if weights == "mxfp4" and model.experts is not None and not has_own_formats:  # quantises only routed experts
        others = sum(params * (size - usual) for params, size in routed) / model.layer_params()
        return dtypes.experts_weight_bytes(dtype, model, sizes) + others
    return dtypes.mean_weight_bytes(usual, model, exceptions)


def _bytes_of_formats(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes per parameter of every format, of which int4 depends on the checkpoint's smallest group.

    A group has a scale of 16 bits, and a zero point of four where it is not symmetric. Groups of 64 and more take no
    less than `dtypes.BYTES_PER_PARAMETER` has.
    """
    of_groups = [mapping(mapping(group).get("weights")) for group in mapping(data.get("config_groups")).values()]
    of_quark = [mapping(layer.get("weight")) for layer in quark_layers(data)]
    sizes = [dtypes.BYTES_PER_PARAMETER["int4"]]
    for weights in (*of_groups, *of_quark, data):
        group = weights.get("q_group_size", weights.get("group_size"))  # AWQ has both names
        if isinstance(group, int) and _LEAST_GROUP <= group < _NO_GROUPS and _may_be_int4(weights):
            is_symmetric = weights.get("symmetric", weights.get("sym", not weights.get("zero_point"))) is not False
            sizes.append(0.5 + (2.0 if is_symmetric else 2.5) / group)
    return {**dtypes.BYTES_PER_PARAMETER, "int4": max(sizes)}


def _may_be_int4(weights: Mapping[str, Any]) -> bool:
    """Return whether nothing that is stated about weights says that they have another format."""
    bits = weights.get("num_bits", weights.get("bits", weights.get("w_bit", 4)))
    return bits == 4 and weights.get("type") != "float" and QUARK.get(str(weights.get("dtype", "int4"))) == "int4"


def _in_order(
    data: Mapping[str, Any], usual: float, base: float, sizes: Mapping[str, float]
) -> tuple[tuple[Stated[float], ...], float]:
    """Return the statements of a checkpoint about modules, of which the first about a module counts, and the bytes of
    modules without any.
    """
    if _mixed(data):
        return (_stated_format(data),), base
    method = str(data.get("quant_method")).lower()
    if method == "gptq" and (quantised := _quantised_parts(data)):
        is_part = _is_any_part(quantised)
        return (_ignored(data, base), lambda name: usual if is_part(name) else None), base
    if _is_by_auto_round(data):
        return (_stated_by_auto_round(data, usual, base), _ignored(data, base)), usual
    if not _has_groups(data):
        return (_ignored(data, base),), usual
    named, of_class = _group_precisions(compressed_groups(data))
    return (_ignored(data, base), lambda name: sizes.get(named(name) or "")), sizes.get(of_class or "", base)


def _quantised_parts(data: Mapping[str, Any]) -> frozenset[str]:
    """Return the parts of names of which each quantised module of GPTQ has one (`is_layer_gptq_quantized` in vLLM
    0.32), or none if all modules are quantised. Some versions group them.
    """
    groups = listed(data.get("modules_in_block_to_quantize"))
    names = (name for group in groups for name in (group if isinstance(group, list) else [group]))
    return frozenset(name for name in names if isinstance(name, str))


def _is_by_auto_round(data: Mapping[str, Any]) -> bool:
    return str(data.get("quant_method")).lower() == "auto-round"


def _stated_by_auto_round(data: Mapping[str, Any], usual: T, base: T) -> Stated[T]:
    """Return what AutoRound states about a module: ``base`` if it has 16 bits, ``usual`` if another number."""
    entry_of, own = _entry_of_auto_round(data), mapping(data.get("extra_config"))

    def stated(name: str) -> T | None:
        entry = entry_of(name)
        return None if entry is None else base if _has_16_bits(own[entry]) else usual

    return stated


def _entry_of_auto_round(data: Mapping[str, Any]) -> Stated[str]:
    """Return the entry of ``extra_config`` that applies to a module, as in vLLM 0.32 (`INCConfigParser`): its name or
    the end of it, or else the first expression that occurs in it.
    """
    own = mapping(data.get("extra_config"))
    expressions = {name: found for name in own if _is_expression(name) and (found := expression(name)) is not None}

    def stated(name: str) -> str | None:
        parts = name.split(".")
        ends = (".".join(parts[begin:]) for begin in range(len(parts)))
        if (end := next((end for end in ends if end in own), None)) is not None:
            return end
        return next((entry for entry, expression in expressions.items() if expression.search(name)), None)

    return stated


def _is_expression(name: str) -> bool:
    return not _SPECIAL.isdisjoint(name)


def _has_16_bits(entry: Any) -> bool:
    bits = mapping(entry).get("bits")
    return isinstance(bits, int) and bits >= 16


def _first(stated: Sequence[Stated[T]], layer: int, module: Module) -> T | None:
    """Return the first statement about a layer's module under any of its possible names."""
    names = [f"{prefix}layers.{layer}.{name}" for prefix in _PREFIXES for name in module.names]
    return next((found for each in stated for found in map(each, names) if found is not None), None)


def _mixed(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(data.get("quantized_layers"))


def _lists_experts(data: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint lists the formats of modules, routed experts among them."""
    return any(".experts" in name for name in _mixed(data))


def _algorithm(entry: Any) -> str:
    return str(mapping(entry).get("quant_algo")).upper()


def _has_groups(data: Mapping[str, Any]) -> bool:
    """Return whether groups decide. ModelOpt writes them, too, but vLLM reads its algorithm."""
    return str(data.get("quant_method")).lower() == "compressed-tensors" and bool(mapping(data.get("config_groups")))


def _group_precisions(groups: Sequence[QuantisedGroup]) -> tuple[Stated[str], str | None]:
    """Return the precision of a module whose name is a target of some group, and that of all whose class is one.

    The most specific target counts, as in the library (`match_targets`): a whole name goes before an expression, an
    expression before a class. Of several expressions the first counts, as in vLLM 0.32 (`find_matched_target`).
    """
    targets = [(target, group.precision) for group in groups for target in group.targets]
    exact = dict(reversed(targets))  # the first of the same targets stays
    patterns = [(expression(target[3:]), precision) for target, precision in targets if target.startswith("re:")]

    def stated(name: str) -> str | None:
        if name in exact:
            return exact[name]
        return next((precision for pattern, precision in patterns if pattern and pattern.match(name)), None)

    return stated, exact.get(CLASS)


def _stated_format(data: Mapping[str, Any]) -> Stated[float]:
    """Return what a checkpoint states about a module if it lists the format of each."""
    formats = {name: MODELOPT.get(_algorithm(entry)) for name, entry in _mixed(data).items()}
    for name, found in [*formats.items()]:
        parent, is_of_expert, _ = name.partition(".experts.")
        if is_of_expert:  # any of a layer's experts stands for all, as in vLLM 0.32 (`_resolve_quant_algo`)
            formats.setdefault(f"{parent}.experts", found)
    sizes = {name: dtypes.BYTES_PER_PARAMETER[found] for name, found in formats.items() if found is not None}
    return {**{_in_layers(name): size for name, size in sizes.items()}, **sizes}.get


def _in_layers(name: str) -> str:
    """Return a module's name without what precedes ``layers``, which differs between families (``backbone.layers.3``);
    one of layers that draft, see or hear unchanged.
    """
    before, is_within, rest = name.partition("layers.")
    return f"layers.{rest}" if is_within and not _OTHER_LAYERS.search(before) else name


_OTHER_LAYERS = re.compile(r"mtp|draft|eagle|vis|image|audio|speech|encoder|talker|tower|resblocks")


def _by_kind(
    data: Mapping[str, Any], stated: Sequence[Stated[float]], every: Sequence[Module]
) -> Iterator[Stated[float]]:  # fmt: skip
    """Yield what a checkpoint states about modules of kinds that it lists under names which are not known here."""
    with_format = (one for one in every if any(_first(stated, n, one) is not None for n in one.layers))
    known = {_kind_of(module.names[0]) for module in with_format}
    formats = dict[tuple[str, str], float]()
    for name, entry in _mixed(data).items():
        layer, kind, precision = _LAYER.search(name), _kind_of(name), MODELOPT.get(_algorithm(entry))
        if layer is not None and kind not in known and precision is not None and not name.endswith(".gate"):
            formats.setdefault((layer[1], kind), dtypes.BYTES_PER_PARAMETER[precision])

    def of_kind(name: str) -> float | None:
        layer = _LAYER.search(name)
        return None if layer is None else formats.get((layer[1], _kind_of(name)))

    if formats:
        yield of_kind


_LAYER = re.compile(r"\blayers\.(\d{1,5})\.")


def _kind_of(name: str) -> str:
    """Return the part of a layer to which a module belongs, by the words that all names of it have."""
    words = {"shared": "shared experts", "expert": "experts", "attn": "attention", "attention": "attention"}
    return next((kind for word, kind in words.items() if word in name), "mlp")


def _ignored(data: Mapping[str, Any], base: T) -> Stated[T]:
    """Return what a checkpoint states about a module if it lists the unquantised ones: ``base`` for these, or None."""
    entries = [entry for key in _UNQUANTISED_KEYS for entry in listed(data.get(key)) if isinstance(entry, str)]
    patterns = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    patterns += [key.removeprefix("-:") for key in mapping(data.get("dynamic")) if key.startswith("-:")]
    named = [each for entry in entries if not entry.startswith("re:") for each in (entry, _in_layers(entry))]
    globs = [entry for entry in dict.fromkeys(named) if "*" in entry]
    exact = {entry for entry in named if "*" not in entry}
    if len(patterns) + len(globs) > MOST_PATTERNS:
        return lambda _: base
    expressions = [found for found in map(expression, patterns) if found is not None]
    if globs:
        expressions.append(re.compile("|".join(map(fnmatch.translate, globs))))

    is_part = _is_any_part(exact) if str(data.get("quant_method")).lower() == "awq" else _has_any_parent(exact)

    def stated(name: str) -> T | None:
        return base if is_part(name) or any(one.match(name) for one in expressions) else None

    return stated


def _has_any_parent(entries: Set[str]) -> Callable[[str], bool]:
    """Return whether a name, or any run of its components, is among the entries."""

    def has(name: str) -> bool:
        parts = name.split(".")
        parents = {".".join(parts[begin:end]) for end in range(1, len(parts) + 1) for begin in range(end)}
        return not entries.isdisjoint(parents)

    return has


def _is_any_part(entries: Set[str]) -> Callable[[str], bool]:
    """Return whether any of the entries is within a name, wherever it begins or ends, as AWQ and vLLM 0.32 match them
    (`is_layer_skipped` with substrings).

    A name is cut into parts as long as entries, since there may be far more of these than parts.
    """
    sizes = sorted({len(entry) for entry in entries})

    def has(name: str) -> bool:
        return any(name[i : i + size] in entries for size in sizes for i in range(len(name) - size + 1))

    return has
