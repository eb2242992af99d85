"""The command line of each engine process: it sets what the plan decides, and leaves the rest to the user."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from hetis.commands.endpoints import joined
from hetis.engines.layout import Layout
from hetis.engines.versions import Engine
from hetis.formats.models.document import load_model
from hetis.formats.models.dtypes import kv_of
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Role

TELL_KV = (
    "if the checkpoint declares fewer, set it for the engine (after -- of hetis-plan export: --kv-cache-dtype bfloat16)"
)
SERVE = ("vllm", "serve")
MASTER_PORT, KV_PORT = 29501, 5600
# Between the master or KV ports of replicas: SGLang takes those after its own for its processes, and copies of a
# prefill replica that share experts serve their KV at one each.
PORT_STEP = 20
KV_DTYPE, SHARE = "--kv-cache-dtype", "--gpu-memory-utilization"
UNQUANTISED_KV = ("bfloat16", "float16")  # values for 16-bit KV; SGLang supports only the first
DECIDED = frozenset(
    (
        *("--model", "--model-path", "--served-model-name", "--host", "--port", "--dtype"),
        *("--tensor-parallel-size", "-tp", "--tp-size", "--pipeline-parallel-size", "-pp", "--pp-size"),
        *("--prefill-context-parallel-size", "-pcp", "--decode-context-parallel-size", "-dcp", "--dcp-size"),
        *("--data-parallel-size", "-dp", "--dp-size", "--enable-dp-attention"),
        *("--enable-expert-parallel", "--no-enable-expert-parallel", "-ep", "--expert-parallel-size", "--ep-size"),
        *("--data-parallel-size-local", "-dpl", "--data-parallel-rank", "-dpn", "--data-parallel-start-rank", "-dpr"),
        *("--data-parallel-external-lb", "-dpe", "--data-parallel-hybrid-lb", "-dph"),
        *("--data-parallel-multi-port-external-lb", "-dpm"),
        *("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--headless"),
        *("--dist-init-addr", "--nccl-init-addr"),
        *("--distributed-executor-backend", "--kv-transfer-config", "--attention-backend"),
        *("--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port"),
        *(KV_DTYPE, "--kv-cache-memory-bytes", "--max-total-tokens", "--num-gpu-blocks-override"),
        "--config",  # a file that may contain any option
    )
)
"""Engine options that follow from the plan or from our own settings; users may set all others (`decided_in`)."""
# How names of options of the engines' HTTP servers begin (vLLM's FrontendArgs in vllm/entrypoints/openai/cli_args.py).
_OF_HTTP_SERVER = (
    *("--host", "--port", "--uds", "--uvicorn-", "--disable-uvicorn-", "--h11-", "--headless", "--api-server-count"),
    *("--api-key", "--ssl-", "--enable-ssl-", "--allow-credentials", "--allowed-origins", "--allowed-methods"),
    *("--allowed-headers", "--root-path", "--middleware", "--disable-fastapi-docs", "--enable-offline-docs"),
)
_NUMBER = re.compile(r"-\d[\d.]*")
_DRAIN = {"--shutdown-timeout"[:length] for length in range(len("--shu"), len("--shutdown-timeout") + 1)}
_SHORT = "-dc"  # vLLM's ``--diffusion-config``, not an abbreviated ``-dcp``


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Settings of an engine that are not part of the layout."""

    model: str  # folder or name, as the engine accepts it
    # Command that starts the engine. If its last word is not ``serve``, it runs the module of vLLM's front end.
    program: tuple[str, ...] = SERVE
    options: tuple[str, ...] = ()  # options passed to the engine verbatim
    dtype: str = "auto"  # dtype of model and KV; ``auto`` leaves it to the engine
    device: str = "cuda"  # ``cuda`` or ``cpu``
    limits_kv: bool = False  # the ranks use no more memory for KV than planned
    executor: str = ""  # Unix socket of the node's agent; empty: no agent controls the engine
    # Where the plugin places head groups of new requests, as `DispatchSettings` has it; empty: the plugin's default
    dispatch: str = ""
    encrypts: bool = False  # whether KV between the plugin and attention workers on other hosts is encrypted
    served_name: str = ""  # the model's name for clients; empty: ``model``

    def at(self, host: str, port: int) -> Serving:
        """Return the settings of an engine whose front end listens there."""
        return replace(self, options=("--host", host, "--port", str(port), *self.options))

    def gives(self, *names: str) -> bool:
        """Return whether any of these options is among the verbatim ones."""
        return bool(names_of(self.options) & set(names))

    @property
    def has_tls(self) -> bool:
        """Whether the engine serves HTTPS, by a certificate among the verbatim options."""
        return any(name.startswith(("--ssl-certf", "--ssl-k")) for name in names_of(self.options))  # or abbreviated

    def dtype_of(self, common: str) -> str:
        """Return the dtype to set on the engine: the user's if there is one, otherwise ``common``, that of its GPUs."""
        return common if self.dtype == "auto" and self.device == "cuda" else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The address where processes on several nodes connect, and the port on which a prefill replica serves its KV."""

    host: str
    port: int = MASTER_PORT
    kv_port: int = KV_PORT


def names_of(options: Sequence[str]) -> set[str]:
    """Return the option names among these words; they may have _ for -, and may end in ``=value``."""
    return {word.partition("=")[0].replace("_", "-") for word in options if word.startswith("-")}


def option_groups(options: Sequence[str]) -> list[list[str]]:
    """Return each option's words: its name, which may end in ``=value``, and its values.

    A value before any option is a group of its own.
    """
    found = list[list[str]]()
    for word in options:
        if not found or (word.startswith("-") and not _NUMBER.fullmatch(word)):
            found.append([word])
        else:
            found[-1].append(word)
    return found


def is_of_http_server(option: str) -> bool:
    """Return whether an option, in any spelling, is one of the engine's HTTP server."""
    return option.replace("_", "-").startswith(_OF_HTTP_SERVER)


def decided_in(options: Sequence[str]) -> set[str]:
    """Return the options among these words that the plan or our own settings decide, in whatever spelling.

    The dtype of 16-bit KV is not among them, because plans do not know the dtype of the checkpoint (`kv_dtype_of`).
    """
    names = names_of(options)
    if set(_values_of(KV_DTYPE, options)) <= set(UNQUANTISED_KV):
        names -= {KV_DTYPE}
    return {decided for name in names if (decided := _decided(name))}


def _decided(name: str) -> str:
    """Return the decided option that an engine may take ``name`` for; empty: none.

    Their parsers accept prefixes of option names, a value directly after a single letter (``-n2``), and a key of a
    JSON option (``--kv-transfer-config.kv_role``). Of the options that users may set, only `_SHORT` is a prefix of a
    decided one.
    """
    name = name.partition(".")[0]
    if not name.strip("-") or name == _SHORT:
        return ""
    found = [one for one in DECIDED if one.startswith(name) or (len(one) == 2 and name.startswith(one))]
    return name if name in found else min(found, key=lambda one: (len(one), one), default="")


def kv_dtype_of(layout: Layout, serving: Serving) -> str:
    """Return the KV dtype to set on the engine; empty: none is set, and the engine uses the checkpoint's.

    KV in 16 bits has the model's dtype if that is set, otherwise the one among the verbatim options. On CPUs none is
    set unless the user does: their kernels for latent attention accept no dtype of KV by name.
    """
    if layout.kv_is_fp8:
        return "fp8"
    dtype = serving.dtype_of(layout.dtype)
    if dtype in _unquantised(layout) and serving.device == "cuda":
        return dtype
    given = list(_values_of(KV_DTYPE, serving.options))
    return given[-1] if given else ""


def missing_kv_option(layout: Layout, serving: Serving, *, stated: str = "") -> str:
    """Return why an engine cannot be configured to keep the KV of a replica as planned; empty: it can.

    Args:
        layout, serving: the replica; its KV may have 16 bits, or 32 if its dtype is float32.
        stated: the quantised KV format that its checkpoint specifies; empty: none, or unknown.
    """
    if layout.kv_is_fp8:
        return ""
    given, possible = dict.fromkeys(_values_of(KV_DTYPE, serving.options)), _unquantised(layout)
    dtype, program = serving.dtype_of(layout.dtype), layout.engine.program
    if len(given) > 1 or not given.keys() <= set(possible):
        return f"{KV_DTYPE} is {' and '.join(given)}, must be {' or '.join(possible)} of {program}"
    if given and not given.keys() <= {serving.dtype} and serving.dtype != "auto":
        return f"{KV_DTYPE} is {''.join(given)}, and --dtype is {serving.dtype}, which also applies to KV"
    if (given or stated) and dtype not in ("auto", *possible):
        return f"{program} has no option to keep KV in {dtype}{f': {serving.model} states {stated}' if stated else ''}"
    if not stated or kv_dtype_of(layout, serving):
        return ""
    names = possible if dtype == "auto" else [dtype]
    return (
        f"{serving.model} states {stated} KV, which engines use by default, but the replica needs 16 bits: "
        f"give the engine {KV_DTYPE} {' or '.join(names)}, the dtype of the checkpoint"
    )


def _unquantised(layout: Layout) -> tuple[str, ...]:
    return UNQUANTISED_KV[:1] if layout.engine is Engine.SGLANG else UNQUANTISED_KV


def checkpoint_model(folder: Path, planned: ModelSpec | None) -> tuple[ModelSpec, str]:
    """Return the model of a checkpoint with KV as planned, and the checkpoint's quantised KV format (empty: none).

    Args:
        folder: folder of the checkpoint.
        planned: the model on its GPUs in the plan. None: unknown, and KV is as the checkpoint specifies.

    Raises:
        DocumentError: the checkpoint's config cannot be used.
    """
    found = load_model(folder / "config.json")
    model = found if planned is None else replace(found, name=planned.name, kv_bytes=planned.kv_bytes)
    return model, kv_of(found) if found.kv_bytes < 2 else ""


def drain_s(options: Sequence[str]) -> float:
    """Return the seconds that vLLM lets running requests continue after a request to stop.

    Its parser accepts shorter names, and takes the last of several.
    """
    return next((float(value) for value in reversed(list(_given(_DRAIN, options))) if value.isdecimal()), 0.0)


def _values_of(name: str, options: Sequence[str]) -> Iterator[str]:
    return _given({name}, options)


def _given(names: Set[str], options: Sequence[str]) -> Iterator[str]:
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word, value in itertools.pairwise((*words, "")):
        if word.replace("_", "-") in names:
            yield value


def without_kv_dtype(options: Sequence[str]) -> list[str]:
    """Return the verbatim options without the KV dtype, which `kv_dtype_of` determines for each replica."""
    kept = list[str]()
    for before, word in itertools.pairwise(("", *options)):
        if KV_DTYPE not in names_of([word]) and before.replace("_", "-") != KV_DTYPE:
            kept.append(word)
    return kept


CONNECTOR = {"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
CONFIG_VARIABLE, HOST_VARIABLE = "HETIS_VLLM_CONFIG", "VLLM_HOST_IP"
KV_HOST_VARIABLE, KV_PORT_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
_NIXL_ROLES: Mapping[Role, str] = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


def connector_of(layout: Layout) -> dict[str, str] | None:
    """Return the KV connector that a replica needs: ours for attention workers, NIXL between prefill and decode.

    Clients of both of NIXL's pass the same parameters from the prefill replica's answer to the decode replica.
    """
    if layout.workers:
        return CONNECTOR
    if layout.role in _NIXL_ROLES:
        connector = "NixlPushConnector" if layout.pushes_kv else "NixlConnector"
        return {"kv_connector": connector, "kv_role": _NIXL_ROLES[layout.role]}
    return None


def serves_kv_addresses(layout: Layout) -> bool:
    """Return whether other replicas ask vLLM where its KV is, to read it or, from decode replicas, to write it."""
    return layout.role is Role.PREFILL or (layout.role is Role.DECODE and layout.pushes_kv)


def room_options(layout: Layout, serving: Serving) -> dict[str, str]:
    """Return the options that limit vLLM to the plan's capacity, except the user's own; a switch has an empty value."""
    # In a pipeline, each of several iterations at a time has a part of the seats, but vLLM wants room for all in each.
    decoding = layout.micro_batch * (1 + layout.draft_tokens)
    tokens = max(_chunk_tokens(layout, decoding) + decoding, layout.seats)
    given = {"--max-num-seqs": str(layout.seats), "--max-num-batched-tokens": str(tokens)}
    room = {name: value for name, value in given.items() if not serving.gives(name)}
    if (dtype := serving.dtype_of(layout.dtype)) != "auto":
        room["--dtype"] = dtype
    if kv_dtype := kv_dtype_of(layout, serving):
        room[KV_DTYPE] = kv_dtype
    if layout.is_deprecated and not serving.gives("--allow-deprecated-quantization"):
        room["--allow-deprecated-quantization"] = ""
    finds_kv = not layout.fixes_kv and serving.device == "cuda"
    if serving.limits_kv:
        if layout.utilisation is not None and serving.device == "cuda" and not serving.gives(SHARE):
            room[SHARE] = f"{layout.utilisation:g}"
        if not finds_kv:
            room["--kv-cache-memory-bytes"] = str(layout.rank_kv_bytes)
        # vLLM does not start unless a request with the model's full context fits.
        if layout.context_tokens is not None and not serving.gives("--max-model-len"):
            room["--max-model-len"] = str(layout.context_tokens)
    if layout.draft_tokens and not serving.gives("--speculative-config"):
        room["--speculative-config"] = json.dumps({"method": "mtp", "num_speculative_tokens": layout.draft_tokens})
    if connector := connector_of(layout):
        room["--kv-transfer-config"] = json.dumps(connector)
    if backend := _attention_backend(layout, serving):
        room["--attention-backend"] = backend
        # The plugin cannot recompute a request that is already scheduled ahead.
        if layout.workers and not serving.gives("--no-async-scheduling"):
            room["--no-async-scheduling"] = ""
    if layout.workers and layout.has_windows_in_some:  # the plugin moves head groups of all layers together
        room["--disable-hybrid-kv-cache-manager"] = ""
    return room


def _chunk_tokens(layout: Layout, decoding: int) -> int:
    """Return the prompt tokens for which vLLM has room in an iteration, beside ``decoding`` ones.

    Where layers keep states, vLLM computes whole blocks of a prompt, and nothing if less than a block is left, unless a
    block exceeds the room for everything (`Scheduler._mamba_block_aligned_split`).
    """
    # A decode replica must have room for an image, too, or vLLM does not start.
    chunk, block = max(layout.chunk_tokens, layout.image_tokens), layout.block_tokens
    if layout.chunk_tokens and 0 < block <= chunk + decoding:
        return max(1, round(chunk / block)) * block
    return chunk


def _attention_backend(layout: Layout, serving: Serving) -> str:
    if serving.device != "cuda":  # a CPU has a single backend, which the plugin replaces
        return ""
    return "CUSTOM" if layout.workers else layout.attention_backend


def shape_options(layout: Layout, *, executor: str = "mp") -> dict[str, str]:
    """Return the options for the number of ranks and for how they are started."""
    stages, shape = len(layout.layers), dict[str, str]()
    if layout.tensor_parallel > 1:
        shape["--tensor-parallel-size"] = str(layout.tensor_parallel)
    if stages > 1:
        shape["--pipeline-parallel-size"] = str(stages)
    if layout.data_parallel > 1:
        shape |= {"--data-parallel-size": str(layout.data_parallel), "--enable-expert-parallel": ""}
    if stages * layout.tensor_parallel > 1:
        shape["--distributed-executor-backend"] = executor
    return shape


def vllm_arguments(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    arguments = [*serving.program, *(() if serving.program[-1] == "serve" else ("--model",)), serving.model]
    if serving.served_name:
        arguments += ["--served-model-name", serving.served_name]
    arguments += words_of(shape_options(layout))
    if len(layout.servers) > 1:
        arguments += ["--nnodes", str(len(layout.servers)), "--node-rank", str(number)]
        arguments += ["--master-addr", meeting.host, "--master-port", str(meeting.port)]
    if number:
        arguments += ["--headless"]
    return (*arguments, *words_of(room_options(layout, serving)), *without_kv_dtype(serving.options))


def words_of(options: Mapping[str, str]) -> list[str]:
    """Return names and values as separate words of a command line."""
    return [word for option in options.items() for word in option if word]


def sglang_arguments(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    # With data-parallel attention SGLang divides ranks, requests and chunks by the number of copies.
    stages, copies = len(layout.layers), layout.data_parallel
    options = {"--model-path": serving.model}
    if serving.served_name:
        options["--served-model-name"] = serving.served_name
    if layout.tensor_parallel * copies > 1:
        options["--tp-size"] = str(layout.tensor_parallel * copies)
    if copies > 1:
        options |= {"--dp-size": str(copies), "--ep-size": str(layout.tensor_parallel * copies)}
        options["--enable-dp-attention"] = ""
    if stages > 1:
        options["--pp-size"] = str(stages)
    if len(layout.servers) > 1:
        options |= {"--nnodes": str(len(layout.servers)), "--node-rank": str(number)}
    if layout.meets:  # without an address, copies take the ports next to the HTTP port
        options["--dist-init-addr"] = joined(meeting.host, meeting.port)
    options["--max-running-requests"] = str(layout.seats * copies)
    if stages > 1 and layout.micro_batch:
        options["--pp-max-micro-batch-size"] = str(layout.micro_batch)
    if layout.chunk_tokens:
        options["--chunked-prefill-size"] = str(layout.chunk_tokens * copies)
    if (dtype := serving.dtype_of(layout.dtype)) != "auto":
        options["--dtype"] = dtype
    if kv_dtype := kv_dtype_of(layout, serving):
        options[KV_DTYPE] = {"fp8": "fp8_e4m3"}.get(kv_dtype, kv_dtype)
    if backend := _attention_backend(layout, serving):
        options["--attention-backend"] = backend
    if serving.limits_kv:
        if layout.utilisation is not None and serving.device == "cuda":
            options["--mem-fraction-static"] = f"{layout.utilisation:g}"
        if layout.fixes_kv:  # otherwise SGLang finds its own
            options["--max-total-tokens"] = str(layout.kv_tokens)
        if layout.context_tokens is not None:
            options["--context-length"] = str(layout.context_tokens)
    if layout.draft_tokens:
        options |= {"--speculative-algorithm": "EAGLE", "--speculative-eagle-topk": "1"}
        options["--speculative-num-steps"] = str(layout.draft_tokens)
        options["--speculative-num-draft-tokens"] = str(layout.draft_tokens + 1)
    if layout.role is not Role.UNIFIED:
        options |= {"--disaggregation-mode": layout.role.value, "--disaggregation-transfer-backend": "nixl"}
    if layout.role is Role.PREFILL:
        options["--disaggregation-bootstrap-port"] = str(meeting.kv_port)
    users = names_of(own := without_kv_dtype(serving.options))
    words = [word for name, value in options.items() if name not in users for word in (name, value) if word]
    return (*serving.program, *words, "--enable-metrics", *own)


def program_of(engine: Engine) -> tuple[str, ...]:
    """Return the default command that starts the engine."""
    return ("sglang", "serve") if engine is Engine.SGLANG else SERVE


def arguments_of(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    command_line = sglang_arguments if layout.engine is Engine.SGLANG else vllm_arguments
    return command_line(layout, serving, number, meeting)


def variables_of(layout: Layout) -> dict[str, str]:
    """Return the environment variables of every process of the engine.

    They assign layers to the engine's stages and, where vLLM's NIXL connector transfers states, lay those out as it
    requires (`is_conv_state_dim_first` in nixl/base_worker.py).
    """
    is_sglang, found = layout.engine is Engine.SGLANG, dict[str, str]()
    if len(layout.layers) > 1:
        variable = "SGLANG_PP_LAYER_PARTITION" if is_sglang else "VLLM_PP_LAYER_PARTITION"
        found[variable] = ",".join(map(str, layout.layers))
    if layout.has_states and layout.role is not Role.UNIFIED and not is_sglang:
        found["VLLM_SSM_CONV_STATE_LAYOUT"] = "DS"
    return found
