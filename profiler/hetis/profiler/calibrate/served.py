"""A comparison of what a log says that its servers serve with what they are said to serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hetis.formats.catalogue import UnknownNameError, find_model
from hetis.formats.vllm_logs import LoggedServer
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec

_UNQUANTISED_BYTES = 2.0  # per parameter, and per element of the KV cache


def contradictions(servers: Sequence[LoggedServer], model: ModelSpec) -> list[str]:
    """Return a sentence for everything in which a server seems to differ from ``model``. Raises InvalidProblemError if
    it certainly has another precision, whose kernels would be taken for those of ``model``.
    """
    return list(dict.fromkeys(sentence for server in servers for sentence in _contradictions(server, model)))


def _contradictions(server: LoggedServer, model: ModelSpec) -> Iterator[str]:
    if (known := _known(server.model)) is not None and _shape(known) != _shape(model):
        yield f"the log is of a server of {server.model}, --model is {model.name}"
    quantised = model.weight_bytes < _UNQUANTISED_BYTES
    if server.quantization == "None" and quantised:
        name = model.weights or f"{model.weight_bytes:g} bytes each"
        raise InvalidProblemError(
            f"the weights of {model.name} are {name}, the server in the log has quantization=None"
        )
    if server.quantization not in ("", "None") and not quantised:
        yield f"the server in the log has quantization={server.quantization}, {model.name} has none: see --weights"
    if server.kv_dtype.startswith("fp8") and model.kv_bytes >= _UNQUANTISED_BYTES:
        raise InvalidProblemError(f"the server in the log has kv_cache_dtype={server.kv_dtype}: give --kv fp8")
    if server.kv_dtype in ("auto", "bfloat16", "float16") and model.kv_bytes < _UNQUANTISED_BYTES:
        yield f"the server in the log has kv_cache_dtype={server.kv_dtype}, {model.name} has KV of 8 bits: see --kv"


def _known(name: str) -> ModelSpec | None:
    """Return the catalogue's model of a name or path, or None if it has none."""
    try:
        return find_model(name.rstrip("/").rpartition("/")[2]).model
    except UnknownNameError:
        return None


def _shape(model: ModelSpec) -> tuple[int, ...]:
    return model.num_layers, model.hidden, model.q_heads, model.kv_heads, model.head_dim
