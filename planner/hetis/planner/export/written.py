"""The files that a target makes of a plan, and their README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hetis.engines.layout import Layout
from hetis.engines.versions import RECORDED
from hetis.formats.errors import single_problem
from hetis.formats.files import write_atomically
from hetis.planner.export.replicas import Launchable, weights_used
from hetis.planner.export.routing import shares_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of a target.

    Attributes:
        files: text by path; a path that ends in ``.sh`` is a program.
        shown: the essential files, for standard output.
        endpoints: of each replica, by its position in the plan.
        start: instructions in Markdown.
        not_carried: features of the plan that the target lacks.
        left_out: why it cannot have a replica, by its position in the plan.
    """

    files: Mapping[str, str]
    shown: tuple[str, ...]
    endpoints: Mapping[int, str]
    start: str
    not_carried: tuple[str, ...] = ()
    left_out: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def readme_of(target: str, launchable: Launchable, written: Written) -> str:
    """Return a README: what was exported, how it is started, and what is not carried."""
    recorded, shares = RECORDED[launchable.engine], shares_of(launchable)
    rows = []
    for number, one in launchable.replicas.items():
        layers = "+".join(map(str, one.layout.layers))
        gpus = "; ".join(_gpus(p.node, p.gpus) for p in one.layout.processes)
        rows.append(
            f"| {one.name} | {one.plan.role.value} | {layers} | {_ranks(one.layout)} | {gpus} "
            f"| {written.endpoints[number]} | {shares[number]:.1%} |"
        )
    lost = [*launchable.changes, *launchable.reasons(), *written.not_carried]
    planned, left = launchable.plan.served_rate(), launchable.rate()
    return "\n".join(
        (
            f"# A plan of hetis for {target}",
            "",
            f"{launchable.model.name} by {launchable.engine.value}, whose options are those of version "
            f"{recorded.version}. The plan serves {planned:.3g} requests/s saturated, what is exported "
            f"{left:.3g}.{_precision(launchable)}",
            "",
            "| replica | role | layers by stage | tensor parallel | GPUs | reached at | share |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "## Start",
            "",
            written.start,
            "",
            "## Not carried",
            "",
            *([f"- {line}" for line in lost] or ["Everything of the plan is here."]),
            "",
            "## Routing",
            "",
            "`router/weights.json` has the share of the requests that each replica should get"
            + (
                ", and the pairs that a request prefills and decodes in; other lists hold the replicas that do both."
                if launchable.has_roles
                else "; nginx, Envoy and LiteLLM take the lists beside it."
            ),
            "",
        )
    )


def _precision(launchable: Launchable) -> str:
    """Return the required precision of the checkpoints, if it differs from the usual one."""
    used = weights_used(launchable.plan, launchable.model)
    if used == ["bf16"]:
        return ""
    if len(used) == 1:
        return f" The plan counts on weights in {used[0]}: give a checkpoint that is kept so."
    models = dict.fromkeys(one.serving.model for one in launchable.replicas.values())
    return f" The plan counts on weights in {' and '.join(used)}: {', '.join(models)} must be kept so."


def _ranks(layout: Layout) -> str:
    """Return the tensor-parallel ranks, and the copies that share their experts."""
    copies = layout.data_parallel
    return str(layout.tensor_parallel) if copies == 1 else f"{layout.tensor_parallel} × {copies} data-parallel"


def _gpus(node: str, gpus: tuple[int, ...]) -> str:
    return f"{node}/{','.join(map(str, gpus))}"


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write every file atomically, and make scripts executable.

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


def folder_refusals(folder: Path, *, force: bool) -> list[str]:
    """Return why files cannot be written to the folder; empty if they can."""
    try:
        if folder.exists() and not folder.is_dir():
            return [f"{folder} is no folder"]
        if not force and folder.is_dir() and any(folder.iterdir()):
            return [f"{folder} is not empty: name another, or force it"]
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    return []
