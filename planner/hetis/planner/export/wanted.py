"""The options of an export, checked before any file is made, both for the command line and for programs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from hetis.engines.kubernetes import NAMESPACE
from hetis.engines.layout import DTYPE_BYTES, planned_model
from hetis.engines.serving import DECIDED, names_of
from hetis.engines.versions import Engine
from hetis.formats import catalogue
from hetis.formats.endpoints import is_host
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.planner.export.names import Device, Target
from hetis.planner.export.replicas import Settings, weights_used
from hetis.planner.export.targets import ENGINES, Export, export_plan
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan

_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")
_MAX_PORT = 60_000  # below the ephemeral ports of operating systems


def export_wanted(
    plan: Plan,
    target: Target,
    *,
    file: str = "export",
    spelled: Callable[[str], str] = str,
    more_wrong: Sequence[str] = (),
    engine: Engine | None = None,
    engine_options: Sequence[str] = (),
    model: str = "",
    served_name: str = "",
    dtype: str = "auto",
    program: str = "",
    device: Device = Device.CUDA,
    hosts: Mapping[str, str] | None = None,
    port: int = 8000,
    name: str = "hetis",
    namespace: str = "",
    image: str = "",
    worker_image: str = "",
    model_claim: str = "",
    api_key_secret: str = "",
    worker_key_secret: str = "",
    insecure: bool = False,
) -> Export:
    """Return the plan as the files of a target with these options.

    Args:
        file: of the plan, for messages.
        spelled: returns an option's spelling in the caller's interface.
        more_wrong: the caller's own errors, reported together with those found here.

    Raises:
        DocumentError: options that cannot be met, all of them at once, or a plan without its model.
        NotExportableError: no replica can be launched on the target.
    """
    hosts = hosts or {}
    wrong = [*more_wrong, *_wrong_hosts(hosts, spelled), *_wrong_options(engine_options)]
    allowed = ENGINES.get(target, tuple(Engine))
    if engine is not None and engine not in allowed:
        runs = " or ".join(one.value for one in allowed)
        wrong.append(f"{spelled('engine')} is {engine.value}: {spelled('to')} {target.value} runs {runs}")
    if dtype not in DTYPE_BYTES:
        wrong.append(f"{spelled('dtype')} is {dtype!r}, must be one of {', '.join(DTYPE_BYTES)}")
    if not _NAME.fullmatch(name):
        wrong.append(f"{spelled('name')} is {name!r}, must be 1 to 30 small letters, digits and -, a letter first")
    if namespace and not NAMESPACE.fullmatch(namespace):
        wrong.append(f"{spelled('namespace')} is {namespace!r}, must be 1 to 63 small letters, digits and -")
    if not 1 <= port <= _MAX_PORT:
        wrong.append(f"{spelled('port')} is {port}, must be from 1 to {_MAX_PORT}")
    if device is Device.CPU and target not in (Target.VLLM, Target.HETIS_LAUNCH):
        wrong.append(f"{spelled('device')} is cpu: {spelled('to')} {target.value} is for GPUs")
    try:
        words = tuple(shlex.split(program))
    except ValueError as error:
        wrong.append(f"{spelled('program')} is {program!r}: {error}")
    if wrong:
        raise DocumentError(Problem(file="export", message=message) for message in wrong)
    shape = planned_model(plan)
    if shape is None:
        raise single_problem(file, "inputs.documents.model is missing: the layout follows from it")
    has_one = len(weights_used(plan, shape)) == 1
    settings = Settings(
        model=model or _checkpoint(plan, shape),
        served_name=served_name or ("" if has_one else shape.name),  # clients know no precisions
        engine=engine or (allowed[0] if len(allowed) == 1 else None),
        program=words,
        device=device.value,
        options=tuple(engine_options),
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
    return export_plan(plan, shape, target, settings)


def _checkpoint(plan: Plan, shape: ModelSpec) -> str:
    """Return the checkpoint that engines load: the Hugging Face id that the plan was asked for, or the model's name."""
    asked = str((plan.inputs.get("origins") or {}).get("model", ""))
    try:
        known = catalogue.find_model(asked).model.name
    except catalogue.UnknownNameError:
        return shape.name
    return asked if _HF_ID.fullmatch(asked) and known == shape.name else shape.name


def _wrong_hosts(hosts: Mapping[str, str], spelled: Callable[[str], str]) -> list[str]:
    """Return errors about invalid addresses, each shown as on the command line."""
    given = {f"{node}={host}" if node else host: node and is_host(host) for node, host in hosts.items()}
    must = "must be NODE=HOST, such as gpu2=10.0.0.2"
    return [f"{spelled('node_address')} is {text!r}, {must}" for text, is_right in given.items() if not is_right]


def _wrong_options(options: Sequence[str]) -> list[str]:
    decided = sorted(names_of(options) & DECIDED)
    wrong = [f"{option} is no option to give the engine: the plan decides it" for option in decided]
    if options and not options[0].startswith("-"):
        wrong.append(f"{options[0]!r} is no option of the engine, which begin with -")
    return wrong
