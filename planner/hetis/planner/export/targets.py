"""The export targets by name, and complete exports, whose options are checked before any file is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hetis.engines.layout import Layout
from hetis.engines.planned import planned_model
from hetis.engines.versions import VERSIONS, Engine
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import write_atomically
from hetis.planner.export import IN_KUBERNETES, ExportTarget
from hetis.planner.export.equals import with_equals_merged
from hetis.planner.export.hosts import why_no_job, write_compose, write_hetis_launch, write_shell, write_slurm
from hetis.planner.export.kubernetes import why_no_group, why_no_pods, write_kubernetes, write_lws
from hetis.planner.export.llm_d import of_one_pool, write_llm_d
from hetis.planner.export.options import MODEL, unknown_addresses, wrong_name, wrong_settings
from hetis.planner.export.ray_serve import why_not_on_ray, write_ray
from hetis.planner.export.replicas import (
    WEIGHTS,
    Launchable,
    LaunchableReplica,
    NotExportableError,
    Written,
    launchable,
    weights_used,
    without_single,
)
from hetis.planner.export.routing import routing_files, shares_of
from hetis.planner.export.settings import ExportSettings
from hetis.planner.export.stacks import why_not_on_dynamo, write_dynamo, write_kserve
from hetis.planner.use_cases.record.parts import Classes, MadeFrom, Requested, Surviving
from hetis.planner.use_cases.request import EngineName
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    files: Mapping[str, str]  # contents by path
    shown: tuple[str, ...]  # the essential files, for standard output
    lost: tuple[str, ...]  # sentences, one for each feature of the plan that the target lacks
    planned: float
    rate: float  # saturated requests/s of the exported replicas, out of ``planned``
    left: tuple[str, ...] = ()  # files like ``shown`` in the folder that are not of this export: of a former plan


class _Target(NamedTuple):
    """How plans are exported to a target.

    Attributes:
        write: returns the files. Raises DocumentError with every missing option.
        why_not: returns why the target cannot run a replica; empty: it can.
        narrowed: returns what it serves of the replicas that it can run. Raises NotExportableError if that is nothing.
        engines: those that it can start.
    """

    write: Callable[[Launchable], Written]
    why_not: Callable[[Launchable, LaunchableReplica], Iterable[str]] = lambda _, __: ()
    narrowed: Callable[[Launchable], Launchable] = lambda launchable: launchable
    engines: tuple[Engine, ...] = tuple(Engine)


_TARGETS: Mapping[ExportTarget, _Target] = {
    ExportTarget.VLLM: _Target(write_shell, engines=(Engine.VLLM_HETIS, Engine.VLLM)),
    ExportTarget.SGLANG: _Target(write_shell, engines=(Engine.SGLANG,)),
    ExportTarget.COMPOSE: _Target(write_compose),
    ExportTarget.KUBERNETES: _Target(write_kubernetes, why_no_pods),
    ExportTarget.LWS: _Target(write_lws, why_no_pods),
    ExportTarget.LLM_D: _Target(write_llm_d, why_no_pods, of_one_pool),
    ExportTarget.KSERVE: _Target(write_kserve, why_no_group, without_single),
    ExportTarget.DYNAMO: _Target(write_dynamo, why_not_on_dynamo),
    ExportTarget.RAY: _Target(write_ray, why_not_on_ray, without_single),
    ExportTarget.SLURM: _Target(write_slurm, why_no_job),
    ExportTarget.HETIS_LAUNCH: _Target(write_hetis_launch),
}
# Targets that run only some engines; all others run any engine.
ENGINES: Mapping[ExportTarget, tuple[Engine, ...]] = {
    name: target.engines for name, target in _TARGETS.items() if target.engines != tuple(Engine)
}
# Targets with a router of their own that does not know the lengths of prompts; others have LiteLLM's, or llm-d's.
_KNOW_NO_LENGTHS = (ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.KSERVE, ExportTarget.DYNAMO)
_ENGINES_SERVE_HTTP = frozenset(ExportTarget) - {ExportTarget.DYNAMO, ExportTarget.RAY}


def not_carried_by_target(
    plan: Plan, model: ModelSpec, engine: EngineName | None = None
) -> dict[ExportTarget, tuple[str, ...]]:
    """Return for each target why it does not serve all of a plan's traffic, a sentence each; empty: it does.

    Images, keys and names count as given. Addresses of nodes are unknown; the order of Ray's stages depends on them.
    ``engine`` is that of the replicas; None: the one that exports choose.
    """

    @cache
    def launched(engine: EngineName | None) -> Launchable:  # targets of the same engine start the same processes
        return launchable(plan, model, ExportSettings(model=f"model-{WEIGHTS}", engine=engine))

    def reasons(target: ExportTarget) -> tuple[str, ...]:
        own = engine or _engine_of(plan, target)
        if own is not None and own not in _TARGETS[target].engines:
            return (f"it does not run {own}",)
        try:
            return tuple(_carried(launched(own), target).reasons())
        except NotExportableError as error:
            return error.reasons

    return {target: reasons(target) for target in ExportTarget}


def _carried(found: Launchable, target: ExportTarget) -> Launchable:
    """Return what a target runs. Raises NotExportableError if that is nothing, or a plan with classes of requests is
    for another router than the target has.
    """
    if found.plan.classes and target in _KNOW_NO_LENGTHS:
        why = "its router does not know the lengths of prompts, by which this plan divides requests"
        plain = f"the same hetis-plan place with --classes none --for {target} makes a plan that it carries"
        if kept := Classes.of(found.plan).kept:
            verb = "keeps" if Surviving.of(found.plan).bound_rps is None else "leaves after a loss"
            plain += (
                f"; without classes it {verb} {kept[0].without_rps:.4g} requests/s, with them {kept[0].with_rps:.4g}"
            )
        raise NotExportableError((why, plain))
    return _TARGETS[target].narrowed(found.without_impossible(_TARGETS[target].why_not))


def _engine_of(plan: Plan, target: ExportTarget) -> EngineName | None:
    """Return the engine to export a plan for if none is chosen: SGLang where it was planned for, or runs alone."""
    engines, planned = _TARGETS[target].engines, Requested.of(plan).engine
    is_for_sglang = planned is not None and planned.name == Engine.SGLANG
    return "sglang" if engines == (Engine.SGLANG,) or (is_for_sglang and Engine.SGLANG in engines) else None


def export_plan(plan: Plan, model: ModelSpec, target: ExportTarget, settings: ExportSettings) -> Export:
    """Return a plan as the files of a target. Raises NotExportableError if no replica can be launched there, and
    DocumentError if the target needs options that are missing.
    """
    try:
        found = _carried(launchable(plan, model, settings), target)
    except NotExportableError as error:
        raise NotExportableError((*error.reasons, *_elsewhere(plan, model, settings.engine))) from None
    if target in IN_KUBERNETES:
        found = with_equals_merged(found)
    written = _TARGETS[target].write(found)
    left_out = tuple(found.reasons())
    if left_out:
        left_out += tuple(_elsewhere(plan, model, settings.engine))
    lists = routing_files(found, written.endpoints, written.routers, listed=written.listed)
    has_tls = any(one.serving.has_tls for one in found.replicas.values() if one.plan.role is Role.UNIFIED)
    if target in _ENGINES_SERVE_HTTP and has_tls:
        why = "router/: its lists connect by HTTP, the engines serve HTTPS"
        written = replace(written, not_carried=(*written.not_carried, why))
    lost = (*found.changes, *left_out, *written.not_carried)
    files = {"README.md": readme_of(target.value, found, written, lost), **written.files, **lists}
    return Export(files=files, shown=written.shown, lost=lost, planned=plan.served_rate(), rate=found.rate())


def _elsewhere(plan: Plan, model: ModelSpec, engine: EngineName | None) -> Iterator[str]:
    """Yield a sentence that names the targets which carry all of a plan, if any does."""
    reasons = not_carried_by_target(plan, model, engine)
    names = [target.value for target, why in reasons.items() if not why]
    if names:
        yield f"all of it is carried with --to {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def export_wanted(
    plan: Plan,
    target: ExportTarget,
    settings: ExportSettings,
    *,
    file: str = "export",
    spelled: Callable[[str], str] = str,
    more_wrong: Sequence[str] = (),
) -> Export:
    """Check the settings, complete them from the plan, and return the plan as the files of a target.

    Args:
        file: the plan's file name, for messages.
        spelled: returns the spelling of an option in the caller's interface.
        more_wrong: the caller's own errors, reported together with those found here.

    Raises:
        DocumentError: options that cannot be met, all of them at once, or a plan without its model.
        NotExportableError: no replica can be launched on the target.
    """
    allowed = _TARGETS[target].engines
    wrong = [
        *more_wrong,
        *wrong_settings(settings, target, allowed, spelled),
        *unknown_addresses(settings, target, plan, spelled),
    ]
    if wrong:
        raise DocumentError(Problem(file="export", message=message) for message in wrong)
    shape = planned_model(plan)
    if shape is None:
        raise single_problem(file, "inputs.documents.model is missing: the layout depends on it")
    # The file may be anyone's, and engines would read such a name as one of their options. They get it as that of the
    # checkpoint, unless another is given, and of what they serve.
    if not settings.model or shape.name.startswith("-"):
        for why in wrong_name(shape.name, "inputs.documents.model.name", MODEL):
            raise single_problem(file, why)
    has_one = len(weights_used(plan, shape)) == 1
    settings = replace(
        settings,
        model=settings.model or MadeFrom.of(plan).checkpoint_of(shape.name),
        served_name=settings.served_name or ("" if has_one else shape.name),  # clients do not know precisions
        engine=settings.engine or _engine_of(plan, target),
    )
    return export_plan(plan, shape, target, settings)


def _rate(rate_rps: float) -> str:
    return f"{rate_rps:,.0f}" if rate_rps >= 1000 else f"{rate_rps:.3g}"


# --- files


def write_export(folder: Path, made: Export) -> Export:
    """Write every file atomically, make scripts executable, and return the export with what is `left` in the folder.

    Raises:
        DocumentError: a file cannot be written.
    """
    for path, text in made.files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise single_problem(str(target.parent), f"cannot be created: {error.strerror}") from None
        write_atomically(target, text)
        if path.endswith(".sh"):
            target.chmod(target.stat().st_mode | 0o111)
    written = set(map(Path, made.files))
    found = (path.relative_to(folder) for pattern in ("*", "*/*") for path in folder.glob(pattern))
    kinds = {Path(path).suffix for path in made.shown}
    left = sorted(str(path) for path in found if path.suffix in kinds and path not in written)
    return replace(made, left=tuple(left))


def folder_refusals(folder: Path, *, force: bool, option: str = "--force") -> list[str]:
    """Return the reasons why the files cannot be written to the folder; empty if they can."""
    try:
        if folder.exists() and not folder.is_dir():
            return [f"{folder} is not a folder"]
        if not force and folder.is_dir() and any(folder.iterdir()):
            return [f"{folder} is not empty: choose another, or use {option}"]
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    return []


# --- README


def readme_of(target: str, launchable: Launchable, written: Written, lost: Sequence[str]) -> str:
    """Return a README: what was exported, how to start it, and which features are missing."""
    shares = shares_of(launchable)
    rows = "\n".join(
        f"| {', '.join(each.name for each in same)} | {one.plan.role.value} | {'+'.join(map(str, one.layout.layers))} "
        f"| {_ranks(one.layout)} | {'; '.join(_gpus(each.layout) for each in same)} | {written.endpoints[number]} "
        f"| {shares[number]:.1%} |"
        for number, one in launchable.replicas.items()
        for same in [(one, *one.equals)]
    )
    planned, left = launchable.plan.served_rate(), launchable.rate()
    lists = _LISTS if not launchable.plan.classes else _LISTS_OF_CLASSES
    lists = lists if written.listed else ", which the target's own router uses."
    missing = "\n".join(f"- {line}" for line in lost) or "The export contains everything in the plan."
    return f"""\
# A plan of hetis for {target}

{launchable.model.name} by {launchable.engine.value}, whose options are those of version \
{VERSIONS[launchable.engine]}. The plan serves {_rate(planned)} requests/s saturated, what is exported \
{_rate(left)}.{_precision(launchable)}

| replica | role | layers by stage | tensor parallel | GPUs | reached at | share |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

## Start

{written.start}

## Not carried

{missing}

## Routing

`router/weights.json` has the share of the requests that each replica should get{lists}
"""


_LISTS = """; nginx, Envoy and LiteLLM take the lists beside it, which send whole requests to replicas and, where
prefill and decode are apart, to what pairs them."""
_LISTS_OF_CLASSES = """. LiteLLM with `router/litellm.yaml` takes the requests, and sends each by
the length of its prompt to a port of nginx with `router/nginx.conf`, on the same machine, which divides them."""


def _gpus(layout: Layout) -> str:
    """Return the engine's GPUs by process, then those of attention workers by node; a GPU may serve several ranks."""
    shown = [*dict.fromkeys(_on_node(process.node, process.gpus) for process in layout.servers)]
    by_node = dict[str, set[int]]()
    for worker in layout.attention_workers:
        by_node.setdefault(worker.node, set()).update(worker.gpus)
    workers = [_on_node(node, sorted(gpus)) for node, gpus in by_node.items()]
    return "; ".join(shown) + (f"; attention workers: {'; '.join(workers)}" if workers else "")


def _on_node(node: str, gpus: Iterable[int]) -> str:
    return f"{node}/{','.join(map(str, gpus))}"


def _precision(launchable: Launchable) -> str:
    """Return a sentence with the precision that checkpoints must have, or an empty string for the usual one."""
    used = weights_used(launchable.plan, launchable.model)
    if used == ["bf16"]:
        return ""
    if len(used) == 1:
        return f" The plan needs weights in {used[0]}: use such a checkpoint."
    models = dict.fromkeys(one.serving.model for one in launchable.replicas.values())
    return f" The plan needs weights in {' and '.join(used)}: {', '.join(models)} must be stored like this."


def _ranks(layout: Layout) -> str:
    """Return the number of tensor-parallel ranks, and of copies that share their experts if there are several."""
    copies = layout.data_parallel
    return str(layout.tensor_parallel) if copies == 1 else f"{layout.tensor_parallel} × {copies} data-parallel"
