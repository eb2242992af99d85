"""Whether a model fits, on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from hetis.engines.memory import GIB
from hetis.formats.models.dtypes import precision_of
from hetis.planner.report.figures import plural, tokens
from hetis.planner.report.tables import as_group, bullets, facts, section, table, table_of
from hetis.planner.use_cases.fits import EngineChoice, Fit, version_of
from hetis.solver.model import ModelSpec


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _engine(choice: EngineChoice) -> str:
    return f"{choice.engine.program} {version_of(choice)}"


def _shape(one: Fit) -> str:
    stages = f", {one.start.stages} stages" if one.start.stages > 1 else ""
    return f"{one.num_gpus} {one.gpu}" + (f", TP {one.start.tp}{stages}" if one.num_gpus > 1 else "")


@as_group
def one_fit(model: ModelSpec, choice: EngineChoice, one: Fit) -> Iterator[RenderableType]:
    """Yield the answer, where the memory goes, what requests it holds, and the engine's options."""
    answer = ("fits", "bold green") if one.starts else ("does not fit", "bold red")
    limit = (
        f", with contexts of up to {one.longest_context:,} tokens" if one.longest_context < one.context_tokens else ""
    )
    yield Text.assemble(f"{model.name} on {_shape(one)}: ", answer, limit if one.starts else "")
    start = one.start
    share = start.rules.share_of(start, one.room.reported_bytes)
    settings = f"{_engine(choice)}, {share:.0%} of the memory"
    if not start.rules.is_sglang:
        settings += f", up to {start.max_num_seqs:,} requests and {start.batched_tokens:,} tokens per iteration"
    yield facts([("precision", precision_of(model)), ("started with", settings + (", eager" if start.eager else ""))])
    room = one.room
    parts = [
        ("beyond the engine's share", room.kept_bytes),
        ("weights as loaded", room.weight_bytes),
        ("contexts, workspaces", room.fixed_bytes),
        ("captured graphs", room.graph_bytes),
        ("largest batch, sampling", room.batch_bytes),
        ("KV", room.kv_bytes),
    ]
    rows = [(name, _gib(size)) for name, size in parts if size] + [("reported", _gib(room.reported_bytes))]
    yield section("GiB of each GPU", table("'", "GiB", rows=rows))
    if not one.starts:
        yield section("Why not", bullets([one.why_not]))
        if one.helps:
            yield section("What would help", bullets(one.helps))
        return
    held = [(f"{context:,}", f"{count:,}" if count else "none") for context, count in one.requests.items()]
    yield section(
        f"KV: {one.kv_tokens:,} tokens, the longest request {one.longest_context:,}",
        table("context", "requests", rows=held),
    )
    if one.options:
        yield section("Engine options", Text(" ".join(one.options)))


@as_group
def fits_table(model: ModelSpec, choice: EngineChoice, found: Sequence[Fit], *, wide: bool) -> Iterator[RenderableType]:
    """Yield a row for each GPU type."""
    yield Text(f"{model.name}, {precision_of(model)}, {_engine(choice)}, started without options of the batch")
    yield table_of(
        found,
        ("'GPUs", _shape),
        ("'fits", lambda one: Text("yes", style="green") if one.starts else Text("no", style="red")),
        ("weights", lambda one: _gib(one.room.weight_bytes)),
        ("KV GiB", lambda one: _gib(one.room.kv_bytes)),
        ("KV tokens", lambda one: tokens(one.kv_tokens)),
        ("longest", lambda one: tokens(one.longest_context)),
        ("'why not", lambda one: one.why_not) if wide else None,
    )
    if not any(one.starts for one in found):
        yield Text(f"no replica of up to {plural(max((one.num_gpus for one in found), default=0), 'GPU')} starts")
